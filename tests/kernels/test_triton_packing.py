"""The Triton kernels of the bit stream give the words and the codes that the plain-torch definition does."""

from __future__ import annotations

import pytest
import torch
from support.interpreter import interpreted

from loftq_cli.triton_kernels.packing.contract import pack_rows, unpack_rows

triton = pytest.importorskip("triton")
packing_triton = pytest.importorskip("loftq_cli.triton_kernels.packing.triton")

pytestmark = pytest.mark.interpreter
all_bits = pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
TILE = packing_triton.PROGRAM_NUMEL


def random_codes(rows: int, n: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * bits + n)
    return torch.randint(0, 2**bits, (rows, n), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 10, 11, 21, 31, 32, 33, 95, 320, TILE - 1, TILE, TILE + 1, 3 * TILE + 40])
@all_bits
def test_words_are_those_of_the_reference_and_give_the_codes_back(bits, n):
    codes = random_codes(3, n, bits)
    packed = interpreted(pack_rows, codes, bits)
    assert packed.dtype == torch.int32
    assert torch.equal(packed, pack_rows(codes, bits))
    assert torch.equal(interpreted(unpack_rows, packed, bits, n), codes)


@all_bits
def test_words_are_those_of_one_big_integer(bits):
    """The definition in Python's integers: sum of code_i * 2^(i * bits), cut into words of 32 bits."""
    row = random_codes(1, 77, bits)
    stream = sum(code << (i * bits) for i, code in enumerate(row[0].tolist()))
    words = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(-(-77 * bits // 32))]
    assert [word & 0xFFFFFFFF for word in interpreted(pack_rows, row, bits)[0].tolist()] == words


@all_bits
def test_the_greatest_codes_fill_every_bit(bits):
    codes = torch.full((2, 64), 2**bits - 1, dtype=torch.uint8)
    packed = interpreted(pack_rows, codes, bits)
    assert (packed == -1).all()
    assert torch.equal(interpreted(unpack_rows, packed, bits, 64), codes)


@all_bits
@pytest.mark.parametrize("n", [64, 75])
def test_strides_of_codes_are_free(n, bits):
    wide = random_codes(4, 2 * n, bits)
    turned = random_codes(n, 4, bits).T
    for codes in (turned, wide[:, :n], wide[:, 5 : n + 5], wide[::3, ::2], wide[:1].expand(4, -1), wide[:, :1]):
        assert torch.equal(interpreted(pack_rows, codes, bits), pack_rows(codes.contiguous(), bits))


@all_bits
@pytest.mark.parametrize("n", [64, 75])
def test_strides_of_words_are_free(n, bits):
    words = pack_rows(random_codes(5, n, bits), bits)
    wide = torch.cat([words, words], dim=1)
    for packed in (words.T.contiguous().T, wide[:, : words.shape[1]], words[::2], words[:1].expand(4, -1)):
        assert torch.equal(interpreted(unpack_rows, packed, bits, n), unpack_rows(packed.contiguous(), bits, n))


@all_bits
def test_what_follows_the_last_code_is_ignored(bits):
    codes = random_codes(2, 33, bits)
    packed = pack_rows(codes, bits)
    used = 33 * bits % 32
    packed[:, -1] |= -1 << used if used else 0
    assert torch.equal(interpreted(unpack_rows, packed, bits, 33), codes)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_codes_pack_to_no_words_and_back(shape):
    packed = interpreted(pack_rows, torch.zeros(shape, dtype=torch.uint8), 3)
    assert packed.numel() == 0
    assert interpreted(unpack_rows, packed, 3, shape[1]).shape == shape


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_those_of_compressed_tensors(bits):
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(5, 96, bits)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(interpreted(pack_rows, codes, bits), theirs.pack_to_int32(signed, bits, 1))
