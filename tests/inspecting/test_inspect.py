"""Inspection: the errors of what lies on the disk, computed again by bitsandbytes and float64 arithmetic."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models
from support.adapters import PREFIX, decoded, delta, edit_json, edit_tensors, tensors_of
from support.conversions import loftq, run_conversion

from loftq_cli.cli.main import _run

Q0 = "model.layers.0.self_attn.q_proj.weight"
CONV1D = ("attn.c_attn.weight", "c_proj.weight", "c_fc.weight")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("original") / "llama", layers=1)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, original: Path) -> Path:
    output = tmp_path_factory.mktemp("converted") / "base"
    run_conversion(original, output, rank=4, alpha=8.0, iterations=2)
    return output


def inspected(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert _run(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    status = _run(["inspect", *map(str, arguments)])
    return status, capsys.readouterr().err.splitlines()[-1]


def copy_of(converted: Path, directory: Path) -> Path:
    shutil.copytree(converted, directory)
    return directory


def as_matrix(name: str, stored: torch.Tensor) -> torch.Tensor:
    return stored.T if name.endswith(CONV1D) else stored


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("layout", ["bitsandbytes", "dense"])
def test_recomputed_errors_are_those_of_the_files(name, layout, tmp_path, capsys):
    base, original = tmp_path / "base", models.BUILDERS[name](tmp_path / "original")
    run_conversion(original, base, rank=4, alpha=6.0, iterations=1, layout=layout)

    values = inspected(capsys, base, "--against", original)

    weights, stored = tensors_of(original), tensors_of(base)
    decoded_base = decoded(base) if layout == "bitsandbytes" else {row["name"]: None for row in values["layers"]}
    assert values["errors_from"] == "files"
    assert {row["name"] for row in values["layers"]} == set(decoded_base)
    assert len(values["layers"]) == values["totals"]["layers"] >= 8
    squared = torch.zeros(3, dtype=torch.float64)
    for row in values["layers"]:
        weight = as_matrix(row["name"], weights[row["name"]]).double()
        dequantized = decoded_base[row["name"]]
        if dequantized is None:
            dequantized = as_matrix(row["name"], stored[row["name"]])
        added = delta(base / "loftq_init", row["name"].removesuffix(".weight"), 1.5)
        base_residual, residual = weight - dequantized.double(), weight - dequantized.double() - added
        error = row["error"]
        assert error["base_error"] == pytest.approx(float(base_residual.norm() / weight.norm()), rel=1e-6)
        assert error["error"] == pytest.approx(float(residual.norm() / weight.norm()), rel=1e-5)
        assert error["max_error"] == pytest.approx(float(residual.abs().max()), rel=1e-4)
        assert error["sqnr_db"] == pytest.approx(20 * float(torch.log10(weight.norm() / residual.norm())), rel=1e-5)
        assert error["delta_norm"] == pytest.approx(float(added.norm()), rel=1e-5)
        assert (row["shape"], row["rank"], row["scaling"]) == ([*weight.shape], 4, 1.5)
        squared += torch.stack([weight.norm() ** 2, base_residual.norm() ** 2, residual.norm() ** 2])
    totals = values["totals"]
    assert totals["base_error"] == pytest.approx(float((squared[1] / squared[0]).sqrt()), rel=1e-6)
    assert totals["error"] == pytest.approx(float((squared[2] / squared[0]).sqrt()), rel=1e-5)


def test_bits_per_weight_count_every_stored_byte(converted, capsys):
    values = inspected(capsys, converted)

    stored = tensors_of(converted)
    n_bits = n_weights = 0
    for row in values["layers"]:
        parts = [t for key, t in stored.items() if key == row["name"] or key.startswith(f"{row['name']}.")]
        assert len(parts) == 6  # codes, absmax, their table, the quant_state, and the two of double quantization
        bits, weights = 8 * sum(t.nbytes for t in parts), row["shape"][0] * row["shape"][1]
        assert row["bits_per_weight"] == pytest.approx(bits / weights)
        n_bits, n_weights = n_bits + bits, n_weights + weights
    assert values["totals"]["bits_per_weight"] == pytest.approx(n_bits / n_weights)


def test_without_an_original_the_errors_are_the_reported_ones(original, converted, capsys):
    reported, computed = inspected(capsys, converted), inspected(capsys, converted, "--against", original)

    assert reported["errors_from"] == "report"
    for row, again in zip(reported["layers"], computed["layers"], strict=True):
        assert row["error"]["error"] == pytest.approx(again["error"]["error"], rel=1e-6)


@pytest.mark.parametrize("hide", ["loftq_elsewhere", "", "../base/other"])
def test_a_changed_report_does_not_change_what_is_recomputed(hide, original, converted, tmp_path, capsys):
    base = copy_of(converted, tmp_path / "base")
    expected = inspected(capsys, base, "--against", original)
    report = json.loads((base / "loftq_report.json").read_text())
    for layer in report["layers"]:
        layer["error"] = {**layer["error"], "squared_error": 1e-9, "squared_weight": 1e9}
        layer |= {"rank": 99, "scaling": 7.0, "module": "nonsense", "double_quant": False, "block_size": 4096}
    edit_json(base / "loftq_report.json", layers=report["layers"][:2], adapter_dir=hide)

    values = inspected(capsys, base, "--against", original)

    assert values == expected


def test_a_changed_adapter_changes_what_is_recomputed(original, converted, tmp_path, capsys):
    base = copy_of(converted, tmp_path / "base")
    name = f"{PREFIX}{Q0.removesuffix('.weight')}.lora_B.weight"
    edit_tensors(base / "loftq_init" / "adapter_model.safetensors", lambda t: t[name].zero_())

    rows = {row["name"]: row["error"] for row in inspected(capsys, base, "--against", original)["layers"]}

    assert rows[Q0]["error"] == rows[Q0]["base_error"]
    assert rows[Q0]["delta_norm"] == 0.0


@pytest.mark.parametrize("flags", [(), ("--against",)])
def test_a_layer_above_the_limit_fails_with_its_own_status(flags, original, converted, capsys):
    arguments = [converted, *flags, *([original] if flags else [])]
    errors = {row["name"]: row["error"]["error"] for row in inspected(capsys, *arguments)["layers"]}
    worst = max(errors, key=errors.__getitem__)
    limit = sorted(errors.values())[-2]

    status, line = refused(capsys, *arguments, "--fail-above", f"{limit:.9f}")

    assert status == 5
    assert f"tensor {worst}: error {errors[worst]:.4f} is above" in line
    assert _run(["inspect", *map(str, arguments), "--fail-above", f"{errors[worst] * 1.001}"]) == 0


def test_the_gate_prints_the_rows_it_judged(converted):
    run = loftq("inspect", converted, "--fail-above", "0.01", "--json")

    assert run.returncode == 5
    assert len(json.loads(run.stdout)["layers"]) == 7
    assert run.stderr.startswith("error: tensor model.layers.0.")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("error", lambda row: -row["error"]["error"]),
        ("base_error", lambda row: -row["error"]["base_error"]),
        ("numel", lambda row: -row["shape"][0] * row["shape"][1]),
        ("name", lambda row: row["name"]),
    ],
)
def test_rows_are_sorted_and_cut(key, value, converted, capsys):
    everything = inspected(capsys, converted)
    values = inspected(capsys, converted, "--sort", key, "--top", 3)

    assert [value(row) for row in values["layers"]] == sorted(value(row) for row in everything["layers"])[:3]
    assert values["totals"] == everything["totals"]


def test_the_keys_of_the_json_are_stable(original, converted, capsys):
    values = inspected(capsys, converted)

    assert set(values) == {"path", "errors_from", "totals", "layers"}
    errors = {"squared_weight", "squared_base_error", "squared_error", "max_error", "squared_delta"}
    errors |= {"base_error", "error", "sqnr_db", "delta_norm"}
    assert set(values["totals"]) == {"layers", "bits_per_weight", "plain_error"} | errors
    layer = {"name", "shape", "quant_type", "block_size", "double_quant", "bits_per_weight", "rank", "scaling", "error"}
    layer |= {"groups", "plain_error", "plain_output_error", "base_output_error", "output_error"}
    assert [set(row) for row in values["layers"]] == [layer] * 7
    assert set(values["layers"][0]["error"]) == errors
    dense = inspected(capsys, original, "--try", "nf4")
    assert set(dense) == {"path", "tensors", "totals"}
    assert set(dense["totals"]) == {"nf4"}
    assert [set(row) for row in dense["tensors"]] == [{"name", "shape", "dtype", "becomes", "errors"}] * 12


def test_the_table_names_every_layer_and_the_totals(original, converted, capsys):
    assert _run(["inspect", str(converted), "--against", str(original)]) == 0

    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    columns = ("layer", "shape", "type", "per", "bits", "rank")
    columns += ("plain error", "base error", "error", "max", "SQNR dB", "delta")
    assert " ".join(lines[0].split()) == " ".join(columns)
    assert [line.split()[0] for line in lines[1:8]] == sorted(decoded(converted))
    assert lines[8].startswith("7 layers, ")
    assert "errors recomputed from the files" in captured.err


def third_party(original: Path, directory: Path, *, nested: bool, block_size: int = 64) -> Path:
    """What `save_pretrained` of a bitsandbytes model writes: bitsandbytes' own codes and its own way to pack them."""
    tensors = {}
    for name, weight in tensors_of(original).items():
        if "_proj" in name:
            packed, state = bitsandbytes.functional.quantize_4bit(
                weight, blocksize=block_size, quant_type="nf4", compress_statistics=nested
            )
            tensors |= {name: packed} | {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}
        else:
            tensors[name] = weight
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(original / "config.json", directory)
    edit_json(directory / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    return directory


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", [32, 64])  # whole blocks a row: others, bitsandbytes decodes wrongly on a CPU
def test_a_4_bit_checkpoint_of_somebody_else_is_compared_with_its_original(
    nested, block_size, original, tmp_path, capsys
):
    base = third_party(original, tmp_path / "base", nested=nested, block_size=block_size)

    values = inspected(capsys, base, "--against", original)

    weights = tensors_of(original)
    assert [row["name"] for row in values["layers"]] == sorted(decoded(base))
    for row in values["layers"]:
        weight = weights[row["name"]].double()
        expected = float((weight - decoded(base)[row["name"]].double()).norm() / weight.norm())
        assert row["error"]["error"] == row["error"]["base_error"] == pytest.approx(expected, rel=1e-6)
        assert row["plain_error"] == pytest.approx(expected, rel=1e-6)  # the codes of bitsandbytes are plain rounding
        assert (row["rank"], row["double_quant"], row["block_size"]) == (None, nested, block_size)


def test_a_4_bit_checkpoint_of_somebody_else_has_no_error_without_its_original(original, tmp_path, capsys):
    base = third_party(original, tmp_path / "base", nested=True)

    values = inspected(capsys, base)

    assert [row["error"] for row in values["layers"]] == [None] * 7
    assert set(values["totals"]) == {"layers", "bits_per_weight"}
    assert refused(capsys, base, "--fail-above", "0.1") == (
        2,
        "error: --fail-above has no error to compare with (--against ORIGINAL or --try TYPE gives one)",
    )
    status, line = refused(capsys, base, "--sort", "error")
    assert (status, "--sort error needs errors (--against ORIGINAL computes them)" in line) == (2, True)


def test_names_are_compared_as_loaders_see_them(tmp_path, capsys):
    # gpt2 on the hub lacks the prefix "transformer." that its own save_pretrained writes.
    original = models.gpt2(tmp_path / "original")
    run_conversion(original, tmp_path / "base", rank=4, method="qlora")
    shutil.copytree(original, tmp_path / "hub")
    weights = {key.removeprefix("transformer."): value for key, value in tensors_of(original).items()}
    save_file(weights, tmp_path / "hub" / "model.safetensors", metadata={"format": "pt"})

    expected = inspected(capsys, tmp_path / "base", "--against", original)

    assert inspected(capsys, tmp_path / "base", "--against", tmp_path / "hub") == expected


def test_one_weight_file_of_a_converted_directory_is_inspected_with_its_report(converted, capsys):
    values = inspected(capsys, converted / "model.safetensors")

    assert values["layers"] == inspected(capsys, converted)["layers"]
    assert values["layers"][0]["rank"] == 4


# Full-precision checkpoints


def test_what_quantize_would_do_is_said_for_every_tensor(original, capsys):
    values = inspected(capsys, original)

    becomes = {row["name"]: row["becomes"] for row in values["tensors"]}
    assert becomes[Q0] == "nf4, block 64"
    assert becomes["lm_head.weight"] == "copied: head"
    assert becomes["model.embed_tokens.weight"] == "copied: embedding"
    assert becomes["model.norm.weight"] == "copied: not a matrix"
    assert sorted(becomes) == sorted(tensors_of(original))
    assert values["totals"] == {}
    assert {row["dtype"] for row in values["tensors"]} == {"bfloat16"}


def test_nf4_on_minilm_has_the_known_error(tmp_path, capsys):
    # ALGORITHMS.md: plain NF4, block 64, layers 0 and 5
    kept = {
        n: t for n, t in load_file(models.minilm() / "model.safetensors").items() if "layer.0." in n or "layer.5." in n
    }
    (tmp_path / "two").mkdir()
    save_file(kept, tmp_path / "two" / "model.safetensors")
    shutil.copy(models.minilm() / "config.json", tmp_path / "two")

    values = inspected(capsys, tmp_path / "two", "--try", "nf4")

    errors = [row["errors"]["nf4"] for row in values["tensors"] if row["errors"]]
    assert len(errors) == 12
    squared = [sum(error[key] for error in errors) for key in ("squared_error", "squared_weight")]
    assert (squared[0] / squared[1]) ** 0.5 == pytest.approx(0.0932, abs=0.0005)
    assert values["totals"]["nf4"]["error"] == pytest.approx(0.0932, abs=0.0005)


def test_a_tried_error_is_the_one_of_bitsandbytes(original, capsys):
    values = inspected(capsys, original, "--try", "nf4")

    rows = {row["name"]: row["errors"] for row in values["tensors"]}
    weight = tensors_of(original)[Q0]
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    residual = weight.double() - bitsandbytes.functional.dequantize_4bit(packed, state).double()
    assert rows[Q0]["nf4"]["error"] == pytest.approx(float(residual.norm() / weight.double().norm()), rel=1e-6)
    assert rows["lm_head.weight"] == {}


def test_tried_errors_are_sorted_cut_and_judged(original, capsys):
    values = inspected(capsys, original, "--try", "nf4", "--sort", "error", "--top", 2)

    everything = inspected(capsys, original, "--try", "nf4")["tensors"]
    errors = {row["name"]: row["errors"]["nf4"]["error"] for row in everything if row["errors"]}
    assert [row["name"] for row in values["tensors"]] == sorted(errors, key=lambda name: -errors[name])[:2]
    status, line = refused(capsys, original, "--try", "nf4", "--fail-above", "0.05")
    assert (status, f"tensor {max(errors, key=errors.__getitem__)}: error" in line) == (5, True)


# Refusals


def test_an_original_that_lacks_a_layer_is_refused(original, converted, tmp_path, capsys):
    other = copy_of(original, tmp_path / "other")
    edit_tensors(other / "model.safetensors", lambda t: t.pop(Q0))

    status, line = refused(capsys, converted, "--against", other)

    assert (status, f"tensor {Q0}: is not in the original" in line) == (4, True), line


def test_an_original_of_another_shape_is_refused(original, converted, tmp_path, capsys):
    other = copy_of(original, tmp_path / "other")
    edit_tensors(other / "model.safetensors", lambda t: t.update({Q0: t[Q0][:64].clone()}))

    status, line = refused(capsys, converted, "--against", other)

    assert (status, "(64, 128) in the original and (128, 128) here" in line) == (4, True), line


def test_a_converted_directory_is_no_original(converted, capsys):
    status, line = refused(capsys, converted, "--against", converted)

    assert (status, "is not in full precision there" in line) == (4, True), line


def test_a_layer_of_the_report_that_the_files_lack_is_refused(converted, tmp_path, capsys):
    base = copy_of(converted, tmp_path / "base")

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [key for key in tensors if key.startswith(Q0)]:
            del tensors[name]

    edit_tensors(base / "model.safetensors", drop)

    status, line = refused(capsys, base)

    assert (status, f"tensor {Q0}: is in loftq_report.json and not in the files" in line) == (2, True), line


@pytest.mark.parametrize("whose", ["original", "base"])
def test_nan_is_named_and_passes_no_gate(whose, original, converted, tmp_path, capsys):
    paths = {"original": copy_of(original, tmp_path / "original"), "base": copy_of(converted, tmp_path / "base")}
    tensor = Q0 if whose == "original" else f"{Q0}.nested_absmax"
    edit_tensors(paths[whose] / "model.safetensors", lambda t: t[tensor].view(-1)[:1].fill_(torch.nan))

    status, line = refused(capsys, paths["base"], "--against", paths["original"], "--fail-above", "0.5")

    assert (status, f"{paths[whose]}: tensor {Q0}: holds NaN" in line) == (2, True), line


def test_nan_in_a_tried_tensor_is_named(original, tmp_path, capsys):
    other = copy_of(original, tmp_path / "other")
    edit_tensors(other / "model.safetensors", lambda t: t[Q0].view(-1)[:1].fill_(torch.nan))

    status, line = refused(capsys, other, "--try", "nf4")

    assert (status, f"tensor {Q0}: holds NaN" in line) == (2, True), line


@pytest.mark.parametrize(
    ("change", "says", "status"),
    [
        (lambda d: edit_json(d / "adapter_config.json", lora_alpha="many"), "lora_alpha is 'many', not a positive", 2),
        (lambda d: edit_json(d / "adapter_config.json", alpha_pattern={"(": 4}), "the key '(', no regular", 2),
        (lambda d: edit_json(d / "adapter_config.json", alpha_pattern=[1]), "alpha_pattern is not a table", 2),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors", 2),
        (
            lambda d: edit_tensors(
                d / "adapter_model.safetensors", lambda t: t.pop(f"{PREFIX}{Q0.removesuffix('.weight')}.lora_B.weight")
            ),
            "lora_A.weight: has no lora_B beside it",
            4,
        ),
        (
            lambda d: edit_tensors(
                d / "adapter_model.safetensors",
                lambda t: t.update({f"{PREFIX}{Q0.removesuffix('.weight')}.lora_B.weight": torch.zeros(7, 4)}),
            ),
            "lora_B.weight: is (7, 4), and its layer asks for (128, 4)",
            4,
        ),
    ],
)
def test_a_damaged_adapter_is_refused(change, says, status, original, converted, tmp_path, capsys):
    base = copy_of(converted, tmp_path / "base")
    change(base / "loftq_init")

    found, line = refused(capsys, base, "--against", original)

    assert (found, says in line) == (status, True), line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("{original}", "--against", "{original}"), "--against is for a converted directory"),
        (("{converted}", "--try", "nf4"), "--try is for a full-precision checkpoint"),
        (("{original}", "--try", "nf9"), "--try 'nf9' does not exist (one of nf4"),
        (("{converted}", "--sort", "size"), "--sort 'size' does not exist (one of name, error, base_error, numel)"),
        (("{original}", "--sort", "size"), "--sort 'size' does not exist"),
        (("{original}", "--try", "nf4", "--sort", "size"), "--sort 'size' does not exist"),
        (("{original}", "--sort", "error"), "--sort error needs errors (--try nf4 computes them)"),
        (("{original}", "--fail-above", "0.1"), "--fail-above has no error to compare with"),
        (("{original}", "--top", "0"), "--top"),
        (("{original}", "--fail-above", "-1"), "--fail-above"),
        (("nowhere",), "no such file or folder"),
        (("{converted}/loftq_init",), "is an adapter, not a model"),
        (("builtin:nothing",), "no built-in model 'nothing'"),
    ],
)
def test_what_means_nothing_is_refused(arguments, says, original, converted, capsys):
    filled = [text.format(original=original, converted=converted) for text in arguments]

    status, line = refused(capsys, *filled)

    assert (status, says in line) == (2, True), line


# A process in which the libraries that load the results cannot be imported.
_WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocked())
from loftq_cli.cli.main import _run
sys.exit(_run(sys.argv[1:]))
"""


def run_without(blocked: set[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    code = _WITHOUT.replace("{blocked}", repr(blocked))
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_inspection_and_merging_need_no_library_that_loads_the_results(original, converted, tmp_path):
    libraries = {"transformers", "peft", "bitsandbytes", "accelerate", "huggingface_hub", "safetensors"}

    inspection = run_without(libraries, "inspect", converted, "--against", original)
    merge = run_without(libraries, "merge", converted, converted / "loftq_init", tmp_path / "out")

    assert inspection.returncode == 0, inspection.stderr
    assert "7 layers" in inspection.stdout
    assert merge.returncode == 0, merge.stderr
    assert len(tensors_of(tmp_path / "out")) == 12


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("{original}",), 0),
        (("{converted}",), 0),
        (("{converted}", "--sort", "error", "--top", "3", "--json"), 0),
        (("{converted}", "--fail-above", "0.001"), 5),
        (("{original}", "--sort", "numel", "--top", "3", "--json"), 0),
        (("{original}", "--sort", "error"), 2),
        (("nowhere",), 2),
    ],
)
def test_what_headers_tell_needs_no_torch(arguments, status, original, converted):
    filled = [text.format(original=original, converted=converted) for text in arguments]

    run = run_without({"torch", "numpy"}, "inspect", *filled)

    assert run.returncode == status, run.stderr


def test_a_gpu_that_has_nothing_to_compute_is_refused(original, converted, tmp_path, capsys):
    (tmp_path / "TEXT").write_text("a text")
    reference = ("--reference", original, "--text", tmp_path / "TEXT")
    messages = {
        (converted,): "--device cuda:7 has nothing to compute (--against ORIGINAL, or leave --device out)",
        (converted, *reference): "and --device cuda:7 is for --against (leave --device out)",
        (original,): "--device cuda:7 has nothing to compute (--try TYPE, or leave --device out)",
    }
    for arguments, message in messages.items():
        status, said = refused(capsys, *arguments, "--device", "cuda:7")
        assert (status, message in said) == (2, True), said
