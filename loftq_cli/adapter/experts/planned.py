"""The factors of experts for each tensor of a base, from headers alone.

An adapter holds the factors of all experts in two tensors (PEFT's target_parameters), or has two tensors for each
expert. A base holds a matrix for each expert, or all experts in a tensor. Each pair of the four fits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from loftq_cli.adapter.expert_factors import FactorPart, gate_rows
from loftq_cli.adapter.experts.places import (
    INTERLEAVED,
    ROLES,
    SAYS_IN_OUT,
    STORED_IN_OUT,
    ExpertPlace,
    model_types,
    place_of,
)
from loftq_cli.adapter.naming import find_place
from loftq_cli.adapter.sorting import LoraTensors
from loftq_cli.adapter.source import AdapterSource
from loftq_cli.adapter.spelling import nearest_name
from loftq_cli.errors import MismatchError
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import module_of
from loftq_cli.tensors.headers import WEIGHT_DTYPES

_EXPERT_MODULE = re.compile(r"(.+\.experts)\.(\d{1,9})\.(\w+)")
_VERSION = re.compile(r"(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class ExpertLoras:
    """The factors of experts by tensor of the base.

    single   matrix of one expert, or of a part of one -> the tensors of the factors, with the part for the matrix
    stacks   tensor of all experts -> for each expert the tensors of all factors to add
    placed   modules of single experts in the adapter's spelling that have a place in `stacks`
    """

    single: Mapping[str, LoraTensors] = field(default_factory=dict)
    stacks: Mapping[str, tuple[tuple[LoraTensors, ...], ...]] = field(default_factory=dict)
    placed: frozenset[str] = frozenset()


def plan_expert_loras(base: BaseModel, adapter: AdapterSource, modules: Iterable[str] | None = None) -> ExpertLoras:
    """Give the factors of experts in `adapter` a place in `base`.

    modules   the modules of the base's matrices in the adapter's spelling, as `names_in` has them, if known. An expert
              among them needs no place here.

    Raises MismatchError naming an adapter tensor whose parameter or expert is not in the base, or does not fit.
    """
    if modules is None:
        modules = map(module_of, adapter.names_in(base).values())
    alone = {m: match for m in adapter.lora.keys() - set(modules) if (match := _EXPERT_MODULE.fullmatch(m))}
    if not adapter.parameters and not alone:
        return ExpertLoras()
    return _Planner(base, adapter).plan(alone)


def lora_with_experts(base: BaseModel, adapter: AdapterSource) -> dict[str, LoraTensors]:
    """Map each adapted weight of `base`, a matrix of one expert included, to the tensors of the factors.

    Raises MismatchError naming an adapter tensor of experts without a place in the base.
    """
    return {**adapter.lora_in(base), **plan_expert_loras(base, adapter).single}


class _Planner:
    """Places the factors of one adapter."""

    def __init__(self, base: BaseModel, adapter: AdapterSource) -> None:
        self._base, self._adapter = base, adapter
        self._types = model_types(base.family)
        self._places: dict[str, dict[str, ExpertPlace]] = {}  # parameter -> tensor -> place
        for name in base.tensors:
            place = place_of(name, base.family, base.tensors)
            if place is not None:
                self._places.setdefault(place.parameter, {})[name] = place
        known, wanted = self._places.keys(), adapter.parameters.keys()
        found = None if wanted <= known else find_place(known, wanted)
        self._spelling = found or ("", "")  # the starts of names in the adapter and in the base

    def plan(self, alone: Mapping[str, re.Match[str]]) -> ExpertLoras:
        """The places of all joined factors, and of the factors of the experts `alone`."""
        single: dict[str, LoraTensors] = {}
        stacks: dict[str, tuple[tuple[LoraTensors, ...], ...]] = {}
        for parameter, lora in self._adapter.parameters.items():
            places = self._find(parameter, lora)
            if all(place.expert is None for place in places.values()):
                for name, place in places.items():
                    stacks[name] = self._fit_stack(name, place, lora)
            else:
                self._check_complete(places, lora)
                for name, place in places.items():
                    single[name] = self._fit_joined(name, place, lora, self._base.matrix_shape(name))
        placed, by_expert = set[str](), dict[str, dict[int, list[LoraTensors]]]()
        for module, match in alone.items():
            lora, found = self._adapter.lora[module], self._find_stack(match)
            if found is not None:
                fitted = self._fit_alone(found, match, lora)
                by_expert.setdefault(found, {}).setdefault(int(match[2]), []).append(fitted)
                placed.add(module)
        for name, loras in by_expert.items():
            experts = range(self._base.tensors[name].shape[0])
            earlier = stacks.get(name, ((),) * len(experts))
            stacks[name] = tuple((*earlier[e], *loras.get(e, ())) for e in experts)
        return ExpertLoras(single, stacks, frozenset(placed))

    def _find(self, parameter: str, lora: LoraTensors) -> dict[str, ExpertPlace]:
        """The tensors of a parameter in the adapter's spelling, whose leading part may differ from the base's."""
        start, other = self._spelling
        found = self._places.get(other + parameter[len(start) :]) if parameter.startswith(start) else None
        if found is None:
            experts = [name for name in self._places if not name.endswith((".weight", ".bias"))] or list(self._places)
            hint = f"the base's parameters are called like {nearest_name(parameter, experts) or 'none'}"
            raise self._mismatch(f"its parameter {parameter} is not in the base", lora.lora_A, hint)
        for name in found:
            dtype = self._base.tensors[name].dtype
            if name not in self._base.quantized and dtype not in WEIGHT_DTYPES:
                raise self._mismatch(f"adapts {name}, which is {dtype}", lora.lora_B)
        return found

    def _check_complete(self, places: Mapping[str, ExpertPlace], lora: LoraTensors) -> None:
        """Raises MismatchError unless the base has as many experts as the adapter, each of them complete."""
        assert lora.part is not None
        experts = {place.expert for place in places.values()}
        if experts != set(range(lora.part.n_experts)):
            message = f"holds {lora.part.n_experts} experts of rank {lora.rank}, and the base has {len(experts)}"
            raise self._mismatch(message, lora.lora_A)
        parts = {place.part for place in places.values()}
        held = {(place.expert, place.part) for place in places.values()}
        for expert in sorted(range(lora.part.n_experts)):
            if not {(expert, part) for part in parts} <= held:
                raise self._mismatch(f"adapts expert {expert}, which is not complete in the base", lora.lora_A)

    def _fit_stack(self, name: str, place: ExpertPlace, lora: LoraTensors) -> tuple[tuple[LoraTensors, ...], ...]:
        assert lora.part is not None
        shape = self._base.tensors[name].shape
        n_experts, matrix = (shape[0], shape[1:]) if len(shape) == 3 else (1, shape)
        if len(matrix) != 2 or lora.part.n_experts != n_experts:
            message = f"holds {lora.part.n_experts} experts of rank {lora.rank}, and {name} of the base is {shape}"
            raise self._mismatch(message, lora.lora_A)
        places = [replace(place, expert=expert) for expert in range(n_experts)]
        return tuple((self._fit_joined(name, place, lora, matrix),) for place in places)

    def _fit_joined(self, name: str, place: ExpertPlace, lora: LoraTensors, matrix: tuple[int, ...]) -> LoraTensors:
        """`lora` for one expert, or for the gate or up of one: `matrix` is the shape in the base as stored.

        Raises MismatchError for factors of another shape.
        """
        tensors = self._adapter.weights.tensors
        inputs, outputs = tensors[lora.lora_A].shape[1], tensors[lora.lora_B].shape[0]
        size = matrix[0] * (1 if place.part is None else 2), matrix[1]
        pooling = lora.pooling_for(size[1], inputs)
        is_straight = (outputs, inputs * (pooling.group_size if pooling else 1)) == size
        is_turned = (inputs, outputs) == size
        if not is_straight and not is_turned:
            message = f"is for {(outputs, inputs)}, and an expert of {name} of the base is {size}"
            raise self._mismatch(message, lora.lora_B)
        if is_straight and is_turned:
            is_turned = self._is_square_turned(is_stack=len(self._base.tensors[name].shape) == 3)
        elif is_turned:
            pooling = None
        interleaved = not INTERLEAVED.isdisjoint(self._types)
        rows = None if place.part is None else gate_rows(size[0], interleaved=interleaved)[place.part]
        assert lora.part is not None
        part = FactorPart(lora.part.n_experts, place.expert or 0, is_turned=is_turned, rows=rows)
        return replace(lora, pooling=pooling, part=part)

    def _is_square_turned(self, *, is_stack: bool) -> bool:
        """Whether PEFT's factors of a square matrix multiply to the transpose of the base's matrix.

        A matrix of one expert lies as [out, in], and a tensor of all experts as the family has the parameter. PEFT 0.18
        took lora_A's width from the second dimension of the parameter, later versions ask for `is_transposed`.
        """
        version = _VERSION.match(str(self._adapter.config.get("peft_version") or ""))
        is_old = version is not None and (int(version[1]), int(version[2])) < (0, 19)
        is_stored_in_out = not STORED_IN_OUT.isdisjoint(self._types)
        reads_in_first = is_old or not SAYS_IN_OUT.isdisjoint(self._types)
        return reads_in_first if is_stack else reads_in_first != is_stored_in_out

    def _find_stack(self, match: re.Match[str]) -> str | None:
        """The tensor of all experts that holds the matrix of an expert's module."""
        if match[3] not in ROLES:
            return None
        parameter = f"{match[1]}.{ROLES[match[3]][0]}"
        for spelling in (parameter, parameter.replace(".block_sparse_moe.", ".mlp.")):
            for name, place in self._places.get(spelling, {}).items():
                ref = self._base.tensors[name]
                if place.expert is None and len(ref.shape) == 3 and ref.dtype in WEIGHT_DTYPES:
                    return name
        return None

    def _fit_alone(self, name: str, match: re.Match[str], lora: LoraTensors) -> LoraTensors:
        """`lora` of one expert's matrix for a tensor of all experts. Raises MismatchError for another shape."""
        tensors = self._adapter.weights.tensors
        inputs, outputs = tensors[lora.lora_A].shape[1], tensors[lora.lora_B].shape[0]
        n_experts, *matrix = self._base.tensors[name].shape
        part = ROLES[match[3]][1]
        size = outputs * (1 if part is None else 2)
        fitting = [turn for turn in (False, True) if ([inputs, size] if turn else [size, inputs]) == matrix]
        if int(match[2]) >= n_experts or not fitting:
            message = (
                f"is for {(outputs, inputs)} of expert {match[2]}, and {name} of the base is {(n_experts, *matrix)}"
            )
            raise self._mismatch(message, lora.lora_B)
        is_turned = fitting[0] if len(fitting) == 1 else not STORED_IN_OUT.isdisjoint(self._types)
        interleaved = not INTERLEAVED.isdisjoint(self._types)
        into = None if part is None else (size, gate_rows(size, interleaved=interleaved)[part])
        return replace(lora, pooling=None, part=FactorPart(is_turned=is_turned, into=into))

    def _mismatch(self, message: str, tensor: str, hint: str | None = None) -> MismatchError:
        return MismatchError(message, file=self._adapter.weights.path, tensor=tensor, hint=hint)
