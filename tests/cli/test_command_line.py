"""The command line as people and programs meet it: streams, exit statuses, one line for every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models
from support.conversions import files_of, loftq


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return models.llama(tmp_path_factory.mktemp("source") / "model")


FAST = ("--rank", 4, "--iterations", 1)
OPTIONS = {"loftq": FAST, "qlora": ("--rank", 4)}


def test_results_go_to_stdout_and_everything_else_to_stderr(run, source):
    status, out, err = run("quantize", source, "out", *FAST)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["base", "adapter", "error", "model"]
    lines = err.splitlines()
    assert sum(line.startswith("[") for line in lines) == 14
    assert "  rank = 4" in lines
    assert lines[-1].startswith("done, peak memory")
    assert "\x1b" not in out + err


def test_quiet_says_nothing_but_the_result(run, source):
    status, out, err = run("quantize", source, "out", *FAST, "--start", "zero", "-q")
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 4


def test_quiet_says_that_a_base_needs_its_adapter(run, source):
    status, out, err = run("quantize", source, "out", *FAST, "--start", "principal", "-q")
    assert (status, len(out.splitlines()), len(err.splitlines())) == (0, 4, 1)
    assert err.startswith("warning: this base is no model without its adapter: ")


def test_the_adapter_names_its_base_without_a_path_of_the_machine(run, source, tmp_path):
    """PEFT loads the base by the name; a relative path is nobody's secret."""
    for output, is_said in ((tmp_path / "absolute", True), ("relative", False)):
        status, _, err = run("quantize", source, output, *FAST)
        assert status == 0
        note = "note: the adapter's config names the base absolute, without the path of this machine: --base-name"
        assert (note in err) == is_said
        config = json.loads((tmp_path / output / "loftq_init" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == Path(output).name


def test_a_name_for_the_base_stands_in_the_adapter_and_nowhere_else(run, source, tmp_path):
    assert run("quantize", source, "plain", *FAST)[0] == 0
    status, _, err = run("quantize", source, tmp_path / "named", *FAST, "--base-name", "you/model-nf4")
    assert (status, "names the base" in err) == (0, False)
    config = json.loads((tmp_path / "named" / "loftq_init" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "you/model-nf4"
    for name in ("model.safetensors", "loftq_init/adapter_model.safetensors", "loftq_report.json", "README.md"):
        assert (tmp_path / "named" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    status, _, err = run("quantize", source, tmp_path / "named", *FAST)  # another name is another result
    assert (status, "exists already" in err) == (2, True)


@pytest.mark.parametrize("name", ["/home/user/base", "", " "])
def test_a_name_that_does_not_travel_is_refused(run, source, name):
    status, _, err = run("quantize", source, "out", *FAST, "--base-name", name)
    assert (status, "cannot name a base that travels (a hub id such as you/model-nf4" in err) == (2, True)


def test_verbose_shows_every_iteration_and_every_copied_tensor(run, source):
    _, _, err = run("quantize", source, "out", "--rank", 4, "--iterations", 3, "--rounds", 0, "-v")
    iterations = [line for line in err.splitlines() if "iterations:" in line]
    assert len(iterations) == 14
    assert len(iterations[0].split("iterations: ")[1].split(" (best")[0].split()) == 3
    assert "copied: lm_head.weight (head)" in err


def test_json_is_the_whole_result(run, source):
    status, out, _ = run("quantize", source, "out", *FAST, "--start", "zero", "--json", "-q")
    values = json.loads(out)
    assert status == 0
    assert values["layers"] == 14
    assert values["verified"] is True
    assert 0 < values["error"] < 0.2
    assert values["error"] < values["plain_error"]
    assert values["notes"] == []
    report = json.loads(Path("out/loftq_report.json").read_text())
    assert report["totals"]["error"] == values["error"]


def test_no_verify_says_so(run, source):
    _, out, _ = run("quantize", source, "out", *FAST, "--no-verify")
    assert "not read back" in out


def test_a_dry_run_writes_nothing_and_lists_every_file(run, source, tmp_path):
    status, out, _ = run("quantize", source, "out", "--dry-run")
    assert status == 0
    assert "model.safetensors" in out
    assert "loftq_init/adapter_model.safetensors" in out
    assert out.count("nf4") == 14
    assert not list(tmp_path.iterdir())


def test_a_dry_run_as_json_has_the_sizes_that_the_run_has(run, source):
    planned = json.loads(run("quantize", source, "out", *FAST, "--dry-run", "--json")[1])
    done = json.loads(run("quantize", source, "out", *FAST, "--json")[1])
    for key in ("base_nbytes", "adapter_nbytes", "bits_per_weight"):
        assert planned[key] == done[key]


def test_underscores_are_as_good_as_dashes(run, source):
    status, out, _ = run("quantize", source, "out", "--block_size", 32, "--no_double_quant", "--dry_run", "--json")
    assert status == 0
    recipe = json.loads(out)["recipe"]
    assert recipe["block_size"] == 32
    assert recipe["double_quant"] is False


def test_every_option_reaches_the_recipe(run, source):
    _, out, _ = run(
        *("quantize", source, "out", "--dry-run", "--json", "--method", "loftq", "--quant-type", "nf4"),
        *(
            "--scales",
            "search",
            "--block-size",
            128,
            "--no-double-quant",
            "--rank",
            8,
            "--alpha",
            12.5,
            "--rslora",
            "--iterations",
            2,
        ),
        *(
            "--fit",
            "loftq",
            "--start",
            "principal",
            "--svd",
            "faithful",
            "--adapter-dtype",
            "bfloat16",
            "--seed",
            3,
            "--include",
            "mlp",
            "--include",
            "attn",
        ),
        *("--exclude", "down", "--max-shard-size", "2MB", "--layout", "dense"),
    )
    assert json.loads(out)["recipe"] == {
        "method": "loftq",
        "quant_type": "nf4",
        "block_size": 128,
        "double_quant": False,
        "scales": "search",
        "rank": 8,
        "alpha": 12.5,
        "rslora": True,
        "start": "principal",
        "fit": "loftq",
        "iterations": 2,
        "svd": "faithful",
        "adapter_dtype": "bfloat16",
        "seed": 3,
        "include": ["mlp", "attn"],
        "exclude": ["down"],
        "layout": "dense",
        "max_shard_size": "2MB",
        "override": [],
    }


def test_the_saved_recipe_makes_the_same_result(run, source, tmp_path):
    run("quantize", source, "one/../out", "--rank", 6, "--alpha", 3, "--exclude", "k_proj", "--iterations", 2, "-q")
    recipe = tmp_path / "out" / "loftq_recipe.toml"
    (tmp_path / "elsewhere").mkdir()
    _, first, _ = run("quantize", source, "again", "--recipe", recipe, "--json", "-q")
    report = json.loads((tmp_path / "out" / "loftq_report.json").read_text())
    assert json.loads(first)["error"] == report["totals"]["error"]


def test_the_help_lists_every_preset_and_command(run):
    assert all(name in run("--help")[1] for name in ("quantize", "merge", "inspect", "calibrate", "recipes"))
    shown = run("recipes")[1]
    assert all(name in shown for name in ("loftq-nf4", "qlora-nf4", "loftq-nf4-r64", "loftq-nf4-dense"))


COMMANDS = ("quantize", "merge", "inspect", "calibrate")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_four_examples_whose_options_exist(run, command):
    text = " ".join(run(command, "--help")[1].split())
    examples = [example.partition(": ")[0] for example in text.partition("Examples: ")[2].split("• ")[1:]]
    assert len(examples) == 4
    for example in examples:
        program, name, *words = example.split()
        shown = run(name, "--help")[1]
        assert program == "loftq"
        assert all(re.search(rf"(?<![\w-]){word}(?![\w-])", shown) for word in words if word.startswith("--"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_options_that_most_people_need_first(run, command):
    panels = re.findall(r"╭─ (.+?) ─+╮", run(command, "--help")[1])
    assert panels == ["Arguments", "Options", "Advanced options"]


def test_the_table_of_presets_has_the_sizes_of_a_model_of_7_billion_weights(run):
    status, out, err = run("recipes", "--json")
    presets = {preset["name"]: preset for preset in json.loads(out)}
    matrices, embeddings, norms = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096, 65 * 4096
    assert (status, err) == (0, "")
    assert presets["loftq-nf4-dense"]["base_nbytes"] == 2 * (matrices + embeddings + norms)  # 6,738,415,616 parameters
    assert matrices + embeddings + norms == 6_738_415_616
    assert presets["qlora-nf4"]["bits_per_weight"] == pytest.approx(4.127, abs=1e-3)  # 4 + 8/64 + 32/(64·256)
    nf4 = presets["qlora-nf4"]
    assert nf4["base_nbytes"] == pytest.approx(nf4["bits_per_weight"] / 8 * matrices + 2 * (embeddings + norms))
    inputs_and_outputs = 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert nf4["adapter_nbytes"] == 4 * 16 * inputs_and_outputs
    assert (presets["loftq-int4"]["loaders"], nf4["loaders"]) == (
        "transformers, PEFT, vLLM",
        "transformers, PEFT, diffusers",
    )


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version_is_printed(run, option):
    assert run(option)[1].startswith("loftq-cli ")


def test_a_shell_can_complete_commands(tmp_path):
    words = {"COMP_WORDS": "loftq q", "COMP_CWORD": "1", "_LOFTQ_COMPLETE": "complete_bash"}
    program = "import sys; sys.argv[0] = 'loftq'; from loftq_cli.cli.start import main; main()"
    environment = {**os.environ, **words}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["quantize"]


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("quantize", "a", "b", "--rnak", "3"), "(did you mean --rank?)"),
        (("quantize", "a", "b", "--bits", "4"), "(did you mean --quant-type?)"),
        (("merge", "a", "b", "c", "--bits", "4"), "(did you mean --requantize?)"),
        (("inspect", "a", "--bits", "4"), "(did you mean --try?)"),
        (("quantize", "--model", "a"), "(MODEL is an argument, without a name before)"),
        (("quantize", "a", "b", "--zzzzzz"), "quantize --help)"),
        (("quantize", "a", "b", "--quant-type", "NF4"), "(write nf4)"),
        (("quantize", "a", "b", "--quant-type", "4"), "(--quant-type nf4 or int4)"),
        (("quantize", "a", "b", "--quant-type", "q2_k"), "not written; the nearest is --quant-type int2)"),
        (("quantize", "a", "b", "--quant-type", "awq"), "--quant-type int4 --text FILE)"),
        (("quantize", "a", "b", "--recipe", "loftq_nf4"), "(did you mean loftq-nf4?)"),
        (("quantize", "a", "b", "--recipe", "gptq"), "--quant-type int4 --layout gptq)"),
    ],
)
def test_a_word_from_another_tool_is_answered_with_ours(run, arguments, meant):
    status, out, err = run(*arguments)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.rstrip().endswith(meant), err


def test_the_directories_above_the_output_are_made(run, source, tmp_path):
    assert run("quantize", source, "runs/today/out", *FAST, "-q")[0] == 0
    assert (tmp_path / "runs" / "today" / "out" / "config.json").is_file()


def test_an_output_below_a_file_is_refused_by_name(run, source, tmp_path):
    (tmp_path / "file").touch()
    status, _, err = run("quantize", source, "file/out", *FAST, "-q")
    assert (status, "file, which is no directory (choose another output)" in err) == (2, True), err


def test_a_tilde_is_the_home_directory(run, source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("quantize", source, "~/out", *FAST, "-q")[0] == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_plan_needs_no_free_output_and_says_so(run, source, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").touch()
    status, out, err = run("quantize", source, "taken", *FAST, "--dry-run")
    assert (status, "model.safetensors" in out) == (0, True)
    assert "note: taken: is not empty and not a result of this tool" in err
    assert os.listdir(tmp_path / "taken") == ["mine.txt"]
    assert run("quantize", source, "taken", *FAST)[0] == 2


def test_json_is_printed_for_a_finished_result_too(run, source):
    first = json.loads(run("quantize", source, "out", *FAST, "--json", "-q")[1])
    again = json.loads(run("quantize", source, "out", *FAST, "--json", "-q")[1])
    assert (first["already_done"], again["already_done"]) == (False, True)
    assert again["error"] == first["error"]
    merge = ("merge", "out", "out/loftq_init", "merged", "--json", "-q")
    results = [json.loads(run(*merge)[1])["already_done"] for _ in range(2)]
    assert results == [False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize",), "error: Missing argument 'MODEL'"),
        (("quantize", "x"), "error: Missing argument 'OUTPUT'"),
        (("frobnicate",), "error: No such command 'frobnicate'"),
        (("quantize", "a", "b", "--rnk", "3"), "error: No such option: --rnk"),
        (("quantize", "a", "b", "--rank", "many"), "error: Invalid value for '--rank'"),
        (("quantize", "missing", "out"), "error: missing: no such file or folder"),
        (("quantize", "org/name", "out"), "hf download org/name"),
        (("quantize", "builtin:none", "out"), "error: no built-in model 'none' (there is tiny-llama)"),
        (("quantize", "builtin:tiny-llama", "out", "--recipe", "x"), "error: no recipe 'x'"),
        (("quantize", "builtin:tiny-llama", "out", "--block-size", "20"), "block_size 20 does not exist"),
        (("inspect", "builtin:tiny-llama", "--try", "int9"), "--try 'int9' does not exist"),
        (("inspect", "builtin:tiny-llama", "--sort", "colour"), "--sort"),
        (("merge", "builtin:none", "adapter", "out"), "error: no built-in model 'none'"),
        (("merge", "builtin:tiny-llama", "adapter", "out"), "error: adapter: is no directory"),
    ],
)
def test_a_mistake_is_one_line_with_status_2(run, tmp_path, arguments, message):
    status, out, err = run(*arguments)
    assert status == 2
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def damaged(source, directory, **changes):
    """A copy of `source` as one file, with some tensors replaced."""
    tensors = load_file(source / "model.safetensors")
    directory.mkdir()
    save_file({**tensors, **changes}, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    return directory


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["loftq", "qlora"])
def test_a_weight_that_is_not_finite_is_refused_by_name(run, source, tmp_path, value, method):
    weight = load_file(source / "model.safetensors")[NAME]
    weight[3, 5] = value
    model = damaged(source, tmp_path / "model", **{NAME: weight})
    status, out, err = run("quantize", model, "out", *OPTIONS[method], "--method", method, "-q")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {model}/model.safetensors: tensor {NAME}: holds NaN or infinite values")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_weights_too_large_for_double_quantization_are_refused_with_the_remedy(run, source, tmp_path):
    huge = torch.full((192, 128), 3.3e38, dtype=torch.bfloat16)
    model = damaged(source, tmp_path / "model", **{NAME: huge})
    status, _, err = run("quantize", model, "out", *OPTIONS["qlora"], "--method", "qlora", "-q")
    assert status == 2
    assert f"tensor {NAME}" in err
    assert "--no-double-quant" in err
    status, _, _ = run(
        "quantize", model, "out", *OPTIONS["qlora"], "--method", "qlora", "-q", "--no-double-quant", "--restart"
    )
    assert status == 0


def test_an_adapter_that_overflows_its_dtype_is_refused(run, source, tmp_path):
    large = torch.full((192, 128), 1e30, dtype=torch.bfloat16)
    large[:, ::3] = 3e29
    model = damaged(source, tmp_path / "model", **{NAME: large})
    status, _, err = run("quantize", model, "out", *FAST, "--fit", "loftq", "--adapter-dtype", "float16", "-q")
    assert status == 2
    assert f"tensor {NAME}" in err
    assert "--adapter-dtype float32" in err


@pytest.mark.parametrize(
    "name", ["[bold]model.layers.0.x", "a\x1b[31m.0.b", "layers.0.\nfake: all is well", "l.0.%s{0}"]
)
def test_names_in_a_checkpoint_are_data(run, tmp_path, name):
    model = tmp_path / "m.safetensors"
    save_file({f"{name}.weight": torch.full((64, 64), float("nan"))}, model)
    status, _, err = run("quantize", model, "out", *FAST, "-q")
    assert status == 2
    assert len(err.splitlines()) == 1
    assert "\x1b" not in err
    status, out, _ = run("inspect", model)
    assert status == 0
    assert "\x1b" not in out
    assert len(out.splitlines()) == 3


ODD_NAMES = [b"[bold]x[red]", b"a\x1b[31m", b"two\nlines", b"{0}%s", b'quote"s', b"\xff\xfe", b"-x"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_of_files_are_data_too(run, source, tmp_path, name):
    folder = os.fsdecode(name)
    shutil.copytree(source, tmp_path / folder)
    output = "out " + name.decode(errors="ignore")
    status, out, err = run("quantize", f"./{folder}", output, *FAST)
    assert (status, len(out.splitlines())) == (0, 4), err
    assert "\x1b" not in out + err
    card = (tmp_path / output / "README.md").read_text()
    compile(card.partition("```python\n")[2].partition("```")[0], "card", "exec")
    assert any(line.startswith("# ") for line in card.splitlines()[5:8])  # after a note, if there is one
    status, out, err = run("merge", output, f"{output}/loftq_init", "merged")
    assert (status, "\x1b" in out + err) == (0, False), err
    status, out, err = run("inspect", output, "--verify")
    assert (status, out.startswith("verified: ")) == (0, True), out
    status, _, err = run("quantize", f"./{folder}", "merged")
    assert (status, len(err.splitlines())) == (2, 1)


def test_a_side_file_whose_name_is_no_text_is_left(run, source, tmp_path):
    shutil.copytree(source, tmp_path / "model")
    (tmp_path / "model" / os.fsdecode(b"caf\xe9.txt")).write_text("au lait")
    (tmp_path / "model" / "café.txt").write_text("crème")
    status, _, _ = run("quantize", "model", "out", *FAST, "-q")
    assert (status, "café.txt" in os.listdir(tmp_path / "out"), os.fsdecode(b"caf\xe9.txt") in os.listdir("out")) == (
        0,
        True,
        False,
    )
    assert run("inspect", "out", "--verify")[0] == 0


def test_an_output_whose_name_is_no_text_is_refused(source, tmp_path):
    done = loftq("quantize", source, os.fsdecode(b"\xff"), *FAST, cwd=tmp_path)
    assert (done.returncode, "is not a name that can be written as text" in done.stderr) == (2, True), done.stderr


def test_a_single_weight_file_converts_without_a_config(run, tmp_path):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    save_file({"layers.0.proj.weight": weight, "layers.0.norm.weight": torch.ones(64)}, tmp_path / "w.safetensors")
    status, _, _ = run("quantize", "w.safetensors", "out", *FAST, "-q")
    assert status == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["layers.0.norm.weight"].dtype == torch.float32
    assert "layers.0.proj.weight.quant_state.bitsandbytes__nf4" in stored
    assert set(json.loads((tmp_path / "out" / "config.json").read_text())) == {"dtype", "quantization_config"}


def test_two_runs_give_the_same_bytes(source, tmp_path):
    results = []
    for place, method in (("a", "loftq"), ("b", "loftq"), ("c", "qlora"), ("d", "qlora")):
        (tmp_path / place).mkdir()
        done = loftq("quantize", source, "out", *OPTIONS[method], "--method", method, "-q", cwd=tmp_path / place)
        assert done.returncode == 0, done.stderr
        results.append(files_of(tmp_path / place / "out"))
    assert results[0] == results[1]
    assert results[2] == results[3]


def test_another_seed_draws_another_qlora_adapter_and_the_same_base(run, source, tmp_path):
    for seed in (0, 1):
        run("quantize", source, f"out{seed}", *OPTIONS["qlora"], "--method", "qlora", "--seed", seed, "-q")
    one, two = (load_file(tmp_path / f"out{seed}" / "qlora_init" / "adapter_model.safetensors") for seed in (0, 1))
    assert all(not torch.equal(one[name], two[name]) for name in one if "lora_A" in name)
    assert (tmp_path / "out0/model.safetensors").read_bytes() == (tmp_path / "out1/model.safetensors").read_bytes()


def test_what_is_drawn_for_a_layer_does_not_depend_on_the_others(run, source, tmp_path):
    run("quantize", source, "all", *OPTIONS["qlora"], "--method", "qlora", "-q")
    run("quantize", source, "few", *OPTIONS["qlora"], "--method", "qlora", "-q", "--include", "layers.1.mlp")
    few = load_file(tmp_path / "few/qlora_init/adapter_model.safetensors")
    all_layers = load_file(tmp_path / "all/qlora_init/adapter_model.safetensors")
    assert len(few) == 6
    assert all(torch.equal(tensor, all_layers[name]) for name, tensor in few.items())


def test_the_output_carries_the_small_files_and_leaves_other_weights(run, source, tmp_path):
    model = damaged(source, tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    (model / "README.md").write_text("theirs")
    (model / "modeling_custom.py").write_text("raise SystemExit('never run')")
    (model / "model.onnx").write_bytes(b"0" * 100)
    (model / ".git").mkdir()
    (model / ".git" / "config").write_text("x")
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text("{}")
    run("quantize", model, "out", *FAST, "-q")
    names = set(files_of(tmp_path / "out"))
    assert {"tokenizer.json", "SOURCE_README.md", "README.md", "modeling_custom.py", "1_Pooling/config.json"} <= names
    assert not {"model.onnx", ".git/config"} & names
    assert (tmp_path / "out" / "SOURCE_README.md").read_text() == "theirs"


def test_the_checksums_are_those_of_the_files(run, source, tmp_path):
    import hashlib

    run("quantize", source, "out", *FAST, "-q")
    listed = json.loads((tmp_path / "out" / "checksums.json").read_text())["files"]
    files = files_of(tmp_path / "out")
    files.pop("checksums.json")
    assert listed == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def test_a_terminal_that_knows_only_ascii_is_no_reason_to_stop():
    done = loftq("inspect", "builtin:tiny-llama", "--top", 2, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "288?192" in done.stdout


def test_a_reader_that_goes_away_is_status_3_without_a_traceback(tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "loftq_cli", "inspect", "builtin:tiny-llama"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


def test_a_full_device_behind_stdout_is_status_3_without_a_traceback():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "loftq_cli", "inspect", "builtin:tiny-llama", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 3
    assert done.stderr == "error: No space left on device\n"


def test_a_second_signal_ends_the_program_at_once():
    program = """
import os, signal
from loftq_cli.cli import start
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, start._interrupt)
try:
    os.kill(os.getpid(), signal.SIGTERM)
except KeyboardInterrupt:
    print("in order", flush=True)
os.kill(os.getpid(), signal.SIGINT)
print("never")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "in order\n")


MEMORY_PROGRAM = """
import resource, sys, torch
from pathlib import Path
from loftq_cli.cli.main import _run
torch.zeros(8) @ torch.zeros(8)
size = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + 40_000_000,) * 2)
sys.exit(_run(sys.argv[1:]))
"""


def test_too_little_memory_is_status_6_and_names_the_tensor(tmp_path):
    weight = torch.zeros(1, 4096).expand(8192, -1).bfloat16()  # 67 MB
    save_file({"layers.0.proj.weight": weight.contiguous()}, tmp_path / "m.safetensors")
    options = ("quantize", tmp_path / "m.safetensors", tmp_path / "out", "-q", "--threads", 1, "--iterations", 1)
    command = [sys.executable, "-c", MEMORY_PROGRAM, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 6
    assert done.stderr == (
        f"error: {tmp_path}/m.safetensors: tensor layers.0.proj.weight: not enough memory "
        "(--threads 1 takes less; --dry-run says how much is needed)\n"
    )
    assert not (tmp_path / "out").exists()


NORM = "model.layers.0.input_layernorm.weight"


def test_what_is_copied_with_nan_in_it_is_said_and_reported(run, source, tmp_path):
    model = damaged(source, tmp_path / "model", **{NORM: torch.full((128,), float("nan"), dtype=torch.bfloat16)})
    status, _, err = run("quantize", model, "out", *FAST)
    note = f"{NORM} holds NaN or infinite values, and is copied as it is"
    assert status == 0
    assert f"warning: {note}" in err.splitlines()
    assert note in json.loads((tmp_path / "out" / "loftq_report.json").read_text())["notes"]
    status, _, err = run("merge", "out", "out/loftq_init", "merged")
    assert status == 0
    assert f"warning: {note}" in err.splitlines()
    assert json.loads((tmp_path / "merged" / "loftq_merge_report.json").read_text())["notes"][-1] == note


@pytest.mark.parametrize("command", ["quantize", "merge", "inspect"])
@pytest.mark.parametrize("damage", ["header", "index", "config"])
def test_damage_is_refused_in_less_time_than_importing_torch_takes(tmp_path, source, command, damage):
    model = tmp_path / "model"
    shutil.copytree(source, model)
    if damage == "header":
        (model / "model.safetensors").write_bytes(b"\xff" * 1000)
    elif damage == "index":
        index = {"weight_map": {"a": "../a.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        (model / "config.json").write_text("{")
    last = {"quantize": [tmp_path / "out"], "merge": [tmp_path / "adapter", tmp_path / "out"], "inspect": []}
    program = "import sys; sys.modules['torch'] = None; from loftq_cli.cli.start import main; main()"
    arguments = [sys.executable, "-c", program, command, str(model), *map(str, last[command])]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {model}/")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["model"]
