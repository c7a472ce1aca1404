"""The choice of a number format and a rank for every layer under a bound on size: candidates, measured errors, the
choice, and a recipe. Writes nothing; the recipe is an ordinary recipe.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from loftq_cli.allocation.candidates import Budget, Candidate, Options, refuse_experts
from loftq_cli.allocation.choice import Choice, select
from loftq_cli.allocation.error_curves import measure_error_curves
from loftq_cli.allocation.integer_program import load_solver
from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.checkpoint.statistics import InputStatistics
from loftq_cli.errors import UsageError
from loftq_cli.layouts.layout import StoredMatrix
from loftq_cli.model.targets import module_of
from loftq_cli.planning.jobs import CopyJob, LayerJob
from loftq_cli.planning.planner import build_plan
from loftq_cli.planning.recipe import Override, Recipe
from loftq_cli.planning.settings import layer_settings
from loftq_cli.planning.settle import revise
from loftq_cli.quant.formats import QuantSpec, spec_json

_MAX_UNIFORM = 5  # alternatives in a report

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The choice for a layer.

    name        tensor name in the original
    numel       weights in the matrix
    candidate   number format and rank, with stored bytes and relative squared error
    """

    name: str
    numel: int
    candidate: Candidate

    @property
    def predicted_error(self) -> float:
        """Relative error of the layer after a single quantization and, where adapters count, the best adapter;
        alternation lowers the error further.
        """
        return math.sqrt(self.candidate.relative_error)

    def to_json(self) -> dict[str, Any]:
        """JSON values for reports."""
        values = {name: getattr(self.candidate, name) for name in ("rank", "base_nbytes", "adapter_nbytes")}
        error = {"predicted_error": self.predicted_error}
        return {"name": self.name, **spec_json(self.candidate.spec), **values, **error}


@dataclass(frozen=True, slots=True)
class Uniform:
    """A model of a single number format and rank within the bounds.

    spec             the number format
    rank             the rank of the adapter
    base_nbytes      bytes of the base, copied tensors included
    adapter_nbytes   bytes of the adapter
    objective        the sum to minimize, as in `Allocation`
    """

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
    """A choice for every layer, and the recipe of the choice.

    target          the bounds
    recipe          the recipe that converts the model by the choice
    layers          the choice for each layer, in the order of the plan
    objective       sum over layers of `importance` times relative squared error; proven to be the least
    copied_nbytes   bytes of the copied tensors
    uniform         the best models of a single format and rank within the bounds, ascending by objective, at most five
    """

    target: Budget
    recipe: Recipe
    layers: tuple[LayerChoice, ...]
    objective: float
    copied_nbytes: int
    uniform: tuple[Uniform, ...]

    @property
    def bits_per_weight(self) -> float:
        """True bits of the stored base per quantized weight, constants included."""
        stored = sum(layer.candidate.base_nbytes for layer in self.layers)
        return 8 * stored / sum(layer.numel for layer in self.layers)

    @property
    def base_nbytes(self) -> int:
        """Bytes of the base, copied tensors included."""
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
            "objective_bound": self.objective,  # the solver proves the objective to be the least
            "uniform": [model.to_json() for model in self.uniform],
            "layers": [layer.to_json() for layer in self.layers],
        }


def allocate(
    checkpoint: Checkpoint,
    recipe: Recipe,
    target: Budget,
    statistics: InputStatistics | None = None,
    *,
    threads: int = 1,
    observe: Callable[[str, int, int], None] = lambda name, done, of: None,
) -> Allocation:
    """Choose a number format and a rank for every layer, of least predicted error within the bounds of `target`.

    checkpoint   the original; every weight to quantize is read
    recipe       all remaining options; an override that sets the format or the rank of a layer stands
    target       the bounds
    statistics   of the layers' inputs: errors then count by the effect on outputs; None: errors of weights count
    threads      number of threads for the measurements
    observe      receives the name of each measured layer, the number of measured layers, and the number of all layers

    Raises UsageError when the container holds a single format, when no choice is within the bounds, when scipy is not
    installed, when no choice is proven the best in time, and in the cases of `build_plan`. Raises InputError naming the
    tensor for a weight without a quantization.
    """
    load_solver()  # a missing package stops the run before hours of measuring
    options = Options(recipe, target)
    plan = build_plan(checkpoint.tensors, checkpoint.config(), options.widest)
    layers = plan.layers
    refuse_experts(layers)
    matrices = {job.name: options.list_matrices(job) for job in layers}
    ranks = {job.name: options.list_ranks(job) for job in layers}
    copied = sum(tensor.nbytes for job in plan.jobs if isinstance(job, CopyJob) for tensor in job.base_tensors)
    limits = _Limits.of(target, layers, copied)
    kinds = [[(matrix, rank) for matrix in matrices[job.name] for rank in ranks[job.name]] for job in layers]
    groups = _make_groups(options.group_fused(layers), kinds)
    sizes = [
        [options.count_nbytes(job, *kind) for kind in job_kinds] for job, job_kinds in zip(layers, kinds, strict=True)
    ]
    nbytes = [
        [(sum(base for base, _ in pairs), sum(adapter for _, adapter in pairs)) for pairs in group.list_values(sizes)]
        for group in groups
    ]
    limits.check(nbytes, layers, copied)
    done = Counter[str]()

    def count(name: str) -> None:
        done["layers"] += 1
        observe(name, done["layers"], len(layers))

    curve_ranks = ranks if options.counts_adapters else {name: (0,) * len(ranks[name]) for name in ranks}
    curves = measure_error_curves(
        checkpoint, layers, matrices, curve_ranks, threads=threads, statistics=statistics, observe=count
    )
    candidates = {
        job.name: list(options.make_candidates(job, matrices[job.name], ranks[job.name], curves[job.name]))
        for job in layers
    }
    costs = [[importance(job) * c.relative_error for c in candidates[job.name]] for job in layers]
    items = [
        [
            Choice(math.fsum(layer_costs), limits.count_nbytes(*pair))
            for layer_costs, pair in zip(group.list_values(costs), pairs, strict=True)
        ]
        for group, pairs in zip(groups, nbytes, strict=True)
    ]
    selection = select(items, limits.nbytes)
    assert selection is not None  # the smallest choices are the smallest under every bound, and `check` passed
    picks = dict(pair for group, pick in zip(groups, selection.picks, strict=True) for pair in group.list_kinds(pick))
    choices = tuple(LayerChoice(job.name, job.numel, candidates[job.name][picks[i]]) for i, job in enumerate(layers))
    return Allocation(
        target,
        build_recipe(options.recipe, layers, choices, plan.dtype),
        choices,
        selection.cost,
        copied,
        tuple(
            sorted(_list_uniform(layers, candidates, limits, copied), key=lambda model: model.objective)[:_MAX_UNIFORM]
        ),
    )


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers in need of a common format. A kind is a number format with a rank.

    places    indices of the layers in the plan
    choices   for each joint choice, the index of the kind of each layer
    """

    places: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    def list_values(self, of_layers: Sequence[Sequence[_Value]]) -> list[list[_Value]]:
        """Return a value for each layer of the group, for each joint choice; `of_layers` has values of all layers by
        kind.
        """
        return [[of_layers[place][i] for place, i in self.list_kinds(n)] for n in range(len(self.choices))]

    def list_kinds(self, choice: int) -> Iterator[tuple[int, int]]:
        """Yield place and index of the kind of each layer, for a joint choice by index."""
        return zip(self.places, self.choices[choice], strict=True)


def _make_groups(fused: Sequence[tuple[int, ...]], kinds: Sequence[Sequence[tuple[StoredMatrix, int]]]) -> list[_Group]:
    """Joint choices of `fused` layers (indices of layers) from the kinds of each layer. Layers without a common format
    become groups of a single layer.
    """
    groups = []
    for places in fused:
        by_spec = [_index_by_spec(kinds[place]) for place in places]
        shared = [spec for spec in by_spec[0] if all(spec in indices for indices in by_spec)]
        if shared:
            choices = (itertools.product(*(indices[spec] for indices in by_spec)) for spec in shared)
            groups.append(_Group(places, tuple(itertools.chain.from_iterable(choices))))
        else:
            groups += [_Group((place,), tuple((i,) for i in range(len(kinds[place])))) for place in places]
    return groups


def _index_by_spec(kinds: Sequence[tuple[StoredMatrix, int]]) -> dict[QuantSpec, list[int]]:
    indices: dict[QuantSpec, list[int]] = {}
    for i, (matrix, _) in enumerate(kinds):
        indices.setdefault(matrix.spec, []).append(i)
    return indices


def importance(job: LayerJob) -> float:
    """The factor of a layer's relative squared error in the objective: √numel, more for a larger layer, but less than
    in proportion to the size.

    Measured on the built-in model against sums of absolute or relative errors, by layer, by weight and in between:
    √numel keeps predictions nearest to predictions of the original (Kullback-Leibler divergence, at 2.6 and 3.0 bits).
    The sums hardly differ at 3.3 bits.

    >>> import loftq_cli as loftq
    >>> job = loftq.quantize("builtin:tiny-llama", "base", rank=8, dry_run=True).layers[0]
    >>> job.numel, importance(job)
    (98304, 313.53...)
    """
    return math.sqrt(job.numel)


@dataclass(frozen=True, slots=True)
class _Limits:
    """The bounds of a target on chosen bases and adapters.

    names    option of each bound
    nbytes   each bound in bytes, without the copied tensors
    """

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

    def count_nbytes(self, base_nbytes: int, adapter_nbytes: int) -> tuple[int, ...]:
        """Bytes under each bound, of a choice with these bytes in base and adapter."""
        nbytes_by_option = {
            "--target-bpw": base_nbytes,
            "--target-size": base_nbytes + adapter_nbytes,
            "--lora-budget": adapter_nbytes,
        }
        return tuple(nbytes_by_option[name] for name in self.names)

    def check(self, sizes: Sequence[Sequence[tuple[int, int]]], layers: Sequence[LayerJob], copied: int) -> None:
        """Raises UsageError naming the smallest possible bounds when the smallest choices exceed a bound.

        sizes    bytes of base and adapter, for each joint choice of each group
        layers   the layers of the plan
        copied   bytes of the copied tensors
        """
        numel, smallest = sum(job.numel for job in layers), []
        for k, (name, limit) in enumerate(zip(self.names, self.nbytes, strict=True)):
            least = sum(min(self.count_nbytes(*nbytes)[k] for nbytes in choices) for choices in sizes)
            if least > limit:
                bits = math.ceil(8 * least / numel * 1e4) / 1e4
                total = least + copied if name == "--target-size" else least
                smallest.append(f"{name} {bits if name == '--target-bpw' else total}")
        if smallest:
            raise UsageError(
                "the target is smaller than what the formats and ranks of this model can be",
                hint=f"the smallest possible is {' and '.join(smallest)}",
            )


def _list_uniform(
    layers: Sequence[LayerJob], candidates: Mapping[str, Sequence[Candidate]], limits: _Limits, copied: int
) -> Iterator[Uniform]:
    """Yield the models of a single format and rank, open to all layers and within the limits."""
    by_kind = [{(c.spec, c.rank): c for c in candidates[job.name]} for job in layers]
    for spec, rank in by_kind[0]:
        model = [kinds[spec, rank] for kinds in by_kind if (spec, rank) in kinds]
        if len(model) < len(layers):
            continue
        base, adapter = sum(c.base_nbytes for c in model), sum(c.adapter_nbytes for c in model)
        if all(map(operator.le, limits.count_nbytes(base, adapter), limits.nbytes)):
            cost = math.fsum(importance(job) * c.relative_error for job, c in zip(layers, model, strict=True))
            yield Uniform(spec, rank, base + copied, adapter, cost)


def build_recipe(recipe: Recipe, layers: Sequence[LayerJob], choices: Sequence[LayerChoice], dtype: str) -> Recipe:
    """Return `recipe` with the chosen format and rank of each of `layers`.

    recipe    all remaining options
    layers    the layers of the plan
    choices   the choice for each layer
    dtype     dtype of the model, for scales in the default dtype

    The most common format becomes the model's format, and the most common rank the model's rank, unless alpha or rslora
    is set. Overrides list the modules of every different layer by name.
    """
    candidates = {module_of(layer.name): layer.candidate for layer in choices}
    common = Counter(candidate.spec for candidate in candidates.values()).most_common(1)[0][0]
    values: dict[str, Any] = common.layer_options
    # A changed rank would change the scaling under a fixed alpha and under rslora.
    if recipe.alpha is None and not recipe.rslora:
        values["rank"] = Counter(candidate.rank for candidate in candidates.values()).most_common(1)[0][0]
    base = revise(recipe, **values)
    formats: dict[QuantSpec, list[str]] = {}
    ranks: dict[int, list[str]] = {}
    for job in layers:
        module = module_of(job.name)
        candidate, (spec, lora, _) = candidates[module], layer_settings(base, module, dtype)
        if spec != candidate.spec:
            formats.setdefault(candidate.spec, []).append(module)
        if lora.rank != candidate.rank:
            ranks.setdefault(candidate.rank, []).append(module)
    by_format = [Override(match=build_pattern(names), **spec.layer_options) for spec, names in formats.items()]
    by_rank = [Override(match=build_pattern(names), rank=rank) for rank, names in sorted(ranks.items())]
    return revise(base, override=(*recipe.override, *by_format, *by_rank))


def build_pattern(names: Sequence[str]) -> str:
    r"""Return a regular expression for the module names `names` and no further names. Names with a difference in the
    first number only share an alternative.

    >>> build_pattern(["layers.0.q_proj", "layers.1.q_proj", "lm_head"])
    '^(?:layers\\.(?:0|1)\\.q_proj|lm_head)$'
    """
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        before, number, after = match.groups() if match else (name, "", "")
        numbers.setdefault((before, after), []).append(number)
    return f"^(?:{'|'.join(_build_alternative(*around, digits) for around, digits in numbers.items())})$"


def _build_alternative(before: str, after: str, numbers: Sequence[str]) -> str:
    among = f"(?:{'|'.join(numbers)})" if len(numbers) > 1 else numbers[0]
    return re.escape(before) + among + re.escape(after)
