"""Experts that a container holds one by one, and the model's own files in one tensor: a dense merge writes the tensor,
for which loaders of the original look.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from loftq_cli.adapter.expert_factors import gate_rows
from loftq_cli.adapter.experts.places import EXPERT, INTERLEAVED, ROLES, model_types
from loftq_cli.merging.planner import MergeJob
from loftq_cli.model.family import Family
from loftq_cli.tensors.headers import OutTensor

# Families with a tensor [experts, in, out] under the name of the parameter, by transformers 5.24.
_ONE_TENSOR = frozenset({"gpt_oss", "openai_privacy_filter", "llama4", "llama4_text"})


def restack(jobs: Iterable[MergeJob], family: Family) -> tuple[MergeJob, ...]:
    """Join the jobs of single experts to a job for each tensor of all experts, where the family has such tensors.

    Experts of a parameter are left alone unless all are dense, complete and of equal shape.
    """
    listed = tuple(jobs)
    if _ONE_TENSOR.isdisjoint(model_types(family)):
        return listed
    groups: dict[str, dict[tuple[int, int | None], MergeJob]] = {}
    for job in listed:
        if (match := EXPERT.fullmatch(job.name)) and match[3] in ROLES:
            leaf, part = ROLES[match[3]]
            groups.setdefault(f"{match[1]}.{leaf}", {})[int(match[2]), part] = job
    joined = {name: new for name, group in groups.items() if (new := _join(name, group)) is not None}
    first = {next(iter(groups[name].values())).name: job for name, job in joined.items()}
    inside = {inner.name for job in joined.values() for inner in job.stacked}
    return tuple(first.get(job.name, job) for job in listed if job.name in first or job.name not in inside)


def _join(name: str, group: dict[tuple[int, int | None], MergeJob]) -> MergeJob | None:
    """The job of a tensor of all experts, [experts, in, out]; None where the experts make no such tensor."""
    places = sorted(group, key=lambda place: (place[0], place[1] or 0))
    n_experts, parts = len({expert for expert, _ in places}), sorted({part for _, part in places}, key=lambda p: p or 0)
    if places != [(expert, part) for expert in range(n_experts) for part in parts] or parts not in ([None], [0, 1]):
        return None
    stacked = tuple(group[place] for place in places)
    outputs = {(job.outputs[0].dtype, job.outputs[0].shape) for job in stacked if job.matrix is None}
    if len(outputs) != 1 or any(job.matrix is not None or len(job.outputs) != 1 for job in stacked):
        return None
    dtype, (out_features, in_features) = next(iter(outputs))
    shape = (n_experts, in_features, out_features * len(parts))
    inner = tuple(replace(job, note=None) for job in stacked)
    return MergeJob(name, outputs=(OutTensor(name, dtype, shape),), stacked=inner)


def rows_of_parts(job: MergeJob, family: Family) -> list[slice]:
    """The rows of each matrix of an expert in the expert's whole matrix [out, in], in the order of `job.stacked`."""
    n_experts, _, out_features = job.outputs[0].shape
    if len(job.stacked) == n_experts:
        return [slice(None)]
    return [*gate_rows(out_features, interleaved=not INTERLEAVED.isdisjoint(model_types(family)))]
