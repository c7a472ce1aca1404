"""Best rank-r approximation of a matrix, as the two balanced factors of an adapter: exact, or by subspace iteration
that starts from the last matrix of a sequence. No quantization here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from loftq_cli.errors import NumericError
from loftq_cli.rows import slabs
from loftq_cli.workers import SERIAL, Workers

# Blocks of the Krylov space, for the first matrix of a sequence and for those that start from the one before.
_BLOCKS = {"fast": (2, 1), "faithful": (4, 3)}
_OVERSAMPLING = 8

# Of the smallest to the largest step of a Cholesky factor, and of the eigenvalues of products: quantization noise has
# more than 0.3. Down to this float32 gives four digits, which is more than the iteration does.
_LEAST_RATIO = 0.03

_NO_DECOMPOSITION = "its residual has no singular value decomposition that is found"

Solver = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def is_exact(svd: str, rank: int, shape: tuple[int, ...]) -> bool:
    """Whether `make_solver` decomposes such matrices: asked to, or because it is then as fast."""
    return svd == "exact" or min(shape) <= 4 * (rank + _OVERSAMPLING)


def make_solver(
    svd: str, rank: int, shape: tuple[int, ...], generator: torch.Generator, workers: Workers = SERIAL
) -> Solver:
    """What gives U·√S [out, rank] and √S·Vᵀ [rank, in] of each of a sequence of similar matrices of `shape`.

    exact      the best approximation (Eckart-Young)
    fast       subspace iteration, warm: about 1 % more error on the first matrix, which the next ones win back
    faithful   the same with more steps: within 0.2 % of exact at every matrix
    Where the smaller side is not much more than the rank, all are exact, which is then as fast.
    """
    if is_exact(svd, rank, shape):
        return lambda matrix: truncated_svd(matrix, rank)
    return SubspaceSolver(rank, *_BLOCKS[svd], generator, workers)


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

    The matrix is read a few rows at a time; what is summed over them is summed in their order.
    """

    def __init__(
        self, rank: int, first_blocks: int, later_blocks: int, generator: torch.Generator, workers: Workers = SERIAL
    ) -> None:
        self._rank, self._width, self._generator = rank, rank + _OVERSAMPLING, generator
        self._cold_blocks, self._warm_blocks = first_blocks, later_blocks
        self._workers = workers
        self._start: torch.Tensor | None = None

    def __call__(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """U·√S and √S·Vᵀ in float32 of [out, in] in float32 or bfloat16, with both sides at least rank + 8 times the
        blocks; signs as those of `truncated_svd`. Peak memory: a few matrices of that width.
        """
        is_cold = self._start is None
        start = self._random(matrix.shape[1]) if self._start is None else self._start
        basis = _orthonormal(self._times(matrix, start))  # [out, width]
        for _ in range((self._cold_blocks if is_cold else self._warm_blocks) - 1):
            rows = self._transposed_times(matrix, basis[:, -self._width :])
            block = self._times(matrix, _orthonormal(rows.T.contiguous()))
            block -= basis @ (basis.T @ block)  # or it would be nearly dependent on what there is
            basis = torch.cat((basis, _orthonormal(block)), dim=1)  # [out, blocks * width]
            if not _is_orthonormal(basis):  # nothing but rounding was left in some directions of the block
                basis = torch.linalg.qr(basis).Q
        basis = basis.to(product_dtype(matrix.dtype)).float()  # as the products see it, so that U·Uᵀ·R is what is found
        projected = self._transposed_times(matrix, basis)  # [blocks * width, in]
        left = _left_vectors(projected)[:, : self._width]
        right = left.T @ projected  # [width, in] = S·Vᵀ
        singular = torch.linalg.vector_norm(right.double(), dim=1).float()  # their squares may overflow float32
        if not bool(torch.isfinite(singular).all()):
            raise NumericError(_NO_DECOMPOSITION)
        # A matrix of lower rank leaves nothing to start from in some directions: the next one starts cold.
        is_whole = bool((singular > singular[0] * torch.finfo(torch.float32).eps).all())
        self._start = (right / singular[:, None]).T if is_whole else None
        root, inverse_root = _roots(singular[: self._rank], matrix.shape[0])
        left_factor = (basis @ left[:, : self._rank]) * root
        return _signed(left_factor, right[: self._rank] * inverse_root[:, None])

    def _times(self, matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """matrix @ right, float32 [out, width]."""
        dtype = product_dtype(matrix.dtype)
        narrow = right.to(dtype).contiguous()
        product = torch.empty(matrix.shape[0], right.shape[1])

        def multiply(part: slice) -> None:
            product[part] = matrix[part].to(dtype) @ narrow

        self._workers.each(multiply, slabs((matrix.shape[0], matrix.shape[1])))
        return product

    def _transposed_times(self, matrix: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """left.T @ matrix, float32 [width, in]."""
        dtype = product_dtype(matrix.dtype)
        narrow = left.T.to(dtype).contiguous()
        product = torch.zeros(left.shape[1], matrix.shape[1])
        parts = slabs((matrix.shape[0], matrix.shape[1]))
        for term in self._workers.map(lambda part: narrow[:, part] @ matrix[part].to(dtype), parts):
            product += term
        return product

    def _random(self, rows: int) -> torch.Tensor:
        return torch.randn(rows, self._width, generator=self._generator)


@cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What matrices stored in `dtype` are multiplied in: bfloat16 only where the processor has instructions for it,
    which are then several times faster, and their sums float32; else float32.
    """
    # torch tells it under private names only; without them, and on other processors, float32 is never wrong.
    known = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    has_products = any(is_supported() for is_supported in known if is_supported is not None)
    return dtype if has_products else torch.float32


def _orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis that holds the columns of float32 [out, width]: by a Cholesky factor of their products, or
    by Householder reflections where the columns are too near to being dependent for that.
    """
    gram = matrix.T @ matrix
    factor, failed = torch.linalg.cholesky_ex(gram)
    steps = factor.diagonal()
    if int(failed) or not _is_usual(gram) or not bool(steps.min() > _LEAST_RATIO * steps.max()):
        reflected: torch.Tensor = torch.linalg.qr(matrix).Q
        return reflected
    basis: torch.Tensor = torch.linalg.solve_triangular(factor.T, matrix, upper=True, left=False)
    return basis


def _is_orthonormal(basis: torch.Tensor) -> bool:
    return bool((basis.T @ basis - torch.eye(basis.shape[1])).abs().max() < 1e-3)


def _left_vectors(matrix: torch.Tensor) -> torch.Tensor:
    """The left singular vectors of a wide float32 matrix as columns, the largest singular value first.

    In float32 where its spectrum is flat, as that of quantization noise is, and float64 where it is not.
    """
    gram = matrix @ matrix.T
    if _is_usual(gram):
        values, vectors = _eigen(gram)
        if bool(values[0] > _LEAST_RATIO * values[-1]):
            return vectors.flip(1)
    wide = matrix.double()
    return _eigenvectors(wide @ wide.T).float()


def _is_usual(gram: torch.Tensor) -> bool:
    """Whether squares of the numbers that a Gram matrix is made of are well inside float32's range."""
    squares = gram.diagonal()
    return bool(((squares > 1e-30) & (squares < 1e30)).all())


def squared_gain(left: torch.Tensor, right: torch.Tensor) -> float:
    """||M||² − ||M − L·R||² for the factors U·√S and √S·Vᵀ that a solver gives of M: twice the sum of the squared
    singular values, less ||L·R||².
    """
    inner = torch.linalg.vector_norm(right.double(), dim=1).pow(4).sum()
    return float(2.0 * inner - ((left.T @ left).double() * (right @ right.T)).sum())


def _eigenvectors(gram: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of a symmetric matrix as columns, by descending eigenvalue. Raises NumericError."""
    return _eigen(gram)[1].flip(1)


def _eigen(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise NumericError(_NO_DECOMPOSITION) from None
    return values, vectors


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
