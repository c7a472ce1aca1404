"""Merging QA-LoRA adapters into the offsets of groups, exactly; what rounding loses; and integers quantized again.

Expected weights are read from the raw tensors with numpy's bit operations and added up in float64.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models
from support.adapters import (
    PREFIX,
    decoded,
    edit_json,
    edit_tensors,
    effective_update,
    loaded,
    names_in,
    tensors_of,
)
from support.conversions import run_conversion

from loftq_cli.cli.main import _run
from loftq_cli.model.stored import BaseModel

Q0 = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
LINEARS = sorted(
    [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    + [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
)

CONTAINERS = {
    "compressed-tensors": {},
    "compressed-tensors of float32": {"model": "float32"},
    "gptq": {"layout": "gptq"},
    "metal": {"layout": "metal"},
    "mlx": {"layout": "mlx"},
}
BASES = [(name, bits) for name in CONTAINERS for bits in (2, 3, 4, 8) if (name, bits) != ("metal", 3)]


# Containers, read again.


@dataclass(frozen=True)
class Grid:
    """A stored matrix: codes [out, in], scales and what is added to code · scale [out, groups] in float64."""

    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def zero_points(self) -> np.ndarray:
        return -self.offsets / self.scales

    @property
    def values(self) -> np.ndarray:
        wide = [np.repeat(part, self.group_size, axis=1) for part in (self.scales, self.offsets)]
        return self.codes * wide[0] + wide[1]


def bit_stream(words: torch.Tensor, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of each row of 32-bit words: element i at bit i · bits, little-endian."""
    rows = words.contiguous().view(torch.int32).numpy().astype("<i4").view(np.uint8)
    found = np.unpackbits(rows, axis=1, bitorder="little")[:, : count * bits]
    return found.reshape(len(rows), count, bits) @ (1 << np.arange(bits))


def container_of(directory: Path) -> tuple[str, int, int]:
    """Its name, the bits and the group size, from config.json."""
    config = config_of(directory)
    if "quantization" in config:
        return "mlx", config["quantization"]["bits"], config["quantization"]["group_size"]
    found = config["quantization_config"]
    if found["quant_method"] == "compressed-tensors":
        weights = found["config_groups"]["group_0"]["weights"]
        return "compressed-tensors", weights["num_bits"], weights["group_size"]
    return found["quant_method"], found["bits"], found["group_size"]


def grids(directory: Path) -> dict[str, Grid]:
    """Every quantized matrix of a directory, by module name."""
    (name, bits, group_size), tensors = container_of(directory), tensors_of(directory)
    ending = {"compressed-tensors": "weight_packed", "gptq": "qweight"}.get(name, "scales")
    modules = [key.removesuffix(f".{ending}") for key in tensors if key.endswith(f".{ending}")]
    found = {}
    for module in modules:
        parts = {key.removeprefix(f"{module}."): tensors[key] for key in tensors if key.startswith(f"{module}.")}
        found[module] = _grid(name, parts, bits)
        assert found[module].group_size == group_size
    return found


def _grid(name: str, parts: dict[str, torch.Tensor], bits: int) -> Grid:
    if name == "gptq":
        scales = parts["scales"].T.double().numpy()
        codes = bit_stream(parts["qweight"].T, bits, len(parts["g_idx"]))
        return Grid(codes, scales, -scales * bit_stream(parts["qzeros"], bits, len(scales)).T)
    if name != "compressed-tensors":
        scales, offsets = parts["scales"].double().numpy(), parts["qbiases" if name == "metal" else "biases"]
        codes = bit_stream(parts["weight"], bits, parts["weight"].shape[1] * 32 // bits)
        return Grid(codes, scales, offsets.double().numpy())
    out_features, in_features = parts["weight_shape"].tolist()
    scales = parts["weight_scale"].double().numpy()
    codes = bit_stream(parts["weight_packed"], bits, in_features)
    if "weight_zero_point" not in parts:
        return Grid(codes, scales, -scales * 2 ** (bits - 1))
    return Grid(codes, scales, -scales * bit_stream(parts["weight_zero_point"].T, bits, out_features).T)


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


# Bases and adapters.


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One block, in two dtypes: rows of 128 and 192."""
    folder = tmp_path_factory.mktemp("models")
    return {name: models.llama(folder / name, layers=1, dtype=getattr(torch, name)) for name in ("bfloat16", "float32")}


class Conversions:
    """QA-LoRA bases with an adapter of rank 4 that starts at zero, each made once."""

    def __init__(self, llamas: dict[str, Path], folder: Path) -> None:
        self.llamas, self.folder, self.made = llamas, folder, {}

    def __call__(self, container: str, bits: int = 4, **recipe: Any) -> Path:
        key = (container, bits, *sorted(recipe.items()))
        if key not in self.made:
            options = {"model": "bfloat16", **CONTAINERS[container], "rank": 4, "alpha": 6.0, "group_size": 32}
            options |= {"method": "qalora", "quant_type": f"int{bits}", **recipe}
            if options["method"] == "qalora":
                options = {"init": "standard", **options}
            self.made[key] = self.folder / f"base{len(self.made)}"
            run_conversion(self.llamas[options.pop("model")], self.made[key], **options)
        return self.made[key]


@pytest.fixture(scope="module")
def converted(llamas: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Conversions:
    return Conversions(llamas, tmp_path_factory.mktemp("bases"))


@dataclass(frozen=True)
class Trained:
    """An adapter directory as training would leave it, and the update [out, in] of each module in float64."""

    path: Path
    updates: dict[str, np.ndarray]


def trained(
    base: Path,
    directory: Path,
    *,
    share: float = 0.02,
    convention: str = "peft",
    group_size: int = 32,
    modules: Sequence[str] = LINEARS,
    stored: dict[str, np.ndarray] | None = None,
) -> Trained:
    """Random factors of rank 4 and alpha 6 in a copy of the base's adapter, each update `share` of its weight."""
    shutil.copytree(next(base.glob("*_init")), directory)
    stored = stored or {name: grid.values for name, grid in grids(base).items()}
    generator = torch.Generator().manual_seed(11)
    factors, updates = {}, {}
    for module in modules:
        out_features, in_features = stored[module].shape
        lora_A = torch.randn(4, in_features // group_size, generator=generator)
        lora_B = torch.randn(out_features, 4, generator=generator)
        if group_size > 1:
            update = effective_update(lora_A, lora_B, 6 / 4, convention, group_size)
        else:
            update = 6 / 4 * lora_B.double() @ lora_A.double()
        factor = share * float(np.linalg.norm(stored[module])) / float(update.norm())
        lora_B = lora_B * factor
        factors |= {f"{PREFIX}{module}.lora_A.weight": lora_A, f"{PREFIX}{module}.lora_B.weight": lora_B}
        if group_size > 1:
            updates[module] = effective_update(lora_A, lora_B, 6 / 4, convention, group_size).numpy()
        else:
            updates[module] = (6 / 4 * lora_B.double() @ lora_A.double()).numpy()
    save_file(factors, directory / "adapter_model.safetensors")
    if group_size > 1:
        says = {"use_qalora": True} if convention == "peft" else {"use_qalora": False, "qalora_pooling": convention}
        edit_json(directory / "adapter_config.json", **says, qalora_group_size=group_size)
    return Trained(directory, updates)


@dataclass(frozen=True)
class Ran:
    """One merge: its exit status, what it printed and what it said."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    @property
    def line(self) -> str:
        """The one line of a refusal."""
        lines = [line for line in self.err.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture
def merge(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(base: Path, adapter: Path | Trained, out: Path, *arguments: object) -> Ran:
        path = adapter.path if isinstance(adapter, Trained) else adapter
        capsys.readouterr()
        status = _run(["merge", *map(str, (base, path, out, "--quiet", *arguments))])
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return run


def largest(values: np.ndarray) -> float:
    return float(np.abs(values).max())


def assert_exact(base: Path, out: Path, updates: dict[str, np.ndarray]) -> None:
    """The base's codes and scales, and (code − zero) · scale + update to a millionth of the largest weight."""
    before, after = grids(base), grids(out)
    assert sorted(after) == sorted(before) == LINEARS
    for module, grid in after.items():
        assert np.array_equal(grid.codes, before[module].codes)
        assert np.array_equal(grid.scales, before[module].scales)
        exact = before[module].values + updates.get(module, 0.0)
        assert largest(grid.values - exact) <= 1e-6 * largest(exact), module


def lost_by_hand(base: Path, out: Path, updates: dict[str, np.ndarray]) -> float:
    """||W_merged − W_exact|| / ||update|| over all modules that have one."""
    before, after = grids(base), float32_values(out)
    wrong = sum(np.square(after[m].double().numpy() - before[m].values - x).sum() for m, x in updates.items())
    return float(np.sqrt(wrong / sum(np.square(update).sum() for update in updates.values())))


def loaded_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The linears of the block as transformers has them, which must find every tensor and need no other."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return {module: model.get_submodule(module).weight.detach() for module in LINEARS}


def float32_values(directory: Path) -> dict[str, torch.Tensor]:
    """code · scale + bias as a loader of float offsets computes it, in float32."""
    found = {}
    for module, grid in grids(directory).items():
        codes, scales, offsets = (torch.from_numpy(x).float() for x in (grid.codes, grid.scales, grid.offsets))
        wide = [part.repeat_interleave(grid.group_size, dim=1) for part in (scales, offsets)]
        found[module] = codes * wide[0] + wide[1]
    return found


# The exact merge.


@pytest.mark.parametrize("convention", ["peft", "paper", "repo"])
@pytest.mark.parametrize(("container", "bits"), BASES)
def test_an_adapter_merges_into_the_offsets_exactly(container, bits, convention, converted, merge, tmp_path):
    base = converted(container, bits)
    adapter = trained(base, tmp_path / "adapter", convention=convention)

    ran = merge(base, adapter, tmp_path / "out", "--json")

    assert (ran.status, ran.err) == (0, "")
    own = container if container in ("metal", "mlx") else "mlx" if bits == 3 else "metal"
    assert container_of(tmp_path / "out") == (own, bits, 32)
    assert_exact(base, tmp_path / "out", adapter.updates)
    assert ran.json["layout"] == own
    assert [layer["name"] for layer in ran.json["layers"]] == [f"{module}.weight" for module in LINEARS]
    assert ran.json["lost"] == pytest.approx(lost_by_hand(base, tmp_path / "out", adapter.updates), abs=1e-6)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_the_printed_difference_is_that_of_the_written_weights(container, scale_dtype, converted, merge, tmp_path):
    base = converted(container)
    adapter = trained(base, tmp_path / "adapter")

    text = merge(base, adapter, tmp_path / "text", "--scale-dtype", scale_dtype)
    ran = merge(base, adapter, tmp_path / "out", "--scale-dtype", scale_dtype, "--json")

    assert (text.status, ran.status) == (0, 0)
    before, after = grids(base), float32_values(tmp_path / "out")
    lost = lost_by_hand(base, tmp_path / "out", adapter.updates)
    differences, shares = [], []
    for layer in ran.json["layers"]:
        module = layer["name"].removesuffix(".weight")
        exact = before[module].values + adapter.updates[module]
        differences.append(largest(after[module].double().numpy() - exact))
        shares.append(differences[-1] / largest(exact))
        # the sum is measured with s·B·A of float32 factors, which is itself off by its float32 rounding
        off = 2e-7 * largest(adapter.updates[module])
        assert layer["max_difference"] == pytest.approx(differences[-1], rel=1e-5, abs=off)
        assert layer["relative_difference"] == pytest.approx(shares[-1], rel=1e-5, abs=off / largest(exact))
    assert ran.json["lost"] == pytest.approx(lost, rel=1e-4, abs=1e-6)
    assert text.out.splitlines()[2] == f"lost     {ran.json['lost']:.2%} of the update"
    printed = [max(layer[key] for layer in ran.json["layers"]) for key in ("max_difference", "relative_difference")]
    expected = f"at most {printed[0]:.1e} from base and adapter ({printed[1]:.1e} of the largest weight)"
    assert expected in text.out
    report = json.loads((tmp_path / "out" / "loftq_merge_report.json").read_text())
    assert (report["lost"], report["layers"]) == (ran.json["lost"], ran.json["layers"])


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_16_bit_offsets_lose_a_share_of_a_small_update(scale_dtype, converted, merge, tmp_path):
    # FORMATS, section 4: of an update of 3 % at 4 bits, bfloat16 loses 12 % and float16 1.5 %. Scales of a bfloat16
    # base are bfloat16 already.
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", share=0.03)

    ran = merge(base, adapter, tmp_path / "out", "--scale-dtype", scale_dtype, "--json")

    low, high = {"float16": (0.005, 0.03), "bfloat16": (0.05, 0.2)}[scale_dtype]
    assert low < ran.json["lost"] < high
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {
        torch.uint32,
        getattr(torch, scale_dtype),
    }


def test_offsets_that_lose_most_of_a_tiny_update_are_refused(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", share=0.002)

    ran = merge(base, adapter, tmp_path / "out", "--scale-dtype", "bfloat16")

    assert (ran.status, ran.out) == (5, "")
    assert "with such offsets," in ran.line
    assert "of the update would be lost (float32 offsets keep all of it" in ran.line
    assert names_in(tmp_path) == ["adapter"]
    assert merge(base, adapter, tmp_path / "out").status == 0


@pytest.mark.parametrize(("container", "bits"), [(c, b) for c, b in BASES if c != "mlx" and b != 3])
def test_transformers_loads_the_merged_weights(container, bits, converted, merge, tmp_path):
    base = converted(container, bits)
    assert merge(base, trained(base, tmp_path / "adapter"), tmp_path / "out").status == 0

    weights = loaded_weights(tmp_path / "out")

    for module, expected in float32_values(tmp_path / "out").items():
        assert weights[module].dtype == torch.float32
        assert torch.equal(weights[module], expected), module
    assert config_of(tmp_path / "out")["dtype"] == "float32"


def test_every_tensor_of_a_metal_model_has_one_dtype(converted, llamas, merge, tmp_path):
    base = converted("compressed-tensors")
    assert merge(base, trained(base, tmp_path / "adapter"), tmp_path / "out").status == 0

    merged, original = tensors_of(tmp_path / "out"), tensors_of(llamas["bfloat16"])
    untouched = [name for name in original if "_proj" not in name]
    assert len(untouched) == 5
    for name in untouched:
        assert merged[name].dtype == torch.float32
        assert torch.equal(merged[name], original[name].float())


@pytest.mark.parametrize("container", CONTAINERS)
def test_weights_without_an_adapter_keep_their_values(container, converted, merge, tmp_path):
    base = converted(container)
    adapter = trained(base, tmp_path / "adapter", modules=[DOWN])

    ran = merge(base, adapter, tmp_path / "out", "--json")

    assert [layer["name"] for layer in ran.json["layers"]] == [f"{DOWN}.weight"]
    assert_exact(base, tmp_path / "out", adapter.updates)
    before, after = grids(base), grids(tmp_path / "out")
    for module in set(LINEARS) - {DOWN}:
        # -zero point · scale of a 16-bit scale is exact in float32, and a bias is kept; of a float32 scale it is
        # rounded once
        offsets = before[module].offsets.astype(np.float32).astype(np.float64)
        assert np.array_equal(after[module].offsets, offsets)
        assert np.array_equal(offsets, before[module].offsets) == (container != "compressed-tensors of float32")


def test_adapter_groups_of_several_base_groups_merge_exactly(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", group_size=64)

    assert merge(base, adapter, tmp_path / "out").status == 0

    assert container_of(tmp_path / "out") == ("metal", 4, 32)
    assert_exact(base, tmp_path / "out", adapter.updates)


def test_a_group_of_the_whole_row_merges_exactly(converted, merge, tmp_path):
    base = converted("gptq")
    adapter = trained(base, tmp_path / "adapter", group_size=192, modules=[DOWN])

    assert merge(base, adapter, tmp_path / "out").status == 0

    assert_exact(base, tmp_path / "out", adapter.updates)


def test_a_symmetric_base_gets_offsets_of_its_own(converted, merge, tmp_path):
    base = converted("compressed-tensors", 8, method="qlora", symmetric=True)
    adapter = trained(base, tmp_path / "adapter")

    assert merge(base, adapter, tmp_path / "out").status == 0

    assert "weight_zero_point" not in {name.rpartition(".")[2] for name in tensors_of(base)}
    assert_exact(base, tmp_path / "out", adapter.updates)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_dense_merge_is_the_decoded_weight_plus_the_update_in_the_models_dtype(container, converted, merge, tmp_path):
    base = converted(container)
    adapter = trained(base, tmp_path / "adapter")

    ran = merge(base, adapter, tmp_path / "out", "--layout", "dense", "--json")

    dtype = torch.float32 if container.endswith("float32") else torch.bfloat16
    assert (ran.status, ran.json["lost"]) == (0, None)
    merged, stored = tensors_of(tmp_path / "out"), grids(base)
    assert "quantization_config" not in config_of(tmp_path / "out")
    for module in LINEARS:
        weight, values = merged[f"{module}.weight"], torch.from_numpy(stored[module].values)
        # what the base's loader decodes to: the model's dtype, which the scales have too, but for GPTQ
        rounding = torch.float16 if container == "gptq" else dtype
        before = values.to(rounding).double() if dtype == torch.bfloat16 else values
        exact = before + torch.from_numpy(adapter.updates[module])
        assert weight.dtype == dtype
        unit = torch.exp2(torch.frexp(exact.abs()).exponent.double() - 1) * torch.finfo(dtype).eps
        float32_error = 2 * torch.finfo(torch.float32).eps * largest(exact.numpy())
        assert bool(((weight.double() - exact).abs() <= unit / 2 + float32_error).all())
    assert sorted(loaded(tmp_path / "out").state_dict()) == sorted(merged)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_merged_directory_is_a_base_again(container, converted, merge, tmp_path, capsys):
    base = converted(container)
    adapter = trained(base, tmp_path / "adapter")
    assert merge(base, adapter, tmp_path / "out").status == 0

    with BaseModel.open(tmp_path / "out") as opened:
        assert opened.layout.name == container_of(tmp_path / "out")[0]
        for module, expected in float32_values(tmp_path / "out").items():
            assert torch.equal(opened.matrix(f"{module}.weight"), expected)

    capsys.readouterr()
    assert _run(["inspect", str(tmp_path / "out"), "--json"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown)
    assert all(module in shown for module in LINEARS)
    # and the same update goes on top of the first
    assert merge(tmp_path / "out", adapter, tmp_path / "twice", "--force").status == 0
    assert_exact(base, tmp_path / "twice", {module: 2 * update for module, update in adapter.updates.items()})


def test_patterns_and_rank_stabilized_scaling_are_inside_the_offsets(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")
    edit_json(adapter.path / "adapter_config.json", use_rslora=True, alpha_pattern={DOWN: 3})

    assert merge(base, adapter, tmp_path / "out").status == 0

    # written for alpha / rank = 6 / 4; now alpha / √rank, with alpha 3 for one
    updates = {m: update * (3 / 2 if m == DOWN else 6 / 2) / (6 / 4) for m, update in adapter.updates.items()}
    assert_exact(base, tmp_path / "out", updates)


def test_a_pooled_adapter_of_16_bits_merges_exactly(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")
    weights = adapter.path / "adapter_model.safetensors"
    edit_tensors(weights, lambda t: t.update({name: value.to(torch.bfloat16) for name, value in t.items()}))

    assert merge(base, adapter, tmp_path / "out").status == 0

    factors = load_file(weights)
    names = {m: [f"{PREFIX}{m}.lora_{x}.weight" for x in "AB"] for m in LINEARS}
    updates = {m: effective_update(factors[a], factors[b], 6 / 4, "peft", 32).numpy() for m, (a, b) in names.items()}
    assert_exact(base, tmp_path / "out", updates)


def test_a_linear_saved_whole_stays_dense_among_moved_offsets(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", modules=[Q0])
    whole = torch.randn(128, 192, generator=torch.Generator().manual_seed(5))
    edit_tensors(adapter.path / "adapter_model.safetensors", lambda t: t.update({f"{PREFIX}{DOWN}.weight": whole}))
    edit_json(adapter.path / "adapter_config.json", modules_to_save=["down_proj"])

    assert merge(base, adapter, tmp_path / "out").status == 0

    assert sorted(grids(tmp_path / "out")) == [module for module in LINEARS if module != DOWN]
    weights, offsets = loaded_weights(tmp_path / "out"), float32_values(tmp_path / "out")
    assert torch.equal(weights[DOWN], whole)
    assert all(torch.equal(weights[module], offsets[module]) for module in offsets)


def test_a_plan_names_what_a_merge_writes(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")

    plan = merge(base, adapter, tmp_path / "out", "--dry-run", "--json")
    assert names_in(tmp_path) == ["adapter"]
    assert merge(base, adapter, tmp_path / "out").status == 0

    planned = {t["name"]: (t["dtype"], tuple(t["shape"])) for t in plan.json["tensors"]}
    written = tensors_of(tmp_path / "out")
    assert planned == {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in written.items()}


@pytest.mark.parametrize("kind", ["nf4", "original"])
def test_a_pooled_adapter_on_another_kind_of_base_merges_densely(kind, converted, llamas, merge, tmp_path):
    integers = converted("compressed-tensors")
    adapter = trained(integers, tmp_path / "adapter")
    base = llamas["bfloat16"]
    if kind == "nf4":
        base = converted("compressed-tensors", quant_type="nf4", method="qlora", group_size=None)
    before = decoded(base) if kind == "nf4" else tensors_of(base)

    ran = merge(base, adapter, tmp_path / "out", "--dtype", "float32", "--json")

    assert (ran.status, ran.json["layout"]) == (0, "dense")
    for module in LINEARS:
        exact = before[f"{module}.weight"].double().numpy() + adapter.updates[module]
        found = tensors_of(tmp_path / "out")[f"{module}.weight"].double().numpy()
        assert largest(found - exact) <= 1e-6 * largest(exact)


# Integer zero points: measured, and refused where they lose most of the update.


def rounded_by_hand(base: Path, updates: dict[str, np.ndarray], bits: int) -> tuple[dict[str, np.ndarray], float]:
    """Zero points round(zero − U / scale) inside the codes' range, and ||W_merged − W_exact|| / ||update||."""
    zeros, wrong = {}, 0.0
    for module, grid in grids(base).items():
        update = updates[module][:, :: grid.group_size]
        zeros[module] = np.clip(np.rint(grid.zero_points - update / grid.scales), 0, 2**bits - 1)
        wrong += np.square(grid.scales * (grid.zero_points - zeros[module]) - update).sum() * grid.group_size
    return zeros, float(np.sqrt(wrong / sum(np.square(update).sum() for update in updates.values())))


@pytest.mark.parametrize(("container", "bits"), [(c, b) for c, b in BASES if c not in ("metal", "mlx")])
@pytest.mark.parametrize("share", [0.05, 2.0])
def test_rounded_zero_points_lose_what_they_lose_by_hand(share, container, bits, converted, merge, tmp_path):
    base = converted(container, bits)
    adapter = trained(base, tmp_path / "adapter", share=share)
    zeros, lost = rounded_by_hand(base, adapter.updates, bits)
    ends = np.concatenate([np.isin(zero, (0, 2**bits - 1)).ravel() for zero in zeros.values()])
    assert ends.mean() > (0.02 if share > 1 else -1)  # a large update reaches the ends of the codes' range

    ran = merge(base, adapter, tmp_path / "out", "--round-zeros", "--force", "--json")

    own = "gptq" if container == "gptq" else "compressed-tensors"
    assert (ran.status, ran.err, ran.json["layout"]) == (0, "", own)
    assert container_of(tmp_path / "out") == (own, bits, 32)
    before, after = grids(base), grids(tmp_path / "out")
    for module, grid in after.items():
        assert np.array_equal(grid.codes, before[module].codes)
        assert np.array_equal(grid.scales, before[module].scales)
        assert np.allclose(grid.zero_points, zeros[module], rtol=1e-12)
    # squares of float32 sums
    assert ran.json["lost"] == pytest.approx(lost, rel=1e-5)
    assert ran.json["lost"] == pytest.approx(lost_by_hand(base, tmp_path / "out", adapter.updates), rel=1e-5)


@pytest.mark.parametrize("container", ["compressed-tensors", "gptq"])
def test_rounding_away_an_update_of_one_percent_is_refused(container, converted, merge, tmp_path):
    base = converted(container)
    adapter = trained(base, tmp_path / "adapter", share=0.01)
    _, lost = rounded_by_hand(base, adapter.updates, 4)
    assert lost > 0.98

    ran = merge(base, adapter, tmp_path / "out", "--round-zeros")

    assert (ran.status, ran.out) == (5, "")
    assert ran.line.startswith(f"error: {base}: with rounded zero points, {lost:.1%} of the update would be lost (")
    assert "leave out --round-zeros; or --force" in ran.line
    assert names_in(tmp_path) == ["adapter"]


def test_a_large_update_survives_rounding(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", share=0.3)
    _, lost = rounded_by_hand(base, adapter.updates, 4)
    assert lost < 0.5

    ran = merge(base, adapter, tmp_path / "out", "--round-zeros")

    assert ran.status == 0
    assert f"lost     {lost:.2%} of the update" in ran.out
    assert "7 layers, compressed-tensors" in ran.out


def test_progress_names_the_share_that_each_layer_lost(converted, tmp_path, capsys):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", share=0.01)

    status = _run(["merge", str(base), str(adapter.path), str(tmp_path / "out"), "--round-zeros", "--force"])

    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    report = json.loads((tmp_path / "out" / "loftq_merge_report.json").read_text())
    assert status == 0
    assert report["round_zeros"] is True
    for number, (line, layer) in enumerate(zip(said, report["layers"], strict=True), 1):
        assert line == f"[{number}/7] {layer['name']}: changed by 1.00%, {layer['lost']:.2g} of it lost"


def test_transformers_loads_rounded_zero_points(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", share=0.3)
    assert merge(base, adapter, tmp_path / "out", "--round-zeros").status == 0

    weights = loaded_weights(tmp_path / "out")

    for module, grid in grids(tmp_path / "out").items():
        # bfloat16 scale times a whole number is exact in float64: rounded once
        assert torch.equal(weights[module], torch.from_numpy(grid.values).to(torch.bfloat16))


def test_rounded_zero_points_of_gptq_are_read_back(converted, merge, tmp_path):
    base = converted("gptq")
    adapter = trained(base, tmp_path / "adapter", share=0.3)
    assert merge(base, adapter, tmp_path / "out", "--round-zeros").status == 0

    config = config_of(tmp_path / "out")["quantization_config"]
    assert (config["checkpoint_format"], config["sym"], config["desc_act"]) == ("gptq_v2", False, False)
    with BaseModel.open(tmp_path / "out") as opened:
        for module, grid in grids(tmp_path / "out").items():
            expected = torch.from_numpy(grid.values).to(torch.float16).float()
            assert torch.equal(opened.matrix(f"{module}.weight"), expected)


@pytest.mark.parametrize("container", ["metal", "mlx"])
def test_a_base_of_float_offsets_can_be_rounded_to_integers(container, converted, merge, tmp_path):
    base = converted(container)
    adapter = trained(base, tmp_path / "adapter", share=0.3)
    _, lost = rounded_by_hand(base, adapter.updates, 4)

    ran = merge(base, adapter, tmp_path / "out", "--round-zeros", "--force", "--json")

    assert (ran.status, container_of(tmp_path / "out")[0]) == (0, "compressed-tensors")
    assert ran.json["lost"] == pytest.approx(lost, rel=1e-5)


# An adapter that adds nothing.


@pytest.mark.parametrize("arguments", [(), ("--round-zeros",), ("--layout", "dense")])
@pytest.mark.parametrize("container", ["compressed-tensors", "compressed-tensors of float32", "gptq"])
def test_an_adapter_that_adds_nothing_loses_nothing(container, arguments, converted, merge, tmp_path):
    base = converted(container)

    ran = merge(base, base / "qalora_init", tmp_path / "out", *arguments, "--json")

    assert (ran.status, ran.err) == (0, "")
    assert ran.json["lost"] in (0.0, None)


@pytest.mark.parametrize(
    ("container", "arguments"),
    [("metal", ("--round-zeros",)), ("compressed-tensors of float32", ("--scale-dtype", "bfloat16"))],
)
def test_offsets_that_move_the_base_under_an_adapter_of_nothing_are_refused(
    container, arguments, converted, merge, tmp_path
):
    base = converted(container)

    ran = merge(base, base / "qalora_init", tmp_path / "out", *arguments)
    forced = merge(base, base / "qalora_init", tmp_path / "out", *arguments, "--force", "--json")

    assert ran.status == 5
    assert "inf" not in ran.line
    assert (forced.status, forced.json["lost"]) == (0, None)  # a share of nothing


@pytest.mark.parametrize("container", ["compressed-tensors", "compressed-tensors of float32"])
def test_an_exact_merge_is_never_refused_for_a_tiny_update(container, converted, merge, tmp_path):
    # Below float32's own rounding of the weights there is nothing that could be kept, and nothing to be refused.
    base = converted(container)
    adapter = trained(base, tmp_path / "adapter", share=1e-9)

    ran = merge(base, adapter, tmp_path / "out")

    assert (ran.status, ran.err) == (0, "")
    assert_exact(base, tmp_path / "out", adapter.updates)


# What is refused.


def refused(ran: Ran, tmp_path: Path, status: int, *says: str, left: Sequence[str] = ("adapter",)) -> None:
    assert (ran.status, ran.out) == (status, ""), ran.err
    assert all(part in ran.line for part in says), ran.line
    assert names_in(tmp_path) == sorted(left)


def test_groups_that_are_no_unions_of_the_bases_are_refused_and_merge_densely(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", group_size=48, modules=[DOWN])

    ran = merge(base, adapter, tmp_path / "out")

    says = (f"{DOWN}.lora_A.weight", "pools groups of 48", "not unions of the groups of 32", "(--layout dense)")
    refused(ran, tmp_path, 4, *says)
    assert merge(base, adapter, tmp_path / "out", "--layout", "dense", "--dtype", "float32").status == 0
    values = torch.from_numpy(grids(base)[DOWN].values).to(torch.bfloat16).double()
    exact = (values + torch.from_numpy(adapter.updates[DOWN])).numpy()
    found = tensors_of(tmp_path / "out")[f"{DOWN}.weight"].double().numpy()
    assert largest(found - exact) <= 1e-6 * largest(exact)


def test_smaller_groups_than_the_bases_are_refused(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", group_size=16)

    ran = merge(base, adapter, tmp_path / "out")

    refused(ran, tmp_path, 4, "pools groups of 16", "not unions of the groups of 32", "--layout dense")


@pytest.mark.parametrize("convention", ["peft", "paper", "repo"])
def test_a_pooling_that_the_config_does_not_say_can_be_named(convention, converted, merge, tmp_path):
    base = converted("gptq")
    adapter = trained(base, tmp_path / "adapter", convention=convention)
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    for key in ("use_qalora", "qalora_pooling", "qalora_group_size"):
        config.pop(key, None)
    (adapter.path / "adapter_config.json").write_text(json.dumps(config))

    ran = merge(base, adapter, tmp_path / "out")

    says = ("lora_B.weight", "is for (128, 6)", "is (128, 192)", "--pooling peft, paper or repo")
    refused(ran, tmp_path, 4, *says)
    assert merge(base, adapter, tmp_path / "out", "--pooling", convention).status == 0
    assert_exact(base, tmp_path / "out", adapter.updates)


@pytest.mark.parametrize("convention", ["peft", "paper", "repo"])
def test_a_named_pooling_overrides_a_config_that_is_wrong(convention, converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", convention=convention)
    says = {"use_qalora": convention != "peft", "qalora_pooling": None if convention != "peft" else "paper"}
    edit_json(adapter.path / "adapter_config.json", **says)

    assert merge(base, adapter, tmp_path / "out", "--pooling", convention).status == 0

    assert_exact(base, tmp_path / "out", adapter.updates)


@pytest.mark.parametrize(
    ("config", "status", "says"),
    [
        ({"qalora_pooling": "max"}, 2, ("adapter_config.json", "pooling convention is one of peft, paper, repo")),
        ({"qalora_group_size": "32"}, 2, ("adapter_config.json", "qalora_group_size is a whole number")),
        ({"qalora_group_size": 0}, 2, ("adapter_config.json", "group_size is at least 1")),
        ({"qalora_group_size": 16}, 4, ("lora_B.weight", "is for (128, 96)", "is (128, 192)")),
        ({"qalora_group_size": 64}, 4, ("lora_B.weight", "is for (128, 384)", "is (128, 192)")),
    ],
)
def test_a_pooling_that_does_not_fit_is_refused(config, status, says, converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")
    edit_json(adapter.path / "adapter_config.json", **config)

    refused(merge(base, adapter, tmp_path / "out"), tmp_path, status, *says)


def test_an_unknown_pooling_on_the_command_line_is_refused(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")

    ran = merge(base, adapter, tmp_path / "out", "--pooling", "max")

    refused(ran, tmp_path, 2, "--pooling 'max' does not exist (one of peft, paper, repo)")


def test_a_pooling_named_for_an_adapter_that_reads_every_input_is_refused(converted, merge, tmp_path):
    base = converted("compressed-tensors", method="qlora")

    ran = merge(base, base / "qlora_init", tmp_path / "out", "--pooling", "paper")

    refused(ran, tmp_path, 2, "--pooling is for a QA-LoRA adapter, and this one reads every input", left=())


def test_a_pooling_into_unequal_groups_is_refused(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", modules=[Q0])
    edit_json(adapter.path / "adapter_config.json", use_qalora=False)
    edit_tensors(
        adapter.path / "adapter_model.safetensors",
        lambda t: t.update({f"{PREFIX}{Q0}.lora_A.weight": torch.ones(4, 5)}),
    )

    ran = merge(base, adapter, tmp_path / "out", "--pooling", "paper")

    refused(ran, tmp_path, 4, f"{Q0}.lora_A.weight", "reads 5 inputs", "no equal groups of the 128")


OPTIONS = {
    "integers without rounding": (
        ("--layout", "compressed-tensors"),
        ("--layout compressed-tensors holds integer zero points", "--layout metal or mlx is exact", "--round-zeros"),
    ),
    "GPTQ without rounding": (("--layout", "gptq"), ("--layout gptq holds integer zero points",)),
    "rounding to float offsets": (
        ("--layout", "metal", "--round-zeros"),
        ("--layout metal has no integer zero points to round to", "leave out --round-zeros"),
    ),
    "new codes and the old ones": (
        ("--requantize", "int4", "--round-zeros"),
        ("--requantize chooses new codes, and --round-zeros keeps them",),
    ),
    "a group size for old codes": (
        ("--group-size", "64"),
        ("--group-size and --symmetric are for --requantize", "leave them out"),
    ),
    "no zero points for old codes": (("--symmetric",), ("--group-size and --symmetric are for --requantize",)),
    "new codes in no container": (
        ("--requantize", "int4", "--layout", "dense"),
        ("--requantize writes codes, and --layout dense has none",),
    ),
    "scales of no container": (
        ("--layout", "dense", "--scale-dtype", "float16"),
        ("--scale-dtype is for a quantized result",),
    ),
    "a model of two dtypes": (
        ("--dtype", "bfloat16"),
        ("--layout metal needs one dtype for scales and model", "--scale-dtype bfloat16"),
    ),
    "bfloat16 scales in GPTQ": (
        ("--layout", "gptq", "--round-zeros", "--scale-dtype", "bfloat16"),
        ("--layout gptq has no bfloat16 scales (float16)",),
    ),
    "a codebook in groups": (
        ("--requantize", "nf4", "--group-size", "64"),
        ("group_size means nothing with quant_type nf4",),
    ),
    "a group size that is none": (
        ("--requantize", "int4", "--group-size", "48"),
        ("group_size 48 does not exist for int4", "one of 16, 32"),
    ),
    "integers in bitsandbytes": (
        ("--requantize", "int4", "--layout", "bitsandbytes"),
        ("layout bitsandbytes does not hold int4",),
    ),
    "symmetric float offsets": (
        ("--requantize", "int4", "--layout", "metal", "--symmetric"),
        ("layout metal stores an offset for every group", "--asymmetric"),
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_contradict_each_other_are_refused(case, converted, merge, tmp_path):
    arguments, says = OPTIONS[case]
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")

    refused(merge(base, adapter, tmp_path / "out", *arguments), tmp_path, 2, *says)


@pytest.mark.parametrize(("bits", "group_size", "layout"), [(3, 32, "metal"), (4, 16, "mlx"), (4, 16, "bitsandbytes")])
def test_a_container_that_does_not_hold_the_bases_codes_is_refused(
    bits, group_size, layout, converted, merge, tmp_path
):
    base = converted("compressed-tensors", bits, group_size=group_size)
    adapter = trained(base, tmp_path / "adapter", group_size=group_size)

    ran = merge(base, adapter, tmp_path / "out", "--layout", layout)

    refused(ran, tmp_path, 2, f"--layout {layout}")


def test_three_bits_in_groups_of_16_have_no_container_and_become_dense(converted, merge, tmp_path):
    base = converted("compressed-tensors", 3, group_size=16)
    adapter = trained(base, tmp_path / "adapter", group_size=16)

    ran = merge(base, adapter, tmp_path / "out", "--json")

    assert (ran.status, ran.json["layout"]) == (0, "dense")


def test_rounding_is_for_pooled_adapters_on_integers(converted, merge, tmp_path):
    base = converted("compressed-tensors", quant_type="nf4", method="qlora", group_size=None)

    ran = merge(base, base / "qlora_init", tmp_path / "out", "--round-zeros")

    refused(ran, tmp_path, 2, "--round-zeros is for a QA-LoRA adapter on an integer base", left=())


def test_an_adapter_without_pooling_has_no_offsets_to_go_to(converted, merge, tmp_path):
    base = converted("compressed-tensors", method="qlora")

    ran = merge(base, base / "qlora_init", tmp_path / "out", "--layout", "metal")

    says = ("--layout metal needs codes", "only a QA-LoRA adapter on an integer base keeps them", "--layout dense")
    refused(ran, tmp_path, 2, *says, left=())


def test_one_module_without_pooling_among_pooled_ones_is_refused_by_name(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")
    edit_tensors(
        adapter.path / "adapter_model.safetensors",
        lambda t: t.update({f"{PREFIX}{Q0}.lora_A.weight": torch.ones(4, 128)}),
    )

    ran = merge(base, adapter, tmp_path / "out")

    refused(ran, tmp_path, 4, f"{Q0}.lora_A.weight", "has no pooled input", f"{Q0}.weight", "(--layout dense)")


def test_a_residual_adapter_on_another_base_is_refused(converted, merge, tmp_path):
    base = converted("compressed-tensors", init="residual")
    other = converted("compressed-tensors", 3)

    ran = merge(other, base / "qalora_init", tmp_path / "out")

    says = (f"the qalora adapter was made for {base}", "this base is another quantized base", "--force")
    refused(ran, tmp_path, 4, *says, left=())
    assert merge(other, base / "qalora_init", tmp_path / "out", "--force").status == 0
    assert merge(base, base / "qalora_init", tmp_path / "own").status == 0


def test_a_residual_adapter_on_the_original_is_refused(converted, llamas, merge, tmp_path):
    base = converted("compressed-tensors", init="residual")

    ran = merge(llamas["bfloat16"], base / "qalora_init", tmp_path / "out")

    refused(ran, tmp_path, 4, "the qalora adapter was made for", "this base is not quantized", left=())


def test_a_residual_adapter_that_peft_saved_is_refused_on_another_base(converted, merge, tmp_path):
    base = converted("compressed-tensors", init="residual")
    shutil.copytree(base / "qalora_init", tmp_path / "adapter")
    (tmp_path / "adapter" / "loftq_provenance.json").unlink()

    ran = merge(converted("compressed-tensors", 3), tmp_path / "adapter", tmp_path / "out")

    refused(ran, tmp_path, 4, f"the adapter was trained on {base}, another base with a fitted adapter of its own")


def test_a_standard_adapter_on_another_base_is_noted(converted, tmp_path, capsys):
    base, other = converted("compressed-tensors"), converted("compressed-tensors", 3)
    adapter = trained(base, tmp_path / "adapter")

    status = _run(["merge", str(other), str(adapter.path), str(tmp_path / "out")])

    said = capsys.readouterr().err
    assert status == 0
    assert f"note: the qalora adapter was made for {base}, and this base is another quantized base" in said
    assert "--force" not in said
    assert_exact(other, tmp_path / "out", adapter.updates)


def test_a_standard_adapter_on_another_base_without_a_report_is_noted(converted, tmp_path, capsys):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")
    shutil.copytree(converted("compressed-tensors", 3), tmp_path / "other")
    (tmp_path / "other" / "loftq_report.json").unlink()

    status = _run(["merge", str(tmp_path / "other"), str(adapter.path), str(tmp_path / "out")])

    said = capsys.readouterr().err
    assert status == 0, said
    assert "--force" not in said


def test_a_base_that_says_act_order_is_refused(converted, merge, tmp_path):
    shutil.copytree(converted("gptq"), tmp_path / "base")
    config = config_of(tmp_path / "base")["quantization_config"]
    edit_json(tmp_path / "base" / "config.json", quantization_config={**config, "desc_act": True})

    ran = merge(tmp_path / "base", tmp_path / "base" / "qalora_init", tmp_path / "out")

    refused(ran, tmp_path, 2, "act-order (desc_act)", "not neighbouring columns", left=["base"])


def test_a_base_with_shuffled_groups_is_refused(converted, merge, tmp_path):
    shutil.copytree(converted("gptq"), tmp_path / "base")
    shuffle = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    edit_tensors(
        tmp_path / "base" / "model.safetensors", lambda t: t.update({f"{Q0}.g_idx": t[f"{Q0}.g_idx"][shuffle]})
    )

    ran = merge(tmp_path / "base", tmp_path / "base" / "qalora_init", tmp_path / "out", "--force")

    refused(ran, tmp_path, 2, f"{Q0}.g_idx", "act-order: the groups are not neighbouring columns", left=["base"])


def test_offsets_beyond_float16_are_refused(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", share=1e8, modules=[DOWN])

    ran = merge(base, adapter, tmp_path / "out", "--scale-dtype", "float16", "--force")

    refused(ran, tmp_path, 2, f"{DOWN}.weight", "scales or offsets are too large for float16", "--scale-dtype float32")


@pytest.mark.parametrize("container", ["compressed-tensors", "gptq"])
def test_groups_of_zeros_in_a_symmetric_base_hold_an_update_exactly(container, llamas, merge, tmp_path):
    shutil.copytree(llamas["float32"], tmp_path / "model")
    edit_tensors(tmp_path / "model" / "model.safetensors", lambda t: t[f"{DOWN}.weight"][5].zero_())
    form = {"quant_type": "int4", "symmetric": True, "group_size": 32, "layout": container}
    run_conversion(tmp_path / "model", tmp_path / "base", method="qlora", rank=4, alpha=6.0, **form)
    adapter = trained(tmp_path / "base", tmp_path / "adapter")

    ran = merge(tmp_path / "base", adapter, tmp_path / "out")

    assert ran.status == 0, ran.err
    before, after = grids(tmp_path / "base")[DOWN], grids(tmp_path / "out")[DOWN]
    assert np.array_equal(after.codes, before.codes)
    assert largest((after.values - adapter.updates[DOWN])[5]) <= 1e-7 * largest(adapter.updates[DOWN])
    exact = before.values + adapter.updates[DOWN]
    assert largest(after.values - exact) <= 1e-6 * largest(exact)


def test_the_measured_difference_is_that_of_the_factors_in_float64(converted, merge, tmp_path):
    """Factors whose products cancel: what float32 makes of them is another update altogether."""
    base = converted("compressed-tensors", model="float32")
    adapter = trained(base, tmp_path / "adapter", modules=[DOWN])

    def cancel(factors):
        lora_A, lora_B = (factors[f"{PREFIX}{DOWN}.lora_{part}.weight"] for part in "AB")
        lora_A[2:], lora_B[:, 2:] = -lora_A[:2] * (1 + 2e-6 * torch.rand(lora_A[:2].shape)), lora_B[:, :2]
        lora_B *= 1e4

    edit_tensors(adapter.path / "adapter_model.safetensors", cancel)
    factors = load_file(adapter.path / "adapter_model.safetensors")
    parts = (factors[f"{PREFIX}{DOWN}.lora_{part}.weight"] for part in "AB")
    update = effective_update(*parts, 6 / 4, "peft", 32).numpy()

    assert merge(base, adapter, tmp_path / "out").status == 0

    exact = grids(base)[DOWN].values + update
    assert largest(grids(tmp_path / "out")[DOWN].values - exact) <= 1e-6 * largest(exact)


@pytest.mark.parametrize("arguments", [(), ("--round-zeros", "--force")])
@pytest.mark.parametrize(("container", "part"), [("metal", "qbiases"), ("mlx", "biases"), ("gptq", "scales")])
def test_a_base_with_nan_is_refused_by_name(container, part, arguments, converted, merge, tmp_path):
    shutil.copytree(converted(container), tmp_path / "base")
    adapter = trained(tmp_path / "base", tmp_path / "adapter")
    edit_tensors(tmp_path / "base" / "model.safetensors", lambda t: t[f"{DOWN}.{part}"][0].fill_(float("nan")))

    ran = merge(tmp_path / "base", adapter, tmp_path / "out", "--force", *arguments)

    assert (ran.status, (tmp_path / "out").exists()) == (2, False)
    assert f"{DOWN}.weight: holds NaN or infinite values" in ran.line


def test_an_update_that_overflows_is_refused_by_name_and_clamped_on_demand(converted, merge, tmp_path):
    base = converted("metal")
    adapter = trained(base, tmp_path / "adapter")
    # 1e61 is finite in float64, in which offsets are computed, and not in float32.
    edit_tensors(adapter.path / "adapter_model.safetensors", lambda t: [v.fill_(3e30) for v in t.values()])

    ran = merge(base, adapter, tmp_path / "out")

    refused(ran, tmp_path, 2, f"{DOWN}.weight", "scales or offsets are too large for float32", "--layout dense")
    rounded = merge(base, adapter, tmp_path / "out", "--round-zeros", "--force", "--json")
    assert (rounded.status, rounded.json["lost"]) == (0, pytest.approx(1.0))


@pytest.mark.parametrize("arguments", [("--scale-dtype", "float16"), ("--layout", "gptq")])
def test_scales_beyond_float16_are_refused_beside_rounded_zero_points(arguments, merge, tmp_path):
    model = models.llama(tmp_path / "model", layers=1, dtype=torch.float32)
    edit_tensors(model / "model.safetensors", lambda t: [v.mul_(1e7) for n, v in t.items() if "_proj" in n])
    form = {"method": "qalora", "quant_type": "int4", "group_size": 32, "rank": 4, "alpha": 6.0, "init": "standard"}
    run_conversion(model, tmp_path / "base", **form)
    adapter = trained(tmp_path / "base", tmp_path / "adapter", share=0.3)

    ran = merge(tmp_path / "base", adapter, tmp_path / "out", "--round-zeros", *arguments)

    refused(ran, tmp_path, 2, "too large for float16", left=("adapter", "base", "model"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pooled_adapter_that_is_not_finite_is_refused(value, converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")
    name = f"{PREFIX}{DOWN}.lora_A.weight"
    edit_tensors(adapter.path / "adapter_model.safetensors", lambda t: t[name].view(-1)[3:4].fill_(value))

    refused(merge(base, adapter, tmp_path / "out"), tmp_path, 2, name, "holds NaN or infinite values")


def test_groups_that_do_not_fit_are_refused_before_torch_is_imported(converted, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", group_size=16)
    code = (
        "import sys; from loftq_cli.cli.main import _run; status = _run(sys.argv[1:]); "
        "sys.exit(99 if 'torch' in sys.modules else status)"
    )
    arguments = ["merge", str(base), str(adapter.path), str(tmp_path / "out")]

    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)

    assert run.returncode == 4, run.stderr


# What PEFT makes of `use_qalora` off GPTQ: an ordinary adapter.


def ordinary(base: Path, directory: Path, stored: dict[str, np.ndarray], **config: Any) -> Trained:
    adapter = trained(base, directory, group_size=1, stored=stored)
    edit_json(directory / "adapter_config.json", **config)
    return adapter


@pytest.mark.parametrize("kind", ["nf4", "int4", "original"])
def test_an_adapter_that_says_qalora_and_reads_every_input_is_an_ordinary_one(kind, converted, llamas, merge, tmp_path):
    if kind == "int4":
        base = converted("compressed-tensors", method="qlora")
        stored = {module: grid.values for module, grid in grids(base).items()}
        before = {m: torch.from_numpy(values).to(torch.bfloat16).double() for m, values in stored.items()}
    else:
        base = converted("compressed-tensors", quant_type="nf4", method="qlora", group_size=None)
        weights = decoded(base) if kind == "nf4" else tensors_of(llamas["bfloat16"])
        before = {module: weights[f"{module}.weight"].double() for module in LINEARS}
        stored = {module: weight.numpy() for module, weight in before.items()}
    adapter = ordinary(base, tmp_path / "adapter", stored, use_qalora=True, qalora_group_size=16)

    ran = merge(llamas["bfloat16"] if kind == "original" else base, adapter, tmp_path / "out", "--dtype", "float32")

    assert (ran.status, ran.err) == (0, "")
    merged = tensors_of(tmp_path / "out")
    for module in LINEARS:
        exact = before[module].numpy() + adapter.updates[module]
        assert largest(merged[f"{module}.weight"].double().numpy() - exact) <= 1e-6 * largest(exact)


# Integers, quantized again.


def grid_values(directory: Path) -> dict[str, torch.Tensor]:
    """What compressed-tensors decodes to in a bfloat16 model: products of bfloat16 scales, rounded once."""
    return {m: torch.from_numpy(grid.values).to(torch.bfloat16) for m, grid in grids(directory).items()}


def ordinary_base(kind: str, converted: Conversions) -> tuple[Path, dict[str, torch.Tensor]]:
    """A base of LoftQ or QLoRA, NF4 or INT4 in groups of 64, and the weights that its loader computes with."""
    method, quant_type = kind.split()
    if quant_type == "nf4":
        base = converted("compressed-tensors", quant_type="nf4", method=method, group_size=None)
        return base, {name.removesuffix(".weight"): value for name, value in decoded(base).items()}
    base = converted("compressed-tensors", method=method, group_size=64)
    return base, grid_values(base)


def retention_by_hand(before, after, updates) -> tuple[dict[str, float], float]:
    """<requantized − base, Δ> / <Δ, Δ> of each module, and of all."""
    kept = {m: float(((after[m].double() - before[m].double()).numpy() * x).sum()) for m, x in updates.items()}
    squares = {module: float(np.square(update).sum()) for module, update in updates.items()}
    return {module: kept[module] / squares[module] for module in kept}, sum(kept.values()) / sum(squares.values())


REQUANTIZED = [
    ("int4", ()),
    ("int4", ("--group-size", "32")),
    ("int4", ("--symmetric",)),
    ("int3", ()),
    ("int8", ()),
    ("int8", ("--group-size", "128", "--asymmetric")),
]


@pytest.mark.parametrize(("quant_type", "arguments"), REQUANTIZED)
@pytest.mark.parametrize("kind", ["loftq nf4", "qlora nf4", "loftq int4", "qlora int4"])
def test_requantizing_to_integers_reports_what_survives(kind, quant_type, arguments, converted, merge, tmp_path):
    base, before = ordinary_base(kind, converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", share=0.01, group_size=1, stored=stored)
    if arguments[:1] == ("--group-size",) and arguments[1] == "128":
        arguments = ("--group-size", "64", *arguments[2:])  # rows of 192 are no whole groups of 128

    ran = merge(base, adapter, tmp_path / "out", "--requantize", quant_type, *arguments, "--force", "--json")

    assert (ran.status, ran.err) == (0, "")
    group_size = int(arguments[1]) if "--group-size" in arguments else 64
    symmetric = (quant_type == "int8" and "--asymmetric" not in arguments) or "--symmetric" in arguments
    assert container_of(tmp_path / "out") == ("compressed-tensors", int(quant_type[3:]), group_size)
    scheme = config_of(tmp_path / "out")["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert scheme["symmetric"] is symmetric
    after, found = grid_values(tmp_path / "out"), grids(tmp_path / "out")
    by_module, total = retention_by_hand(before, after, adapter.updates)
    # sums of products of float32 numbers in float64
    for layer in ran.json["layers"]:
        assert layer["retention"] == pytest.approx(by_module[layer["name"].removesuffix(".weight")], rel=1e-4, abs=1e-4)
    assert ran.json["retention"] == pytest.approx(total, rel=1e-4, abs=1e-4)
    for module, grid in found.items():
        # no weight is farther than half a step, and half a unit of the bfloat16 it decodes to
        exact = stored[module] + adapter.updates[module]
        step = np.repeat(grid.scales, group_size, axis=1)
        # a rounded bfloat16 scale moves the ends of the range by 2^-9 of them
        slack = np.abs(exact).max() * 2.0**-7
        assert bool((np.abs(grid.values - exact) <= 0.5 * step + slack).all()), module


@pytest.mark.parametrize("kind", ["loftq nf4", "qlora nf4", "loftq int4", "qlora int4"])
def test_eight_bits_keep_nearly_all_of_a_small_update(kind, converted, merge, tmp_path):
    base, before = ordinary_base(kind, converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", share=0.01, group_size=1, stored=stored)

    ran = merge(base, adapter, tmp_path / "out", "--requantize", "int8")

    assert ran.status == 0
    _, total = retention_by_hand(before, grid_values(tmp_path / "out"), adapter.updates)
    assert total > 0.9
    assert f"retained {total:.1%} of the adapter" in ran.out


def test_a_small_update_does_not_survive_the_grid_that_the_base_lies_on(converted, merge, tmp_path):
    base, before = ordinary_base("qlora int4", converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", share=0.01, group_size=1, stored=stored)

    ran = merge(base, adapter, tmp_path / "out", "--requantize", "int4")

    assert (ran.status, ran.out) == (5, "")
    assert "quantized again to int4," in ran.line
    assert "of the adapter would survive" in ran.line
    assert names_in(tmp_path) == ["adapter"]


@pytest.mark.parametrize(("quant_type", "arguments"), [("int4", ("--group-size", "32")), ("int8", ())])
@pytest.mark.parametrize("kind", ["loftq nf4", "qlora int4"])
def test_transformers_loads_the_requantized_weights(kind, quant_type, arguments, converted, merge, tmp_path):
    base, before = ordinary_base(kind, converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", group_size=1, stored=stored)
    assert merge(base, adapter, tmp_path / "out", "--requantize", quant_type, *arguments, "--force").status == 0

    weights, by_hand = loaded_weights(tmp_path / "out"), grid_values(tmp_path / "out")

    with BaseModel.open(tmp_path / "out") as opened:
        for module in LINEARS:
            assert torch.equal(weights[module], by_hand[module])
            assert torch.equal(weights[module].float(), opened.matrix(f"{module}.weight"))


def test_requantizing_leaves_an_integer_weight_without_an_adapter_byte_for_byte(converted, merge, tmp_path):
    base, before = ordinary_base("qlora int4", converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", share=0.3, group_size=1, stored=stored, modules=[DOWN])

    assert merge(base, adapter, tmp_path / "out", "--requantize", "int4").status == 0

    kept, written = tensors_of(base), tensors_of(tmp_path / "out")
    assert kept.keys() == written.keys()
    changed = {name for name in kept if not torch.equal(kept[name], written[name])}
    assert changed == {f"{DOWN}.weight_{part}" for part in ("packed", "scale", "zero_point")}


def test_requantizing_an_nf4_base_writes_one_container(converted, merge, tmp_path):
    base, before = ordinary_base("qlora nf4", converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", share=0.3, group_size=1, stored=stored, modules=[DOWN])

    assert merge(base, adapter, tmp_path / "out", "--requantize", "int8").status == 0

    assert sorted(grids(tmp_path / "out")) == LINEARS
    assert not any("bitsandbytes" in name or "absmax" in name for name in tensors_of(tmp_path / "out"))


def test_a_pooled_adapter_can_be_quantized_again_too(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", share=0.01)

    ran = merge(base, adapter, tmp_path / "out", "--requantize", "int8", "--json")

    assert (ran.status, ran.json["layout"]) == (0, "compressed-tensors")
    _, total = retention_by_hand(grid_values(base), grid_values(tmp_path / "out"), adapter.updates)
    assert ran.json["retention"] == pytest.approx(total, rel=1e-4)
    assert total > 0.9


@pytest.mark.parametrize("layout", ["metal", "mlx", "gptq"])
def test_any_container_of_integers_takes_the_requantized_weights(layout, converted, merge, tmp_path):
    base, before = ordinary_base("qlora nf4", converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", share=0.1, group_size=1, stored=stored)

    ran = merge(base, adapter, tmp_path / "out", "--requantize", "int8", "--layout", layout, "--asymmetric", "--json")

    assert (ran.status, container_of(tmp_path / "out")) == (0, (layout, 8, 64))
    dtype = torch.float16 if layout == "gptq" else torch.bfloat16
    after = {module: values.to(dtype) for module, values in float32_values(tmp_path / "out").items()}
    _, total = retention_by_hand(before, after, adapter.updates)
    assert ran.json["retention"] == pytest.approx(total, rel=1e-4)
    if layout == "metal":
        weights = loaded_weights(tmp_path / "out")
        assert all(torch.equal(weights[module], after[module]) for module in LINEARS)


def test_requantizing_in_groups_that_no_weight_has_is_refused(converted, merge, tmp_path):
    base, before = ordinary_base("qlora int4", converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", share=0.3, group_size=1, stored=stored)

    ran = merge(base, adapter, tmp_path / "out", "--requantize", "int4", "--group-size", "1024")

    refused(ran, tmp_path, 2, "not whole groups of 1024")


def test_a_weight_that_the_groups_do_not_fit_is_kept_dense_and_it_is_said(converted, tmp_path, capsys):
    base, before = ordinary_base("qlora int4", converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", share=0.3, group_size=1, stored=stored)
    arguments = [str(base), str(adapter.path), str(tmp_path / "out"), "--requantize", "int4", "--group-size", "128"]
    capsys.readouterr()

    assert _run(["merge", *arguments]) == 0

    said = capsys.readouterr().err
    weight = loaded_weights(tmp_path / "out")[DOWN]
    exact = torch.from_numpy(stored[DOWN] + adapter.updates[DOWN])
    assert sorted(grids(tmp_path / "out")) == [module for module in LINEARS if module != DOWN]
    assert torch.allclose(weight.double(), exact, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-7)
    assert f"note: {DOWN}.weight" in said
    assert "rows of 192 are not whole groups of 128" in said
