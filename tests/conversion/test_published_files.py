"""The files of a result say nothing about the machine: the bytes depend neither on the output's place nor on the places
of the inputs. The adapter's config alone names the base, as PEFT wants.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
from support import models
from support.adapters import edit_json
from support.conversions import files_of

Run = Callable[..., tuple[int, str, str]]
OPTIONS = ("--method", "loftq", "--rank", "4", "--include", "q_proj", "--iterations", "1", "-q")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = models.llama(tmp_path_factory.mktemp("source") / "model", layers=1)
    edit_json(path / "config.json", _name_or_path=str(path))
    return path


def statistics(source: Path, directory: Path) -> Path:
    """What `loftq calibrate` writes about the linears of `source`, in diagonal form."""
    import torch
    from safetensors.torch import load_file, save_file

    names = [name for name in load_file(source / "model.safetensors") if name.endswith("q_proj.weight")]
    directory.mkdir(parents=True)
    save_file({"q": torch.linspace(0.1, 5.0, 128)}, directory / "statistics.safetensors")

    record = {"tool": "loftq-cli", "format": 1, "kind": "diagonal", "tokens": 8, "inputs": dict.fromkeys(names, "q")}
    sha256 = hashlib.sha256((directory / "statistics.safetensors").read_bytes()).hexdigest()
    (directory / "calibration.json").write_text(json.dumps({**record, "statistics_sha256": sha256}))
    return directory


def test_two_outputs_differ_in_the_name_of_the_base_alone(source: Path, run: Run, tmp_path: Path) -> None:
    first, second = tmp_path / "secret home" / "one", tmp_path / "elsewhere" / "deep" / "two"
    for output, place in ((first, "secret home"), (second, "elsewhere/deep")):
        output.parent.mkdir(parents=True)
        model = shutil.copytree(source, tmp_path / place / "model")
        stats = statistics(source, tmp_path / place / "stats")
        status, _, err = run("quantize", model, output, *OPTIONS, "--calibration", stats)
        assert status == 0, err
    one, two = files_of(first), files_of(second)
    assert one.keys() == two.keys()
    # The checksums list the sha256 of the adapter's config, and the fingerprint covers the config.
    different = {name for name in one if one[name] != two[name]}
    assert different == {"loftq_init/adapter_config.json", "checksums.json"}

    configs = [json.loads(files["loftq_init/adapter_config.json"]) for files in (one, two)]
    assert [config.pop("base_model_name_or_path") for config in configs] == ["one", "two"]
    assert configs[0] == configs[1]
    marks = [json.loads(files["checksums.json"]) for files in (one, two)]
    for mark in marks:
        del mark["fingerprint"], mark["files"]["loftq_init/adapter_config.json"]
    assert marks[0] == marks[1]


def test_no_file_holds_a_path_of_the_machine(source: Path, run: Run, tmp_path: Path) -> None:
    """Not even one that the original, or somebody's adapter, carries."""
    stats = statistics(source, tmp_path / "stats")
    assert run("quantize", source, tmp_path / "out", *OPTIONS, "--calibration", stats)[0] == 0
    adapter = shutil.copytree(tmp_path / "out" / "loftq_init", tmp_path / "trained")
    (adapter / "loftq_provenance.json").unlink()  # as PEFT saves a trained adapter
    for number, base in enumerate((tmp_path / "out", source, tmp_path / "not there")):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
        assert run("merge", tmp_path / "out", adapter, tmp_path / f"merged{number}")[0] == 0
    roots = [str(tmp_path).encode(), str(source.parent).encode()]
    for output in ("out", "merged0", "merged1", "merged2"):
        telling = {n for n, data in files_of(tmp_path / output).items() if any(root in data for root in roots)}
        assert not telling


def test_the_lines_of_the_card_work_in_the_folder_wherever_it_is(source: Path, run: Run, tmp_path: Path) -> None:
    run("quantize", source, tmp_path / "out", *OPTIONS)
    (tmp_path / "out").rename(tmp_path / "moved")
    card = (tmp_path / "moved" / "README.md").read_text()
    namespace: dict[str, object] = {}
    with chdir(tmp_path / "moved"):
        exec(card.partition("```python\n")[2].partition("```")[0], namespace)
    assert type(namespace["model"]).__name__ == "PeftModelForCausalLM"


@pytest.mark.parametrize("typed", ["here/stats", "here/stats/", "here/../here/stats", "here/stats/."])
def test_the_recipe_of_a_result_names_the_statistics_and_the_plan_says_where_they_are(
    typed: str, source: Path, run: Run, tmp_path: Path
) -> None:
    statistics(source, tmp_path / "here" / "stats")
    assert run("quantize", source, "out", *OPTIONS, "--calibration", typed)[0] == 0
    recipe = tomllib.loads((tmp_path / "out" / "loftq_recipe.toml").read_text())
    assert recipe["calibration"] == "stats"
    (tmp_path / "here" / "stats").rename(tmp_path / "stats")
    assert "already done" in run("quantize", source, "out", "--recipe", "out/loftq_recipe.toml")[2]


@pytest.mark.parametrize(("name", "is_kept"), [("ada/llama", True), ("llama", True), ("/home/ada/llama", False)])
def test_the_config_keeps_the_name_of_a_model_and_loses_a_path(
    name: str, is_kept: bool, source: Path, run: Run, tmp_path: Path
) -> None:
    model = shutil.copytree(source, tmp_path / "model")
    edit_json(model / "config.json", _name_or_path=name)
    assert run("quantize", model, "out", *OPTIONS)[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("_name_or_path") == (name if is_kept else None)


# Recipes.


@pytest.mark.parametrize("expression", ["a\x7fb|q_proj", "q_proj|\x1b\x00\x9f", 'q_proj|"\\\\é\u2028', "q_proj|\t"])
def test_a_recipe_with_any_character_is_read_back(expression: str, source: Path, run: Run, tmp_path: Path) -> None:
    options = [option if option != "q_proj" else expression for option in OPTIONS]
    assert run("quantize", source, "out", *options)[0] == 0
    text = (tmp_path / "out" / "loftq_recipe.toml").read_text()
    assert tomllib.loads(text)["include"] == [expression]
    assert "already done" in run("quantize", source, "out", "--recipe", "out/loftq_recipe.toml")[2]


@pytest.mark.parametrize("option", ["--include", "--exclude"])
def test_an_expression_that_is_no_text_is_refused_before_the_work(option: str, source: Path, run: Run) -> None:
    status, _, err = run("quantize", source, "out", *OPTIONS, option, "q\udcff")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "cannot be written as text (UTF-8) (type . for any character)" in err
