"""Best rank-r approximations of a sequence of matrices, as the two factors of an adapter: exact, or by iteration from
where the matrix before ended. No quantization here.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

import torch

from loftq_cli.errors import NumericError
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.rows import slabs

# Of the Krylov space of "faithful", for the first matrix of a sequence and for those that start from the one before.
_COLD_BLOCKS, _WARM_BLOCKS = 4, 3
_OVERSAMPLING = 8
COLD_STEPS = 4  # of "fast", on the first matrix; one on those that start from the one before

# Of the smallest to the largest step of a Cholesky factor, and of the eigenvalues of products: quantization noise has
# more than 0.3. Down to this float32 gives four digits, which is more than the iteration does.
_LEAST_RATIO = 0.03
_NOTHING = torch.finfo(torch.float32).eps

# Of a matrix, the largest entry whose squares and products are inside float32's range; beyond it a matrix is scaled.
_LARGEST = 1e10


@dataclass(frozen=True, slots=True)
class Factors:
    """left [out, rank] and right [rank, in] in float32, whose product approximates a matrix M; and
    gain = ||M||² − ||M − left·right||², good to four digits.
    """

    left: torch.Tensor
    right: torch.Tensor
    gain: float


class Coordinates(Protocol):
    """A linear map F [in, k] that is applied to the rows of a matrix M before it is approximated: M·F."""

    def spread(self, columns: torch.Tensor) -> torch.Tensor:
        """F @ columns: float32 [in, r] of [k, r]."""
        ...

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ F: float32 [r, k] of [r, in]."""
        ...


class Solver(Protocol):
    """What gives low-rank factors of each of a sequence of similar matrices."""

    def restart(self, right: torch.Tensor) -> None:
        """Take `right` [r, in] for the factor that the matrix before has left."""
        ...

    def __call__(self, matrix: torch.Tensor, *, balances: bool = True) -> Factors:
        """Factors of [out, in] in float32 or bfloat16. Balanced ones are U·√S and √S·Vᵀ with the largest entry of each
        column of U positive; others are cheaper where the product is all that is needed.
        """
        ...


def is_exact(svd: str, rank: int, shape: tuple[int, ...]) -> bool:
    """Whether `make_solver` decomposes such matrices: asked to, or because it is then as fast."""
    return svd == "exact" or min(shape) <= 4 * (rank + _OVERSAMPLING)


def make_solver(
    svd: str,
    rank: int,
    shape: tuple[int, ...],
    generator: torch.Generator,
    workers: Workers = SERIAL,
    coordinates: Coordinates | None = None,
) -> Solver:
    """The solver of a sequence of matrices of `shape`; with `coordinates`, of matrices that have this shape in them,
    whose right factors are found there: left @ right approximates M·F.

    exact      the best approximation (Eckart-Young)
    fast       subspace iteration, warm: about 1 % more error on the first matrix, which the next ones win back
    faithful   block Krylov iteration, warm: within 0.2 % of exact at every matrix
    Where the smaller side is not much more than the rank, all are exact, which is then as fast.
    """
    if is_exact(svd, rank, shape):
        return ExactSolver(rank, coordinates)
    solver = SubspaceSolver if svd == "fast" else KrylovSolver
    return _Rescaling(solver(rank, generator, workers, coordinates))


class ExactSolver:
    """Every matrix by itself, with float64 eigenvectors."""

    def __init__(self, rank: int, coordinates: Coordinates | None = None) -> None:
        self._rank, self._coordinates = rank, coordinates

    def restart(self, right: torch.Tensor) -> None:
        """Nothing: it begins with nothing."""

    def __call__(self, matrix: torch.Tensor, *, balances: bool = True) -> Factors:
        """See `truncated_svd`. Balanced always."""
        del balances
        if self._coordinates is not None:
            matrix = self._coordinates.gather(matrix.float())
        left, right = truncated_svd(matrix, self._rank)
        return Factors(left, right, _squared_singular_values(right))


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


class _Rescaling:
    """An iteration, again with a matrix of smaller numbers where float32 cannot hold products of what it has."""

    def __init__(self, solver: SubspaceSolver | KrylovSolver) -> None:
        self._solver = solver

    def restart(self, right: torch.Tensor) -> None:
        """See `Solver`."""
        self._solver.restart(right)

    def __call__(self, matrix: torch.Tensor, *, balances: bool = True) -> Factors:
        """See `Solver`. Peak memory where it has to scale: one more copy of `matrix`."""
        try:
            return self._solver(matrix, balances=balances)
        except NumericError:
            largest = max(abs(float(end)) for end in torch.aminmax(matrix))
            if not _LARGEST < largest < math.inf:
                raise
        self._solver.forget()
        root = 2.0 ** (math.frexp(largest)[1] // 2)  # powers of two: nothing is rounded
        found = self._solver((matrix / root).div_(root))
        self._solver.forget()  # what it would start from is of the other size
        return Factors(found.left * root, found.right * root, found.gain * root**4)


class _Iteration:
    """What both iterations have in common: products with a matrix, a few of its rows at a time. What is summed over
    them is summed in their order.
    """

    def __init__(
        self,
        rank: int,
        generator: torch.Generator,
        workers: Workers = SERIAL,
        coordinates: Coordinates | None = None,
    ) -> None:
        self._rank, self._generator, self._workers, self._coordinates = rank, generator, workers, coordinates
        self._start: torch.Tensor | None = None  # [in, width], from the matrix before

    def restart(self, right: torch.Tensor) -> None:
        """See `Solver`."""
        scale = float(right.abs().max())
        self._start = (right / scale).T if 0.0 < scale < math.inf else None

    def forget(self) -> None:
        """Take the next matrix for the first."""
        self._start = None

    def _times(self, matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """matrix @ right, float32 [out, width]; in coordinates matrix @ F @ right."""
        dtype = product_dtype(matrix)
        if self._coordinates is not None:
            right = self._coordinates.spread(right)
        narrow = right.to(dtype).contiguous()
        product = torch.empty(matrix.shape[0], right.shape[1], device=matrix.device)

        def multiply(part: slice) -> None:
            product[part] = matrix[part].to(dtype) @ narrow

        self._workers.each(multiply, _slabs(matrix))
        return product

    def _transposed_times(self, matrix: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """left.T @ matrix, float32 [width, in]; in coordinates left.T @ matrix @ F."""
        dtype = product_dtype(matrix)
        narrow = left.T.to(dtype).contiguous()
        product = torch.zeros(left.shape[1], matrix.shape[1], device=matrix.device)
        for term in self._workers.map(lambda part: narrow[:, part] @ matrix[part].to(dtype), _slabs(matrix)):
            product += term
        return product if self._coordinates is None else self._coordinates.gather(product)

    def _random(self, matrix: torch.Tensor, width: int) -> torch.Tensor:
        """[in, width], drawn on the CPU: the same whatever the matrix is on. In coordinates, what they have of it."""
        drawn = torch.randn(matrix.shape[1], width, generator=self._generator).to(matrix.device)
        return drawn if self._coordinates is None else self._coordinates.gather(drawn.T).T


class SubspaceSolver(_Iteration):
    """Subspace iteration of exactly the rank: one step a matrix, from the right factor of the one before. Between the
    matrices of an alternation, which hardly differ, the steps add up.
    """

    def __call__(self, matrix: torch.Tensor, *, balances: bool = True) -> Factors:
        """See `Solver`. Both sides of the matrix are at least the rank. Peak memory: a few matrices of that width."""
        start, steps = self._start, 1
        if start is None:
            start, steps = self._random(matrix, self._rank), COLD_STEPS
        for _ in range(steps - 1):
            basis = _orthonormal(self._times(matrix, start))
            start = _orthonormal(self._transposed_times(matrix, basis).T.contiguous())
        basis = _orthonormal(self._times(matrix, start))  # [out, rank]
        basis = basis.to(product_dtype(matrix)).float()  # as the product sees it
        right = self._transposed_times(matrix, basis)  # [rank, in]
        scale = float(right.abs().max())
        if not math.isfinite(scale):
            raise _no_decomposition()
        unit = right / scale if scale else right  # its squares are inside float32's range
        gram = unit @ unit.T
        squares = gram.diagonal()
        # A matrix of lower rank leaves nothing to start from in some directions: the next one starts cold.
        self._start = unit.T if scale and bool(squares.min() > _NOTHING * squares.max()) else None
        gain = 2.0 * squares.double().sum() - ((basis.T @ basis).double() * gram).sum()
        found = Factors(basis, right, scale**2 * float(gain))
        return balanced(found) if balances else found


class KrylovSolver(_Iteration):
    """Block Krylov iteration (Musco and Musco, arXiv 1504.05477), each started from the right singular vectors of the
    matrix before.
    """

    def __call__(self, matrix: torch.Tensor, *, balances: bool = True) -> Factors:
        """See `Solver`; balanced always. Peak memory: a few matrices of a few times the rank."""
        del balances
        width = self._rank + _OVERSAMPLING
        start, blocks = self._start, _WARM_BLOCKS
        if start is None:
            start, blocks = self._random(matrix, width), _COLD_BLOCKS
        basis = _orthonormal(self._times(matrix, start))  # [out, width]
        for _ in range(blocks - 1):
            rows = self._transposed_times(matrix, basis[:, -width:])
            block = self._times(matrix, _orthonormal(rows.T.contiguous()))
            block -= basis @ (basis.T @ block)  # or it would be nearly dependent on what there is
            basis = torch.cat((basis, _orthonormal(block)), dim=1)  # [out, blocks * width]
            if not _is_orthonormal(basis):  # nothing but rounding was left in some directions of the block
                basis = torch.linalg.qr(basis).Q
        basis = basis.to(product_dtype(matrix)).float()  # as the product sees it
        projected = self._transposed_times(matrix, basis)  # [blocks * width, in]
        vectors = _left_vectors(projected)[:, :width]
        right = vectors.T @ projected  # [width, in] = S·Vᵀ
        singular = _row_norms(right)
        self._start = None
        if bool((singular > _NOTHING * singular[0]).all()):
            self._start = (right / singular[:, None]).T
        left, right = basis @ vectors[:, : self._rank], right[: self._rank]
        return _factors(left, right, singular[: self._rank])


def balanced(factors: Factors) -> Factors:
    """The same product as U·√S and √S·Vᵀ; `factors.left` is orthonormal."""
    vectors = _left_vectors(factors.right)
    right = vectors.T @ factors.right  # S·Vᵀ
    made = _factors(factors.left @ vectors, right, _row_norms(right))
    return replace(made, gain=factors.gain)


def _factors(left: torch.Tensor, right: torch.Tensor, singular: torch.Tensor) -> Factors:
    """Balanced factors of U [out, rank] and S·Vᵀ [rank, in]."""
    root, inverse_root = _roots(singular, left.shape[0])
    left, right = _signed(left * root, right * inverse_root[:, None])
    inner = _squared_singular_values(right)
    return Factors(left, right, 2.0 * inner - float(((left.T @ left).double() * (right @ right.T)).sum()))


def _row_norms(matrix: torch.Tensor) -> torch.Tensor:
    """float32. Raises NumericError when one is not finite."""
    norms: torch.Tensor = torch.linalg.vector_norm(matrix.double(), dim=1).float()  # squares may overflow float32
    if not bool(torch.isfinite(norms).all()):
        raise _no_decomposition()
    return norms


def _squared_singular_values(right: torch.Tensor) -> float:
    """Their sum, from √S·Vᵀ."""
    return float(torch.linalg.vector_norm(right.double(), dim=1).pow(4).sum())


def product_dtype(matrix: torch.Tensor) -> torch.dtype:
    """What `matrix` is multiplied in: bfloat16 only on a GPU, and where the processor has instructions for it, which
    are then several times faster, and their sums float32; else float32.
    """
    return matrix.dtype if not matrix.is_cpu or _multiplies_bfloat16() else torch.float32


@cache
def _multiplies_bfloat16() -> bool:
    """Whether the processor does."""
    # torch tells it under private names only; without them, and on other processors, float32 is never wrong.
    known = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(is_supported() for is_supported in known if is_supported is not None)


def _slabs(matrix: torch.Tensor) -> list[slice]:
    """Of the rows of a matrix; a GPU takes all of them at once."""
    rows, columns = matrix.shape
    return slabs((rows, columns)) if matrix.is_cpu else [slice(0, rows)]


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
    return bool((basis.T @ basis - torch.eye(basis.shape[1], device=basis.device)).abs().max() < 1e-3)


def _left_vectors(matrix: torch.Tensor) -> torch.Tensor:
    """The left singular vectors of a wide float32 matrix as columns, the largest singular value first.

    In float32 where its spectrum is flat, as that of quantization noise is, and float64 where it is not, or LAPACK does
    not converge.
    """
    gram = matrix @ matrix.T
    if _is_usual(gram):
        with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            values, vectors = torch.linalg.eigh(gram)
            if bool(values[0] > _LEAST_RATIO * values[-1]):
                descending: torch.Tensor = vectors.flip(1)
                return descending
    wide = matrix.double()
    return _eigenvectors(wide @ wide.T).float()


def _is_usual(gram: torch.Tensor) -> bool:
    """Whether squares of the numbers that a Gram matrix is made of are well inside float32's range."""
    squares = gram.diagonal()
    return bool(((squares > 1e-30) & (squares < 1e30)).all())


def _eigenvectors(gram: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of a symmetric float64 matrix as columns, by descending eigenvalue. Raises NumericError."""
    # LAPACK may or may not say that it does not converge on NaN.
    if bool(torch.isfinite(gram).all()):
        with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            vectors: torch.Tensor = torch.linalg.eigh(gram).eigenvectors.flip(1)
            return vectors
        with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            # Of a matrix without negative eigenvalues, the same by another algorithm.
            left: torch.Tensor = torch.linalg.svd(gram).U
            return left
    raise _no_decomposition()


def _no_decomposition() -> NumericError:
    return NumericError(
        "its residual has no singular value decomposition that is found",
        hint="--svd exact, then --method qlora or --exclude it",
    )


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
