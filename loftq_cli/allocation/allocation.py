"""Which layer gets which number format and rank under a bound on size: candidates, their measured errors, the choice,
and the recipe that says it. Writes nothing; what comes out is a recipe like any other.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from loftq_cli.allocation.candidates import Budget, Candidate, Options
from loftq_cli.allocation.choice import Choice, select
from loftq_cli.allocation.error_curves import error_curves
from loftq_cli.allocation.integer_program import load_solver
from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.checkpoint.statistics import Statistics
from loftq_cli.errors import UsageError
from loftq_cli.layouts.layout import StoredMatrix
from loftq_cli.model.targets import module_of
from loftq_cli.planning.jobs import CopyJob, LayerJob
from loftq_cli.planning.planner import build_plan
from loftq_cli.planning.recipe import Override, Recipe
from loftq_cli.planning.settings import layer_settings
from loftq_cli.planning.settle import revise
from loftq_cli.quant.formats import QuantSpec, spec_json

_MAX_UNIFORM = 5  # alternatives that are reported

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen for one layer."""

    name: str
    numel: int
    candidate: Candidate

    @property
    def predicted_error(self) -> float:
        """Relative error of the layer after one quantization and the best adapter; alternating leaves less."""
        return math.sqrt(self.candidate.relative_error)

    def to_json(self) -> dict[str, Any]:
        """JSON values for reports."""
        values = {name: getattr(self.candidate, name) for name in ("rank", "base_nbytes", "adapter_nbytes")}
        error = {"predicted_error": self.predicted_error}
        return {"name": self.name, **spec_json(self.candidate.spec), **values, **error}


@dataclass(frozen=True, slots=True)
class Uniform:
    """One format and rank for all layers, within the same bounds; `base_nbytes` with what is copied."""

    spec: QuantSpec
    rank: int
    base_nbytes: int
    adapter_nbytes: int
    objective: float

    def to_json(self) -> dict[str, Any]:
        """JSON values for reports."""
        values = {name: getattr(self, name) for name in ("rank", "base_nbytes", "adapter_nbytes", "objective")}
        return {**spec_json(self.spec), **values}


@dataclass(frozen=True, slots=True)
class Allocation:
    """A choice for every layer, and the recipe that makes it.

    objective      sum of the layers' `importance` times their relative squared errors; proven to be the least
    copied_nbytes  of the tensors that are not quantized
    uniform        the best models of one format and rank within the bounds, the best one first
    """

    target: Budget
    recipe: Recipe
    layers: tuple[Chosen, ...]
    objective: float
    copied_nbytes: int
    uniform: tuple[Uniform, ...]

    @property
    def bits_per_weight(self) -> float:
        """True bits of the stored base, constants included."""
        stored = sum(layer.candidate.base_nbytes for layer in self.layers)
        return 8 * stored / sum(layer.numel for layer in self.layers)

    @property
    def base_nbytes(self) -> int:
        """Bytes of the base, with what is copied."""
        return self.copied_nbytes + sum(layer.candidate.base_nbytes for layer in self.layers)

    @property
    def adapter_nbytes(self) -> int:
        """Bytes of the adapter."""
        return sum(layer.candidate.adapter_nbytes for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """JSON values for reports."""
        bounds = {
            "bits_per_weight": self.target.bits_per_weight,
            "total_nbytes": self.target.total_nbytes,
            "adapter_nbytes": self.target.adapter_nbytes,
        }
        return {
            "target": {name: value for name, value in bounds.items() if value is not None},
            "bits_per_weight": round(self.bits_per_weight, 4),
            "base_nbytes": self.base_nbytes,
            "adapter_nbytes": self.adapter_nbytes,
            "objective": self.objective,
            "objective_bound": self.objective,  # the solver proves that no choice falls below
            "uniform": [other.to_json() for other in self.uniform],
            "layers": [layer.to_json() for layer in self.layers],
        }


def allocate(
    checkpoint: Checkpoint,
    recipe: Recipe,
    target: Budget,
    statistics: Statistics | None = None,
    *,
    threads: int = 1,
    observe: Callable[[str, int, int], None] = lambda name, done, of: None,
) -> Allocation:
    """The choice of least predicted error within the bounds of `target`; every other option is the recipe's, and so is
    what its overrides say of a layer. With `statistics` of their inputs, errors count by what they do to
    the layers' outputs. `observe` is told of each measured layer, how many are done, and of how many.

    Raises UsageError for a layout that holds one format, for bounds that nothing fits, without scipy, and as
    `build_plan` does.
    """
    load_solver()  # a missing package shows before hours of measuring
    options = Options(recipe, target)
    plan = build_plan(checkpoint.tensors, checkpoint.config(), options.widest)
    layers = plan.layers
    matrices = {job.name: options.matrices(job) for job in layers}
    ranks = {job.name: options.ranks(job) for job in layers}
    copied = sum(tensor.nbytes for job in plan.jobs if isinstance(job, CopyJob) for tensor in job.base_tensors)
    limits = _Limits.of(target, layers, copied)
    kinds = [[(matrix, rank) for matrix in matrices[job.name] for rank in ranks[job.name]] for job in layers]
    groups = _groups(options.together(layers), kinds)
    sizes = [[options.nbytes(job, *kind) for kind in own] for job, own in zip(layers, kinds, strict=True)]
    nbytes = [[(sum(b for b, _ in own), sum(a for _, a in own)) for own in group.values(sizes)] for group in groups]
    limits.check(nbytes, layers, copied)
    done = Counter[str]()

    def count(name: str) -> None:
        done["layers"] += 1
        observe(name, done["layers"], len(layers))

    measured = {name: found if options.counts_adapters else (0,) * len(found) for name, found in ranks.items()}
    curves = error_curves(checkpoint, layers, matrices, measured, threads=threads, statistics=statistics, observe=count)
    candidates = {
        job.name: list(options.candidates(job, matrices[job.name], ranks[job.name], curves[job.name])) for job in layers
    }
    costs = [[importance(job) * c.relative_error for c in candidates[job.name]] for job in layers]
    items = [
        [Choice(math.fsum(own), limits.takes(*taken)) for own, taken in zip(group.values(costs), sums, strict=True)]
        for group, sums in zip(groups, nbytes, strict=True)
    ]
    found = select(items, limits.nbytes)
    assert found is not None  # what takes least of one resource takes least of the other
    picks = {i: at for group, pick in zip(groups, found.picks, strict=True) for i, at in group.picked(pick)}
    chosen = tuple(Chosen(job.name, job.numel, candidates[job.name][picks[i]]) for i, job in enumerate(layers))
    return Allocation(
        target,
        resolved_recipe(options.recipe, layers, chosen, plan.dtype),
        chosen,
        found.cost,
        copied,
        tuple(sorted(_uniform(layers, candidates, limits, copied), key=lambda u: u.objective)[:_MAX_UNIFORM]),
    )


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers that need one format, by their places, and what they may be together: a choice for each."""

    places: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    def values(self, of_layers: Sequence[Sequence[_Value]]) -> list[list[_Value]]:
        """For each choice together, which of their values the layers have."""
        return [[of_layers[place][i] for place, i in self.picked(n)] for n in range(len(self.choices))]

    def picked(self, choice: int) -> Iterator[tuple[int, int]]:
        """The places of the layers and the choice of each."""
        return zip(self.places, self.choices[choice], strict=True)


def _groups(together: Sequence[tuple[int, ...]], kinds: Sequence[Sequence[tuple[StoredMatrix, int]]]) -> list[_Group]:
    """What layers may be together, of the formats and ranks of each; those that have no format in common are left
    alone.
    """
    groups = []
    for places in together:
        by_spec = [_indices_by_spec(kinds[place]) for place in places]
        shared = [spec for spec in by_spec[0] if all(spec in other for other in by_spec)]
        if shared:
            choices = (itertools.product(*(indices[spec] for indices in by_spec)) for spec in shared)
            groups.append(_Group(places, tuple(itertools.chain.from_iterable(choices))))
        else:
            groups += [_Group((place,), tuple((i,) for i in range(len(kinds[place])))) for place in places]
    return groups


def _indices_by_spec(kinds: Sequence[tuple[StoredMatrix, int]]) -> dict[QuantSpec, list[int]]:
    found: dict[QuantSpec, list[int]] = {}
    for i, (matrix, _) in enumerate(kinds):
        found.setdefault(matrix.spec, []).append(i)
    return found


def importance(job: LayerJob) -> float:
    """What the relative squared error of a layer counts: more for its size, but less than in proportion to it. Of sums
    of absolute and relative errors, by layer, by weight and in between, these keep the predictions of the built-in
    model nearest to those of the original (Kullback-Leibler, at 2.6 and 3.0 bits); at 3.3 bits they hardly differ.
    """
    return math.sqrt(job.numel)


@dataclass(frozen=True, slots=True)
class _Limits:
    """The bounds of a target in bytes of what is chosen, with the names of their options."""

    names: tuple[str, ...]
    nbytes: tuple[int, ...]

    @classmethod
    def of(cls, target: Budget, layers: Sequence[LayerJob], copied: int) -> _Limits:
        limits = {}
        if target.bits_per_weight is not None:
            limits["--target-bpw"] = math.floor(target.bits_per_weight * sum(job.numel for job in layers) / 8)
        if target.total_nbytes is not None:
            limits["--target-size"] = target.total_nbytes - copied
        if target.adapter_nbytes is not None:
            limits["--lora-budget"] = target.adapter_nbytes
        return cls(tuple(limits), tuple(limits.values()))

    def takes(self, base_nbytes: int, adapter_nbytes: int) -> tuple[int, ...]:
        """What is counted of each bound."""
        counted = {
            "--target-bpw": base_nbytes,
            "--target-size": base_nbytes + adapter_nbytes,
            "--lora-budget": adapter_nbytes,
        }
        return tuple(counted[name] for name in self.names)

    def check(self, sizes: Sequence[Sequence[tuple[int, int]]], layers: Sequence[LayerJob], copied: int) -> None:
        """Raises UsageError that says the smallest that a bound could be, where the smallest of `sizes`, in bytes of
        base and adapter for each choice of each layer, exceed it.
        """
        numel, smallest = sum(job.numel for job in layers), []
        for k, (name, limit) in enumerate(zip(self.names, self.nbytes, strict=True)):
            least = sum(min(self.takes(*nbytes)[k] for nbytes in choices) for choices in sizes)
            if least > limit:
                bits = math.ceil(8 * least / numel * 1e4) / 1e4
                total = least + copied if name == "--target-size" else least
                smallest.append(f"{name} {bits if name == '--target-bpw' else total}")
        if smallest:
            raise UsageError(
                "the target is smaller than what the formats and ranks of this model can be",
                hint=f"the smallest possible is {' and '.join(smallest)}",
            )


def _uniform(
    layers: Sequence[LayerJob], candidates: Mapping[str, Sequence[Candidate]], limits: _Limits, copied: int
) -> Iterator[Uniform]:
    """Every format and rank that all layers can have together within the limits."""
    by_kind = [{(c.spec, c.rank): c for c in candidates[job.name]} for job in layers]
    for spec, rank in by_kind[0]:
        found = [kinds.get((spec, rank)) for kinds in by_kind]
        if any(candidate is None for candidate in found):
            continue
        whole = [candidate for candidate in found if candidate is not None]
        base, adapter = sum(c.base_nbytes for c in whole), sum(c.adapter_nbytes for c in whole)
        if all(map(_within, limits.takes(base, adapter), limits.nbytes)):
            cost = math.fsum(importance(job) * c.relative_error for job, c in zip(layers, whole, strict=True))
            yield Uniform(spec, rank, base + copied, adapter, cost)


def _within(taken: int, limit: int) -> bool:
    return taken <= limit


def resolved_recipe(recipe: Recipe, layers: Sequence[LayerJob], chosen: Sequence[Chosen], dtype: str) -> Recipe:
    """The recipe that gives each of `layers` what was chosen for it: the most common choice is the model's own, and
    overrides list by name those that differ.
    """
    picked = {module_of(layer.name): layer.candidate for layer in chosen}
    common = Counter(candidate.spec for candidate in picked.values()).most_common(1)[0][0]
    values: dict[str, Any] = common.layer_options
    # With another rank, a given alpha would mean another scaling.
    if recipe.alpha is None and not recipe.rslora:
        values["rank"] = Counter(candidate.rank for candidate in picked.values()).most_common(1)[0][0]
    base = revise(recipe, **values)
    formats: dict[QuantSpec, list[str]] = {}
    ranks: dict[int, list[str]] = {}
    for job in layers:
        module = module_of(job.name)
        candidate, (spec, lora, _) = picked[module], layer_settings(base, module, dtype)
        if spec != candidate.spec:
            formats.setdefault(candidate.spec, []).append(module)
        if lora.rank != candidate.rank:
            ranks.setdefault(candidate.rank, []).append(module)
    by_format = [Override(match=exactly(names), **spec.layer_options) for spec, names in formats.items()]
    by_rank = [Override(match=exactly(names), rank=rank) for rank, names in sorted(ranks.items())]
    return revise(base, override=(*recipe.override, *by_format, *by_rank))


def exactly(names: Sequence[str]) -> str:
    """A regular expression that finds these module names and no others; names that differ in their first number only
    share one alternative.
    """
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        before, number, after = match.groups() if match else (name, "", "")
        numbers.setdefault((before, after), []).append(number)
    return f"^(?:{'|'.join(_alternative(*around, found) for around, found in numbers.items())})$"


def _alternative(before: str, after: str, numbers: Sequence[str]) -> str:
    among = f"(?:{'|'.join(numbers)})" if len(numbers) > 1 else numbers[0]
    return re.escape(before) + among + re.escape(after)
