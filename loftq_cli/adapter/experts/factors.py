"""Reading the factors of one matrix from an adapter file, of a module or of one expert among all."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

from loftq_cli.adapter.expert_factors import FactorPart, Factors
from loftq_cli.adapter.sorting import LoraTensors
from loftq_cli.adapter.source import AdapterSource
from loftq_cli.checkpoint.source import WeightsFile
from loftq_cli.errors import InputError
from loftq_cli.tensors.matrices import LoraPair, lora_pair
from loftq_cli.tensors.metrics import is_finite

if TYPE_CHECKING:
    import torch

_KEPT = 4  # tensors: the experts of a layer follow one another, and gate and up read the same tensor


class FactorReader:
    """Reads factors from `weights`. The lora_B of all experts is kept for the experts that follow."""

    def __init__(self, weights: WeightsFile) -> None:
        self._weights, self._kept, self._lock = weights, dict[str, "torch.Tensor"](), Lock()

    def load(self, name: str) -> torch.Tensor:
        """Load the adapter tensor `name`. Raises InputError for NaN and infinite values."""
        return self._check(name, self._weights.load(name))

    def pair(self, lora: LoraTensors) -> LoraPair:
        """Load the factors of one matrix: lora_A [rank, in / group_size] and lora_B [out, rank].

        Raises InputError naming a tensor with NaN or infinite values.
        """
        if lora.part is None:
            return lora_pair(self.load(lora.lora_A), self.load(lora.lora_B), lora.scaling, lora.pooling)
        part = lora.part
        start = part.expert * lora.rank
        rows = self._check(lora.lora_A, self._weights.load_rows(lora.lora_A, start, start + lora.rank))
        columns = self._load_kept(lora.lora_B)[:, part.expert :: part.n_experts]
        alone = FactorPart(is_turned=part.is_turned, rows=part.rows, into=part.into)
        return lora_pair(*alone.of(Factors(rows, columns)), lora.scaling, lora.pooling)

    def _load_kept(self, name: str) -> torch.Tensor:
        with self._lock:
            if name not in self._kept:
                while len(self._kept) >= _KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[name] = self.load(name)
            return self._kept[name]

    def _check(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not is_finite(tensor):
            raise InputError("holds NaN or infinite values", file=self._weights.path, tensor=name)
        return tensor


def load_pair(adapter: AdapterSource, lora: LoraTensors, shape: tuple[int, int]) -> LoraPair | None:
    """Load the factors of a matrix [out, in] of a base, of a module or of one expert; None for an embedding.

    lora   one of `AdapterSource.lora_in` or of the single matrices of `plan_expert_loras`

    Raises MismatchError naming a factor of a wrong shape, and InputError for NaN and infinite values of an expert.
    """
    return adapter.pair(lora.module, shape) if lora.part is None else FactorReader(adapter.weights).pair(lora)
