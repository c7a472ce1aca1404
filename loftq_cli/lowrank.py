"""Best rank-r approximation of a matrix, as the two balanced factors of an adapter: exact, or by subspace iteration
that starts from the last matrix of a sequence. No quantization here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from loftq_cli.errors import NumericError

# Blocks of the Krylov space, for the first matrix of a sequence and for those that start from the one before.
_BLOCKS = {"fast": (2, 1), "faithful": (4, 3)}
_OVERSAMPLING = 8

Solver = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def make_solver(svd: str, rank: int, shape: tuple[int, ...], generator: torch.Generator) -> Solver:
    """What gives U·√S [out, rank] and √S·Vᵀ [rank, in] of each of a sequence of similar matrices of `shape`.

    exact      the best approximation (Eckart-Young)
    fast       subspace iteration, warm: about 1 % more error on the first matrix, which the next ones win back
    faithful   the same with more steps: within 0.2 % of exact at every matrix
    Where the smaller side is not much more than the rank, all are exact, which is then as fast.
    """
    if svd == "exact" or min(shape) <= 4 * (rank + _OVERSAMPLING):
        return lambda matrix: truncated_svd(matrix, rank)
    return SubspaceSolver(rank, *_BLOCKS[svd], generator)


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U·√S [out, rank] and √S·Vᵀ [rank, in] in float32: their product is the best rank-r approximation (Eckart-Young).

    matrix: float32 [out, in], rank <= min(out, in). The eigenvectors of the smaller Gram matrix in float64 give the
    singular vectors to float32 accuracy, several times faster than a full SVD. The largest entry of each column of U
    is positive, so equal input gives equal signs. Peak memory: one float64 copy of `matrix`, and the Gram matrix.
    Raises ValueError for a rank that the matrix does not have, NumericError where LAPACK does not converge.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank {rank} is not between 1 and {min(matrix.shape)}")
    wide = matrix.shape[0] <= matrix.shape[1]
    tall = (matrix.T if wide else matrix).double()  # [long, short]
    right = _eigenvectors(tall.T @ tall)[:, :rank]  # [short, rank]
    projected = tall @ right  # [long, rank] = U·S of the tall matrix
    root, inverse_root = _roots(torch.linalg.vector_norm(projected, dim=0), tall.shape[0])
    long_factor, short_factor = projected * inverse_root, right * root
    return _signed(*((short_factor, long_factor.T) if wide else (long_factor, short_factor.T)))


class SubspaceSolver:
    """Truncated SVDs of a sequence of similar matrices by block Krylov iteration (Musco and Musco, arXiv 1504.05477),
    each started from the right singular vectors of the one before, which is what makes few blocks enough.
    """

    def __init__(self, rank: int, first_blocks: int, later_blocks: int, generator: torch.Generator) -> None:
        self._rank, self._width, self._generator = rank, rank + _OVERSAMPLING, generator
        self._cold_blocks, self._warm_blocks = first_blocks, later_blocks
        self._start: torch.Tensor | None = None

    def __call__(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """U·√S and √S·Vᵀ of float32 [out, in] with both sides at least rank + 8 times the blocks; signs as those of
        `truncated_svd`. Peak memory: a few matrices of that width.
        """
        is_cold = self._start is None
        start = self._random(matrix.shape[1]) if self._start is None else self._start
        blocks = [matrix @ start]  # [out, width] each
        for _ in range((self._cold_blocks if is_cold else self._warm_blocks) - 1):
            basis = torch.linalg.qr(blocks[-1]).Q
            blocks.append(matrix @ (matrix.T @ basis))
        basis = torch.linalg.qr(torch.cat(blocks, dim=1)).Q  # [out, blocks * width]
        projected = basis.T @ matrix  # [blocks * width, in]
        wide = projected.double()
        left = _eigenvectors(wide @ wide.T)[:, : self._width].float()
        right = left.T @ projected  # [width, in] = S·Vᵀ
        singular = torch.linalg.vector_norm(right, dim=1)
        # A matrix of lower rank leaves nothing to start from in some directions: the next one starts cold.
        is_whole = bool((singular > singular[0] * torch.finfo(torch.float32).eps).all())
        self._start = (right / singular[:, None]).T if is_whole else None
        root, inverse_root = _roots(singular[: self._rank], matrix.shape[0])
        left_factor = (basis @ left[:, : self._rank]) * root
        return _signed(left_factor, right[: self._rank] * inverse_root[:, None])

    def _random(self, rows: int) -> torch.Tensor:
        return torch.randn(rows, self._width, generator=self._generator)


def _eigenvectors(gram: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of a symmetric matrix as columns, by descending eigenvalue. Raises NumericError."""
    try:
        vectors: torch.Tensor = torch.linalg.eigh(gram)[1]
        return vectors.flip(1)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise NumericError("its residual has no singular value decomposition that LAPACK finds") from None


def _roots(singular: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """√S and 1/√S; 0 where a residual of lower rank than asked for (a zero one, say) has nothing."""
    positive = singular > singular[0] * torch.finfo(singular.dtype).eps * size
    root = torch.where(positive, singular.sqrt(), 0.0)
    return root, torch.where(positive, 1.0 / root, 0.0)


def _signed(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors in float32, with the largest entry of each column of `left` positive."""
    largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))  # [1, rank]
    sign = torch.where(largest < 0, -1.0, 1.0)
    return (left * sign).float().contiguous(), (right * sign.T).float().contiguous()
