"""LoftQ and QLoRA of a stack of equal matrices on a GPU: the alternation of loftq.py with the solver "fast", in which
the host never waits. Which matrices may be stacked is for jobs to decide; what is unusual is only noted.
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

# Added to the diagonal of a Gram matrix of unit columns: below it they count as dependent, as those of no quantization
# noise are.
_SHIFT = 1e-6
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class StackedAlternation:
    """What alternating finds of n matrices [out, in].

    lora_A, lora_B    float32 [n, rank, in] and [n, out, rank], not balanced
    squared_errors    float64 [iterations, n], with the adapter
    squared_base      float64 [n]: what quantizing once loses
    best_iteration    int64 [n], counted from 1
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    squared_errors: torch.Tensor
    squared_base: torch.Tensor
    best_iteration: torch.Tensor


@dataclass(frozen=True, slots=True)
class StackedInitialization:
    """What a method makes of n matrices; on the device it may still be being computed.

    packed        uint8 [n, bytes]
    constants     float32 [n, blocks], or what is stored of them after double quantization, with a first dimension n
    sums          float64 [n, 7], see `codebook_error_sums`: of what is stored
    is_ordinary   bool [n]: the others are to be made one by one, by the method itself
    alternation   None where nothing iterates
    """

    packed: torch.Tensor
    constants: torch.Tensor | NestedAbsmax
    sums: torch.Tensor
    is_ordinary: torch.Tensor
    alternation: StackedAlternation | None


def quantize_once(weight: torch.Tensor, spec: QuantSpec, dtype: str) -> StackedInitialization:
    """QLoRA of [n, out, in]: its adapter is not computed from the weights, and adds nothing."""
    quantized = quantize_stack(weight, spec, dtype)
    sums = _sums(weight, quantized, None, 1.0)
    return StackedInitialization(quantized.coded.packed, quantized.constants, sums, quantized.is_ordinary, None)


def alternate_stack(
    weight: torch.Tensor, spec: QuantSpec, dtype: str, lora: LoraSpec, iterations: int, start: torch.Tensor
) -> StackedInitialization:
    """LoftQ of [n, out, in]; `start` holds random vectors, float32 [n, in, rank].

    The best iterate of each matrix is kept as what its base was made from: the base itself is made again from that,
    which reads the weights once more, and no codes are copied at any step.
    """
    vectors, update = start, None
    state = _Best.none(weight, lora.rank)
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
        left = basis.bfloat16().float()  # as the product sees it
        right = transposed_residual_product(weight, quantized.coded, left)
        squared_error = (squares - _gain(left, right)).clamp_(min=0.0)
        is_ordinary &= quantized.is_ordinary & is_found & squared_error.isfinite()
        state = state.or_better(iteration, squared_error, update, (left, right))
        squared_errors.append(squared_error)
        squared_base_errors.append(squares)
        vectors = (right / right.abs().amax(dim=(1, 2), keepdim=True).clamp_(min=_TINY)).transpose(1, 2).contiguous()
        update = (left, right)
    if iterations > 1:
        quantized = quantize_stack(weight, spec, dtype, state.update)
    # Both public implementations fit B·A and forget the scaling, which most loaders then multiply by.
    root = math.sqrt(lora.scaling)
    lora_A, lora_B = state.factors[1] / root, state.factors[0] / root
    sums = _sums(weight, quantized, (lora_A, lora_B), lora.scaling)
    found = StackedAlternation(lora_A, lora_B, torch.stack(squared_errors), squared_base_errors[0], state.iteration)
    return StackedInitialization(quantized.coded.packed, quantized.constants, sums, is_ordinary, found)


def orthonormal_stack(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal bases of what the columns of float32 [n, size, rank] span, and bool [n]: whether they were found.

    Cholesky QR, twice: the first makes the columns nearly orthogonal, so that the second is exact to rounding. The
    small factor is inverted and multiplied by: a product runs faster on a GPU than a triangular solve of many rows.
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
    """Of each matrix, the best iterate so far: its number and error, what its base was quantized minus, its factors."""

    iteration: torch.Tensor
    squared_error: torch.Tensor
    update: tuple[torch.Tensor, torch.Tensor]
    factors: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def none(cls, weight: torch.Tensor, rank: int) -> _Best:
        n, out_features, in_features = weight.shape
        on = weight.device
        nothing = (torch.zeros(n, out_features, rank, device=on), torch.zeros(n, rank, in_features, device=on))
        number = torch.zeros(n, dtype=torch.int64, device=on)
        return cls(number, torch.full((n,), math.inf, dtype=torch.float64, device=on), nothing, nothing)

    def or_better(
        self,
        iteration: int,
        squared_error: torch.Tensor,
        update: tuple[torch.Tensor, torch.Tensor] | None,
        factors: tuple[torch.Tensor, torch.Tensor],
    ) -> _Best:
        """With the iterates of those matrices whose error they lower."""
        is_better = squared_error < (1 - TIE) * self.squared_error
        wide = is_better[:, None, None]

        def chosen(
            new: tuple[torch.Tensor, torch.Tensor] | None, old: tuple[torch.Tensor, torch.Tensor]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return old if new is None else (torch.where(wide, new[0], old[0]), torch.where(wide, new[1], old[1]))

        return _Best(
            self.iteration.masked_fill(is_better, iteration),
            torch.where(is_better, squared_error, self.squared_error),
            chosen(update, self.update),
            chosen(factors, self.factors),
        )


def _gain(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """By how much left·right lowers the squared error, float64 [n], where right = leftᵀ·residual."""
    inner = (left.transpose(1, 2) @ left).double() * (right @ right.transpose(1, 2)).double()
    return 2.0 * right.double().square().sum(dim=(1, 2)) - inner.sum(dim=(1, 2))


def _sums(
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
