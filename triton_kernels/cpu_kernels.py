"""The loops of the `*_cpu.py` modules, compiled by numba to machine code that is kept on disk and runs without Python's
global lock. They know arrays only.

All in one file, because that cache takes a kernel for unchanged as long as its own file is. float32 and bfloat16 come
as unsigned integers, which numba has both of.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

# Elements that a kernel widens, computes on and narrows at once: 4 KB each, so a few such buffers stay in the
# processor's first cache.
BUFFER_NUMEL = 1024

# bitsandbytes' floor under the divisor; see codebook_reference.py.
SMALLEST_ABSMAX = np.float32(1e-38)


def kernel(*, reassociates: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiles a function at its first call. Arithmetic is IEEE, without fused multiply-adds; `reassociates` lets a
    sum be taken in any order, so that it can use vectors.
    """
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": {"reassoc"} if reassociates else False,
    }

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            made: Any = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written
            return numba.njit(**options)(function)  # type: ignore[no-any-return]
        _forgive(getattr(made, "_cache", None))
        return made  # type: ignore[no-any-return]

    return compiled


def _forgive(cache: Any) -> None:
    """A kernel that cannot be kept, on a full disk say, is compiled again another time; numba would end the run."""
    save: Any = getattr(cache, "save_overload", None)

    def try_to_save(*arguments: Any) -> None:
        with suppress(OSError):
            save(*arguments)

    if save is not None:
        cache.save_overload = try_to_save


def bits_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A flat float32 or bfloat16 tensor as uint32 or uint16, over the same memory."""
    bits: np.ndarray[Any, Any] = tensor.view(torch.uint32 if tensor.dtype == torch.float32 else torch.uint16).numpy()
    return bits


# Loops run over whole arrays, and a part of one is passed as a slice: an index that could be negative to numba, as one
# with an offset could, keeps a loop from using vectors.


@kernel()
def widen(source: Any, bits: Any) -> None:
    """The bits of the floats of `source`, as those of float32, into as many of `bits`."""
    shift = np.uint32(32 - 8 * source.itemsize)
    for i in range(source.size):
        bits[i] = np.uint32(source[i]) << shift


@kernel()
def round_bfloat16(bits: Any) -> None:
    """Round float32 numbers, as bits, to bfloat16 numbers: half to even, and NaN stays NaN."""
    for i in range(bits.size):
        bits[i] = _rounded(bits[i]) & np.uint32(0xFFFF0000)


@kernel()
def _rounded(bits: Any) -> Any:
    """The bits of a float32, of which the upper half is the bfloat16 next to it."""
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint32(0x7FC00000)
    return bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))


@kernel()
def narrow(bits: Any, target: Any) -> None:
    """The inverse of `widen`, for as many as `target` has; what goes into bfloat16 is rounded half to even."""
    if target.itemsize == 2:
        for i in range(target.size):
            target[i] = _rounded(bits[i]) >> np.uint32(16)
    else:
        for i in range(target.size):
            target[i] = bits[i]


@kernel()
def quantize_blocks(
    weight: Any, minus: Any, has_minus: bool, t: Any, block_size: int, packed: Any, absmax: Any, n_blocks: int
) -> None:
    per_pass = max(BUFFER_NUMEL // block_size, 1)  # blocks
    bits, minus_bits = np.empty(per_pass * block_size, np.uint32), np.empty(per_pass * block_size, np.uint32)
    x, d = bits.view(np.float32), minus_bits.view(np.float32)
    codes, values = np.empty(per_pass * block_size, np.uint8), absmax.view(np.float32)
    inverses = np.empty(per_pass, np.float32)
    for first in range(0, n_blocks, per_pass):
        blocks = min(per_pass, n_blocks - first)
        start, count = first * block_size, blocks * block_size
        widen(weight[start : start + count], bits)
        if has_minus:
            widen(minus[start : start + count], minus_bits)
            for i in range(count):
                x[i] -= d[i]
        _largest_magnitudes(bits[:count].reshape(blocks, block_size), absmax[first : first + blocks])
        for block in range(blocks):
            inverses[block] = np.float32(1.0) / max(values[first + block], SMALLEST_ABSMAX)
        _scale(x[:count].reshape(blocks, block_size), inverses)
        _encode(x[:count], t, codes)
        _pack(codes[:count], packed[start // 2 : (start + count) // 2])


@kernel()
def _largest_magnitudes(bits: Any, largest: Any) -> None:
    """Of each row, the bits of its largest magnitude. Those compare like the numbers and put NaN above infinity: it is
    never lost.
    """
    for row in range(bits.shape[0]):
        found = np.uint32(0)
        for i in range(bits.shape[1]):
            found = max(found, bits[row, i] & np.uint32(0x7FFFFFFF))
        largest[row] = found


@kernel()
def _encode(x: Any, t: Any, codes: Any) -> None:
    """How many of the 15 thresholds lie below each element."""
    t0, t1, t2, t3, t4, t5, t6, t7 = t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]
    t8, t9, t10, t11, t12, t13, t14 = t[8], t[9], t[10], t[11], t[12], t[13], t[14]
    for i in range(x.size):
        # All comparisons of every element, so that they run in vectors: a search would read or choose thresholds.
        y = x[i]
        low = np.uint8(y > t0) + np.uint8(y > t1) + np.uint8(y > t2) + np.uint8(y > t3) + np.uint8(y > t4)
        middle = np.uint8(y > t5) + np.uint8(y > t6) + np.uint8(y > t7) + np.uint8(y > t8) + np.uint8(y > t9)
        high = np.uint8(y > t10) + np.uint8(y > t11) + np.uint8(y > t12) + np.uint8(y > t13) + np.uint8(y > t14)
        codes[i] = np.uint8(low + middle + high)


@kernel()
def _pack(codes: Any, packed: Any) -> None:
    for i in range(packed.size):
        packed[i] = np.uint8(codes[2 * i] << 4) | codes[2 * i + 1]


@intrinsic
def _decode_16(typing: Any, packed: Any, start: Any, table: Any, scale: Any, values: Any, at: Any) -> Any:
    """values[at : at + 16] = table[codes] * scale for the codes of packed[start : start + 8]: one permutation of the
    table, which LLVM makes of no loop.
    """
    signature = types.void(packed, start, table, scale, values, at)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, word, number = ir.IntType(8), ir.IntType(32), ir.FloatType()
        words, numbers = ir.VectorType(word, 16), ir.VectorType(number, 16)

        def pointer(argument: int, index: Any, vector: Any) -> Any:
            array = context.make_array(signature.args[argument])(context, builder, arguments[argument])
            return builder.bitcast(builder.gep(array.data, [index]), vector.as_pointer())

        eight = builder.load(pointer(0, arguments[1], ir.VectorType(byte, 8)), align=1)
        first = builder.lshr(eight, ir.Constant(eight.type, [4] * 8))
        second = builder.and_(eight, ir.Constant(eight.type, [15] * 8))
        order = ir.Constant(words, [i // 2 + 8 * (i % 2) for i in range(16)])
        codes = builder.zext(builder.shuffle_vector(first, second, order), words)
        entries = builder.load(pointer(2, ir.Constant(ir.IntType(64), 0), numbers), align=4)
        permute = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
            builder.module, ir.FunctionType(numbers, [numbers, words]), "llvm.x86.avx512.permvar.sf.512"
        )
        decoded = builder.call(permute, [entries, codes])
        nothing = ir.Constant(numbers, ir.Undefined)
        one = builder.insert_element(nothing, arguments[3], ir.Constant(word, 0))
        scales = builder.shuffle_vector(one, nothing, ir.Constant(words, [0] * 16))
        builder.store(builder.fmul(decoded, scales), pointer(4, arguments[5], numbers), align=4)
        return context.get_dummy_value()

    return signature, generate


@kernel()
def _decode_by_permuting(packed: Any, absmax: Any, table: Any, pairs: Any, block_size: int, values: Any) -> None:
    if block_size % 16:
        _decode_by_pairs(packed, absmax, table, pairs, block_size, values)
        return
    for block in range(absmax.size):
        scale = absmax[block]
        for i in range(0, block_size, 16):
            at = block * block_size + i
            _decode_16(packed, at // 2, table, scale, values, at)  # type: ignore[call-arg]


@kernel()
def _decode_by_pairs(packed: Any, absmax: Any, table: Any, pairs: Any, block_size: int, values: Any) -> None:
    """`pairs` holds the two values of each byte, as one number."""
    two = values.view(np.uint64)
    for i in range(packed.size):
        two[i] = pairs[packed[i]]
    _scale(values.reshape(absmax.size, block_size), absmax)


def _has_permutations() -> bool:
    """Whether machine code is made for this very processor, and it has AVX-512."""
    is_native = not getattr(config, "CPU_NAME", None) and not getattr(config, "CPU_FEATURES", None)
    return is_native and bool(get_host_cpu_features().get("avx512f"))


# The values of whole blocks.
_decode = _decode_by_permuting if _has_permutations() else _decode_by_pairs


@kernel()
def _scale(values: Any, scales: Any) -> None:
    """Each row by its scale."""
    for row in range(values.shape[0]):
        scale = scales[row]
        for i in range(values.shape[1]):
            values[row, i] *= scale


@kernel()
def decode_blocks(packed: Any, absmax: Any, table: Any, pairs: Any, block_size: int, out: Any) -> None:
    """Whole blocks into `out`."""
    per_pass = max(4 * BUFFER_NUMEL // block_size, 1)  # blocks
    bits = np.empty(per_pass * block_size, np.uint32)
    for first in range(0, absmax.size, per_pass):
        last = min(first + per_pass, absmax.size)
        start, stop = first * block_size, last * block_size
        codes, scales = packed[start // 2 : stop // 2], absmax[first:last]
        if out.itemsize == 4:
            _decode(codes, scales, table, pairs, block_size, out[start:stop].view(np.float32))
        else:
            _decode(codes, scales, table, pairs, block_size, bits[: stop - start].view(np.float32))
            narrow(bits, out[start:stop])


@kernel(reassociates=True)
def _sum_of_squares(values: Any) -> float:
    total = 0.0
    for i in range(values.size):
        total += np.float64(values[i]) * np.float64(values[i])
    return total


@kernel()
def residual_of_blocks(
    weight: Any, packed: Any, absmax: Any, table: Any, pairs: Any, block_size: int, rounds: bool, out: Any
) -> float:
    """What whole blocks lose into `out`, and the sum of its squares."""
    per_pass, squares = max(BUFFER_NUMEL // block_size, 1), 0.0
    bits, decoded_bits = np.empty(per_pass * block_size, np.uint32), np.empty(per_pass * block_size, np.uint32)
    w, decoded = bits.view(np.float32), decoded_bits.view(np.float32)
    for first in range(0, absmax.size, per_pass):
        last = min(first + per_pass, absmax.size)
        start, stop = first * block_size, last * block_size
        count = stop - start
        _decode(packed[start // 2 : stop // 2], absmax[first:last], table, pairs, block_size, decoded[:count])
        if rounds:
            round_bfloat16(decoded_bits[:count])
        widen(weight[start:stop], bits)
        for i in range(count):
            w[i] -= decoded[i]
        squares += _sum_of_squares(w[:count])
        narrow(bits, out[start:stop])
    return squares


@kernel(reassociates=True)
def _add_squares(values: Any, differences: Any, totals: Any, first: int, second: int) -> None:
    one = two = 0.0
    for i in range(values.size):
        one += np.float64(values[i]) * np.float64(values[i])
        two += differences[i] * differences[i]
    totals[first] += one
    totals[second] += two


@kernel()
def _largest_difference(magnitudes: Any, largest: Any) -> Any:
    """Of float64 numbers by their bits, which compare like them and put NaN above infinity: it is never lost."""
    for i in range(magnitudes.size):
        largest = max(largest, magnitudes[i] & np.uint64(0x7FFFFFFFFFFFFFFF))
    return largest


@kernel()
def _subtract(w: Any, q: Any, differences: Any) -> None:
    for i in range(differences.size):
        differences[i] = np.float64(w[i]) - np.float64(q[i])


@kernel()
def sum_errors(weight: Any, decoded: Any, totals: Any) -> None:
    w_bits, q_bits = np.empty(BUFFER_NUMEL, np.uint32), np.empty(BUFFER_NUMEL, np.uint32)
    w, q = w_bits.view(np.float32), q_bits.view(np.float32)
    differences, largest = np.empty(BUFFER_NUMEL, np.float64), np.zeros(1, np.uint64)
    for start in range(0, weight.size, BUFFER_NUMEL):
        count = min(BUFFER_NUMEL, weight.size - start)
        widen(weight[start : start + count], w_bits)
        widen(decoded[start : start + count], q_bits)
        _subtract(w, q, differences[:count])
        _add_squares(w[:count], differences, totals, 0, 1)
        largest[0] = _largest_difference(differences[:count].view(np.uint64), largest[0])
    totals[3] = largest.view(np.float64)[0]


@kernel()
def sum_errors_with_delta(weight: Any, decoded: Any, delta: Any, totals: Any) -> None:
    w_bits, q_bits = np.empty(BUFFER_NUMEL, np.uint32), np.empty(BUFFER_NUMEL, np.uint32)
    d_bits = np.empty(BUFFER_NUMEL, np.uint32)
    w, q, d = w_bits.view(np.float32), q_bits.view(np.float32), d_bits.view(np.float32)
    differences, largest = np.empty(BUFFER_NUMEL, np.float64), np.zeros(1, np.uint64)
    for start in range(0, weight.size, BUFFER_NUMEL):
        count = min(BUFFER_NUMEL, weight.size - start)
        widen(weight[start : start + count], w_bits)
        widen(decoded[start : start + count], q_bits)
        widen(delta[start : start + count], d_bits)
        _subtract(w, q, differences[:count])
        _add_squares(d[:count], differences, totals, 4, 1)
        for i in range(count):
            q[i] += d[i]
        _subtract(w, q, differences[:count])
        _add_squares(w[:count], differences, totals, 0, 2)
        largest[0] = _largest_difference(differences[:count].view(np.uint64), largest[0])
    totals[3] = largest.view(np.float64)[0]


@kernel()
def encode_constants(
    absmax: Any, offset: Any, nearest: Any, nested_block_size: int, codes: Any, nested_absmax: Any
) -> None:
    """See double_quant_reference.py; `nearest` is the code of each point of its grid."""
    centred = np.empty(nested_block_size, np.float32)
    zero, half, one = np.float32(0.0), np.float32(0.5), np.float32(1.0)
    grid, centre = np.float32(nearest.size - 1), offset.reshape(1)[0]
    for block in range(nested_absmax.size):
        first = block * nested_block_size
        count = min(nested_block_size, codes.size - first)
        source, target = absmax[first : first + count], codes[first : first + count]
        largest, has_nan = zero, False
        for i in range(count):
            centred[i] = source[i] - centre
            largest = max(largest, abs(centred[i]))
            has_nan |= centred[i] != centred[i]
        nested_absmax[block] = np.float32(np.nan) if has_nan else largest
        inverse = one / largest if largest > zero else zero
        for i in range(count):
            x = centred[i] * inverse
            x = min(max(x, -one), one) if x == x else zero
            cell = np.int64((x + one) * half * grid + half)
            target[i] = nearest[cell] if largest > zero and not has_nan else np.uint8(0)


@kernel()
def decode_constants(
    codes: Any, nested_absmax: Any, code_map: Any, offset: Any, nested_block_size: int, absmax: Any
) -> None:
    """See double_quant_reference.py."""
    centre = offset.reshape(1)[0]
    for block in range(nested_absmax.size):
        part = slice(block * nested_block_size, (block + 1) * nested_block_size)
        source, target, scale = codes[part], absmax[part], nested_absmax[block]
        for i in range(source.size):
            target[i] = code_map[source[i]] * scale + centre


@kernel()
def min_max(groups: Any, ends: Any) -> None:
    for row in range(groups.shape[0]):
        lowest, highest = _least(groups[row]), _greatest(groups[row])
        ends[0, row], ends[1, row] = lowest, highest


@kernel()
def _least(group: Any) -> Any:
    """NaN where there is one."""
    least, has_nan = group[0], False
    for i in range(group.size):
        least = group[i] if group[i] < least else least
        has_nan |= group[i] != group[i]
    return np.float32(np.nan) if has_nan else least


@kernel()
def _greatest(group: Any) -> Any:
    """NaN where there is one."""
    greatest, has_nan = group[0], False
    for i in range(group.size):
        greatest = group[i] if group[i] > greatest else greatest
        has_nan |= group[i] != group[i]
    return np.float32(np.nan) if has_nan else greatest


@kernel()
def _group_steps(group: Any, scale: Any, offset: Any, is_float: bool, top: Any, steps: Any) -> None:
    """The codes of a group as float32."""
    zero = np.float32(0.0)
    if is_float:
        for i in range(group.size):
            x = np.rint((group[i] - offset) / scale)
            x = x if abs(x) < np.float32(np.inf) else zero  # NaN is not less either
            steps[i] = min(max(x, zero), top)
    else:
        for i in range(group.size):
            x = np.rint(group[i] / scale)
            x = (x if x == x else zero) + offset
            steps[i] = min(max(x, zero), top)


@kernel()
def encode_groups(groups: Any, scales: Any, offsets: Any, is_float: bool, top: int, codes: Any) -> None:
    steps = np.empty(groups.shape[1], np.float32)
    for row in range(groups.shape[0]):
        _group_steps(groups[row], scales[row], offsets[row], is_float, np.float32(top), steps)
        _to_bytes(steps, codes[row])


@kernel()
def _to_bytes(steps: Any, codes: Any) -> None:
    for i in range(codes.size):
        codes[i] = np.uint8(np.int32(steps[i]))


@kernel()
def _decode_group(steps: Any, scale: Any, offset: Any, is_float: bool, rounds: bool, values: Any) -> None:
    """What codes decode to."""
    bits = values.view(np.uint32)
    if is_float:
        for i in range(values.size):
            values[i] = np.float32(steps[i]) * scale
        for i in range(values.size):
            values[i] += offset
    else:
        for i in range(values.size):
            values[i] = np.float32(steps[i]) - offset
        if rounds:
            round_bfloat16(bits)
        for i in range(values.size):
            values[i] *= scale
        if rounds:
            round_bfloat16(bits)


@kernel(reassociates=True)
def _squared_difference(group: Any, values: Any) -> float:
    """float32 squares summed in float64."""
    total = 0.0
    for i in range(group.size):
        difference = group[i] - values[i]
        total += np.float64(difference * difference)
    return total


@kernel()
def squared_errors(groups: Any, scales: Any, offsets: Any, is_float: bool, rounds: bool, top: int, errors: Any) -> None:
    steps, values = np.empty(groups.shape[1], np.float32), np.empty(groups.shape[1], np.float32)
    for row in range(groups.shape[0]):
        _group_steps(groups[row], scales[row], offsets[row], is_float, np.float32(top), steps)
        _decode_group(steps, scales[row], offsets[row], is_float, rounds, values)
        errors[row] = _squared_difference(groups[row], values)
