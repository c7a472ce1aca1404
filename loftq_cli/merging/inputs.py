"""The sha256 of every input tensor of a merge; each tensor is hashed once."""

from __future__ import annotations

from collections.abc import Callable

from loftq_cli.merging.plan import Merge
from loftq_cli.merging.planner import MergeJob
from loftq_cli.output.checksums import fingerprint_of


class InputSums:
    """Hashes tensors of base and adapter, and remembers each sha256."""

    def __init__(self, merge: Merge) -> None:
        self._base, self._adapter = merge.base, merge.adapter
        self._jobs = {job.name: job for job in merge.jobs}
        self._sums: dict[tuple[str, str], str] = {}

    def hash_base_tensor(self, name: str) -> str:
        """The sha256 of the stored base tensor `name`."""
        return self._hash("base", self._base.checkpoint.sha256, name)

    def hash_job(self, name: str) -> str:
        """The fingerprint of all input tensors of the job called `name`, from base and adapter."""
        job = self._jobs[name]
        parts = self._base.parts(name) if name in self._base.tensors else []
        sums = {f"base {part.name}": self.hash_base_tensor(part.name) for part in parts}
        sha256 = self._adapter.weights.sha256
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
    loras = [job.lora] if job.lora is not None else [lora for expert in job.experts for lora in expert]
    factors = dict.fromkeys(name for lora in loras for name in (lora.lora_A, lora.lora_B))
    bias = None if job.lora_bias is None else job.lora_bias.lora_bias
    return [name for name in (*factors, bias, job.replacement) if name is not None]
