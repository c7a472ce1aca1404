"""The weights that benchmarks quantize: real ones, matrices of any size cut from them, and drawn ones."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from safetensors.torch import load_file

from tests.support.models import minilm

_TILE = 384  # the width of all-MiniLM-L6-v2, whose linears are 384 × 384, 1536 × 384 and 384 × 1536


@cache
def encoder_linears() -> dict[str, torch.Tensor]:
    """The 36 linears of the encoder of all-MiniLM-L6-v2, float32 [out, in], by name."""
    tensors = load_file(minilm() / "model.safetensors")
    return {
        n: w.float() for n, w in sorted(tensors.items()) if ".layer." in n and n.endswith("weight") and w.dim() == 2
    }


def real_matrix(size: int) -> torch.Tensor:
    """float32 [size, size]: the linears of `encoder_linears`, cut into 72 tiles of 384 × 384 and laid side by side.
    From the 73rd place on the same tiles come again, transposed.
    """
    tiles = [
        tile
        for weight in encoder_linears().values()
        for rows in weight.split(_TILE)
        for tile in rows.split(_TILE, dim=1)
    ]
    tiles += [tile.T for tile in tiles]
    across = -(-size // _TILE)
    places = [tiles[place % len(tiles)] for place in range(across * across)]
    rows = [torch.cat(places[row * across : (row + 1) * across], dim=1) for row in range(across)]
    return torch.cat(rows)[:size, :size].contiguous()


def heavy_tailed_matrix(size: int) -> torch.Tensor:
    """float32 [size, size]: Student's t with 5 degrees of freedom, times 0.02."""
    drawn = np.random.default_rng(0).standard_t(5, (size, size)).astype(np.float32)
    return torch.from_numpy(drawn) * 0.02


def normal_matrix(size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """`dtype` [size, size]: normal, with standard deviation 0.02."""
    return (torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


MATRICES = {"MiniLM tiles": real_matrix, "Student t5": heavy_tailed_matrix}
