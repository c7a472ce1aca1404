"""Best rank-r approximations of a sequence of matrices, as the two factors of an adapter: exact, or by an iteration
that starts from the right factor of the previous matrix. No quantization here.
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

# Blocks of the Krylov space of "faithful": cold for the first matrix of a sequence, warm after a previous matrix.
_COLD_BLOCKS, _WARM_BLOCKS = 4, 3
_OVERSAMPLING = 8
COLD_STEPS = 4  # steps of "fast" on the first matrix of a sequence; every later matrix gets a single step

# Least ratio of smallest to largest, for the diagonal of a Cholesky factor and the eigenvalues of a Gram matrix:
# quantization noise has more than 0.3. At 0.03 float32 still gives four digits, more than the iteration does.
_LEAST_RATIO = 0.03
_NOTHING = torch.finfo(torch.float32).eps  # a (squared) singular value of at most this part of the largest is rounding

_LARGEST = 1e10  # entries up to here have squares and products inside the range of float32


@dataclass(frozen=True, slots=True)
class Factors:
    """Factors of an approximation left·right of a matrix M.

    left    float32 [out, rank]
    right   float32 [rank, in]
    gain    ||M||² − ||M − left·right||², good to four digits
    """

    left: torch.Tensor
    right: torch.Tensor
    gain: float


class Coordinates(Protocol):
    """A linear map F [in, k] on the rows of a matrix M: solvers approximate M·F."""

    def spread(self, columns: torch.Tensor) -> torch.Tensor:
        """F @ columns: float32 [in, r] of [k, r]."""
        ...

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ F: float32 [r, k] of [r, in]."""
        ...


class Solver(Protocol):
    """Computes low-rank factors of each matrix in a sequence of similar matrices."""

    def restart(self, right: torch.Tensor) -> None:
        """Replace the right factor of the previous matrix, the next start, by `right` [r, in]."""
        ...

    def __call__(self, matrix: torch.Tensor, *, balances: bool = True) -> Factors:
        """Factors of a float32 or bfloat16 matrix [out, in]. Balanced factors are U·√S and √S·Vᵀ with the largest
        entry of each column of U positive; unbalanced factors have an equal product and are cheaper.
        Raises NumericError for a matrix without a decomposition.
        """
        ...


def is_exact(svd: str, rank: int, shape: tuple[int, ...]) -> bool:
    """Whether `make_solver` decomposes matrices of `shape` exactly: if `svd` is "exact", or if the smaller side is at
    most 4·(rank + 8), since an exact decomposition is then as fast as an iteration.

    >>> is_exact("fast", 16, (96, 4096)), is_exact("fast", 16, (97, 4096))
    (True, False)
    """
    return svd == "exact" or min(shape) <= 4 * (rank + _OVERSAMPLING)


def make_solver(
    svd: str,
    rank: int,
    shape: tuple[int, ...],
    generator: torch.Generator,
    workers: Workers = SERIAL,
    coordinates: Coordinates | None = None,
) -> Solver:
    """The solver of a sequence of matrices M of `shape`. Given `coordinates`, the solver approximates M·F of `shape`.
    `generator` draws the start of the first matrix. The solver is exact if `is_exact` is true.

    exact      the best approximation (Eckart-Young)
    fast       warm subspace iteration: about 1 % more error on the first matrix, won back on the next matrices
    faithful   warm block Krylov iteration: within 0.2 % of exact at every matrix

    >>> solve = make_solver("fast", 1, (64, 64), torch.Generator().manual_seed(0))
    >>> round(solve(torch.full((64, 64), 2.0)).gain)
    16384
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
        """Do nothing: an exact solver needs no start."""

    def __call__(self, matrix: torch.Tensor, *, balances: bool = True) -> Factors:
        """See `truncated_svd`: the factors are always balanced."""
        del balances
        if self._coordinates is not None:
            matrix = self._coordinates.gather(matrix.float())
        left, right = truncated_svd(matrix, self._rank)
        return Factors(left, right, _squared_singular_values(right))


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U·√S [out, rank] and √S·Vᵀ [rank, in] in float32: the product is the best rank-r approximation (Eckart-Young).

    matrix: float32 [out, in], rank <= min(out, in). The eigenvectors of the smaller Gram matrix in float64 give the
    singular vectors to float32 accuracy, several times faster than a full SVD. The largest entry of each column of U
    is positive, so equal input gives equal signs. Peak memory: a float64 copy of `matrix`, and the Gram matrix.
    Raises ValueError for a rank outside 1 to min(out, in), NumericError for NaN or if LAPACK does not converge.

    >>> [factor.norm().item() for factor in truncated_svd(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), rank=1)]
    [2.0, 2.0]
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank {rank} is not between 1 and {min(matrix.shape)}")
    is_wide = matrix.shape[0] <= matrix.shape[1]
    tall = (matrix.T if is_wide else matrix).double()  # [long, short]
    right = _eigenvectors(tall.T @ tall)[:, :rank]  # [short, rank]
    projected = tall @ right  # [long, rank] = U·S of the tall matrix
    root, inverse_root = _roots(torch.linalg.vector_norm(projected, dim=0), tall.shape[0])
    long_factor, short_factor = projected * inverse_root, right * root
    return _fix_signs(*((short_factor, long_factor.T) if is_wide else (long_factor, short_factor.T)))


class _Rescaling:
    """An iteration that is repeated on a scaled matrix where products of large entries overflow float32."""

    def __init__(self, solver: SubspaceSolver | KrylovSolver) -> None:
        self._solver = solver

    def restart(self, right: torch.Tensor) -> None:
        """See `Solver`."""
        self._solver.restart(right)

    def __call__(self, matrix: torch.Tensor, *, balances: bool = True) -> Factors:
        """See `Solver`. Peak memory of scaling: a copy of `matrix`."""
        try:
            return self._solver(matrix, balances=balances)
        except NumericError:
            largest = max(abs(float(end)) for end in torch.aminmax(matrix))
            if not _LARGEST < largest < math.inf:
                raise
        self._solver.forget()
        root = 2.0 ** (math.frexp(largest)[1] // 2)  # powers of two: nothing is rounded
        factors = self._solver((matrix / root).div_(root))
        self._solver.forget()  # a start for scaled matrices does not suit the next matrix
        return Factors(factors.left * root, factors.right * root, factors.gain * root**4)


class _Iteration:
    """Products with a matrix M, a few rows at a time, for both iterations. Sums over parts follow the order of rows."""

    def __init__(
        self, rank: int, generator: torch.Generator, workers: Workers = SERIAL, coordinates: Coordinates | None = None
    ) -> None:
        self._rank, self._generator, self._workers, self._coordinates = rank, generator, workers, coordinates
        self._start: torch.Tensor | None = None  # [in, width], from the previous matrix

    def restart(self, right: torch.Tensor) -> None:
        """See `Solver`."""
        scale = float(right.abs().max())
        self._start = (right / scale).T if 0.0 < scale < math.inf else None

    def forget(self) -> None:
        """Start the next matrix cold, as the first."""
        self._start = None

    def _multiply(self, matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """M @ right, float32 [out, width]; M @ F @ right if there are coordinates."""
        dtype = product_dtype(matrix)
        if self._coordinates is not None:
            right = self._coordinates.spread(right)
        narrow = right.to(dtype).contiguous()
        product = torch.empty(matrix.shape[0], right.shape[1], dtype=torch.float32, device=matrix.device)

        def multiply(part: slice) -> None:
            product[part] = matrix[part].to(dtype) @ narrow

        self._workers.each(multiply, _slabs(matrix))
        return product

    def _multiply_transposed(self, matrix: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """left.T @ M, float32 [width, in]; left.T @ M @ F, [width, k], if there are coordinates."""
        dtype = product_dtype(matrix)
        narrow = left.T.to(dtype).contiguous()
        product = torch.zeros(left.shape[1], matrix.shape[1], dtype=torch.float32, device=matrix.device)
        for term in self._workers.map(lambda part: narrow[:, part] @ matrix[part].to(dtype), _slabs(matrix)):
            product += term
        return product if self._coordinates is None else self._coordinates.gather(product)

    def _draw_start(self, matrix: torch.Tensor, width: int) -> torch.Tensor:
        """Normal numbers [in, width], or Fᵀ times the numbers. The CPU draws, so every device gets equal numbers."""
        normal = torch.randn(matrix.shape[1], width, generator=self._generator, dtype=torch.float32).to(matrix.device)
        return normal if self._coordinates is None else self._coordinates.gather(normal.T).T


class SubspaceSolver(_Iteration):
    """Subspace iteration as wide as the rank: a single step per matrix, from the right factor of the previous matrix.
    Matrices of an alternation hardly differ, so the steps add up.
    """

    def __call__(self, matrix: torch.Tensor, *, balances: bool = True) -> Factors:
        """See `Solver`. Both sides of the matrix are at least the rank. Peak memory: a few matrices of rank columns."""
        start, steps = self._start, 1
        if start is None:
            start, steps = self._draw_start(matrix, self._rank), COLD_STEPS
        for _ in range(steps - 1):
            basis = _orthonormalize(self._multiply(matrix, start))
            start = _orthonormalize(self._multiply_transposed(matrix, basis).T.contiguous())
        basis = _orthonormalize(self._multiply(matrix, start))  # [out, rank]
        basis = basis.to(product_dtype(matrix)).float()  # rounded for the next product
        right = self._multiply_transposed(matrix, basis)  # [rank, in]
        scale = float(right.abs().max())
        if not math.isfinite(scale):
            raise _no_decomposition()
        unit = right / scale if scale else right  # squares are inside the range of float32
        gram = unit @ unit.T
        squares = gram.diagonal()
        # A matrix of lower rank gives no start in some directions: the next matrix starts cold.
        self._start = unit.T if scale and bool(squares.min() > _NOTHING * squares.max()) else None
        gain = 2.0 * squares.double().sum() - ((basis.T @ basis).double() * gram).sum()
        factors = Factors(basis, right, scale**2 * float(gain))
        return balance_factors(factors) if balances else factors


class KrylovSolver(_Iteration):
    """Block Krylov iteration (Musco and Musco, arXiv 1504.05477) from the previous matrix's right singular vectors."""

    def __call__(self, matrix: torch.Tensor, *, balances: bool = True) -> Factors:
        """See `Solver`: the factors are always balanced. Peak memory: a few matrices of a few times rank columns."""
        del balances
        width = self._rank + _OVERSAMPLING
        start, blocks = self._start, _WARM_BLOCKS
        if start is None:
            start, blocks = self._draw_start(matrix, width), _COLD_BLOCKS
        basis = _orthonormalize(self._multiply(matrix, start))  # [out, width]
        for _ in range(blocks - 1):
            rows = self._multiply_transposed(matrix, basis[:, -width:])
            block = self._multiply(matrix, _orthonormalize(rows.T.contiguous()))
            block -= basis @ (basis.T @ block)  # else the block is nearly dependent on the basis
            basis = torch.cat((basis, _orthonormalize(block)), dim=1)  # [out, blocks * width]
            if not _is_orthonormal(basis):  # some directions of the block were rounding only
                basis = torch.linalg.qr(basis).Q
        basis = basis.to(product_dtype(matrix)).float()  # rounded for the next product
        projected = self._multiply_transposed(matrix, basis)  # [blocks * width, in]
        vectors = _left_vectors(projected)[:, :width]
        right = vectors.T @ projected  # [width, in] = S·Vᵀ
        singular = _row_norms(right)
        self._start = None
        if bool((singular > _NOTHING * singular[0]).all()):
            self._start = (right / singular[:, None]).T
        left, right = basis @ vectors[:, : self._rank], right[: self._rank]
        return _balance(left, right, singular[: self._rank])


def balance_factors(factors: Factors) -> Factors:
    """The product of `factors` as U·√S and √S·Vᵀ, with the gain of `factors`; `factors.left` has orthonormal columns.
    Raises NumericError for a right factor without a decomposition.

    >>> balance_factors(Factors(torch.tensor([[1.0], [0.0]]), torch.tensor([[9.0, 0.0]]), 81.0)).left.tolist()
    [[3.0], [0.0]]
    """
    vectors = _left_vectors(factors.right)
    right = vectors.T @ factors.right  # S·Vᵀ
    return replace(_balance(factors.left @ vectors, right, _row_norms(right)), gain=factors.gain)


def _balance(left: torch.Tensor, right: torch.Tensor, singular: torch.Tensor) -> Factors:
    """Balanced factors of U [out, rank] and S·Vᵀ [rank, in]."""
    root, inverse_root = _roots(singular, left.shape[0])
    left, right = _fix_signs(left * root, right * inverse_root[:, None])
    inner = _squared_singular_values(right)
    return Factors(left, right, 2.0 * inner - float(((left.T @ left).double() * (right @ right.T)).sum()))


def _row_norms(matrix: torch.Tensor) -> torch.Tensor:
    """float32 [rows]. Raises NumericError when a norm is not finite."""
    norms: torch.Tensor = torch.linalg.vector_norm(matrix.double(), dim=1).float()  # squares may overflow float32
    if not bool(torch.isfinite(norms).all()):
        raise _no_decomposition()
    return norms


def _squared_singular_values(right: torch.Tensor) -> float:
    """Σ S² of √S·Vᵀ."""
    return float(torch.linalg.vector_norm(right.double(), dim=1).pow(4).sum())


def product_dtype(matrix: torch.Tensor) -> torch.dtype:
    """The dtype of products with a float32 or bfloat16 matrix. Bfloat16 needs a GPU or a processor with bfloat16
    instructions, several times faster with float32 sums; elsewhere float32 replaces bfloat16.
    """
    return matrix.dtype if not matrix.is_cpu or _multiplies_bfloat16() else torch.float32


@cache
def _multiplies_bfloat16() -> bool:
    # The functions of torch are private and may disappear. Float32 is the answer for every processor not recognized.
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(is_supported() for is_supported in checks if is_supported is not None)


def _slabs(matrix: torch.Tensor) -> list[slice]:
    """Parts of the rows of a matrix; a GPU multiplies all rows at once."""
    rows, columns = matrix.shape
    return slabs((rows, columns)) if matrix.is_cpu else [slice(0, rows)]


def _orthonormalize(matrix: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns of equal span, float32 [out, width]: Cholesky QR, or Householder QR if nearly dependent."""
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
    """Left singular vectors of a wide float32 matrix as columns, by descending singular value."""
    gram = matrix @ matrix.T
    if _is_usual(gram):
        with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            values, vectors = torch.linalg.eigh(gram)
            if bool(values[0] > _LEAST_RATIO * values[-1]):
                descending: torch.Tensor = vectors.flip(1)
                return descending
    # A steep spectrum, unlike the flat spectrum of quantization noise, needs float64, and so does a failure in float32.
    double = matrix.double()
    return _eigenvectors(double @ double.T).float()


def _is_usual(gram: torch.Tensor) -> bool:
    """True if the squared norms on the diagonal are well inside the range of float32."""
    squares = gram.diagonal()
    return bool(((squares > 1e-30) & (squares < 1e30)).all())


def _eigenvectors(gram: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of a symmetric float64 matrix as columns, by descending eigenvalue. Raises NumericError."""
    # LAPACK does not always report NaN as a failure to converge.
    if bool(torch.isfinite(gram).all()):
        with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            vectors: torch.Tensor = torch.linalg.eigh(gram).eigenvectors.flip(1)
            return vectors
        with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            # A different algorithm: without negative eigenvalues, left singular vectors are eigenvectors.
            left_vectors: torch.Tensor = torch.linalg.svd(gram).U
            return left_vectors
    raise _no_decomposition()


def _no_decomposition() -> NumericError:
    return NumericError(
        "its residual has no singular value decomposition that is found",
        hint="--svd exact, then --method qlora or --exclude it",
    )


def _roots(singular: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """√S and 1/√S, both 0 for the singular values that a residual of lower rank (a zero residual, say) lacks."""
    positive = singular > singular[0] * torch.finfo(singular.dtype).eps * size
    root = torch.where(positive, singular.sqrt(), 0.0)
    return root, torch.where(positive, 1.0 / root, 0.0)


def _fix_signs(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors in float32, with the largest entry of each column of `left` positive."""
    largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))  # [1, rank]
    sign = torch.where(largest < 0, -1.0, 1.0)
    return (left * sign).float().contiguous(), (right * sign.T).float().contiguous()
