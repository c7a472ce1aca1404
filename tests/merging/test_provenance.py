"""Which adapter belongs to which base: what is checked, what is refused, what is said where nothing can be checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support import models
from support.adapters import (
    decoded,
    delta,
    edit_json,
    edit_tensors,
    lora_tensors,
    names_in,
    quietly,
    tensors_of,
    write_adapter,
)
from support.conversions import run_conversion
from support.loading import load

from loftq_cli.cli.main import _run
from loftq_cli.errors import InputError
from loftq_cli.nn import load_adapted

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("original") / "llama", layers=1)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, original: Path) -> Path:
    """The original with a LoftQ adapter."""
    output = tmp_path_factory.mktemp("converted") / "base"
    run_conversion(original, output, rank=4, iterations=2, svd="exact")
    return output


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, original: Path) -> tuple[Path, Path]:
    """A converted directory, and its LoftQ adapter after two steps of training, as PEFT saves it."""
    folder = tmp_path_factory.mktemp("trained")
    outcome = run_conversion(original, folder / "base", rank=4, alpha=8.0, iterations=2)
    peft = quietly(load, outcome, "AutoModelForCausalLM").peft.train()
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.5)
    ids = torch.arange(20).view(2, 10)
    for _ in range(2):
        optimizer.zero_grad()
        peft(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    quietly(peft.save_pretrained, folder / "adapter")
    return folder / "base", folder / "adapter"


def merge(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit status and everything on stderr."""
    status = _run(["merge", *map(str, arguments)])
    return status, capsys.readouterr().err


def assert_merged(out: Path, base: Path, adapter: Path, scaling: float) -> None:
    """bfloat16 rounding of bitsandbytes' decoded weights plus float64 s·B·A."""
    merged = tensors_of(out)
    for name, weight in decoded(base).items():
        expected = weight.double() + delta(adapter, name.removesuffix(".weight"), scaling)
        assert torch.allclose(merged[name].double(), expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-7), name


def test_a_conversion_says_in_the_adapter_which_base_it_is_for(converted):
    side_file = json.loads((converted / "loftq_init" / "loftq_provenance.json").read_text())
    report = json.loads((converted / "loftq_report.json").read_text())

    assert side_file["method"] == "loftq"
    assert side_file["source"] == "llama"
    assert side_file["base_fingerprint"] == report["base_fingerprint"]
    assert len(side_file["base_fingerprint"]) == 64


def test_an_adapter_on_its_base_is_checked_and_it_is_said(converted, tmp_path, capsys):
    status, said = merge(capsys, converted, converted / "loftq_init", tmp_path / "out")

    assert status == 0
    assert "note: loftq_provenance.json in the adapter names this base" in said
    assert "note: the base's quantized weights have the recorded sha256" in said
    report = json.loads((tmp_path / "out" / "loftq_merge_report.json").read_text())
    assert len(report["notes"]) == 2


def test_a_loftq_adapter_on_the_original_is_refused(original, converted, tmp_path, capsys):
    status, said = merge(capsys, original, converted / "loftq_init", tmp_path / "out")

    assert status == 4
    assert "the loftq adapter was made for a base of llama, and this base is not quantized" in said
    assert "merge it into the base it was made for, or --force" in said
    assert names_in(tmp_path) == []


def test_force_merges_a_loftq_adapter_into_the_original_and_says_so(original, converted, tmp_path, capsys):
    adapter = converted / "loftq_init"

    status, said = merge(capsys, original, adapter, tmp_path / "out", "--force")

    assert status == 0
    assert "this base is not quantized, merged all the same (--force)" in said
    report = json.loads((tmp_path / "out" / "loftq_merge_report.json").read_text())
    assert any("--force" in note for note in report["notes"])
    merged, before = tensors_of(tmp_path / "out"), tensors_of(original)
    expected = before[f"{Q0}.weight"].double() + delta(adapter, Q0, 1.0)
    assert torch.allclose(merged[f"{Q0}.weight"].double(), expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-7)


@pytest.mark.parametrize("recipe", [{"rank": 8}, {"iterations": 3}, {"block_size": 128}, {"double_quant": False}])
def test_a_loftq_adapter_on_another_conversion_is_refused(recipe, original, converted, tmp_path, capsys):
    run_conversion(original, tmp_path / "other", **{"rank": 4, "iterations": 2, **recipe})

    status, said = merge(capsys, tmp_path / "other", converted / "loftq_init", tmp_path / "out")

    assert status == 4
    assert "this base is another quantized base" in said
    assert names_in(tmp_path) == ["other"]


def test_force_merges_into_another_conversion_and_says_so(original, converted, tmp_path, capsys):
    run_conversion(original, tmp_path / "other", rank=8, iterations=2)

    status, said = merge(capsys, tmp_path / "other", converted / "loftq_init", tmp_path / "out", "--force")

    assert status == 0
    assert "this base is another quantized base, merged all the same (--force)" in said


def test_the_same_conversion_made_twice_is_the_same_base(original, converted, tmp_path, capsys):
    # Where files are cut changes the conversion, and no byte of a tensor.
    run_conversion(original, tmp_path / "again", rank=4, iterations=2, max_shard_size="4GB", svd="exact")

    status, said = merge(capsys, tmp_path / "again", converted / "loftq_init", tmp_path / "out")

    assert status == 0
    assert "names this base" in said


def test_an_adapter_that_starts_at_zero_may_go_to_another_base(original, tmp_path, capsys):
    run_conversion(original, tmp_path / "a", rank=4, method="qlora")
    run_conversion(original, tmp_path / "b", rank=4, method="qlora", block_size=128)

    status, said = merge(capsys, tmp_path / "b", tmp_path / "a" / "qlora_init", tmp_path / "out")

    assert status == 0
    assert "the qlora adapter was made for a base of llama, and this base is another quantized base" in said
    assert "--force" not in said


def copy_of(converted: Path, directory: Path) -> Path:
    shutil.copytree(converted, directory)
    return directory


@pytest.mark.parametrize("part", ["weight", "weight.absmax", "weight.nested_absmax"])
def test_a_base_that_was_changed_after_its_conversion_is_refused(part, converted, tmp_path, capsys):
    base = copy_of(converted, tmp_path / "base")
    edit_tensors(base / "model.safetensors", lambda t: t[f"{Q0}.{part}"].view(torch.uint8).view(-1)[3:4].add_(1))

    status, said = merge(capsys, base, converted / "loftq_init", tmp_path / "out")

    assert status == 4
    assert "its quantized weights are not those the adapter was made for" in said
    assert names_in(tmp_path) == ["base"]


def test_force_merges_into_a_changed_base_and_says_so(converted, tmp_path, capsys):
    base = copy_of(converted, tmp_path / "base")
    edit_tensors(base / "model.safetensors", lambda t: t[f"{Q0}.weight"].view(-1)[:5].add_(1))

    status, said = merge(capsys, base, converted / "loftq_init", tmp_path / "out", "--force")

    assert status == 0
    assert "warning: base: its quantized weights are not those the adapter was made for, merged all the same" in said
    assert "recorded sha256" not in said
    report = json.loads((tmp_path / "out" / "loftq_merge_report.json").read_text())
    assert any("not those the adapter was made for" in note for note in report["notes"])


def test_a_changed_report_does_not_make_another_base_fit(original, converted, tmp_path, capsys):
    run_conversion(original, tmp_path / "other", rank=8, iterations=2)
    right = json.loads((converted / "loftq_report.json").read_text())["base_fingerprint"]
    edit_json(tmp_path / "other" / "loftq_report.json", base_fingerprint=right)

    status, said = merge(capsys, tmp_path / "other", converted / "loftq_init", tmp_path / "out")

    assert (status, "not those the adapter was made for" in said) == (4, True), said


@pytest.mark.parametrize("delete", [(), ("loftq_report.json",)])
def test_a_base_that_was_moved_is_known_by_its_bytes(delete, converted, tmp_path, capsys):
    base = copy_of(converted, tmp_path / "moved")
    for name in delete:
        (base / name).unlink()

    status, said = merge(capsys, base, converted / "loftq_init", tmp_path / "out")

    assert status == 0
    assert "have the recorded sha256" in said


def test_another_base_without_a_report_is_known_by_its_bytes_too(original, converted, tmp_path, capsys):
    run_conversion(original, tmp_path / "other", rank=8, iterations=2)
    (tmp_path / "other" / "loftq_report.json").unlink()

    status, said = merge(capsys, tmp_path / "other", converted / "loftq_init", tmp_path / "out")

    assert (status, "not those the adapter was made for" in said) == (4, True), said


@pytest.mark.parametrize("content", ["{}", '{"method": 1, "base_fingerprint": "x"}'])
def test_a_damaged_side_file_is_refused(content, converted, tmp_path, capsys):
    base = copy_of(converted, tmp_path / "base")
    (base / "loftq_init" / "loftq_provenance.json").write_text(content)

    status, said = merge(capsys, base, base / "loftq_init", tmp_path / "out")

    assert (status, "is not a provenance file of this tool" in said) == (2, True), said


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("start", [{"method": "of tomorrow"}, {"method": "loftq", "init": "of tomorrow"}])
def test_a_method_that_this_version_does_not_know_is_refused_and_not_taken_for_one_that_fits_nothing(
    start, force, original, converted, tmp_path, capsys
):
    base = copy_of(converted, tmp_path / "base")
    side_file = base / "loftq_init" / "loftq_provenance.json"
    edit_json(side_file, version="9.8.7", **start)

    for place in (original, base):
        status, said = merge(capsys, place, base / "loftq_init", tmp_path / "out", *force)

        assert status == 2, said
        assert "of tomorrow, and this version knows loftq, " in said
        assert "(use loftq-cli 9.8.7, which wrote it)" in said
    with pytest.raises(InputError, match="of tomorrow"):
        load_adapted(torch.nn.Linear(2, 2), base)


def test_a_report_of_an_unknown_method_does_not_make_its_adapter_fit_the_original(original, trained, tmp_path, capsys):
    base = copy_of(trained[0], tmp_path / "base")
    adapter = without_record(trained[1], tmp_path / "adapter", base_model_name_or_path=str(base))
    edit_json(base / "loftq_report.json", recipe={"method": "of tomorrow"})

    status, said = merge(capsys, original, adapter, tmp_path / "out")

    assert (status, "method of tomorrow" in said) == (2, True), said


def test_a_damaged_report_is_refused(converted, tmp_path, capsys):
    base = copy_of(converted, tmp_path / "base")
    (base / "loftq_report.json").write_text("{}")

    status, said = merge(capsys, base, base / "loftq_init", tmp_path / "out")

    assert (status, "is not a report of this tool" in said) == (2, True), said


def _with_layer(**values):
    return lambda report: {**report, "layers": [{**report["layers"][0], **values}, *report["layers"][1:]]}


REPORTS = {
    "an adapter's folder that is a number": lambda report: {**report, "adapter_dir": 5},
    "no fingerprint": lambda report: {key: value for key, value in report.items() if key != "base_fingerprint"},
    "a fingerprint that is a number": lambda report: {**report, "base_fingerprint": 1},
    "a method that is a list": lambda report: {**report, "recipe": {"method": ["loftq"]}},
    "layers that are text": lambda report: {**report, "layers": "abc"},
    "a shape that is text": _with_layer(shape="ab"),
    "a shape of one side": _with_layer(shape=[8]),
    "no rank": _with_layer(rank=None),
    "an error that is text": _with_layer(plain_error="0.1"),
    "errors that are text": _with_layer(iteration_errors="12"),
    "a format without a name": _with_layer(quant_type=["nf4"]),
}


@pytest.mark.parametrize("case", REPORTS)
def test_a_report_with_a_value_of_the_wrong_type_is_refused(case, converted, tmp_path, capsys):
    base = copy_of(converted, tmp_path / "base")
    report = json.loads((base / "loftq_report.json").read_text())
    (base / "loftq_report.json").write_text(json.dumps(REPORTS[case](report)))

    status, said = merge(capsys, base, base / "loftq_init", tmp_path / "out")

    assert (status, "loftq_report.json: is not a report of this tool" in said) == (2, True), said
    assert _run(["inspect", str(base)]) == 2


# An adapter that PEFT saved after training has no side file, and the record in its config.


def without_record(adapter: Path, directory: Path, **config: object) -> Path:
    """A copy of the adapter as earlier versions left it after training: nothing in its config tells the base."""
    copy_of(adapter, directory)
    edit_json(directory / "adapter_config.json", megatron_core="megatron.core", **config)
    return directory


def test_a_trained_adapter_merges_into_its_base(trained, tmp_path, capsys):
    base, adapter = trained
    assert not (adapter / "loftq_provenance.json").exists()
    assert not torch.equal(delta(adapter, Q0, 2.0), delta(base / "loftq_init", Q0, 2.0))

    status, said = merge(capsys, base, adapter, tmp_path / "out")

    assert status == 0
    assert "note: adapter_config.json in the adapter names this base" in said
    assert "note: the base's quantized weights have the recorded sha256" in said
    assert_merged(tmp_path / "out", base, adapter, 2.0)


def test_without_a_record_the_report_of_its_base_refuses_a_trained_adapter_on_the_original(
    original, trained, tmp_path, capsys
):
    base = trained[0]
    adapter = without_record(trained[1], tmp_path / "adapter", base_model_name_or_path=str(base))

    status, said = merge(capsys, original, adapter, tmp_path / "out")

    assert status == 4
    assert f"the adapter was trained on {base}, another base" in said
    assert names_in(tmp_path) == ["adapter"]


def test_a_trained_loftq_adapter_on_the_original_merges_by_force(original, trained, tmp_path, capsys):
    status, said = merge(capsys, original, trained[1], tmp_path / "out", "--force")

    assert (status, "merged all the same (--force)" in said) == (0, True), said


def test_without_a_record_a_trained_adapter_knows_its_base_by_the_path(trained, tmp_path, capsys):
    adapter = without_record(trained[1], tmp_path / "adapter", base_model_name_or_path=str(trained[0]))
    status, said = merge(capsys, trained[0], adapter, tmp_path / "out")

    assert (status, "note: the adapter names this base by its path" in said) == (0, True), said


def test_without_a_record_a_trained_adapter_knows_a_copy_of_its_base(trained, tmp_path, capsys):
    base = copy_of(trained[0], tmp_path / "copy")
    adapter = without_record(trained[1], tmp_path / "adapter", base_model_name_or_path=str(trained[0]))

    status, said = merge(capsys, base, adapter, tmp_path / "out")

    assert (status, f"the adapter names {trained[0].name}, which is the same base" in said) == (0, True), said


def test_a_trained_adapter_whose_base_was_changed_since_is_refused(trained, tmp_path, capsys):
    base = copy_of(trained[0], tmp_path / "base")
    adapter = copy_of(trained[1], tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    edit_tensors(base / "model.safetensors", lambda t: t[f"{Q0}.weight"].view(-1)[:5].add_(1))

    status, said = merge(capsys, base, adapter, tmp_path / "out")

    assert (status, "not those the adapter was made for" in said) == (4, True), said


NAMES = ["hub/model", None, 7, "", "x" * 5000, "a\0b"]


@pytest.mark.parametrize("named", NAMES)
def test_a_trained_adapter_knows_its_base_whatever_it_is_called(named, trained, tmp_path, capsys):
    adapter = copy_of(trained[1], tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=named)

    status, said = merge(capsys, trained[0], adapter, tmp_path / "out")

    assert (status, "adapter_config.json in the adapter names this base" in said) == (0, True), said


@pytest.mark.parametrize("named", NAMES)
def test_nothing_tells_the_base_of_an_adapter_of_the_form_of_the_fitted_one(named, trained, tmp_path, capsys):
    adapter = without_record(trained[1], tmp_path / "adapter", base_model_name_or_path=named)

    status, said = merge(capsys, trained[0], adapter, tmp_path / "out")
    assert status == 4
    assert "could not check that the adapter belongs to this base" in said
    assert "(--force merges it, where it was trained on this base)" in said

    status, said = merge(capsys, trained[0], adapter, tmp_path / "out", "--force", "--quiet")
    assert status == 0
    assert "warning: could not check that the adapter belongs to this base" in said


def test_without_a_record_the_untrained_adapter_is_known_by_the_norms_in_the_report(trained, tmp_path, capsys):
    base, nowhere = trained[0], {"base_model_name_or_path": "not there"}
    adapter = without_record(base / "loftq_init", tmp_path / "adapter", **nowhere)
    (adapter / "loftq_provenance.json").unlink()

    status, said = merge(capsys, base, adapter, tmp_path / "out")
    assert (status, "the untrained adapter of this base, by the norms in the report" in said) == (0, True), said

    edit_tensors(adapter / "adapter_model.safetensors", lambda t: t[sorted(t)[0]].mul_(1.002))
    assert merge(capsys, base, adapter, tmp_path / "out2")[0] == 4


def test_an_adapter_of_another_form_is_no_start_of_this_base_and_merges_with_a_warning(trained, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)), base_model_name_or_path="not there")

    status, said = merge(capsys, trained[0], adapter, tmp_path / "out", "--quiet")

    assert status == 0
    assert "warning: could not check that the adapter belongs to this base" in said


def test_without_a_record_a_base_is_known_by_the_name_it_had_when_it_was_converted(trained, tmp_path, capsys):
    name = {"base_model_name_or_path": "out/llama-nf4"}
    base, adapter = copy_of(trained[0], tmp_path / "moved"), without_record(trained[1], tmp_path / "adapter", **name)
    edit_json(base / "loftq_init" / "adapter_config.json", **name)

    status, said = merge(capsys, base, adapter, tmp_path / "out", "--quiet")

    assert status == 0
    assert "warning: the adapter names this base as it was called when it was converted" in said


def test_two_records_of_two_bases_are_refused(trained, converted, tmp_path, capsys):
    # Training saved its adapter over the adapter of another base.
    adapter = copy_of(converted / "loftq_init", tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained[1] / name, adapter / name)

    status, said = merge(capsys, trained[0], adapter, tmp_path / "out")
    assert status == 4
    assert "and adapter_config.json names " in said
    assert "(delete the file, where the adapter was saved over an earlier adapter)" in said

    (adapter / "loftq_provenance.json").unlink()
    assert merge(capsys, trained[0], adapter, tmp_path / "out")[0] == 0


@pytest.mark.parametrize("text", ["{", '{"tool": "loftq-cli"}', '{"tool": "loftq-cli", "method": 1}'])
def test_a_damaged_record_in_the_config_is_refused(text, trained, tmp_path, capsys):
    adapter = copy_of(trained[1], tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", megatron_core=text)

    status, said = merge(capsys, trained[0], adapter, tmp_path / "out")

    assert (status, "adapter_config.json: megatron_core" in said) == (2, True), said


def test_an_ordinary_adapter_says_which_directory_it_names(original, tmp_path, capsys):
    models.llama(tmp_path / "other", layers=1)
    adapter = write_adapter(
        tmp_path / "adapter", lora_tensors(Q0, (128, 128)), base_model_name_or_path=str(tmp_path / "other")
    )

    status, said = merge(capsys, original, adapter, tmp_path / "out")

    assert (status, "the adapter names other, another directory" in said) == (0, True), said
    assert "quantized weights" not in said
