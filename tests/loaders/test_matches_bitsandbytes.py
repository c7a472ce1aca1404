"""Codes, as its container holds them, and block constants are the bytes that bitsandbytes computes on a CPU."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.layouts.layout import StoredMatrix, load_layout
from loftq_cli.layouts.stored_tensors import CodeRows
from loftq_cli.tensors.specs import CodebookSpec
from loftq_cli.triton_kernels.codebook.contract import CODEBOOKS, codebook_table, dequantize_codebook, quantize_codebook
from loftq_cli.triton_kernels.double_quant.contract import double_dequantize, double_quantize, dynamic_map

bnb = pytest.importorskip("bitsandbytes.functional")

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
every_codebook = pytest.mark.parametrize("codebook", CODEBOOKS)


@pytest.fixture(autouse=True)
def one_thread():
    """bitsandbytes takes the mean of the block constants with as many threads as torch has; ours takes it with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows_of(codebook: str) -> CodeRows:
    matrix = StoredMatrix("weight", (1, 0), CodebookSpec(codebook), "float32", transposed=False)
    rows = load_layout("bitsandbytes").code_rows(matrix)
    assert rows is not None
    return rows


def numbered(packed: torch.Tensor, codebook: str) -> torch.Tensor:
    """Codes as bitsandbytes numbers them."""
    return rows_of(codebook).pack(packed).view(-1)


def designed(kind: str, codebook: str = "nf4") -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(96, 448, generator=generator) * 0.05
    if kind == "zero blocks":
        weight.view(-1)[: 64 * 3] = 0.0
        weight[-1] = 0.0
    elif kind == "all zero":
        weight.zero_()
    elif kind == "one outlier":
        weight[3, 5] = 40.0
    elif kind == "constant":
        weight.fill_(-0.25)
    elif kind == "midpoints":
        table = torch.tensor(CODEBOOKS[codebook])
        midpoints = (table[:-1] + table[1:]) / 2
        weight = torch.cat([midpoints, torch.ones(1)]).repeat(48 * 56).view(96, 448).contiguous()
    elif kind == "huge and subnormal":
        weight[0] *= 1e37
        weight[1] = 1e-41
        weight[2] *= 1e-30
    elif kind == "negative zero":
        weight[0] = -0.0
    return weight


KINDS = (
    "normal",
    "zero blocks",
    "all zero",
    "one outlier",
    "constant",
    "midpoints",
    "huge and subnormal",
    "negative zero",
)


@every_codebook
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_absmax_are_byte_identical(kind, block_size, codebook):
    weight = designed(kind, codebook)
    expected_packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type=codebook)
    packed, absmax = quantize_codebook(weight, codebook, block_size)
    assert torch.equal(numbered(packed, codebook), expected_packed.view(-1))
    assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 33), (1, 63), (65, 1), (17, 129), (2, 32), (31, 4097)])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("codebook", "tail"), [("nf4", "normal"), ("nf4", "zero"), ("fp4", "normal")])
def test_ragged_ends_are_byte_identical(shape, block_size, codebook, tail):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    if tail == "zero":
        weight.view(-1)[-(weight.numel() % block_size or block_size) :] = 0.0
    expected_packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type=codebook)
    packed, absmax = quantize_codebook(weight, codebook, block_size)
    if weight.numel() % 2:  # the pad nibble lies beyond the tensor; bitsandbytes fills it with the code of 0.0
        assert packed[-1] & 0xF == 7
    assert torch.equal(numbered(packed, codebook), expected_packed.view(-1))
    assert torch.equal(absmax, state.absmax)


@every_codebook
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_byte_identical(dtype, codebook):
    weight = (torch.randn(64, 320, generator=torch.Generator().manual_seed(2)) * 0.03).to(dtype)
    expected_packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=codebook)
    packed, absmax = quantize_codebook(weight.float(), codebook, 64)
    assert torch.equal(numbered(packed, codebook), expected_packed.view(-1))
    assert torch.equal(absmax, state.absmax)


@every_codebook
def test_the_values_are_those_that_bitsandbytes_gives_their_numbers(codebook):
    values = bnb.get_4bit_type(codebook, device="cpu")
    numbers = numbered(torch.arange(0x00, 0x100, 0x11, dtype=torch.uint8), codebook) & 15  # a pair of every code
    assert numbers.sort().values.tolist() == list(range(16))
    assert torch.equal(values[numbers.long()], codebook_table(codebook))


@every_codebook
def test_numbers_are_read_back_as_the_codes_they_were(codebook):
    rows, packed = rows_of(codebook), torch.arange(256, dtype=torch.uint8)
    assert torch.equal(rows.unpack(rows.pack(packed)), packed)


def test_the_dynamic_map_is_bitsandbytes_own():
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_double_quantized_constants_are_byte_identical(kind, block_size):
    weight = designed(kind)
    _, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="nf4", compress_statistics=True)
    _, absmax = quantize_codebook(weight, "nf4", block_size)
    codes, nested_absmax, offset = double_quantize(absmax, 256)
    assert torch.equal(offset, state.offset)
    assert torch.equal(nested_absmax, state.state2.absmax)
    assert torch.equal(codes, state.absmax)


@pytest.mark.parametrize("n_blocks", [1, 2, 255, 256, 257, 5000, 70_001])
def test_double_quantization_of_any_number_of_blocks_is_byte_identical(n_blocks):
    absmax = torch.rand(n_blocks, generator=torch.Generator().manual_seed(n_blocks)) * 0.1 + 0.01
    offset = absmax.mean()
    expected_codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    codes, nested_absmax, our_offset = double_quantize(absmax, 256)
    assert torch.equal(our_offset, offset)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(nested_absmax, state.absmax)


def test_every_cell_of_the_8_bit_grid_takes_the_entry_that_bitsandbytes_takes():
    # 1.0 in each block of 256 makes the scale 1, so the other 255 values are looked up as they are.
    values = torch.linspace(-1, 1, 255 * 1024).view(-1, 255)
    blocks = torch.cat([values, torch.ones(len(values), 1)], dim=1).view(-1)
    centred = torch.cat([blocks, -blocks])  # mean 0: the offset changes nothing
    assert float(centred.mean()) == 0.0
    expected, _ = bnb.quantize_blockwise(centred, blocksize=256)
    codes, _, _ = double_quantize(centred, 256)
    assert torch.equal(codes, expected)


@every_codebook
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["normal", "zero blocks", "one outlier"])
def test_decoded_values_are_what_bitsandbytes_decodes(kind, double_quant, codebook):
    weight = designed(kind)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=codebook, compress_statistics=double_quant)
    expected = bnb.dequantize_4bit(packed, state)
    if double_quant:
        absmax = double_dequantize(state.absmax, state.state2.absmax, state.state2.code, state.offset, 256)
    else:
        absmax = state.absmax
    codes = rows_of(codebook).unpack(packed)
    decoded = dequantize_codebook(codes, absmax, codebook, 64, weight.numel()).view(weight.shape)
    assert torch.equal(decoded, expected)


def test_the_bytes_do_not_depend_on_the_number_of_threads():
    weight = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(3))
    torch.set_num_threads(1)
    packed, absmax = quantize_codebook(weight, "nf4", 64)
    constants = double_quantize(absmax, 256)
    torch.set_num_threads(2)
    packed_2, absmax_2 = quantize_codebook(weight, "nf4", 64)
    constants_2 = double_quantize(absmax_2, 256)
    assert torch.equal(packed, packed_2)
    assert all(torch.equal(a, b) for a, b in zip(constants, constants_2, strict=True))
