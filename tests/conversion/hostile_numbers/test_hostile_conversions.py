"""Whole conversions of hostile numbers: finite, or refused in one line by file and tensor."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from support.hostile_conversions import NAME, ONCE, fast, published, refused, save
from support.hostile_matrices import LARGE, MATRICES, normal, with_one

from loftq_cli.model.stored import BaseModel

PLACES = {"first": (0, 0), "middle": (40, 77), "last": (63, 127)}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_wherever_it_is(run, tmp_path, value, place, dtype, suffix):
    weight = (normal(64, 128) * 0.02).to(getattr(torch, dtype))
    weight[PLACES[place]] = value
    file = save({NAME: weight}, tmp_path / f"w.{suffix}")
    ran = run("quantize", file, "out", *(ONCE if place == "middle" else fast()))
    refused(ran, tmp_path / "out", file, "holds NaN or infinite values")


@pytest.mark.parametrize(
    "options",
    [
        ("--no-double-quant",),
        ("--quant-type", "int4"),
        ("--quant-type", "int8"),
        ("--quant-type", "int3", "--layout", "gptq"),
        ("--quant-type", "int4", "--layout", "mlx"),
        ("--quant-type", "int2", "--layout", "metal"),
        ("--quant-type", "int4", "--layout", "dense"),
        ("--quant-type", "int4", "--method", "qalora"),
        ("--quant-type", "int4", "--scales", "search"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_not_finite_is_refused_in_every_format(run, tmp_path, value, options):
    weight = normal(64, 128) * 0.02
    weight[63, 127] = value
    file = save({NAME: weight}, tmp_path / "w.safetensors")
    refused(run("quantize", file, "out", *fast(options)), tmp_path / "out", file, "holds NaN or infinite values")


@pytest.mark.parametrize("options", [(), ("--quant-type", "int4"), ("--method", "qlora")], ids=" ".join)
@pytest.mark.parametrize("value", [1e300, -1e39])
def test_a_float64_weight_beyond_float32_is_called_too_large_and_not_infinite(run, tmp_path, value, options):
    weight = normal(64, 128).double()
    weight[3, 5] = value
    file = save({NAME: weight}, tmp_path / "w.safetensors")
    ran = run("quantize", file, "out", "--rank", 1, "-q", *options)
    refused(ran, tmp_path / "out", file, "has numbers too large for float32", "--exclude")
    assert "infinite" not in ran[1]


def test_a_float64_weight_below_float32_becomes_zero(run, tmp_path):
    file = save({NAME: normal(64, 128).double() * 1e-300}, tmp_path / "w.safetensors")
    assert run("quantize", file, "out", *fast()) == (0, "")
    published(tmp_path / "out")
    assert not bool(BaseModel.open(tmp_path / "out").matrix(NAME).any())


def test_the_remedy_of_double_quantization_works_for_all_and_for_one(run, tmp_path):
    tensors = {NAME: with_one(2e4, 0.02), "layers.1.proj.weight": normal(64, 128)}
    tensors[NAME] = torch.cat([tensors[NAME], normal(40, 128)])
    file = save(tensors, tmp_path / "w.safetensors")
    refused(run("quantize", file, "out", *ONCE), tmp_path / "out", file, "--no-double-quant", "[[override]]")
    assert run("quantize", file, "all", *ONCE, "--no-double-quant")[0] == 0
    recipe = "[[override]]\nmatch = 'layers.0.proj'\ndouble_quant = false\n"
    (tmp_path / "recipe.toml").write_text(recipe)
    assert run("quantize", file, "one", *ONCE, "--recipe", "recipe.toml")[0] == 0
    stored = published(tmp_path / "one")
    assert f"{NAME}.nested_absmax" not in stored
    assert "layers.1.proj.weight.nested_absmax" in stored


CONVERSIONS = [
    ("--no-double-quant",),
    (),
    ("--method", "qlora"),
    ("--quant-type", "int4"),
    ("--quant-type", "int2", "--symmetric", "--scales", "search"),
    ("--quant-type", "int3", "--layout", "gptq", "--method", "qlora"),
    ("--quant-type", "int4", "--layout", "mlx"),
    ("--quant-type", "int4", "--method", "qalora"),
    ("--quant-type", "int8", "--layout", "dense"),
]


@pytest.mark.parametrize("options", CONVERSIONS, ids=" ".join)
def test_a_conversion_of_any_finite_matrix_is_finite_or_refused_in_one_line(run, tmp_path, options):
    usual = ("zero", "constant", "one float32 subnormal", "subnormals", "at float16's least", "half zero", "rank 1")
    for number, name in enumerate([*usual, *LARGE]):
        matrix = MATRICES[name]
        weight = torch.cat([matrix] * 4)  # 96 rows: containers want multiples of 32
        file, output = save({NAME: weight}, tmp_path / f"{number}.safetensors"), tmp_path / f"out{number}"
        ran = run("quantize", file, output.name, *fast(options, 2, 2))
        if ran[0] == 0:
            published(output)
            values = BaseModel.open(output).matrix(NAME)
            assert bool(values.isfinite().all()), name
            assert bool(matrix.any()) or not bool(values.any()), name
        else:
            assert name in LARGE, ran[1]
            refused(ran, output, file, "(--")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_what_is_copied_is_copied_bit_for_bit(run, tmp_path, suffix):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (64, 128), generator=generator).to(torch.uint8)
    others = {
        "float8_e4m3fn": raw.clone().view(torch.float8_e4m3fn),  # every bit pattern, NaN too
        "float8_e5m2": raw.clone().view(torch.float8_e5m2),
        "int8": raw.clone().view(torch.int8),
        "int64": raw.clone().view(torch.int64),
        "uint8": raw,
        "bool": raw > 127,
        "empty rows": torch.empty(0, 64),
        "empty columns": torch.empty(64, 0),
        "empty vector": torch.empty(0),
        "empty and huge": torch.empty(0, 2**40),
        "a number": torch.tensor(3.5),
        "an integer": torch.tensor(7),
        "one of one": torch.tensor([[2.0]]),
    }
    # A matrix of codes called "weight" is refused: it would lose its scales.
    endings = {name: "weight" if tensor.dtype == torch.float32 else "codes" for name, tensor in others.items()}
    copies = {f"layers.0.{name.replace(' ', '_')}.{endings[name]}": tensor for name, tensor in others.items()}
    if suffix == "bin":
        copies["layers.0.strided"] = torch.arange(12.0)[::2]
        copies["layers.0.expanded"] = torch.tensor([1.0, 2.0]).view(2, 1)[:, :1].t()
    file = save({NAME: normal(64, 128), **copies}, tmp_path / f"w.{suffix}")
    status, said = run("quantize", file, "out", *ONCE, "--exclude", "one_of_one")
    assert status == 0
    assert said.splitlines() == [
        f"warning: layers.0.{name}.codes holds NaN or infinite values, and is copied as it is"
        for name in ("float8_e4m3fn", "float8_e5m2")
    ]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in copies.items():
        assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tensor.shape), name
        if tensor.numel():
            expected = tensor.contiguous().reshape(-1).view(torch.uint8)
            assert torch.equal(stored[name].reshape(-1).view(torch.uint8), expected), name


@pytest.mark.parametrize("options", [(), ("--quant-type", "int4", "--method", "qlora")], ids=" ".join)
def test_views_in_a_torch_file_are_the_matrices_that_they_show(run, tmp_path, options):
    matrix = normal(128, 192)
    views = {
        "transposed": matrix.t(),
        "columns": torch.cat([matrix, matrix], dim=1)[:, 96 : 96 + 192],
        "rows": torch.cat([matrix, matrix])[::2],
        "offset": torch.cat([torch.full((1, 192), math.nan), matrix])[1:],
    }
    for name, view in views.items():
        file = save({NAME: view}, tmp_path / f"{name}.bin")
        plain = save({NAME: view.contiguous()}, tmp_path / f"{name}.safetensors")
        assert run("quantize", file, f"a {name}", *ONCE[:2], "-q", *options)[0] == 0
        assert run("quantize", plain, f"b {name}", *ONCE[:2], "-q", *options)[0] == 0
        a, b = published(tmp_path / f"a {name}"), published(tmp_path / f"b {name}")
        assert set(a) == set(b)
        assert all(torch.equal(a[key], b[key]) for key in a), name


SHAPES = [(1, 64), (32, 1), (1, 1), (3, 5), (32, 32), (7, 128), (5, 100), (2, 4096), (4096, 2), (64, 65)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_any_shape_is_quantized_or_kept_or_refused(run, tmp_path, shape):
    """Where the container does not take it, it is copied if there is something else to quantize."""
    weight = normal(*shape)
    alone = save({NAME: weight}, tmp_path / "alone.safetensors")
    beside = save({NAME: weight, "layers.1.proj.weight": normal(64, 128)}, tmp_path / "beside.safetensors")
    # A base of the joint fit is near to its weights only with its adapter.
    for number, form in enumerate([(), ("--quant-type", "int4"), ("--layout", "dense")]):
        options = ("--fit", "loftq", *form)
        status, err = run("quantize", alone, f"alone{number}", *fast(options))
        assert status in (0, 2)
        if status:
            assert len(err.splitlines()) == 1
            assert "no weight to quantize: " in err
            assert not (tmp_path / f"alone{number}").exists()
        assert run("quantize", beside, f"beside{number}", *fast(options))[0] == 0
        published(tmp_path / f"beside{number}")
        values = BaseModel.open(tmp_path / f"beside{number}").matrix(NAME)
        assert values.shape == weight.shape
        if status:
            assert torch.equal(values, weight)
        else:
            assert float((values - weight).norm() / weight.norm()) < 0.25


def test_inspect_says_the_same_of_hostile_weights(run, tmp_path):
    weight = normal(64, 128).double()
    weight[3, 5] = 1e300
    save({NAME: weight}, tmp_path / "w.safetensors")
    status, err = run("inspect", "w.safetensors", "--try", "int4")
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"tensor {NAME}: has numbers too large for float32" in err
    save({NAME: with_one(2e4, 0.02, (0, 0)).repeat(4, 1)}, tmp_path / "v.safetensors")
    status, err = run("inspect", "v.safetensors", "--try", "nf4")
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"tensor {NAME}: its block constants differ too much" in err
    for options in ((), ("--quant-type", "int4")):
        save({NAME: weight.clamp(-4, 4)}, tmp_path / "u.safetensors")
        run("quantize", "u.safetensors", "out", *fast(options), "--overwrite")
        status, err = run("inspect", "out", "--against", "w.safetensors")
        assert (status, len(err.splitlines())) == (2, 1)
        assert f"w.safetensors: tensor {NAME}: has numbers too large for float32" in err
