"""Loops over arrays for the `cpu.py` module of each operation. numba compiles every loop to machine code, caches the
code on disk and runs the code without Python's global lock.

All loops share one file: numba's cache takes a kernel for unchanged while the kernel's own file is unchanged. float32
and bfloat16 arrive as unsigned integers, because numba has no bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from loftq_cli.triton_kernels.kernel_cache import guard_cache

# Elements of a buffer that a kernel widens, computes and narrows in one go: 4 KB, so a few buffers fit the first cache
# of a processor.
BUFFER_NUMEL = 1024

# bitsandbytes' floor under the divisor; see codebook/reference.py.
SMALLEST_ABSMAX = np.float32(1e-38)


def kernel(
    *, reassociates: bool = False, contracts: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that compiles a function at the first call.

    Arithmetic is IEEE. `contracts` allows fused multiply-adds; `reassociates` allows sums in any order, so that sums
    use vectors.
    """
    relaxed = {name for name, allowed in (("reassoc", reassociates), ("contract", contracts)) if allowed}
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": relaxed or False,
    }

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            made: Any = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # neither the folder of the package nor the cache of the user is writable
            return numba.njit(**options)(function)  # type: ignore[no-any-return]
        guard_cache(getattr(made, "_cache", None))
        return made  # type: ignore[no-any-return]

    return compiled


def bits_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """View a flat float32 or bfloat16 tensor as a uint32 or uint16 array in shared memory."""
    bits: np.ndarray[Any, Any] = tensor.view(torch.uint32 if tensor.dtype == torch.float32 else torch.uint16).numpy()
    return bits


# Loops run over whole arrays, and callers pass a part as a slice: numba cannot prove that an index plus an offset is
# positive, and a loop with a possibly negative index uses no vectors.


@kernel()
def widen(source: Any, bits: Any) -> None:
    """Write the floats of `source` into `bits` as bit patterns of float32."""
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
    """Bits of a float32 whose upper half is the nearest bfloat16."""
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint32(0x7FC00000)
    return bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))


@kernel()
def narrow(bits: Any, target: Any) -> None:
    """The inverse of `widen`: fill `target` from `bits`, rounding half to even for bfloat16."""
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
    """Bits of the largest magnitude of each row. Bit patterns of magnitudes sort like the numbers, with NaN above
    infinity, so a NaN always wins.
    """
    for row in range(bits.shape[0]):
        found = np.uint32(0)
        for i in range(bits.shape[1]):
            found = max(found, bits[row, i] & np.uint32(0x7FFFFFFF))
        largest[row] = found


@kernel()
def _encode(x: Any, t: Any, codes: Any) -> None:
    """Count the thresholds (of 15) below each element."""
    t0, t1, t2, t3, t4, t5, t6, t7 = t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]
    t8, t9, t10, t11, t12, t13, t14 = t[8], t[9], t[10], t[11], t[12], t[13], t[14]
    for i in range(x.size):
        # Every element meets every threshold, so the comparisons run in vectors; a search would gather thresholds.
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
    """values[at : at + 16] = table[codes] * scale for the codes of packed[start : start + 8], by one permutation of the
    table. LLVM turns no loop into a permutation.
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
    """Decode with `pairs`, the two values of each byte as a single 64-bit number."""
    two = values.view(np.uint64)
    for i in range(packed.size):
        two[i] = pairs[packed[i]]
    _scale(values.reshape(absmax.size, block_size), absmax)


def _has_permutations() -> bool:
    """Whether numba compiles for the processor at hand and the processor has AVX-512."""
    is_native = not getattr(config, "CPU_NAME", None) and not getattr(config, "CPU_FEATURES", None)
    return is_native and bool(get_host_cpu_features().get("avx512f"))


# Values of whole blocks.
_decode = _decode_by_permuting if _has_permutations() else _decode_by_pairs


@kernel()
def _scale(values: Any, scales: Any) -> None:
    """Multiply each row by the scale of the row."""
    for row in range(values.shape[0]):
        scale = scales[row]
        for i in range(values.shape[1]):
            values[row, i] *= scale


@kernel()
def decode_blocks(packed: Any, absmax: Any, table: Any, pairs: Any, block_size: int, out: Any) -> None:
    """Decode whole blocks into `out`."""
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
    """Write weight minus decoded value of whole blocks into `out`; return the sum of squares."""
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
    """The largest difference of float64 numbers, compared by bits: NaN sorts above infinity, so a NaN always wins."""
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
    """See double_quant/reference.py; `nearest` holds the code of each point of the grid."""
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
    """See double_quant/reference.py."""
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
    """NaN where an argument is NaN."""
    least, has_nan = group[0], False
    for i in range(group.size):
        least = group[i] if group[i] < least else least
        has_nan |= group[i] != group[i]
    return np.float32(np.nan) if has_nan else least


@kernel()
def _greatest(group: Any) -> Any:
    """NaN where an argument is NaN."""
    greatest, has_nan = group[0], False
    for i in range(group.size):
        greatest = group[i] if group[i] > greatest else greatest
        has_nan |= group[i] != group[i]
    return np.float32(np.nan) if has_nan else greatest


@kernel()
def encode_groups(groups: Any, scales: Any, offsets: Any, is_float: bool, top: int, codes: Any) -> None:
    zero, last = np.float32(0.0), np.float32(top)
    for row in range(groups.shape[0]):
        group, scale, offset, target = groups[row], scales[row], offsets[row], codes[row]
        if is_float:
            for i in range(group.size):
                x = np.rint((group[i] - offset) / scale)
                x = x if abs(x) < np.float32(np.inf) else zero  # NaN fails the comparison too
                target[i] = np.uint8(np.int32(min(max(x, zero), last)))
        else:
            for i in range(group.size):
                x = np.rint(group[i] / scale)
                x = (x if x == x else zero) + offset
                target[i] = np.uint8(np.int32(min(max(x, zero), last)))


# Refinement, see refinement/reference.py. The order of sums and fused multiply-adds differ from the reference.
# `table` and `thresholds` are None for integers: numba compiles a kernel for each case.

# Rows side by side in the inner loops of a tile; columns of a row depend on each other.
LANES = 64

# Columns whose steps update the products at once; columns further on in the block are updated after the whole group.
STRIP = 16

_TINY = np.float32(1e-38)


@kernel()
def _stored(number: Any, dtype: int) -> Any:
    """Round a float32 to float32 (0), bfloat16 (1) or float16 (2)."""
    if dtype == 0 or not abs(number) < np.float32(np.inf):
        return number
    bits = np.float32(number).view(np.uint32)
    if dtype == 1:
        return np.uint32(_rounded(bits) & np.uint32(0xFFFF0000)).view(np.float32)
    if abs(number) < np.float32(2.0**-14):
        return (number + np.float32(0.75)) - np.float32(0.75)  # subnormal float16 steps equal float32 steps near 0.75
    carried = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    half = np.uint32(carried & np.uint32(0xFFFFE000)).view(np.float32)
    return half if abs(half) <= np.float32(65504.0) else np.copysign(np.float32(np.inf), number)


@kernel()
def _inverse(number: Any) -> Any:
    return np.float32(0.0) if abs(number) < _TINY else np.float32(1.0) / number


@intrinsic
def _nearest_16(typing: Any, x: Any, at: Any, factor: Any, thresholds: Any, table: Any, levels: Any, codes: Any) -> Any:
    """levels[at : at + 16] and codes of x[at : at + 16] * factor by bisection. Each step, and the table look-up, is a
    permutation of 16 numbers; LLVM turns no loop into a permutation. Measured 5 times faster than 15 comparisons and a
    gather, except on numbers that were just stored as smaller vectors: the processor waits for such stores.
    """
    signature = types.void(x, at, factor, thresholds, table, levels, codes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, word, number = ir.IntType(8), ir.IntType(32), ir.FloatType()
        words, numbers, some_bytes = ir.VectorType(word, 16), ir.VectorType(number, 16), ir.VectorType(byte, 16)

        def pointer(argument: int, index: Any, vector: Any) -> Any:
            array = context.make_array(signature.args[argument])(context, builder, arguments[argument])
            return builder.bitcast(builder.gep(array.data, [index]), vector.as_pointer())

        first = ir.Constant(ir.IntType(64), 0)
        nothing = ir.Constant(numbers, ir.Undefined)
        one = builder.insert_element(nothing, arguments[2], ir.Constant(word, 0))
        factors = builder.shuffle_vector(one, nothing, ir.Constant(words, [0] * 16))
        values = builder.fmul(builder.load(pointer(0, arguments[1], numbers), align=4), factors)
        bounds, entries = (builder.load(pointer(k, first, numbers), align=4) for k in (3, 4))
        permute = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
            builder.module, ir.FunctionType(numbers, [numbers, words]), "llvm.x86.avx512.permvar.sf.512"
        )
        found = ir.Constant(words, [0] * 16)
        for step in (8, 4, 2, 1):
            bound = builder.call(permute, [bounds, builder.add(found, ir.Constant(words, [step - 1] * 16))])
            above = builder.add(found, ir.Constant(words, [step] * 16))
            found = builder.select(builder.fcmp_ordered(">", values, bound), above, found)
        builder.store(builder.call(permute, [entries, found]), pointer(5, arguments[1], numbers), align=4)
        builder.store(builder.trunc(found, some_bytes), pointer(6, arguments[1], some_bytes), align=1)
        return context.get_dummy_value()

    return signature, generate


@kernel()
def _nearest_by_permuting(blocks: Any, factors: Any, thresholds: Any, table: Any, levels: Any, codes: Any) -> None:
    if blocks.shape[1] % 16:
        _nearest_by_comparing(blocks, factors, thresholds, table, levels, codes)
        return
    for row in range(factors.size):
        x, level, code = blocks[row], levels[row], codes[row]
        for at in range(0, x.size, 16):
            _nearest_16(x, at, factors[row], thresholds, table, level, code)  # type: ignore[call-arg]


@kernel()
def _nearest_by_comparing(blocks: Any, factors: Any, thresholds: Any, table: Any, levels: Any, codes: Any) -> None:
    for row in range(factors.size):
        x, level, code = blocks[row], levels[row], codes[row]
        for i in range(x.size):
            level[i] = x[i] * factors[row]
        _encode(level, thresholds, code)
        for i in range(x.size):
            level[i] = table[code[i]]


# Nearest levels, and codes, of blocks [n, block_size] * factors [n] in a table of 16. `thresholds` has 16 entries; the
# last entry is unused.
_nearest = _nearest_by_permuting if _has_permutations() else _nearest_by_comparing


@kernel(reassociates=True, contracts=True)
def _table_sums(blocks: Any, levels: Any, units: Any, scales: Any, sums: Any) -> None:
    """Per block: the squared error, the sum of weight * level, the sum of level * level."""
    for row in range(units.size):
        x, level, unit, scale = blocks[row], levels[row], units[row], scales[row]
        error = mixed = square = np.float32(0.0)
        for i in range(x.size):
            difference = (x[i] - level[i] * scale) * unit
            error += difference * difference
            mixed += x[i] * unit * level[i]
            square += level[i] * level[i]
        sums[row, 0], sums[row, 1], sums[row, 2] = error, mixed, square


@kernel(reassociates=True, contracts=True)
def _weighted_table_sums(
    blocks: Any, importance: Any, place: int, levels: Any, units: Any, scales: Any, sums: Any
) -> None:
    """`_table_sums` with a weight for each column; `place` is the index of the first block in a row."""
    for row in range(units.size):
        x, level, unit, scale = blocks[row], levels[row], units[row], scales[row]
        d = importance[(place + row) % importance.shape[0]]
        error = mixed = square = np.float32(0.0)
        for i in range(x.size):
            difference = (x[i] - level[i] * scale) * unit
            counted = d[i] * level[i]
            error += difference * difference * d[i]
            mixed += x[i] * unit * counted
            square += level[i] * counted
        sums[row, 0], sums[row, 1], sums[row, 2] = error, mixed, square


@kernel(reassociates=True, contracts=True)
def _sums_of_steps(x: Any, inverse: Any, unit: Any, scale: Any, zero: Any, bias: Any, top: Any, sums: Any) -> None:
    """`_table_sums` for integers, whose levels are steps from the zero point; also the sums of weights and levels."""
    error = mixed = square = total = steps = np.float32(0.0)
    for i in range(x.size):
        level = np.rint((x[i] - bias) * inverse) + zero
        level = min(max(level, np.float32(0.0)), top) - zero
        difference = (x[i] - (level * scale + bias)) * unit
        error += difference * difference
        mixed += x[i] * unit * level
        square += level * level
        total += x[i] * unit
        steps += level
    sums[0], sums[1], sums[2], sums[3], sums[4] = error, mixed, square, total, steps


@kernel(reassociates=True, contracts=True)
def _weighted_sums_of_steps(
    x: Any, d: Any, inverse: Any, unit: Any, scale: Any, zero: Any, bias: Any, top: Any, sums: Any
) -> None:
    """`_sums_of_steps` with a weight for each column."""
    error = mixed = square = total = steps = np.float32(0.0)
    for i in range(x.size):
        level = np.rint((x[i] - bias) * inverse) + zero
        level = min(max(level, np.float32(0.0)), top) - zero
        difference = (x[i] - (level * scale + bias)) * unit
        counted = d[i] * level
        error += difference * difference * d[i]
        mixed += x[i] * unit * counted
        square += level * counted
        total += x[i] * unit * d[i]
        steps += counted
    sums[0], sums[1], sums[2], sums[3], sums[4] = error, mixed, square, total, steps


@kernel()
def search_table(
    blocks: Any,
    importance: Any,
    table: Any,
    thresholds: Any,
    factors: Any,
    refits: int,
    is_signed: bool,
    dtype: int,
    has_start: bool,
    codes: Any,
    scales: Any,
) -> None:
    """Search scales of blocks in a table. `importance` [blocks of a row, block_size]; no rows mean equal columns."""
    # A call costs as much as a block, so each pass covers many blocks.
    per_pass, size = max(4 * BUFFER_NUMEL // blocks.shape[1], 1), blocks.shape[1]
    levels, zero, infinity = np.empty((per_pass, size), np.float32), np.float32(0.0), np.float32(np.inf)
    numbers = np.empty((6, per_pass), np.float32)
    largest, units, tried, factor, error, slopes = (
        numbers[0],
        numbers[1],
        numbers[2],
        numbers[3],
        numbers[4],
        numbers[5],
    )
    sums, starts_at_zero = np.empty((per_pass, 3), np.float32), np.zeros(per_pass, np.bool_)
    for first in range(0, blocks.shape[0], per_pass):
        last = min(first + per_pass, blocks.shape[0])
        n = last - first
        x, found, best = blocks[first:last], codes[first:last], scales[first:last]
        _largest_magnitudes(x.view(np.uint32), largest[:n].view(np.uint32))
        is_searched = not has_start
        for row in range(n):
            largest[row] = largest[row] if largest[row] < infinity else np.float32(np.nan)
            units[row], error[row], slopes[row] = _inverse(largest[row]), infinity, zero
            if not has_start:
                best[row] = _stored(largest[row] * factors[0], dtype)
            starts_at_zero[row] = has_start and best[row] == zero
            is_searched |= starts_at_zero[row]
        begins_with = -1 if has_start else 0
        for i in range(begins_with, factors.size + refits if is_searched else 1):
            for row in range(n):
                scale = best[row]
                if i >= factors.size or (has_start and i == 0 and not starts_at_zero[row]):
                    scale = _stored(largest[row] * slopes[row], dtype)
                elif i >= 0:
                    scale = _stored(largest[row] * factors[i], dtype)
                is_usable = abs(scale) < infinity and scale != zero and (scale > zero or is_signed or i < 0)
                is_usable &= not has_start or i < 1 or starts_at_zero[row]
                tried[row] = scale if is_usable else zero
                factor[row] = _inverse(tried[row])
            _nearest(x, factor[:n], thresholds, table, levels, found)
            if importance.shape[0]:
                _weighted_table_sums(x, importance, first, levels, units[:n], tried, sums)
            else:
                _table_sums(x, levels, units[:n], tried, sums)
            for row in range(n):
                if tried[row] != zero and sums[row, 0] < error[row]:
                    error[row], best[row], slopes[row] = sums[row, 0], tried[row], sums[row, 1] / sums[row, 2]
        for row in range(n):
            factor[row] = _inverse(best[row])
        _nearest(x, factor[:n], thresholds, table, levels, found)


@kernel()
def _largest(x: Any) -> Any:
    """The largest magnitude; NaN where a number is NaN or infinite."""
    bits, found = x.view(np.uint32), np.uint32(0)
    for i in range(bits.size):
        found = max(found, bits[i] & np.uint32(0x7FFFFFFF))
    return np.uint32(found).view(np.float32) if found < np.uint32(0x7F800000) else np.float32(np.nan)


@kernel()
def search_steps(
    blocks: Any,
    importance: Any,
    offset: int,
    top: int,
    factors: Any,
    refits: int,
    is_signed: bool,
    dtype: int,
    has_start: bool,
    codes: Any,
    scales: Any,
    zeros: Any,
    biases: Any,
) -> None:
    """Search the constants of integer blocks. `importance` as in `search_table`; `offset` is none (0), int (1), float
    (2).
    """
    sums, best_sums, nothing, highest = (
        np.empty(5, np.float32),
        np.empty(5, np.float32),
        np.float32(0.0),
        np.float32(top),
    )
    middle = np.float32((top + 1) // 2) if offset == 0 else nothing
    d, total = importance[:1].reshape(-1), np.float32(blocks.shape[1])
    for row in range(blocks.shape[0]):
        x = blocks[row]
        if importance.shape[0]:
            d, total = importance[row % importance.shape[0]], nothing
            for i in range(d.size):
                total += d[i]
        largest, low, high = _largest(x), _least(x), _greatest(x)
        if offset == 1:
            low, high = min(low, nothing), max(high, nothing)
        centre, unit, error = (low + high) / np.float32(2.0), _inverse(largest), np.float32(np.inf)
        best_scale, best_zero, best_bias = np.float32(np.nan), middle, nothing
        for i in range(-1 if has_start else 0, factors.size + refits):
            scale, zero, bias = nothing, middle, nothing
            if i < 0:
                scale, zero, bias = scales[row], zeros[row], biases[row]
            elif i < factors.size:
                if offset == 0:
                    scale = _stored(largest * factors[i] / np.float32(top / 2), dtype)
                else:
                    scale = _stored((high - low) * factors[i] / highest, dtype)
                scale = np.float32(1.0) if scale == nothing else scale
                if offset == 1:
                    zero = min(max(np.rint(-low * factors[i] / scale), nothing), highest)
                elif offset == 2:
                    bias = _stored(centre + (low - centre) * factors[i], dtype)
                if not error < np.float32(np.inf):
                    best_scale, best_zero, best_bias = scale, zero, bias
            else:
                slope, zero, start = _line(best_sums, best_zero, offset, (i - factors.size) % 2 == 0, total, highest)
                scale, bias = _stored(slope * largest, dtype), _stored(start * largest, dtype)
                if scale == nothing or (scale < nothing and not is_signed):
                    continue
            if not (abs(scale) < np.float32(np.inf) and abs(bias) < np.float32(np.inf)):
                continue
            if importance.shape[0]:
                _weighted_sums_of_steps(x, d, _inverse(scale), unit, scale, zero, bias, highest, sums)
            else:
                _sums_of_steps(x, _inverse(scale), unit, scale, zero, bias, highest, sums)
            if sums[0] < error:
                error, best_scale, best_zero, best_bias = sums[0], scale, zero, bias
                best_sums[:] = sums
        scales[row] = best_scale if largest == largest else np.float32(np.nan)
        zeros[row], biases[row] = best_zero, best_bias
        if largest == largest:
            _encode_steps(x, _inverse(best_scale), best_zero, best_bias, highest, codes[row])


@kernel()
def _line(sums: Any, zero: Any, offset: int, moves_zero: bool, n: Any, top: Any) -> Any:
    """Least squares line of weights over levels: the slope, the level where the line is 0 (the zero point), and the
    value at level 0 (the bias). `n` is the sum of the importance.
    """
    mixed, square, total, steps = sums[1], sums[2], sums[3], sums[4]
    nothing = np.float32(0.0)
    if offset == 0 or (offset == 1 and not moves_zero):
        return mixed / square, zero, nothing
    slope = (mixed - total * steps / n) / (square - steps * steps / n)
    start = (total - slope * steps) / n
    if offset == 2:
        return slope, zero, start
    moved = np.rint(zero - start / slope)
    if not abs(moved) < np.float32(np.inf):
        return np.float32(np.nan), zero, nothing
    moved = min(max(moved, nothing), top)
    move = zero - moved
    return (mixed + move * total) / (square + move * (np.float32(2.0) * steps + n * move)), moved, nothing


@kernel()
def _encode_steps(x: Any, inverse: Any, zero: Any, bias: Any, top: Any, codes: Any) -> None:
    for i in range(x.size):
        level = np.rint((x[i] - bias) * inverse) + zero
        codes[i] = np.uint8(np.int32(min(max(level, np.float32(0.0)), top)))


@kernel(contracts=True)
def refine_rows(
    weight: Any,
    codes: Any,
    scales: Any,
    zeros: Any,
    biases: Any,
    table: Any,
    thresholds: Any,
    top: int,
    vectors: Any,
    importance: Any,
    sweeps: int,
    fits: int,
    is_signed: bool,
    dtype: int,
    limits: Any,
    before: Any,
    after: Any,
    projections: Any,
    out: Any,
) -> None:
    """Refine rows under an adapter. `vectors` [in, r], r a multiple of 4; `fits` is 0 (codes), 1 (and scales) or 2 (and
    biases); `limits` holds LEAST_WEIGHT and 2 * WORTHWHILE; an `out` without rows receives nothing.
    """
    rows, columns = weight.shape
    n_blocks, rank = scales.shape[1], vectors.shape[1]
    size = columns // n_blocks
    w, q = np.zeros((columns, LANES), np.float32), np.zeros((columns, LANES), np.float32)
    c, chosen = np.zeros((columns, LANES), np.uint8), np.zeros(LANES, np.uint8)
    constants = np.zeros((n_blocks, 3, LANES), np.float32)  # scales, zero points, biases
    m, work = np.zeros((rank, LANES), np.float32), np.zeros((9, LANES), np.float32)
    projected, ones = np.zeros((rank, LANES), np.float32), np.zeros((n_blocks, rank), np.float32)
    left, values = np.empty(columns, np.float32), np.empty(size, np.float32)
    for j in range(columns):
        absorbed = 0.0
        for k in range(rank):
            absorbed += np.float64(vectors[j, k]) * np.float64(vectors[j, k])
            ones[j // size, k] += vectors[j, k]
        left[j] = importance[j] - absorbed
    for first in range(0, rows, LANES):
        count = min(LANES, rows - first)
        for block in range(n_blocks):
            part = slice(block * size, (block + 1) * size)
            for lane in range(count):
                row = first + lane
                scale, zero, bias = scales[row, block], zeros[row, block], biases[row, block]
                constants[block, 0, lane], constants[block, 1, lane], constants[block, 2, lane] = scale, zero, bias
                _decode_block(codes[row, part], scale, zero, bias, table, values)
                _to_lane(weight[row, part], w[part], lane)
                _to_lane(values, q[part], lane)
                _to_lane(codes[row, part], c[part], lane)
        m[:] = np.float32(0.0)
        for j in range(columns):
            for lane in range(LANES):
                work[0, lane] = w[j, lane] - q[j, lane]
            _add_products(work[0], vectors[j], m)
        _squared_errors(w, q, importance, m, before[first : first + count])
        for _ in range(sweeps):
            for block in range(n_blocks):
                part = slice(block * size, (block + 1) * size)
                if fits:
                    _fit_tile(
                        w[part],
                        q[part],
                        constants[block],
                        vectors[part],
                        importance[part],
                        ones[block],
                        m,
                        projected,
                        work,
                        fits == 2,
                        is_signed,
                        dtype,
                        limits[0],
                    )
                _sweep_block(
                    w[part],
                    q[part],
                    c[part],
                    constants[block],
                    table,
                    thresholds,
                    np.float32(top),
                    vectors[part],
                    importance[part],
                    left[part],
                    m,
                    None,
                    None,
                    None,
                    work,
                    chosen,
                    limits,
                )
        _squared_errors(w, q, importance, m, after[first : first + count])
        for block in range(n_blocks):
            part = slice(block * size, (block + 1) * size)
            for lane in range(count):
                row = first + lane
                scales[row, block], biases[row, block] = constants[block, 0, lane], constants[block, 2, lane]
                _from_lane(c[part], lane, codes[row, part])
                if out.shape[0]:
                    _from_lane(q[part], lane, values)
                    for i in range(size):
                        out[row, block * size + i] = weight[row, block * size + i] - values[i]
        for lane in range(count):
            for k in range(projections.shape[1]):
                projections[first + lane, k] = m[k, lane]


@kernel()
def _to_lane(source: Any, tile: Any, lane: int) -> None:
    for i in range(source.size):
        tile[i, lane] = source[i]


@kernel()
def _from_lane(tile: Any, lane: int, target: Any) -> None:
    for i in range(target.size):
        target[i] = tile[i, lane]


@kernel(contracts=True)
def _decode_block(codes: Any, scale: Any, zero: Any, bias: Any, table: Any, values: Any) -> None:
    for i in range(values.size):
        if table is None:
            values[i] = (np.float32(codes[i]) - zero) * scale + bias
        else:
            values[i] = table[codes[i]] * scale


@kernel(contracts=True)
def residual_of_rows(
    weight: Any, codes: Any, scales: Any, zeros: Any, biases: Any, table: Any, out: Any, squares: Any
) -> None:
    """Write weight minus decoded value into `out`, and the sum of squares of each row."""
    size = weight.shape[1] // scales.shape[1]
    values = np.empty(size, np.float32)
    for row in range(weight.shape[0]):
        for block in range(scales.shape[1]):
            part = slice(block * size, (block + 1) * size)
            _decode_block(codes[row, part], scales[row, block], zeros[row, block], biases[row, block], table, values)
            x, error = weight[row, part], out[row, part]
            for i in range(size):
                error[i] = x[i] - values[i]
        squares[row] = _sum_of_squares(out[row])


@kernel(contracts=True)
def _add_products(number: Any, v: Any, m: Any) -> None:
    """m [r, LANES] += v [r] * number [LANES]."""
    for k in range(0, v.size, 4):
        v0, v1, v2, v3 = v[k], v[k + 1], v[k + 2], v[k + 3]
        m0, m1, m2, m3 = m[k], m[k + 1], m[k + 2], m[k + 3]
        for lane in range(LANES):
            d = number[lane]
            m0[lane] += d * v0
            m1[lane] += d * v1
            m2[lane] += d * v2
            m3[lane] += d * v3


@kernel(contracts=True)
def _squared_errors(w: Any, q: Any, importance: Any, m: Any, errors: Any) -> None:
    totals = np.zeros(LANES, np.float64)
    for j in range(w.shape[0]):
        d = np.float64(importance[j])
        for lane in range(LANES):
            error = np.float64(w[j, lane] - q[j, lane])
            totals[lane] += d * error * error
    for k in range(m.shape[0]):
        for lane in range(LANES):
            totals[lane] -= np.float64(m[k, lane]) * np.float64(m[k, lane])
    for lane in range(errors.size):
        errors[lane] = totals[lane]


@kernel(contracts=True)
def _step_and_dot(delta: Any, v: Any, u: Any, m: Any, dot: Any) -> None:
    """m -= delta * v, and then dot = u·m."""
    for lane in range(LANES):
        dot[lane] = np.float32(0.0)
    for k in range(0, v.size, 4):
        v0, v1, v2, v3 = v[k], v[k + 1], v[k + 2], v[k + 3]
        u0, u1, u2, u3 = u[k], u[k + 1], u[k + 2], u[k + 3]
        m0, m1, m2, m3 = m[k], m[k + 1], m[k + 2], m[k + 3]
        for lane in range(LANES):
            d = delta[lane]
            a0, a1, a2, a3 = m0[lane] - d * v0, m1[lane] - d * v1, m2[lane] - d * v2, m3[lane] - d * v3
            m0[lane], m1[lane], m2[lane], m3[lane] = a0, a1, a2, a3
            dot[lane] += (a0 * u0 + a1 * u1) + (a2 * u2 + a3 * u3)


@kernel(contracts=True)
def _sweep_block(
    w: Any,
    q: Any,
    c: Any,
    constants: Any,
    table: Any,
    thresholds: Any,
    top: Any,
    vectors: Any,
    importance: Any,
    left: Any,
    m: Any,
    hessian: Any,
    g: Any,
    steps: Any,
    work: Any,
    chosen: Any,
    limits: Any,
) -> None:
    """Move the codes of a block, column after column.

    H is diag(importance) − vectors·vectorsᵀ, and `m` follows the steps; or H is `hessian`, and `g` follows the steps
    for the columns still to come. `vectors` and `m`, or `hessian` and `g`, are None: numba compiles a kernel for each
    case.
    """
    scale, zero, bias = constants[0], constants[1], constants[2]
    delta, dot, y, inverse, found = work[0], work[1], work[2], work[3], work[4]
    for lane in range(LANES):
        delta[lane], inverse[lane] = np.float32(0.0), _inverse(scale[lane])
    previous, end = 0, 0
    for j in range(q.shape[0]):
        qj, cj, h = q[j], c[j], left[j]
        if vectors is not None:
            _step_and_dot(delta, vectors[previous], vectors[j], m, dot)
            previous = j
            if not h > limits[0] * importance[j]:
                delta[:] = np.float32(0.0)
                continue
            wj, d = w[j], importance[j]
            for lane in range(LANES):
                dot[lane] = d * (wj[lane] - qj[lane]) - dot[lane]
        if hessian is not None:
            dot, delta, end = g[j], steps[j], min(j - j % STRIP + STRIP, q.shape[0])
            if not h > np.float32(0.0):
                delta[:] = np.float32(0.0)
        if h > np.float32(0.0):
            reciprocal = np.float32(1.0) / h
            for lane in range(LANES):
                y[lane] = (qj[lane] + dot[lane] * reciprocal - bias[lane]) * inverse[lane]
            if table is None:
                for lane in range(LANES):
                    level = min(max(np.rint(y[lane]) + zero[lane], np.float32(0.0)), top)
                    chosen[lane] = np.uint8(np.int32(level))
                    found[lane] = (level - zero[lane]) * scale[lane] + bias[lane]
            else:
                _encode(y, thresholds, chosen)
                for lane in range(LANES):
                    found[lane] = table[chosen[lane]] * scale[lane]
            for lane in range(LANES):
                slope, step = dot[lane], found[lane] - qj[lane]
                lowers = (step * np.copysign(np.float32(1.0), slope) > np.float32(0.0)) & (
                    abs(step) * h < limits[1] * abs(slope)
                )
                delta[lane] = step if lowers else np.float32(0.0)
                qj[lane] = found[lane] if lowers else qj[lane]
                cj[lane] = chosen[lane] if lowers else cj[lane]
        if hessian is not None:
            for k in range(j + 1, end):
                gk, hk = g[k], hessian[j, k]
                for lane in range(LANES):
                    gk[lane] -= hk * delta[lane]
            if j + 1 == end and end < q.shape[0]:
                begin = j - j % STRIP
                _subtract_products(hessian[begin:end, end:], steps[begin:end], g[end:])
    if vectors is not None:
        for k in range(m.shape[0]):
            v = vectors[previous, k]
            for lane in range(LANES):
                m[k, lane] -= delta[lane] * v


@kernel(contracts=True)
def _fit_tile(
    w: Any,
    q: Any,
    constants: Any,
    vectors: Any,
    importance: Any,
    ones: Any,
    m: Any,
    projected: Any,
    work: Any,
    fits_bias: bool,
    is_signed: bool,
    dtype: int,
    least: Any,
) -> None:
    """Fit the scale and the bias of a block."""
    bias = constants[2]
    linear, right, square, right_bias, mixed = work[0], work[1], work[2], work[3], work[4]
    factors, shifts, norm = work[5], work[6], work[7]
    work[:] = np.float32(0.0)
    projected[:] = np.float32(0.0)
    square_bias = np.float32(0.0)
    for j in range(w.shape[0]):
        wj, qj, weight = w[j], q[j], importance[j]
        square_bias += weight
        for lane in range(LANES):
            d = qj[lane] - bias[lane]
            error = weight * (wj[lane] - qj[lane])
            linear[lane] = d
            right[lane] += d * error
            norm[lane] += weight * d * d
            right_bias[lane] += error
            mixed[lane] += weight * d
        _add_products(linear, vectors[j], projected)
    for lane in range(LANES):
        square[lane] = norm[lane]
    for k in range(m.shape[0]):
        square_bias -= ones[k] * ones[k]
        for lane in range(LANES):
            p = projected[k, lane]
            right[lane] -= p * m[k, lane]
            square[lane] -= p * p
            right_bias[lane] -= m[k, lane] * ones[k]
            mixed[lane] -= p * ones[k]
    linear[:] = bias
    _solve(work, square_bias, constants, fits_bias, is_signed, dtype, least)
    for j in range(w.shape[0]):
        qj = q[j]
        for lane in range(LANES):
            qj[lane] += factors[lane] * (qj[lane] - linear[lane]) + shifts[lane]
    for k in range(m.shape[0]):
        for lane in range(LANES):
            m[k, lane] -= factors[lane] * projected[k, lane] + shifts[lane] * ones[k]


@kernel(contracts=True)
def _solve(
    work: Any, square_bias: Any, constants: Any, fits_bias: bool, is_signed: bool, dtype: int, least: Any
) -> None:
    """Scale and bias of least error from the products in `work`; the changes go into `work`."""
    scale, bias = constants[0], constants[2]
    right, square, right_bias, mixed = work[1], work[2], work[3], work[4]
    factors, shifts, norm = work[5], work[6], work[7]
    one, two, nothing = np.float32(1.0), np.float32(2.0), np.float32(0.0)
    for lane in range(LANES):
        a, b, r, s = square[lane], mixed[lane], right[lane], right_bias[lane]
        is_usable = a > least * norm[lane]
        if fits_bias:
            determinant = a * square_bias - b * b
            is_usable &= determinant > least * a * square_bias
            factor, shift = (r * square_bias - s * b) / determinant, (s * a - r * b) / determinant
        else:
            factor, shift = r / a, nothing
        new_scale, new_bias = _stored(scale[lane] * (one + factor), dtype), _stored(bias[lane] + shift, dtype)
        factor, shift = (new_scale - scale[lane]) / scale[lane], new_bias - bias[lane]
        change = factor * (factor * a - two * r) + shift * (shift * square_bias - two * s + two * factor * b)
        is_usable &= change < nothing and abs(new_scale) < np.float32(np.inf) and new_scale != nothing
        is_usable &= is_signed or new_scale > nothing
        factors[lane] = factor if is_usable else nothing
        shifts[lane] = shift if is_usable else nothing
        scale[lane] = new_scale if is_usable else scale[lane]
        bias[lane] = new_bias if is_usable else bias[lane]


@kernel(contracts=True)
def refine_columns(
    weight: Any,
    codes: Any,
    scales: Any,
    zeros: Any,
    biases: Any,
    table: Any,
    thresholds: Any,
    top: int,
    hessian: Any,
    products: Any,
    start: int,
    fits: int,
    is_signed: bool,
    dtype: int,
    limits: Any,
    error: Any,
    is_changed: Any,
) -> None:
    """Refine the whole blocks of a tile of columns from `start` on. `hessian` [columns, columns] belongs to the tile;
    `products` [rows, columns] are the errors of whole rows times H; `error` covers whole rows.
    """
    rows, columns, size = products.shape[0], products.shape[1], weight.shape[1] // scales.shape[1]
    q, g, moved = (
        np.zeros((columns, LANES), np.float32),
        np.zeros((columns, LANES), np.float32),
        np.zeros((columns, LANES), np.float32),
    )
    c, chosen = np.zeros((columns, LANES), np.uint8), np.zeros(LANES, np.uint8)
    constants, values = np.zeros((3, LANES), np.float32), np.empty(size, np.float32)
    linear, projected = np.zeros((size, LANES), np.float32), np.zeros((size, LANES), np.float32)
    work, diagonal = np.zeros((9, LANES), np.float32), np.diag(hessian).copy()
    for first in range(0, rows, LANES):
        count = min(LANES, rows - first)
        for lane in range(count):
            _to_lane(products[first + lane], g, lane)
            _to_lane(codes[first + lane, start : start + columns], c, lane)
        for begin in range(0, columns, size):
            end, block = begin + size, (start + begin) // size
            own, qb, gb, cb, mb = hessian[begin:end], q[begin:end], g[begin:end], c[begin:end], moved[begin:end]
            for lane in range(count):
                row = first + lane
                scale, zero, bias = scales[row, block], zeros[row, block], biases[row, block]
                constants[0, lane], constants[1, lane], constants[2, lane] = scale, zero, bias
                _decode_block(codes[row, start + begin : start + end], scale, zero, bias, table, values)
                _to_lane(values, qb, lane)
            mb[:] = np.float32(0.0)
            if fits:
                _fit_columns(
                    qb,
                    gb,
                    mb,
                    constants,
                    own[:, begin:end],
                    linear,
                    projected,
                    work,
                    fits == 2,
                    is_signed,
                    dtype,
                    limits[0],
                )
            _sweep_block(
                None,
                qb,
                cb,
                constants,
                table,
                thresholds,
                np.float32(top),
                None,
                None,
                diagonal[begin:end],
                None,
                own[:, begin:end],
                gb,
                linear,
                work,
                chosen,
                limits,
            )
            for j in range(size):
                for lane in range(LANES):
                    mb[j, lane] += linear[j, lane]
            for lane in range(count):
                row, part = first + lane, slice(start + begin, start + end)
                scale, zero, bias = constants[0, lane], constants[1, lane], constants[2, lane]
                scales[row, block], biases[row, block] = scale, bias
                _from_lane(cb, lane, codes[row, part])
                _decode_block(codes[row, part], scale, zero, bias, table, values)
                is_changed[row] |= _replace_error(weight[row, part], values, error[row, part])
            if end < columns:
                _subtract_products(own[:, end:], mb, g[end:])


@kernel()
def _replace_error(weight: Any, values: Any, error: Any) -> bool:
    """Store an error; return whether the stored error changed."""
    is_changed = False
    for i in range(values.size):
        difference = weight[i] - values[i]
        is_changed |= difference != error[i]
        error[i] = difference
    return is_changed


@kernel(contracts=True)
def _subtract_products(hessian: Any, steps: Any, g: Any) -> None:
    """g [columns, LANES] -= hessian [n, columns] transposed times steps [n, LANES]."""
    n = steps.shape[0]
    for k in range(g.shape[0]):
        gk = g[k]
        for i in range(0, n - 3, 4):
            h0, h1, h2, h3 = hessian[i, k], hessian[i + 1, k], hessian[i + 2, k], hessian[i + 3, k]
            d0, d1, d2, d3 = steps[i], steps[i + 1], steps[i + 2], steps[i + 3]
            for lane in range(LANES):
                gk[lane] -= (h0 * d0[lane] + h1 * d1[lane]) + (h2 * d2[lane] + h3 * d3[lane])
        for i in range(n - n % 4, n):
            h0, d0 = hessian[i, k], steps[i]
            for lane in range(LANES):
                gk[lane] -= h0 * d0[lane]


@kernel(contracts=True)
def _fit_columns(
    q: Any,
    g: Any,
    moved: Any,
    constants: Any,
    hessian: Any,
    linear: Any,
    projected: Any,
    work: Any,
    fits_bias: bool,
    is_signed: bool,
    dtype: int,
    least: Any,
) -> None:
    """Fit the scale and the bias of a block."""
    bias = constants[2]
    right, square, right_bias, mixed = work[1], work[2], work[3], work[4]
    factors, shifts, norm = work[5], work[6], work[7]
    work[:] = np.float32(0.0)
    projected[:] = np.float32(0.0)
    for j in range(q.shape[0]):
        for lane in range(LANES):
            linear[j, lane] = q[j, lane] - bias[lane]
    _subtract_products(hessian, linear, projected)
    square_bias = np.float32(0.0)
    for j in range(q.shape[0]):
        h = hessian[j, j]
        for k in range(q.shape[0]):
            square_bias += hessian[j, k]
        for lane in range(LANES):
            d, p = linear[j, lane], projected[j, lane]
            right[lane] += d * g[j, lane]
            square[lane] -= d * p
            norm[lane] += h * d * d
            right_bias[lane] += g[j, lane]
            mixed[lane] -= p
    _solve(work, square_bias, constants, fits_bias, is_signed, dtype, least)
    for j in range(q.shape[0]):
        total = np.float32(0.0)
        for k in range(q.shape[0]):
            total += hessian[j, k]
        for lane in range(LANES):
            step = factors[lane] * linear[j, lane] + shifts[lane]
            moved[j, lane] = step
            q[j, lane] += step
            g[j, lane] += factors[lane] * projected[j, lane] - shifts[lane] * total


@kernel(reassociates=True, contracts=True)
def add_inner_products(products: Any, error: Any, start: int, factor: float, totals: Any) -> None:
    """Add to each row: `factor` times the inner product of `products` and the columns of `error` from `start` on."""
    for row in range(totals.size):
        one, other, total = products[row], error[row, start : start + products.shape[1]], 0.0
        for i in range(one.size):
            total += np.float64(one[i]) * np.float64(other[i])
        totals[row] += factor * total
