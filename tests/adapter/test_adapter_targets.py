"""Which modules an adapter_config.json names: as PEFT itself decides it, in bounded time, in any thread."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.adapters import lora_tensors, write_adapter

from loftq_cli.adapter.config import values_of
from loftq_cli.adapter.source import open_adapter
from loftq_cli.adapter.targets import TargetModules
from loftq_cli.checkpoint.patterns import first_matches
from loftq_cli.errors import InputError
from loftq_cli.merging.form import MergeOptions
from loftq_cli.merging.plan import prepare_merge

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

    assert TargetModules.of(config).named(MODULES) == expected


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_where_peft_chooses_by_the_model_every_module_is_taken(targets: str | None) -> None:
    assert TargetModules.of({"target_modules": targets}).named(MODULES) == set(MODULES)


def test_patterns_are_matched_at_the_end_of_a_name_and_the_first_wins() -> None:
    config = {"r": 8, "rank_pattern": {r"layers\.0\..*": 4, "q_proj": 2, "lm_head|embed_tokens": 6}}

    ranks = values_of(config, "r", MODULES)

    assert ranks["model.layers.0.self_attn.q_proj"] == 4
    assert (ranks["q_proj"], ranks["layers.1.self_attn.q_proj"], ranks["my_q_proj"]) == (2, 2, 8)
    assert (ranks["lm_head"], ranks["model.embed_tokens"]) == (6, 6)


BOMBS = ["(a+)+$", "(.*)*x", "(.*.*)*x", "(a|aa)+$", "(a|a)*b", "(?i)[\0-\U0010ffff]" * 600, "(.*)" * 40 + "x"]


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_hostile_expression_is_answered_or_refused_within_a_second(bomb: str) -> None:
    began = time.process_time()
    try:
        assert "a" * 60 + "!" not in first_matches({bomb: bomb}, ["a" * 60 + "!"], whole=True)
    except ValueError as error:
        assert str(error).startswith("the key '")
    assert time.process_time() - began < 1.0


def test_another_thread_takes_names_only() -> None:
    said: list[str] = []

    def match() -> None:
        said.append(str(first_matches({"layers.0.q_proj": r".*layers.0.q_proj"}, ["model.layers.0.q_proj"])))
        try:
            first_matches({"(a+)+$": "(a+)+$"}, ["a" * 60 + "!"])
        except ValueError as error:
            said.append(str(error))

    thread = threading.Thread(target=match)
    thread.start()
    thread.join(10)

    assert said[0] == "{'model.layers.0.q_proj': 'layers.0.q_proj'}"
    assert said[1] == "the key '(a+)+$', no plain name, and only the main thread matches expressions"


def test_a_timer_of_others_is_left_alone() -> None:
    import signal

    seen: list[int] = []
    before = signal.signal(signal.SIGVTALRM, lambda number, frame: seen.append(number))
    try:
        first_matches({"(a+)+$": "(a+)+$"}, ["aaa"])
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
        signal.raise_signal(signal.SIGVTALRM)
    finally:
        signal.signal(signal.SIGVTALRM, before)
    assert seen == [signal.SIGVTALRM]


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
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q, (32, 64)), rank_pattern={"(.*.*)*x": 4})

    with pytest.raises(InputError) as caught:
        open_adapter(adapter)

    assert caught.value.file == str(adapter / "adapter_config.json")
    assert caught.value.message == (
        "rank_pattern has the key '(.*.*)*x', a regular expression that takes too long to match"
    )
