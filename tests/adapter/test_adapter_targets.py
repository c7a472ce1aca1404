"""Which modules an adapter_config.json names: as PEFT itself decides it, in bounded time, in any thread."""

from __future__ import annotations

import doctest
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.adapters import lora_tensors, write_adapter

from loftq_cli.adapter.config import values_of
from loftq_cli.adapter.source import open_adapter
from loftq_cli.adapter.targets import TargetModules
from loftq_cli.checkpoint import patterns
from loftq_cli.checkpoint.patterns import first_matches
from loftq_cli.errors import InputError
from loftq_cli.merging.form import MergeOptions
from loftq_cli.merging.plan import prepare_merge

ROOT = Path(__file__).parent.parent.parent

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.12.mlp.experts.0.down_proj",
    "model.visual.blocks.1.attn.qkv",
    "layers.1.self_attn.q_proj",
    "h.1.attn.c_attn",
    "transformer.h.1.attn.c_attn",
    "model.embed_tokens",
    "lm_head",
    "q_proj",
    "my_q_proj",
    "q_proj.1",
]
CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["self_attn.q_proj", "lm_head", "attn"]},
    {"target_modules": ["proj", "1"]},
    {"target_modules": r".*\.q_proj"},
    {"target_modules": r"model\.(?!visual).*(?:proj|qkv)|lm_head"},
    {"target_modules": r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)"},
    {"target_modules": ["q_proj", "c_attn"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "c_attn"], "exclude_modules": r"model\.layers\.[0-9]+\..*"},
    {"target_modules": ["q_proj", "c_attn", "qkv", "down_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "c_attn", "qkv", "down_proj"], "layers_to_transform": [0, 12]},
    {"target_modules": ["q_proj", "c_attn", "qkv"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "c_attn", "qkv"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "c_attn", "qkv"], "layers_to_transform": [1], "layers_pattern": ["h", "blocks"]},
    {"target_modules": ["q_proj", "c_attn", "qkv"], "layers_to_transform": [1], "layers_pattern": ["b.*s"]},
    {"target_modules": ["down_proj"], "layers_to_transform": [0], "layers_pattern": ["experts", "layers"]},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_modules_are_those_that_peft_chooses(config: dict[str, Any]) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = LoraConfig(**config)

    expected = {module for module in MODULES if check_target_module_exists(theirs, module)}

    assert TargetModules.of(config).select(MODULES) == expected


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_where_peft_chooses_by_the_model_every_module_is_taken(targets: str | None) -> None:
    assert TargetModules.of({"target_modules": targets}).select(MODULES) == set(MODULES)


def test_patterns_are_matched_at_the_end_of_a_name_and_the_first_wins() -> None:
    config = {"r": 8, "rank_pattern": {r"layers\.0\..*": 4, "q_proj": 2, "lm_head|embed_tokens": 6}}

    ranks = values_of(config, "r", MODULES)

    assert ranks["model.layers.0.self_attn.q_proj"] == 4
    assert (ranks["q_proj"], ranks["layers.1.self_attn.q_proj"], ranks["my_q_proj"]) == (2, 2, 8)
    assert (ranks["lm_head"], ranks["model.embed_tokens"]) == (6, 6)


# Expressions of published adapters and of trainers, then the syntax that they could use.
EXPRESSIONS = [
    r".*\.(q|k|v|o)_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)",
    r"^(?!.*(?:visual|lm_head)).*(?:proj|qkv|c_attn)$",
    r"model\.layers\.(?:[0-9]|1[0-2])\.self_attn\.[qv]_proj",
    r"(?<=layers\.)\d+|.*(?<!my_)q_proj",
    r"(?i)MODEL\..*PROJ",
    r"(?s).*|(?:)",
    r"(?i:Q_Proj)|(?im-s:LM_HEAD)",
    r"(?a)\w+|h\.\d{1,2}\.attn\.\w+",
    r"\w+(?:\.\w+)*+",
    r"(?P<kind>[a-z]+)_\w+|(?>layers?)\.\d.*",
    r"(\w)_\1*.*",
    r"[^.\W]+\.?\S*\Z",
    r"\A[-\w.]{3,9}$",
    "größe|(?i)x",
    "größe\\.[^.]+",
]
NAMES = [*MODULES, "größe.Σ_proj", "modèle.layers.٣.q", "GRÖSSE", "a\nb", "q_proj\n", "ſ", "K"]
SECOND = 1.0


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("whole", [True, False])
def test_an_expression_matches_what_it_matches_in_peft(expression: str, whole: bool) -> None:
    try:
        compiled = re.compile(expression)
    except re.error:
        with pytest.raises(ValueError, match=r"no regular expression$"):
            first_matches({expression: expression}, NAMES, whole=whole)
        return

    expected = {name for name in NAMES if (compiled.fullmatch(name) if whole else compiled.match(name))}

    assert set(first_matches({expression: expression}, NAMES, whole=whole)) == expected


FRAGMENTS = [
    *("q_proj", "model", "layers", "σ", "Σ", "k", "K", "s", "é", ".", r"\n", "ss", "ß", "1"),
    *(".*", r"\.", "(?:", "(", ")", "|", "[qkv]", "[^.]+", r"\d+", r"\w*", r"\b", "^", "$", "?", "*", "+"),
    *("(?!visual)", "(?=model)", r"(?<=layers\.)", r"(?<!12\.)", "(?>", "*+", "?+", "*?", "{1,3}", "{2}", "{2,}"),
    *("(?i)", "(?i:", "(?s)", "(?m)", "(?a)", "(?u)", "(?-i:", "(?P<x>", r"\1", r"\Z", r"\A", r"\S", r"\W", r"\D"),
    *("[a-z]", "[A-Z]", r"[\w.]", r"[^\W\d]", "[k]", "[s-t]"),
]


@given(st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=7).map("".join))
@settings(max_examples=400, deadline=None)
def test_whatever_is_read_is_read_as_python_reads_it(expression: str) -> None:
    try:
        compiled = re.compile(expression)
    except (re.error, ValueError):  # ValueError: flags that contradict each other
        with pytest.raises(ValueError, match="no regular expression"):
            first_matches({expression: expression}, NAMES)
        return
    expected = {name for name in NAMES if compiled.match(name)}
    try:
        assert set(first_matches({expression: expression}, NAMES)) == expected
    except ValueError as error:
        assert str(error).endswith("takes too long to match")


@pytest.mark.parametrize(
    "expression",
    [
        "(?:abc){e<=3}",  # `regex`: up to three errors
        r"[[:alpha:]]+_proj",  # `regex`: letters
        "(?x)a{1 000}",  # `regex`: a thousand
        r"\p{L}+",
        "(?R)?",
        r"\m\w+",
        r"\L<names>",
        "a{,3}",
        "[\0-\U0010ffff]",
        "(?V1)[a--b]",
        "(?r)a",
    ],
)
def test_syntax_that_python_lacks_or_reads_otherwise_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=r"^the key '.*', no regular expression in the syntax that is read here$"):
        first_matches({expression: expression}, ["a"])


BOMBS = [
    *("(a+)+$", "(.*)*x", "(.*.*)*x", "(a|aa)+$", "(a|a)*b", "(?i)[\0-\U0010ffff]" * 600, "(.*)" * 40 + "x"),
    *("(a?)" * 2000, "(?:(a)|(b))*" * 800 + "x", "(?=.*a)" * 1400 + "x", "(a*)\\1*" * 600 + "x"),
    *(
        "(?:a{1000}){1000}",
        "(?:(?:a{1000}){1000}){1000}",
        "a{9999}" * 1400,
        "a{4294967295}",
        "(?:" * 300 + "a" + "){9}" * 300,
    ),
    *("(" * 4900 + "a" + ")" * 4900, "(?i)[!-~]" + "[!-~]" * 1900, "(?:" * 1900 + "a" + ")*" * 1900),
]


def answer(bomb: str, name: str) -> str | None:
    """The key that matches, or the message of the refusal."""
    try:
        return first_matches({bomb: bomb}, [name], whole=True).get(name)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb[:20])
def test_a_hostile_expression_is_answered_or_refused_within_a_second(bomb: str) -> None:
    began = time.thread_time()

    said = answer(bomb, "a" * 60 + "!")

    assert time.thread_time() - began < SECOND
    assert said is None or said.startswith("the key '")


def test_hostile_expressions_take_little_memory() -> None:
    code = (
        "import json, sys\n"
        "from loftq_cli.checkpoint.patterns import first_matches\n"
        "for bomb in json.load(sys.stdin):\n"
        "    try: first_matches({bomb: bomb}, ['a' * 60 + '!'], whole=True)\n"
        "    except ValueError: pass\n"
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    )
    command = [sys.executable, "-c", code]

    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, input=json.dumps(BOMBS))

    assert int(run.stdout) < 60_000  # kB, of which Python takes 20,000


@pytest.mark.parametrize(("count", "is_read"), [(10_000, True), (10_001, False)])
def test_an_expression_has_ten_thousand_characters_at_most(count: int, is_read: bool) -> None:
    said = answer("a|" * (count // 2) + "b" * (count % 2), "a")

    assert (said == "a|" * (count // 2)) if is_read else (said or "").endswith(f"of {count} characters"), said


@pytest.mark.parametrize(("count", "is_read"), [(7692, True), (7693, False)])
def test_counts_may_write_out_a_hundred_thousand_characters(count: int, is_read: bool) -> None:
    expression = f"(?:a){{{count}}}b?"  # 13 characters

    said = answer(expression, "a" * count)

    assert said == expression if is_read else "takes too long to match" in (said or "")


def test_any_thread_matches_expressions_in_bounded_time() -> None:
    said: list[str | None] = []

    def match() -> None:
        said.append(answer(r".*layers.0.q_proj|x", "model.layers.0.q_proj"))
        said.append(answer("(a|aa)+$", "a" * 60 + "!"))

    thread = threading.Thread(target=match)
    thread.start()
    thread.join(10)

    assert said == [
        ".*layers.0.q_proj|x",
        "the key '(a|aa)+$', a regular expression that takes too long to match",
    ]


def test_handlers_and_timers_of_others_are_left_alone() -> None:
    code = (
        "import signal\n"
        "def refuse(*arguments): raise AssertionError(arguments)\n"
        "signal.signal = signal.setitimer = refuse\n"
        "from loftq_cli.checkpoint.patterns import first_matches\n"
        "try: first_matches({'(a|aa)+$': '(a|aa)+$'}, ['a' * 60 + '!'])\n"
        "except ValueError: print('refused')"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert (run.stdout, run.stderr) == ("refused\n", "")


def test_the_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(patterns).failed == 0
    assert doctest.testmod(patterns).attempted > 0


Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def base_of(directory: Path) -> Path:
    directory.mkdir()
    weights = {f"{Q}.weight": torch.zeros(32, 64), f"{V}.weight": torch.zeros(32, 64), "norm.weight": torch.ones(64)}
    save_file(weights, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], [Q, V]])
def test_targets_that_the_adapter_holds_nothing_of_are_noted(tmp_path: Path, targets: list[str]) -> None:
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q, (32, 64)), target_modules=targets)

    merge = prepare_merge(base_of(tmp_path / "base"), adapter, tmp_path / "out", MergeOptions())

    assert merge.notes == (
        f"the adapter's target_modules name layers of which it holds nothing, merged as they are: {V}.weight",
    )


@pytest.mark.parametrize("targets", [["q_proj"], [Q], None, "all-linear", r".*(q|v)_proj", ["q_proj", "k_proj"]])
def test_an_adapter_that_holds_all_that_it_names_is_merged_without_a_note(tmp_path: Path, targets: Any) -> None:
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q, (32, 64)), target_modules=targets)

    merge = prepare_merge(base_of(tmp_path / "base"), adapter, tmp_path / "out", MergeOptions())

    assert merge.notes == ()


def test_a_thousand_keys_for_a_thousand_modules_are_matched_at_once(tmp_path: Path) -> None:
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(1000)]
    pattern = {module: 1 + i for i, module in enumerate(modules)}

    ranks = values_of({"r": 8, "rank_pattern": pattern}, "r", modules)

    assert ranks == pattern


def test_the_file_and_the_key_are_named(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q, (32, 64)), rank_pattern={"(.|..)*[XYZ]": 4})

    with pytest.raises(InputError) as caught:
        open_adapter(adapter)

    assert caught.value.file == str(adapter / "adapter_config.json")
    assert caught.value.message == (
        "rank_pattern has the key '(.|..)*[XYZ]', a regular expression that takes too long to match"
    )
