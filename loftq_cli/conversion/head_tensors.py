"""The head of a task in the adapter file: the model's own head, or a new one. Each tensor is a unit of the run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.output.journal import JournalEntry
from loftq_cli.output.staged_run import Entries
from loftq_cli.output.writer import OutputFiles
from loftq_cli.planning.plan import Plan

if TYPE_CHECKING:
    import torch

_NEW = hashlib.sha256(b"a new head").hexdigest()  # stands for the input of a tensor made of the seed alone


def input_hash(
    plan: Plan, checkpoint: Checkpoint, hash_job: Callable[[str], str] | None = None
) -> Callable[[str], str]:
    """A function from a unit of the run to the sha256 of the unit's input. `hash_job` hashes the inputs of the units of
    the base; None: the unit has the name of the only tensor that the unit reads.
    """
    names = {tensor.name: name for name, tensor in plan.head_tensors.items()}

    def sha256(unit: str) -> str:
        if unit not in names:
            return (hash_job or checkpoint.sha256)(unit)
        source = plan.sources.get(names[unit])
        return _NEW if source is None else checkpoint.sha256(source)

    return sha256


def write_head(
    plan: Plan, checkpoint: Checkpoint, files: OutputFiles, finished: Entries
) -> Generator[tuple[JournalEntry, bool]]:
    """Write the tensors of the head. Yields the journal entry of each tensor, and whether `finished` held the entry."""
    sha256 = input_hash(plan, checkpoint)
    for name, planned in plan.head_tensors.items():
        entry, unit = finished.get(planned.name), planned.name
        if entry is not None and entry.input_sha256 == sha256(unit) and files.hold(entry.outputs):
            yield entry, True
            continue
        source = plan.sources.get(name)
        tensor = _new_tensor(plan, name, planned.shape) if source is None else checkpoint.load(source)
        import torch

        stored = tensor.to(getattr(torch, planned.dtype)).contiguous()
        yield JournalEntry(unit, sha256(unit), {unit: files[unit].write(unit, stored)}, {}), False


def _new_tensor(plan: Plan, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The start of a head's tensor, as transformers starts one: float32, small normal numbers for a matrix, ones for
    the weight of a norm, zeros for a bias.
    """
    import torch

    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) < 2:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{plan.recipe.seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    std = 0.0 if plan.head is None else plan.head.std
    return torch.randn(shape, generator=generator) * std
