"""Packed codes are the dense little-endian bit stream that compressed-tensors and GPTQ loaders read."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.triton_kernels.packing.contract import pack_rows, unpack_rows
from loftq_cli.triton_kernels.packing.reference import PIECE_NUMEL

ALL_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
LENGTHS = (1, 7, 8, 10, 11, 21, 31, 32, 33, 64, 95, 320)


def random_codes(rows: int, n: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * bits + n)
    return torch.randint(0, 2**bits, (rows, n), generator=generator, dtype=torch.uint8)


def words_of_one_big_integer(row: list[int], bits: int) -> list[int]:
    """The definition in Python's integers: sum of code_i * 2^(i * bits), cut into signed words of 32 bits."""
    stream = sum(code << (i * bits) for i, code in enumerate(row))
    words = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def test_four_bit_words_by_hand():
    # Element 0 in the low nibble of the first byte: 1..8 reads backwards in hexadecimal. 0xF0000000 is negative.
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 0, 0, 0, 0, 15]], dtype=torch.uint8)
    assert pack_rows(codes, 4).tolist() == [[0x87654321 - (1 << 32)], [0xF0000000 - (1 << 32)]]


def test_two_and_eight_bit_words_by_hand():
    assert pack_rows(torch.tensor([[3, 0, 1, 2]], dtype=torch.uint8), 2).tolist() == [[0b10_01_00_11]]
    assert pack_rows(torch.tensor([[1, 2, 3, 255, 128]], dtype=torch.uint8), 8).tolist() == [
        [0xFF030201 - (1 << 32), 128]
    ]


def test_three_bit_codes_cross_word_boundaries_by_hand():
    # Element 10 holds bits 30, 31 and 32: 0b101 leaves 01 at the top of word 0 and 1 at the bottom of word 1.
    codes = torch.zeros(1, 11, dtype=torch.uint8)
    codes[0, 10] = 0b101
    assert pack_rows(codes, 3).tolist() == [[1 << 30, 1]]
    # Element 21 holds bits 63, 64 and 65: 0b110 leaves 0 at the top of word 1 and 11 at the bottom of word 2.
    codes = torch.zeros(1, 22, dtype=torch.uint8)
    codes[0, 21] = 0b110
    assert pack_rows(codes, 3).tolist() == [[0, 0, 0b11]]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_words_are_those_of_one_big_integer(bits, n):
    codes = random_codes(3, n, bits)
    assert pack_rows(codes, bits).tolist() == [words_of_one_big_integer(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_unpacking_returns_the_codes(bits, n):
    codes = random_codes(5, n, bits)
    unpacked = unpack_rows(pack_rows(codes, bits), bits, n)
    assert unpacked.dtype == torch.uint8 and torch.equal(unpacked, codes)


@pytest.mark.parametrize("packed_dim", [0, 1])
@pytest.mark.parametrize("shape", [(33, 96), (7, 50), (64, 1), (1, 21)])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_words_are_those_of_compressed_tensors(bits, shape, packed_dim):
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(*shape, bits)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)  # what they pack: the code less half the range
    packed = pack_rows(codes, bits) if packed_dim else pack_rows(codes.T, bits).T
    assert torch.equal(packed, theirs.pack_to_int32(signed, bits, packed_dim))
    assert torch.equal(theirs.unpack_from_int32(packed, bits, torch.Size(shape), packed_dim), signed)
    unpacked = unpack_rows(packed, bits, shape[1]) if packed_dim else unpack_rows(packed.T, bits, shape[0]).T
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_a_tensor_of_many_pieces_packs_like_its_rows(bits):
    n = 1001
    codes = random_codes(2 * PIECE_NUMEL // n + 3, n, bits)
    packed = pack_rows(codes, bits)
    assert torch.equal(packed, torch.cat([pack_rows(row[None], bits) for row in codes]))
    assert torch.equal(unpack_rows(packed, bits, n), codes)


def test_a_row_longer_than_a_piece_is_packed_whole():
    codes = random_codes(2, PIECE_NUMEL + 5, 3)
    assert torch.equal(unpack_rows(pack_rows(codes, 3), 3, codes.shape[1]), codes)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_empty_codes_pack_to_no_words(shape):
    packed = pack_rows(torch.empty(shape, dtype=torch.uint8), 4)
    assert packed.dtype == torch.int32 and packed.shape == (shape[0], shape[1] // 8)
    assert unpack_rows(packed, 4, shape[1]).shape == shape


def test_bits_after_the_last_code_are_ignored():
    packed = pack_rows(torch.tensor([[5, 6]], dtype=torch.uint8), 3)
    assert unpack_rows(packed | (-1 << 6), 3, 2).tolist() == [[5, 6]]


def test_a_code_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a code of 8 does not fit 3 bits"):
        pack_rows(torch.tensor([[7, 8]], dtype=torch.uint8), 3)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        pack_rows(torch.zeros(1, 8, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        unpack_rows(torch.zeros(1, 1, dtype=torch.int32), bits, 8)


def test_other_dtypes_and_sizes_are_refused():
    with pytest.raises(ValueError, match="codes must be uint8 with two dimensions"):
        pack_rows(torch.zeros(1, 8, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="codes must be uint8 with two dimensions"):
        pack_rows(torch.zeros(8, dtype=torch.uint8), 4)
    for packed in (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1).int()):
        with pytest.raises(ValueError, match="packed must be int32 with two dimensions and 1 columns"):
            unpack_rows(packed, 4, 8)
