"""QPiSSA: the adapter is the principal part of the weights, the base the quantized rest, and the two belong together in
everything that reads a result.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import models
from support.adapters import edit_json
from support.conversions import loftq, run_conversion, run_merge

from loftq_cli.errors import MismatchError, UsageError
from loftq_cli.methods.method import Fitting, load_method
from loftq_cli.nn import load_adapted, save_adapter
from loftq_cli.planning.recipe_files import resolve_recipe
from loftq_cli.planning.settle import make_recipe
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import CodebookSpec, LoraSpec

RANK, SPIKES = 4, 6
NAME = "model.layers.0.self_attn.q_proj"
FIT = {"method": "pissa", "rank": RANK}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("pissa") / "model", layers=1)


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    return run_conversion(source, source.parent / "converted", svd="exact", **FIT).output


def spiked(out_features: int = 96, in_features: int = 160) -> torch.Tensor:
    """A matrix with a few directions that stand out of the noise, as those of trained layers do."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(out_features, SPIKES, generator=generator),
        torch.randn(SPIKES, in_features, generator=generator),
    )
    return 0.05 * torch.randn(out_features, in_features, generator=generator) + 0.1 * left @ right


def principal_part(weight: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def fitted(weight: torch.Tensor, lora: LoraSpec, **fitting: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """dequant(Q) and s·B·A in float64, and what the method gave."""
    quantizer = make_quantizer(CodebookSpec(), "float32")
    generator = torch.Generator().manual_seed(1)
    result = load_method("pissa")(TensorRows(weight), quantizer, lora, Fitting(**fitting), generator=generator)
    pair = result.lora
    delta = pair.scaling * pair.lora_B.double() @ pair.lora_A.double()
    return quantizer.dequantize(result.quantized).double(), delta, result


@pytest.mark.parametrize("alpha", [4.0, 9.0])
@pytest.mark.parametrize(("svd", "tolerance"), [("exact", 1e-6), ("faithful", 1e-4), ("fast", 1e-3)])
def test_the_adapter_is_the_principal_part_whatever_its_scaling(alpha: float, svd: str, tolerance: float) -> None:
    weight = spiked()
    _, delta, _ = fitted(weight, LoraSpec(SPIKES, alpha), svd=svd)
    expected = principal_part(weight, SPIKES)
    assert float((delta - expected).norm() / expected.norm()) < tolerance


def test_the_factors_are_those_of_peft() -> None:
    """`init_lora_weights="pissa"` of PEFT, up to the sign of each direction."""
    peft = pytest.importorskip("peft")
    weight = spiked()
    model = torch.nn.Sequential(torch.nn.Linear(160, 96, bias=False))
    model[0].weight.data = weight.clone()
    config = peft.LoraConfig(r=RANK, lora_alpha=9, init_lora_weights="pissa", target_modules=["0"])
    layer = peft.get_peft_model(model, config).base_model.model[0]
    _, _, result = fitted(weight, LoraSpec(RANK, 9.0), svd="exact")
    theirs_A, theirs_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    sign = torch.sign((theirs_A * result.lora.lora_A).sum(dim=1))
    torch.testing.assert_close(result.lora.lora_A, sign[:, None] * theirs_A, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(result.lora.lora_B, sign * theirs_B, atol=1e-4, rtol=1e-3)
    # PEFT leaves the rest in full precision; ours is that rest in NF4.
    rest = make_quantizer(CodebookSpec(), "float32")
    expected = rest.dequantize(rest.quantize(TensorRows(layer.base_layer.weight.detach().clone())))
    decoded = rest.dequantize(result.quantized)
    assert float((decoded - expected).norm() / expected.norm()) < 1e-3


def test_base_and_adapter_are_nearer_to_the_weights_than_nf4_alone() -> None:
    weight = spiked()
    decoded, delta, result = fitted(weight, LoraSpec(RANK, 4.0), svd="exact")
    quantizer = make_quantizer(CodebookSpec(), "float32")
    alone = quantizer.dequantize(quantizer.quantize(TensorRows(weight))).double()
    total = float(weight.double().norm())
    assert result.quantization_error == pytest.approx(float((weight.double() - alone).norm()) / total, rel=1e-4)
    assert result.iteration_errors == (
        pytest.approx(float((weight.double() - decoded - delta).norm()) / total, rel=1e-4),
    )
    assert result.iteration_errors[0] < 0.9 * result.quantization_error


def test_more_iterations_are_the_loop_of_the_authors_code() -> None:
    weight, quantizer = spiked(), make_quantizer(CodebookSpec(), "float32")
    errors, rest = [], weight
    for _ in range(5):
        delta = principal_part(rest, RANK).float()
        decoded = quantizer.dequantize(quantizer.quantize(TensorRows(weight - delta)))
        rest = weight - decoded
        errors.append(float((rest - delta).norm() / weight.norm()))
    _, _, result = fitted(weight, LoraSpec(RANK, 4.0), svd="exact", iterations=5)
    assert result.iteration_errors == pytest.approx(errors, rel=1e-2)
    assert result.best_iteration == 1 + result.iteration_errors.index(min(result.iteration_errors))
    assert min(result.iteration_errors) < result.iteration_errors[0]


def test_a_matrix_of_zeros_stays_one() -> None:
    decoded, delta, result = fitted(torch.zeros(64, 64), LoraSpec(RANK, 4.0), iterations=2)
    assert not decoded.any() and not delta.any()
    assert result.iteration_errors == (0.0, 0.0)


def test_the_preset_is_the_default_of_the_method() -> None:
    assert resolve_recipe("pissa-nf4", {}) == make_recipe(method="pissa")
    assert make_recipe(method="pissa").fitting.iterations == 1


@pytest.mark.parametrize(
    "option", [{"fit": "joint"}, {"start": "zero"}, {"rounds": 1}, {"keep_base": 0.5}, {"calibration": "STATS"}]
)
def test_options_of_other_fits_are_refused(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(UsageError, match=rf"{name} means nothing with method pissa \(leave {name} out\)"):
        make_recipe(method="pissa", **option)


def test_a_conversion_reports_its_iterations_and_names_its_method(source: Path, converted: Path) -> None:
    provenance = json.loads((converted / "pissa_init" / "loftq_provenance.json").read_text())
    assert provenance["method"] == "pissa" and "init" not in provenance
    report = json.loads((converted / "loftq_report.json").read_text())
    assert all(len(layer["iteration_errors"]) == 1 for layer in report["layers"])
    assert report["totals"]["error"] < report["totals"]["base_error"]
    assert "principal part" in (converted / "README.md").read_text()
    factors = load_file(converted / "pissa_init" / "adapter_model.safetensors")
    lora_A, lora_B = (factors[f"base_model.model.{NAME}.lora_{side}.weight"] for side in "AB")
    expected = principal_part(load_file(source / "model.safetensors")[f"{NAME}.weight"], RANK)
    assert float((lora_B.double() @ lora_A.double() - expected).norm() / expected.norm()) < 1e-5


def test_the_adapter_merges_into_its_own_base(source: Path, converted: Path, tmp_path: Path) -> None:
    merged = load_file(run_merge(converted, converted / "pissa_init", tmp_path / "merged") / "model.safetensors")
    original = load_file(source / "model.safetensors")
    error = (merged[f"{NAME}.weight"].double() - original[f"{NAME}.weight"].double()).norm()
    assert float(error / original[f"{NAME}.weight"].double().norm()) < 0.1


def test_the_adapter_is_refused_on_the_original_weights(source: Path, converted: Path, tmp_path: Path) -> None:
    run = loftq("merge", source, converted / "pissa_init", tmp_path / "merged")
    assert run.returncode == 4
    assert "the pissa adapter was made for" in run.stderr and "--force" in run.stderr
    assert not (tmp_path / "merged").exists()


def test_a_trained_adapter_is_refused_there_too_with_a_record_and_without(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "trained"
    trained.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (trained / name).write_bytes((converted / "pissa_init" / name).read_bytes())
    with pytest.raises(MismatchError, match="the pissa adapter was made for"):
        run_merge(source, trained, tmp_path / "merged")
    edit_json(trained / "adapter_config.json", megatron_core="megatron.core", base_model_name_or_path=str(converted))
    with pytest.raises(MismatchError, match="another base with a fitted adapter of its own"):
        run_merge(source, trained, tmp_path / "merged")


def test_inspect_computes_the_reported_error_from_the_files(source: Path, converted: Path) -> None:
    run = loftq("inspect", converted, "--against", source, "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads((converted / "loftq_report.json").read_text())
    assert json.loads(run.stdout)["totals"]["error"] == pytest.approx(report["totals"]["error"], rel=1e-4)
    assert loftq("inspect", converted, "--verify").returncode == 0


def test_our_modules_train_save_and_merge_it(converted: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(converted)
    model = load_adapted(transformers.AutoModelForCausalLM.from_config(config), converted)
    layer = model.get_submodule(NAME)
    assert type(layer).__name__ == "LoftQLinear"
    layer.lora_B.data.mul_(1.01)
    save_adapter(model, tmp_path / "trained")
    provenance = json.loads((tmp_path / "trained" / "loftq_provenance.json").read_text())
    assert provenance["method"] == "pissa"
    run_merge(converted, tmp_path / "trained", tmp_path / "merged")


def test_the_command_line_offers_it() -> None:
    shown = loftq("quantize", "--help", COLUMNS="400").stdout
    assert "pissa: adapter of the principal part of the weights" in shown
    assert "pissa-nf4" in loftq("recipes").stdout
