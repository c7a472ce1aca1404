"""Best rank-r approximation of a matrix, as the two balanced factors of an adapter. No quantization here."""

from __future__ import annotations

import torch

from loftq_cli.errors import NumericError


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
    try:
        _, vectors = torch.linalg.eigh(tall.T @ tall)  # ascending
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise NumericError("its residual has no singular value decomposition that LAPACK finds") from None
    right = vectors[:, -rank:].flip(1)  # [short, rank], by descending singular value
    projected = tall @ right  # [long, rank] = U·S of the tall matrix
    singular = torch.linalg.vector_norm(projected, dim=0)
    # A residual of lower rank than asked for (a zero one, say) has nothing in its last directions.
    positive = singular > singular[0] * torch.finfo(torch.float64).eps * tall.shape[0]
    root = torch.where(positive, singular.sqrt(), 0.0)
    inverse_root = torch.where(positive, 1.0 / root, 0.0)
    long_factor, short_factor = projected * inverse_root, right * root
    left, right_t = (short_factor, long_factor.T) if wide else (long_factor, short_factor.T)
    largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))  # [1, rank]
    sign = torch.where(largest < 0, -1.0, 1.0)
    return (left * sign).float().contiguous(), (right_t * sign.T).float().contiguous()
