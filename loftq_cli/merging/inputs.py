"""The sha256 of every input tensor of a merge; each tensor is hashed once."""

from __future__ import annotations

from collections.abc import Callable

from loftq_cli.merging.plan import Merge
from loftq_cli.merging.planner import MergeJob
from loftq_cli.output.checksums import fingerprint_of


class InputSums:
    """Hashes tensors of base and adapter, and remembers each sha256."""

    def __init__(self, merge: Merge) -> None:
        self._base, self._weights = merge.base, merge.weights
        self._jobs = {job.name: job for job in merge.jobs}
        self._sums: dict[tuple[str, str], str] = {}

    def hash_base_tensor(self, name: str) -> str:
        """The sha256 of the stored base tensor `name`."""
        return self._hash("base", self._base.checkpoint.sha256, name)

    def hash_job(self, name: str) -> str:
        """The fingerprint of all input tensors of the job called `name`, from base and adapter."""
        job = self._jobs[name]
        read = [inner.name for inner in job.stacked] or [job.source or name]
        parts = [part for name in read if name in self._base.tensors for part in self._base.parts(name)]
        sums = {f"base {part.name}": self.hash_base_tensor(part.name) for part in parts}
        sha256 = self._weights.sha256
        sums |= {f"adapter {tensor}": self._hash("adapter", sha256, tensor) for tensor in _adapter_tensors(job)}
        return fingerprint_of(sums)

    def remember(self, name: str, sha256: str) -> None:
        """Remember the sha256 of the base tensor `name` after a copy byte by byte."""
        self._sums["base", name] = sha256

    def _hash(self, side: str, sha256: Callable[[str], str], name: str) -> str:
        if (side, name) not in self._sums:
            self._sums[side, name] = sha256(name)
        return self._sums[side, name]


def _adapter_tensors(job: MergeJob) -> list[str]:
    """Names of the job's input tensors in the adapter."""
    factors = [name for item in job.additions for name in (item.lora.lora_A, item.lora.lora_B, item.lora.magnitude)]
    rows = [item.tokens.tensor for item in job.tokens]
    biases = [item.lora.lora_bias for item in job.biases]
    names = dict.fromkeys((*factors, *biases, *rows, job.replacement))
    return [name for name in names if name is not None]
