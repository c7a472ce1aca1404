"""LoftQ and QLoRA of a stack of matrices of equal shape on a GPU: the alternation of loftq.py with the solver "fast",
and a host that never waits. Callers decide about stacks; unusual matrices are only marked, see `is_ordinary`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from loftq_cli.methods.alternation import TIE
from loftq_cli.methods.lowrank import COLD_STEPS
from loftq_cli.quant.codebook_stack import QuantizedStack, quantize_stack
from loftq_cli.quant.formats import QuantSpec
from loftq_cli.tensors.matrices import NestedAbsmax
from loftq_cli.tensors.specs import LoraSpec
from loftq_cli.triton_kernels.error_stats.contract import codebook_error_sums
from loftq_cli.triton_kernels.residual.contract import residual_product, transposed_residual_product

# Added to the diagonal of a Gram matrix of unit columns, so that dependent columns have a Cholesky factor too. Columns
# of products with quantization noise are far from dependent, and the shift hardly changes the factor.
_SHIFT = 1e-6
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class StackedAlternation:
    """The result of alternating for n matrices W [out, in].

    lora_A            float32 [n, rank, in], not balanced with lora_B
    lora_B            float32 [n, out, rank], the scaling divided out
    squared_errors    float64 [iterations, n]: ||W − dequant(Q) − s·B·A||² after each iteration, by bfloat16 products
    squared_base      float64 [n]: ||W − dequant(Q)||² of quantizing once
    best_iteration    int64 [n]: the returned iteration, counted from 1
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    squared_errors: torch.Tensor
    squared_base: torch.Tensor
    best_iteration: torch.Tensor


@dataclass(frozen=True, slots=True)
class StackedInitialization:
    """Bases and adapters of n matrices; the device may still be computing the tensors.

    packed        uint8 [n, bytes]: the packed codes
    constants     the absmax float32 [n, blocks], or the stored form after double quantization, with a first dimension n
    sums          float64 [n, 7]: `codebook_error_sums` of the stored codes and constants, with the adapter
    is_ordinary   bool [n]: false for a matrix whose result is void; the caller runs the method on the matrix alone
    alternation   None for a method without iterations
    """

    packed: torch.Tensor
    constants: torch.Tensor | NestedAbsmax
    sums: torch.Tensor
    is_ordinary: torch.Tensor
    alternation: StackedAlternation | None


def quantize_once(weight: torch.Tensor, spec: QuantSpec, dtype: str) -> StackedInitialization:
    """QLoRA of a stack [n, out, in]: the bases. QLoRA's adapters add nothing and do not depend on the weights.

    weight   contiguous float32, bfloat16 or float16
    spec     a codebook format
    dtype    a loader's dtype for decoded values
    Raises TypeError for a format without `has_code_kernels`.

    >>> from loftq_cli.tensors.specs import CodebookSpec
    >>> stack = quantize_once(torch.ones(2, 4, 64), CodebookSpec("nf4", 64), "float32")
    >>> tuple(stack.packed.shape), stack.is_ordinary.tolist()
    ((2, 128), [True, True])
    """
    quantized = quantize_stack(weight, spec, dtype)
    sums = _sum_errors(weight, quantized, None, 1.0)
    return StackedInitialization(quantized.coded.packed, quantized.constants, sums, quantized.is_ordinary, None)


def alternate_stack(
    weight: torch.Tensor, spec: QuantSpec, dtype: str, lora: LoraSpec, iterations: int, start: torch.Tensor
) -> StackedInitialization:
    """LoftQ of a stack [n, out, in]: bases and adapters of the best iteration of each matrix.

    weight   contiguous float32, bfloat16 or float16
    spec     a codebook format
    dtype    a loader's dtype for decoded values
    start    random vectors, float32 [n, in, rank]
    No step copies codes. The state of a matrix keeps the factors that the best iteration subtracted from the weights. A
    last quantization computes the codes again from the factors, at the price of reading the weights once more.
    Raises TypeError for a format without `has_code_kernels`.
    """
    vectors, update = start, None
    state = _Best.make_empty(weight, lora.rank)
    is_ordinary = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    squared_errors: list[torch.Tensor] = []
    squared_base_errors: list[torch.Tensor] = []
    for iteration in range(1, iterations + 1):
        quantized = quantize_stack(weight, spec, dtype, update)
        for _ in range(COLD_STEPS - 1 if iteration == 1 else 0):
            product, _ = residual_product(weight, quantized.coded, vectors)
            basis, _ = orthonormal_stack(product)
            rows = transposed_residual_product(weight, quantized.coded, basis)
            vectors, _ = orthonormal_stack(rows.transpose(1, 2).contiguous())
        product, squares = residual_product(weight, quantized.coded, vectors)
        basis, is_found = orthonormal_stack(product)
        left = basis.bfloat16().float()  # rounded for the next product
        right = transposed_residual_product(weight, quantized.coded, left)
        squared_error = (squares - _gain(left, right)).clamp_(min=0.0)
        is_ordinary &= quantized.is_ordinary & is_found & squared_error.isfinite()
        state = state.take_better(iteration, squared_error, update, (left, right))
        squared_errors.append(squared_error)
        squared_base_errors.append(squares)
        vectors = (right / right.abs().amax(dim=(1, 2), keepdim=True).clamp_(min=_TINY)).transpose(1, 2).contiguous()
        update = (left, right)
    if iterations > 1:
        quantized = quantize_stack(weight, spec, dtype, state.update)
    # Most loaders multiply by the scaling s; both public implementations of LoftQ fit B·A and forget s.
    root = math.sqrt(lora.scaling)
    lora_A, lora_B = state.factors[1] / root, state.factors[0] / root
    sums = _sum_errors(weight, quantized, (lora_A, lora_B), lora.scaling)
    alternation = StackedAlternation(
        lora_A, lora_B, torch.stack(squared_errors), squared_base_errors[0], state.iteration
    )
    return StackedInitialization(quantized.coded.packed, quantized.constants, sums, is_ordinary, alternation)


def orthonormal_stack(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal bases of the spans of float32 columns [n, size, rank], and bool [n]: true if every Cholesky
    factorization succeeded. Columns of zeros have a basis of zeros.

    Cholesky QR, twice: the first makes the columns nearly orthogonal, so that the second is exact to rounding. The
    small factor is inverted and multiplied by: a product runs faster on a GPU than a triangular solve of many rows.

    >>> bases, is_found = orthonormal_stack(torch.tensor([[[3.0, 1.0], [0.0, 2.0]]]))
    >>> torch.allclose(bases.mT @ bases, torch.eye(2), atol=1e-5), is_found.tolist()
    (True, [True])
    """
    is_found = torch.ones(len(columns), dtype=torch.bool, device=columns.device)
    identity = torch.eye(columns.shape[2], device=columns.device).expand(len(columns), -1, -1)
    for _ in range(2):
        unit = columns / torch.linalg.vector_norm(columns, dim=1, keepdim=True).clamp_(min=_TINY)
        gram = unit.transpose(1, 2) @ unit
        gram.diagonal(dim1=1, dim2=2).add_(_SHIFT)
        factor, failed = torch.linalg.cholesky_ex(gram)
        is_found &= failed == 0
        columns = unit @ torch.linalg.solve_triangular(factor, identity, upper=False).transpose(1, 2)
    return columns, is_found


@dataclass(frozen=True, slots=True)
class _Best:
    """The best iteration so far of each of n matrices.

    iteration       int64 [n], counted from 1; 0 before the first
    squared_error   float64 [n], with the adapter
    update          (left, right), subtracted as left·right before quantizing the base; zeros for no subtraction
    factors         (left, right) with left·right = s·B·A: float32 [n, out, rank] and [n, rank, in]
    """

    iteration: torch.Tensor
    squared_error: torch.Tensor
    update: tuple[torch.Tensor, torch.Tensor]
    factors: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def make_empty(cls, weight: torch.Tensor, rank: int) -> _Best:
        n, out_features, in_features = weight.shape
        device = weight.device
        shapes = ((n, out_features, rank), (n, rank, in_features))
        left, right = (torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes)
        iteration = torch.zeros(n, dtype=torch.int64, device=device)
        return cls(
            iteration, torch.full((n,), math.inf, dtype=torch.float64, device=device), (left, right), (left, right)
        )

    def take_better(
        self,
        iteration: int,
        squared_error: torch.Tensor,
        update: tuple[torch.Tensor, torch.Tensor] | None,
        factors: tuple[torch.Tensor, torch.Tensor],
    ) -> _Best:
        """The state after an iteration: matrices whose error falls get the values of the iteration."""
        is_better = squared_error < (1 - TIE) * self.squared_error
        is_better_matrix = is_better[:, None, None]

        def choose(
            new: tuple[torch.Tensor, torch.Tensor] | None, old: tuple[torch.Tensor, torch.Tensor]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if new is None:
                return old
            return torch.where(is_better_matrix, new[0], old[0]), torch.where(is_better_matrix, new[1], old[1])

        return _Best(
            self.iteration.masked_fill(is_better, iteration),
            torch.where(is_better, squared_error, self.squared_error),
            choose(update, self.update),
            choose(factors, self.factors),
        )


def _gain(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The amount by which left·right lowers the squared error, float64 [n], where right = leftᵀ·residual."""
    inner = (left.transpose(1, 2) @ left).double() * (right @ right.transpose(1, 2)).double()
    return 2.0 * right.double().square().sum(dim=(1, 2)) - inner.sum(dim=(1, 2))


def _sum_errors(
    weight: torch.Tensor, quantized: QuantizedStack, factors: tuple[torch.Tensor, torch.Tensor] | None, scaling: float
) -> torch.Tensor:
    coded = quantized.coded
    sums = [
        codebook_error_sums(
            matrix,
            coded.packed[i],
            coded.absmax[i],
            coded.codebook,
            coded.block_size,
            coded.dtype,
            None if factors is None else factors[0][i],
            None if factors is None else factors[1][i],
            scaling,
        )
        for i, matrix in enumerate(weight)
    ]
    return torch.stack(sums)
