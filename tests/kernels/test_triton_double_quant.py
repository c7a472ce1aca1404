"""The Triton kernels of double quantization compute what the plain-torch definition does with the same offset, bit for
bit; the offset itself is the mean, exact before it is rounded.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.interpreter import interpreted

from loftq_cli.triton_kernels.double_quant import reference as double_quant_reference
from loftq_cli.triton_kernels.double_quant.contract import double_dequantize, double_quantize, dynamic_map

triton = pytest.importorskip("triton")
double_quant_triton = pytest.importorskip("loftq_cli.triton_kernels.double_quant.triton")

pytestmark = [
    pytest.mark.interpreter,
    # NumPy warns of what the interpreter computes on purpose: 1 / 0 and infinity times 0.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def random(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.01


ABSMAX = {
    "one": random(1),
    "short": random(255),
    "a block": random(256),
    "ragged": random(1000),
    "many programs": random(5003),
    "equal": torch.full((600,), 0.37),
    "zeros": torch.zeros(300),
    "zeros of both signs": torch.tensor([0.0, -0.0]).repeat(150),
    "an outlier": torch.cat([random(700), torch.tensor([1e4])]),
    "a zero block": torch.cat([torch.full((256,), 0.5), torch.tensor([0.25, 0.75]).repeat(128)]),
    "huge": random(512) * 3e38,
    "subnormal": random(512) * 1e-41,
    "every step": torch.linspace(0, 2, 4096),
    "NaN": torch.cat([random(300), torch.tensor([math.nan])]),
    "Inf": torch.cat([random(300), torch.tensor([math.inf])]),
}


def assert_same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("nested_block_size", [1, 48, 64, 256, 4096])
@pytest.mark.parametrize("name", ABSMAX)
def test_with_the_same_offset_codes_and_constants_are_those_of_the_reference(name, nested_block_size):
    found = interpreted(double_quantize, ABSMAX[name], nested_block_size)
    expected = double_quant_reference.quantize_around(found[2], ABSMAX[name], dynamic_map(), nested_block_size)
    assert_same(found, expected)


@pytest.mark.parametrize("nested_block_size", [64, 256])
def test_where_both_means_are_exact_everything_is_that_of_the_reference(nested_block_size):
    absmax = torch.arange(1, 1025) / 1024.0  # the sum has 20 bits, and 1024 of them divide it exactly
    found = interpreted(double_quantize, absmax, nested_block_size)
    assert found[2].item() == 1025 / 2048
    assert_same(found, double_quantize(absmax, nested_block_size))


@pytest.mark.parametrize("offset", [0.0, -0.0, 0.5, -1.0, math.inf, -math.inf, math.nan])
def test_any_offset_is_used_as_the_reference_uses_it(offset):
    arguments = (torch.tensor(offset), random(700), dynamic_map(), 256)
    found = interpreted(double_quant_triton.quantize_around, *arguments)
    assert_same(found, double_quant_reference.quantize_around(*arguments))


def test_the_offset_is_the_mean_rounded_once():
    absmax = random(100_003)
    _, _, offset = interpreted(double_quantize, absmax, 256)
    exact = math.fsum(absmax.tolist()) / absmax.numel()
    assert offset.dtype == torch.float32 and offset.dim() == 0
    assert offset.item() == torch.tensor(exact, dtype=torch.float32).item()


def test_codes_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    absmax = torch.arange(1, 1025) / 1024.0
    codes, nested_absmax, offset = interpreted(double_quantize, absmax, 256)
    expected, state = functional.quantize_blockwise(absmax - offset, blocksize=256)
    assert torch.equal(codes, expected) and torch.equal(nested_absmax, state.absmax)


@pytest.mark.parametrize("nested_block_size", [1, 48, 256, 4096])
@pytest.mark.parametrize("n", [1, 255, 257, 5003])
def test_constants_decode_to_what_the_reference_decodes_them_to(n, nested_block_size):
    codes, nested_absmax, offset = double_quantize(random(n, seed=n), nested_block_size)
    arguments = (codes, nested_absmax, dynamic_map(), offset, nested_block_size)
    assert torch.equal(interpreted(double_dequantize, *arguments), double_dequantize(*arguments))


def test_every_code_of_any_map_decodes():
    code_map = random(256, seed=3) - 0.05
    codes, nested_absmax = torch.arange(256, dtype=torch.uint8), random(4, seed=4)
    arguments = (codes, nested_absmax, code_map, torch.tensor(0.3), 64)
    assert torch.equal(interpreted(double_dequantize, *arguments), double_dequantize(*arguments))


def test_a_map_is_made_once_for_a_device():
    assert dynamic_map("cpu") is dynamic_map("cpu")
    assert torch.equal(dynamic_map(torch.device("cpu")), dynamic_map())
    nearest = double_quant_reference.nearest_entry
    assert nearest(dynamic_map()) is nearest(dynamic_map())


@pytest.mark.parametrize("n", [1, 700, 5003])
def test_a_stack_is_made_of_what_its_matrices_become_alone(n):
    stack = torch.stack([random(n, seed=seed) for seed in range(3)])
    found = interpreted(double_quantize, stack, 256)
    alone = [interpreted(double_quantize, absmax, 256) for absmax in stack]
    assert_same(found, tuple(torch.stack(parts) for parts in zip(*alone, strict=True)))
    decoded = interpreted(double_dequantize, *found[:2], dynamic_map(), found[2], 256)
    expected = [double_dequantize(*one[:2], dynamic_map(), one[2], 256) for one in alone]
    assert_same((decoded,), (torch.stack(expected),))
    assert_same((double_dequantize(*found[:2], dynamic_map(), found[2], 256),), (decoded,))


def test_a_stack_on_a_processor_goes_matrix_by_matrix():
    stack = torch.stack([random(700, seed=seed) for seed in range(3)])
    alone = [double_quantize(absmax, 256) for absmax in stack]
    assert_same(double_quantize(stack, 256), tuple(torch.stack(parts) for parts in zip(*alone, strict=True)))
