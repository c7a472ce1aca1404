"""NaN and infinite numbers in copied tensors are said whatever else is quiet, and stand in the JSON.

The bit patterns are those of the formats: E4M3FN has NaN and no infinity, E5M2 both, E8M0 NaN alone (OCP 8-bit
Floating Point Specification, OCP Microscaling Formats Specification).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loftq_cli.cli.main import _run

LINEAR = "layers.0.proj.weight"
QUANTIZE = ("--method", "qlora", "--rank", "2", "--no-verify")


def bits(pattern: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((4, 4), pattern, dtype=torch.uint8).view(dtype)


WRONG = {
    "all-NaN E4M3FN": bits(0x7F, torch.float8_e4m3fn),
    "negative NaN in E4M3FN": bits(0xFF, torch.float8_e4m3fn),
    "infinity in E5M2": bits(0x7C, torch.float8_e5m2),
    "NaN in E5M2": bits(0x7E, torch.float8_e5m2),
    "NaN in E8M0": bits(0xFF, torch.float8_e8m0fnu),
    "NaN in an imaginary part": torch.full((4, 4), complex(1.0, float("nan")), dtype=torch.complex64),
    "infinity in a real part": torch.full((4, 4), complex(float("inf"), 1.0), dtype=torch.complex64),
    "NaN in bfloat16": torch.full((4,), float("nan"), dtype=torch.bfloat16),
}
RIGHT = {
    "the largest of E4M3FN": bits(0x7E, torch.float8_e4m3fn),
    "the largest of E5M2": bits(0x7B, torch.float8_e5m2),
    "the largest of E8M0": bits(0xFE, torch.float8_e8m0fnu),
    "complex numbers": torch.full((4, 4), 3.0 + 4.0j, dtype=torch.complex64),
    "integers of all bits": torch.full((4, 4), 0xFF, dtype=torch.uint8),
}


def model_with(tmp_path: Path, tensor: torch.Tensor) -> Path:
    generator = torch.Generator().manual_seed(0)
    linear = torch.randn(64, 64, generator=generator).bfloat16()
    path = tmp_path / "model.safetensors"
    save_file({LINEAR: linear, "odd": tensor}, path, metadata={"format": "pt"})
    return path


def quantize(tmp_path: Path, tensor: torch.Tensor, *options: str) -> int:
    return _run(["quantize", str(model_with(tmp_path, tensor)), str(tmp_path / "out"), *QUANTIZE, *options])


@pytest.mark.parametrize("options", [(), ("--quiet",), ("--json", "--quiet")], ids=["loud", "quiet", "json"])
@pytest.mark.parametrize("name", WRONG)
def test_quantize_warns_of_copied_numbers_that_are_not_finite(name, options, tmp_path, capsys):
    assert quantize(tmp_path, WRONG[name], *options) == 0
    printed = capsys.readouterr()
    sentence = "odd holds NaN or infinite values, and is copied as it is"
    assert f"warning: {sentence}" in printed.err.splitlines()
    if "--json" in options:
        assert sentence in json.loads(printed.out)["notes"]
    assert sentence in json.loads((tmp_path / "out" / "loftq_report.json").read_text())["notes"]


@pytest.mark.parametrize("name", RIGHT)
def test_finite_numbers_of_the_same_formats_pass_without_a_warning(name, tmp_path, capsys):
    assert quantize(tmp_path, RIGHT[name], "--json", "--quiet") == 0
    printed = capsys.readouterr()
    assert not printed.err
    assert not any("NaN" in note for note in json.loads(printed.out)["notes"])


def test_complex_tensors_are_named_in_the_plan(tmp_path, capsys):
    assert quantize(tmp_path, RIGHT["complex numbers"], "--dry-run") == 0
    assert "note: complex numbers are copied as they are: odd" in capsys.readouterr().err.splitlines()


def test_merge_warns_under_quiet_and_in_json(tmp_path, capsys):
    assert quantize(tmp_path, WRONG["infinity in E5M2"], "--quiet") == 0
    capsys.readouterr()
    base = tmp_path / "out"
    assert _run(["merge", str(base), str(base / "qlora_init"), str(tmp_path / "merged"), "--quiet", "--json"]) == 0
    printed = capsys.readouterr()
    sentence = "odd holds NaN or infinite values, and is copied as it is"
    assert printed.err.splitlines() == [f"warning: {sentence}"]
    assert sentence in json.loads(printed.out)["notes"]
