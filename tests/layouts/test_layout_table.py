"""The table of containers: one class for each row, every fact in the row, no name of a container anywhere else."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

import loftq_cli
from loftq_cli.errors import UsageError
from loftq_cli.layouts import layout
from loftq_cli.layouts.layout import (
    DENSE,
    FLOAT_OFFSETS,
    INTEGER_ZEROS,
    LAYOUTS,
    Layout,
    ModelFacts,
    StoredMatrix,
    default_layouts_text,
    layout_of_key,
    load_layout,
    mixing_layouts,
)
from loftq_cli.layouts.stored_tensors import StoredTensors
from loftq_cli.quant.formats import FORMATS
from loftq_cli.tensors.specs import AffineSpec, CodebookSpec

PACKAGE = Path(loftq_cli.__file__).parent
every_layout = pytest.mark.parametrize("name", LAYOUTS)
NAMED = re.compile(rf"(?<![\w-])(?:{'|'.join(LAYOUTS)})(?![\w-])")
INT4 = AffineSpec(4, 64, symmetric=True)


def strings_of(path: Path) -> list[tuple[int, str]]:
    """Texts of a module that are no docstrings, with their lines."""
    tree = ast.parse(path.read_text())
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in statements]
    return [(node.lineno, node.value) for node in constants if isinstance(node.value, str)]


def empty() -> StoredTensors:
    """A directory without tensors and without a config."""

    def nothing(*arguments: object) -> None:
        raise AssertionError(arguments)

    return StoredTensors({}, {}, "float32", nothing, nothing, nothing, Path("nowhere"))


def facts(spec: AffineSpec, modules: tuple[str, ...] = ("model.layers.0.q",), **other: object) -> ModelFacts:
    return ModelFacts("float32", spec, modules, [], **other)


def test_no_container_is_named_outside_layouts():
    files = [p for p in PACKAGE.rglob("*.py") if not {"layouts", "triton_kernels"} & set(p.relative_to(PACKAGE).parts)]
    literals = [
        f"{path.name}:{line}: {text!r}"
        for path in files
        for line, text in strings_of(path)
        if text in LAYOUTS or any(NAMED.search(option) for option in re.findall(r"--layout.*", text))
    ]
    assert literals == []


@every_layout
def test_a_row_names_the_module_of_a_container_that_knows_its_row(name):
    layout = load_layout(name)
    assert isinstance(layout, Layout)
    assert (layout.name, layout.row) == (name, LAYOUTS[name])


@every_layout
def test_a_container_finds_nothing_where_nothing_is_stored(name):
    assert load_layout(name).quantized_names(empty()) == []


def test_decoded_values_have_no_codes_to_find_or_to_read():
    dense, matrix = load_layout(DENSE), StoredMatrix("a.weight", (64, 64), INT4, "float32", transposed=False)
    assert dense.code_rows(matrix) is None
    assert dense.parts("a.weight") == ("a.weight",)
    with pytest.raises(ValueError, match=r"a\.weight is not quantized"):
        dense.stored_matrix("a.weight", empty(), transposed=False)
    with pytest.raises(ValueError, match=r"a\.weight is not quantized"):
        dense.unpack(matrix, empty())


@pytest.mark.parametrize(
    ("name", "spec", "transposed", "is_row_after_row"),
    [
        ("bitsandbytes", CodebookSpec(), False, True),
        ("bitsandbytes", CodebookSpec(), True, False),
        ("compressed-tensors", INT4, False, True),
        ("gptq", INT4, False, False),
        ("metal", INT4, False, True),
        ("mlx", INT4, False, True),
    ],
)
def test_codes_are_streamed_where_they_lie_row_after_row(name, spec, transposed, is_row_after_row):
    matrix = StoredMatrix("a.weight", (64, 64), spec, "float32", transposed)
    assert (load_layout(name).code_rows(matrix) is not None) == is_row_after_row


@pytest.mark.parametrize(("name", "other"), [("bitsandbytes", INT4), ("gptq", CodebookSpec()), ("mlx", CodebookSpec())])
def test_a_container_refuses_a_format_of_the_other_kind(name, other):
    with pytest.raises(TypeError, match="is no"):
        load_layout(name).fit(other, (64, 64), transposed=False)


def test_containers_with_zero_points_and_with_float_offsets_are_told_apart():
    assert (INTEGER_ZEROS, FLOAT_OFFSETS) == (("compressed-tensors", "gptq"), ("metal", "mlx"))


def test_what_mixes_formats_depends_on_offsets():
    assert mixing_layouts("int4", with_offsets=False) == ("compressed-tensors", "mlx", "dense")
    assert mixing_layouts("int4", with_offsets=True) == ("mlx", "dense")


def test_defaults_are_told_as_a_sentence():
    assert default_layouts_text() == "bitsandbytes for nf4 and fp4, compressed-tensors for integers"


def test_the_sentence_has_every_codebook_beside_its_own_default(monkeypatch):
    monkeypatch.setattr(layout, "_CODEBOOKS", ("nf4", "af4", "fp4"))
    dense = replace(LAYOUTS[DENSE], quant_types=(*LAYOUTS[DENSE].quant_types, "af4"))
    monkeypatch.setitem(LAYOUTS, DENSE, dense)
    assert default_layouts_text() == "bitsandbytes for nf4 and fp4, dense for af4, compressed-tensors for integers"


def test_every_key_of_a_config_belongs_to_containers():
    assert (layout_of_key("quantization"), layout_of_key("quantization_config"), layout_of_key("x")) == (
        "mlx",
        None,
        None,
    )


@pytest.mark.parametrize(
    ("spec", "others", "hint"),
    [
        (INT4, {}, "--layout compressed-tensors, metal or dense"),
        (AffineSpec(3, 64, symmetric=True), {}, "--layout compressed-tensors or dense"),  # no 3 bits in metal
    ],
)
def test_gptq_offers_containers_that_hold_the_format(spec, others, hint):
    with pytest.raises(UsageError) as refusal:
        load_layout("gptq").model_config({"model_type": "mamba"}, facts(spec, refused_by=("gptq",), other_specs=others))
    assert (refusal.value.message, refusal.value.hint) == ("GPTQ loaders do not read mamba models", hint)


def test_gptq_reads_a_family_that_others_refuse():
    config = load_layout("gptq").model_config({"model_type": "mamba"}, facts(INT4, refused_by=("metal",)))
    assert config["quantization_config"]["quant_method"] == "gptq"


@pytest.mark.parametrize(
    ("spec", "others", "hint"),
    [
        (INT4, {}, "--layout metal, or dense"),
        (AffineSpec(3, 64, symmetric=True), {}, "--layout dense"),
        (INT4, {"b": AffineSpec(8, 64, symmetric=True)}, "--layout dense"),  # metal holds one format in a model
    ],
)
def test_experts_in_full_precision_are_offered_containers_that_hold_all_formats(spec, others, hint):
    with pytest.raises(UsageError) as refusal:
        load_layout("compressed-tensors").model_config({}, facts(spec, has_experts=True, other_specs=others))
    assert refusal.value.hint == hint


@every_layout
def test_alternatives_are_containers_that_hold_integers(name):
    for alternative in LAYOUTS[name].alternatives:
        assert any(FORMATS[quant_type].is_affine for quant_type in LAYOUTS[alternative].quant_types)


def test_group_sizes_and_formats_of_a_row_bound_what_it_holds():
    row = LAYOUTS["mlx"]
    sizes = [size for size in FORMATS["int4"].group_sizes if row.holds(AffineSpec(4, size, symmetric=False))]
    assert sizes == [32, 64, 128]
    assert [bits for bits in (2, 3, 4, 8) if LAYOUTS["metal"].holds(AffineSpec(bits, 64, symmetric=False))] == [2, 4, 8]
    assert LAYOUTS["bitsandbytes"].holds(CodebookSpec()) and not LAYOUTS["bitsandbytes"].holds(INT4)


def test_offsets_of_kept_codes_are_exact_unless_another_dtype_is_asked_for():
    stored = AffineSpec(4, 64, symmetric=True, scale_dtype="bfloat16")
    mlx, gptq, packed = (LAYOUTS[name] for name in ("mlx", "gptq", "compressed-tensors"))
    assert mlx.spec_with_offsets(stored, None) == AffineSpec(4, 64, False, "float", "float32")
    assert mlx.spec_with_offsets(stored, "float16") == AffineSpec(4, 64, False, "float", "float16")
    assert gptq.spec_with_offsets(stored, None) == AffineSpec(4, 64, False, "int", "float16")
    assert packed.spec_with_offsets(stored, None) == AffineSpec(4, 64, False, "int", "bfloat16")
