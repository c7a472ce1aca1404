"""What is timed on a GPU: each kernel through its contract, with the bytes that it must move and the operations that it
must do, and beside it bitsandbytes and the plain torch definition. Times nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch

from loftq_cli.methods.stacked import alternate_stack
from loftq_cli.tensors.specs import CodebookSpec, LoraSpec
from loftq_cli.triton_kernels.affine.contract import dequantize_affine, quantize_affine
from loftq_cli.triton_kernels.backend import use_backend
from loftq_cli.triton_kernels.codebook import reference as codebook_reference
from loftq_cli.triton_kernels.codebook.contract import dequantize_codebook, quantize_codebook
from loftq_cli.triton_kernels.dequant_matmul.contract import dequant_matmul
from loftq_cli.triton_kernels.double_quant.contract import double_quantize
from loftq_cli.triton_kernels.error_stats.contract import codebook_error_sums
from loftq_cli.triton_kernels.merging.contract import merge_codebook, retention_sums
from loftq_cli.triton_kernels.packing.contract import pack_rows, unpack_rows
from loftq_cli.triton_kernels.refinement.contract import Levels, search_scales
from loftq_cli.triton_kernels.residual.contract import (
    CodedStack,
    quantize_difference,
    residual_product,
    transposed_residual_product,
)
from tests.benchmarks import gpu_peers

Calls = list[Callable[[], object]]
BLOCK, GROUP = 64, 64
DTYPE = torch.bfloat16
CODED_NBYTES = 0.5 + 4 / BLOCK  # a weight: its code, and its share of a constant

# Of the copy rate, or of the roofline: what a kernel is to reach.
GOALS = {
    "quantize NF4": 0.8,
    "quantize NF4, double": 0.8,
    "alternation": 0.5,
    "error sums": 0.7,
    "merge": 0.7,
    "retention": 0.7,
}


@dataclass(frozen=True, slots=True)
class Case:
    """ours            calls that do the same work, each on inputs of its own
    nbytes, flops   of one call: the least that must be moved, and done in `unit`
    peers           what makes such calls of another program; a text says why there is none
    """

    kernel: str
    shape: tuple[int, int]
    ours: Calls
    nbytes: float
    flops: float = 0.0
    unit: str = "bfloat16"
    rank: int | None = None
    tokens: int | None = None
    peers: Mapping[str, Callable[[], Calls] | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [out, in] on the device, and its codes."""

    weight: torch.Tensor
    packed: torch.Tensor
    absmax: torch.Tensor

    @classmethod
    def random(cls, shape: tuple[int, int]) -> Matrix:
        weight = torch.randn(shape, device="cuda").mul_(0.02).to(DTYPE)
        return cls(weight, *quantize_codebook(weight, "nf4", BLOCK))

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def coded(self) -> CodedStack:
        return CodedStack(self.packed[None], self.absmax[None], "nf4", BLOCK, DTYPE)


def codebook_cases(matrices: Sequence[Matrix]) -> Iterator[Case]:
    """There and back, and sums over a matrix as it is."""
    shape, numel = matrices[0].shape, matrices[0].weight.numel()

    def case(name: str, call: Callable[[Matrix], object], nbytes: float, peer: str = "") -> Case:
        ours = [partial(call, matrix) for matrix in matrices]
        return Case(name, shape, ours, nbytes * numel, peers=_peers(ours, matrices, peer))

    yield case("quantize NF4", lambda m: quantize_codebook(m.weight, "nf4", BLOCK), 2 + CODED_NBYTES, "quantize")
    yield case("quantize NF4, double", _doubly, 2.5 + 1 / BLOCK + 4 / BLOCK / 256, "quantize double")
    yield case(
        "decode NF4",
        lambda m: dequantize_codebook(m.packed, m.absmax, "nf4", BLOCK, m.weight.numel(), DTYPE),
        2 + CODED_NBYTES,
        "decode",
    )
    yield case("error sums", lambda m: _error_sums(m, ()), 2 + CODED_NBYTES)
    others = [matrix.weight.roll(1) for matrix in matrices]
    tripled = [partial(retention_sums, m.weight, other, other) for m, other in zip(matrices, others, strict=True)]
    yield Case("retention", shape, tripled, 4.0 * numel, peers={"torch": partial(by_definition, tripled)})


def affine_cases(matrices: Sequence[Matrix]) -> Iterator[Case]:
    """Integers, from float32 and to it, as the contract has it."""
    shape, numel = matrices[0].shape, matrices[0].weight.numel()
    wide = [matrix.weight.float() for matrix in matrices]
    constants = 3 / GROUP  # a bfloat16 scale and a zero point

    def case(name: str, ours: Calls, nbytes: float) -> Case:
        return Case(name, shape, ours, nbytes * numel, peers={"torch": partial(by_definition, ours)})

    quantize = partial(quantize_affine, bits=4, group_size=GROUP, symmetric=False, scale_dtype="bfloat16")
    yield case("quantize INT4", [partial(quantize, w) for w in wide], 5 + constants)
    levels = Levels(None, 4, "int", torch.bfloat16)
    yield case("search INT4", [partial(search_scales, w, GROUP, levels) for w in wide], 5 + constants)
    coded = [quantize(w) for w in wide]
    del wide
    yield case(
        "decode INT4",
        [partial(dequantize_affine, c.codes, c.scales, c.zero_points, 4, GROUP) for c in coded],
        5 + constants,
    )
    yield case("pack INT4", [partial(pack_rows, c.codes, 4) for c in coded], 1.5)
    packed = [pack_rows(c.codes, 4) for c in coded]
    yield case("unpack INT4", [partial(unpack_rows, p, 4, shape[1]) for p in packed], 1.5)


def low_rank_cases(matrices: Sequence[Matrix], rank: int) -> Iterator[Case]:
    """The passes of LoftQ, and what is done with its adapter. Of factors and vectors 2 bytes are counted:
    they are multiplied as bfloat16.
    """
    (rows, columns), numel = matrices[0].shape, matrices[0].weight.numel()
    left = torch.randn(1, rows, rank, device="cuda").mul_(0.02)
    right = torch.randn(1, rank, columns, device="cuda").mul_(0.02)
    vectors, flops = right.transpose(1, 2).contiguous(), 2.0 * numel * rank

    def case(name: str, call: Callable[[Matrix], object], nbytes: float, passes: int = 1, unit: str = "") -> Case:
        ours = [partial(call, matrix) for matrix in matrices]
        peers = {"torch": partial(by_definition, ours)}
        unit = unit or "bfloat16"
        return Case(name, (rows, columns), ours, nbytes, passes * flops, unit, rank, peers=peers)

    reading = (2 + CODED_NBYTES) * numel
    both = (rows + columns) * rank
    passes: dict[str, tuple[Callable[[Matrix], object], float]] = {
        "minus and quantize": (lambda m: quantize_difference(m.weight[None], left, right, "nf4", BLOCK), 2.0 * both),
        "residual · vectors": (lambda m: residual_product(m.weight[None], m.coded, vectors), 2.0 * both),
        "vectors · residual": (lambda m: transposed_residual_product(m.weight[None], m.coded, left), 2.0 * both),
    }
    for name, (call, nbytes) in passes.items():
        yield case(name, call, reading + nbytes)

    def alternation(matrix: Matrix) -> list[object]:
        return [call(matrix) for call, _ in passes.values()]

    yield case("alternation", alternation, 3 * reading + 6.0 * both, 3)
    lora = right[0], left[0]
    yield case("error sums", lambda m: _error_sums(m, lora), reading + 4.0 * both, unit="float32")
    yield case(
        "merge",
        lambda m: merge_codebook(m.packed, m.absmax, "nf4", BLOCK, m.shape, DTYPE, *lora, 2.0, DTYPE),
        reading + 4.0 * both,
        unit="float32",
    )


def loftq_case(matrices: Sequence[Matrix], rank: int, iterations: int) -> Case:
    """A stack of two matrices, K alternations and what follows them. The bytes and operations are those of its passes:
    three an alternation, two more of the first, one that quantizes the best, and its error sums.
    """
    (rows, columns), numel = matrices[0].shape, 2 * matrices[0].weight.numel()
    stacks = [torch.stack([a.weight, b.weight]) for a, b in zip(matrices[::2], matrices[1::2], strict=False)]
    start = torch.randn(2, columns, rank, device="cuda")
    passes = 3 * iterations + 4

    def run(stack: torch.Tensor) -> object:
        return alternate_stack(stack, CodebookSpec(), "bfloat16", LoraSpec(rank, rank), iterations, start)

    return Case(
        f"LoftQ, K = {iterations}, 2 matrices",
        (rows, columns),
        [partial(run, stack) for stack in stacks],
        passes * ((2 + CODED_NBYTES) * numel + 2 * 3 * (rows + columns) * rank),
        passes * 2.0 * numel * rank,
        rank=rank,
    )


def product_cases(matrices: Sequence[Matrix], tokens: int) -> Iterator[Case]:
    """Inputs times a quantized matrix."""
    (rows, columns), numel = matrices[0].shape, matrices[0].weight.numel()
    x = torch.randn(tokens, columns, device="cuda").to(DTYPE)
    ours: Calls = [
        partial(dequant_matmul, x, m.packed, m.absmax, "nf4", BLOCK, m.shape, DTYPE)  # type: ignore[arg-type]
        for m in matrices
    ]
    peers: dict[str, Callable[[], Calls] | str] = {
        "bitsandbytes": gpu_peers.unusable() or partial(gpu_peers.products, matrices, x),
        "torch": lambda: [partial(torch.matmul, x, m.weight.T) for m in matrices],
    }
    nbytes = CODED_NBYTES * numel + 2.0 * tokens * (rows + columns)
    yield Case("product", (rows, columns), ours, nbytes, 2.0 * numel * tokens, tokens=tokens, peers=peers)


def by_definition(ours: Calls) -> Calls:
    """The same by the plain torch definition, in pieces that a GPU is not too large for."""

    def defined(call: Callable[[], object]) -> object:
        use_backend("cuda", "reference")
        try:
            with mock.patch.object(codebook_reference, "PIECE_NUMEL", 1 << 26):
                return call()
        finally:
            use_backend("cuda", None)

    return [partial(defined, call) for call in ours]


def _peers(ours: Calls, matrices: Sequence[Matrix], peer: str) -> dict[str, Callable[[], Calls] | str]:
    peers: dict[str, Callable[[], Calls] | str] = {"torch": partial(by_definition, ours)}
    if peer:
        peers["bitsandbytes"] = gpu_peers.unusable() or partial(gpu_peers.CODEBOOK[peer], matrices)
    return peers


def _doubly(matrix: Matrix) -> object:
    packed, absmax = quantize_codebook(matrix.weight, "nf4", BLOCK)
    return packed, double_quantize(absmax, 256)


def _error_sums(matrix: Matrix, lora: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return codebook_error_sums(matrix.weight, matrix.packed, matrix.absmax, "nf4", BLOCK, DTYPE, *lora)
