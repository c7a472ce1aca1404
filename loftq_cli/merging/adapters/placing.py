"""The place of each tensor of an adapter in the base, by name. A tensor without a place is refused by name."""

from __future__ import annotations

from collections.abc import Mapping

from loftq_cli.adapter.experts.planned import plan_expert_loras
from loftq_cli.adapter.fused import FusedRows, fused_parts, rows_of_parts
from loftq_cli.adapter.naming import VOCABULARY_HEAD
from loftq_cli.adapter.sorting import LoraTensors
from loftq_cli.adapter.spelling import nearest_name
from loftq_cli.errors import printable
from loftq_cli.merging.adapters.placed import Addition, Placed, Replacement, Rows, weighted
from loftq_cli.merging.adapters.weighted import WeightedAdapter, mismatch
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import module_of


def place(adapter: WeightedAdapter, base: BaseModel) -> Placed:
    """Give every tensor of `adapter` a place in `base`. A tensor that only the head of a tied model can take has the
    name of the head, see `settle_tied`.

    Raises MismatchError naming a tensor without a place.
    """
    return weighted(_Placing(adapter, base).place(), adapter.weight)


class _Placing:
    """The places of one adapter."""

    def __init__(self, adapter: WeightedAdapter, base: BaseModel) -> None:
        self._source, self._base = adapter.source, base
        self._names = adapter.source.names_in(base)
        self._files = {loaded: name for name, loaded in self._names.items()}
        self._fused = self._find_fused()
        self._placed = Placed(unused=dict(adapter.source.unused))

    def place(self) -> Placed:
        experts = plan_expert_loras(self._base, self._source, [*map(module_of, self._names.values()), *self._fused])
        for module, lora in self._source.lora.items():
            if module not in experts.placed:
                self._place_lora(module, lora)
        for name, lora in experts.single.items():
            self._placed.lora[name] = (*self._placed.lora.get(name, ()), Addition(self._source, lora))
        for name, stack in experts.stacks.items():
            self._placed.experts[name] = tuple(tuple(Addition(self._source, lora) for lora in loras) for loras in stack)
        for loaded, name in self._source.whole.items():
            replacement = Replacement(self._source, name)
            if loaded in self._files:
                self._placed.whole[self._files[loaded]] = replacement
            else:
                self._placed.new[loaded] = replacement
        for module, tokens in self._source.tokens.items():
            matrix = self._file_of(f"{module}.weight")
            if matrix is None:
                raise self._absent(module, tokens.tensor)
            self._placed.tokens[matrix] = (Rows(self._source, tokens),)
        self._placed.notes = tuple(self._notes())
        return self._placed

    def _place_lora(self, module: str, lora: LoraTensors) -> None:
        own = self._file_of(f"{module}.weight")
        if own is None and module not in self._fused:
            raise self._absent(module, lora.lora_A)
        fused = self._fused[module] if own is None else None
        weight, part = (str(own), None) if fused is None else fused
        addition = Addition(self._source, lora, part=part)
        self._placed.lora[weight] = (*self._placed.lora.get(weight, ()), addition)
        if lora.lora_bias is None:
            return
        bias = self._file_of(f"{module}.bias") if part is None else f"{module_of(weight)}.bias"
        if bias not in self._base.tensors:
            raise mismatch(self._source, "its module has no bias in the base", lora.lora_bias)
        self._placed.biases[bias] = (*self._placed.biases.get(bias, ()), addition)

    def _file_of(self, loaded: str) -> str | None:
        """The name in the base's files; the name itself for a tied head, which has no tensor in the files."""
        if loaded in self._files:
            return self._files[loaded]
        is_head = VOCABULARY_HEAD.search(module_of(loaded)) and loaded.endswith(".weight")
        return loaded if is_head and self._base.family.ties_embeddings() else None

    def _find_fused(self) -> dict[str, tuple[str, FusedRows]]:
        """Module of the adapter -> the base's fused weight, and the rows of the module in the weight."""
        found: dict[str, tuple[str, FusedRows]] = {}
        missing = {module for module in self._source.lora if f"{module}.weight" not in self._files}
        if not missing:
            return found
        tensors = self._source.weights.tensors
        for name, loaded in self._names.items():
            if not name.endswith(".weight") or len(self._base.tensors[name].shape) != 2:
                continue
            for parts in (self._split_at_load(name), *fused_parts(module_of(loaded))):
                sizes = {part: tensors[self._source.lora[part].lora_B].shape[0] for part in parts if part in missing}
                rows = (
                    rows_of_parts(self._base.config, self._base.matrix_shape(name)[0], parts, sizes) if sizes else None
                )
                if rows is not None:
                    found |= {part: (name, rows[part]) for part in sizes}
        return found

    def _split_at_load(self, name: str) -> tuple[str, ...]:
        """The modules that transformers makes of a fused matrix while loading; nothing for a matrix that stays."""
        modules = [module_of(other) for other in self._base.tensors]
        parts = self._base.family.loaded_parts(module_of(name), modules)
        return parts if len(parts) in (2, 3) else ()

    def _notes(self) -> list[str]:
        notes = []
        fused = sorted({module_of(name) for name, _ in self._fused.values()})
        if fused:
            parts = sorted({module.rpartition(".")[2] for module in self._fused})
            leaves = ", ".join(sorted({printable(module.rpartition(".")[2], 80) for module in fused}))
            notes.append(f"{', '.join(parts)} of the adapter are rows of the base's {leaves}, in {len(fused)} matrices")
        moved = _moved(self._names, self._base.loaded_names(), [f"{module}.weight" for module in self._source.lora])
        if moved is not None:
            notes.append(f"{printable(moved[0], 120)} in the adapter is {printable(moved[1], 120)} in the base")
        return notes

    def _absent(self, module: str, tensor: str) -> Exception:
        modules = [module_of(name) for name in self._names.values() if name.endswith(".weight")]
        hint = f"the base's modules are called like {nearest_name(module, modules) or 'none'}"
        return mismatch(self._source, "its module is not in the base", tensor, hint)


def _moved(spelled: Mapping[str, str], loaded: Mapping[str, str], adapted: list[str]) -> tuple[str, str] | None:
    """The first adapted tensor that lies elsewhere than one leading part up or down, in both spellings."""
    for name, ours in loaded.items():
        theirs = spelled[name]
        if theirs in adapted and theirs != ours and name != theirs:
            if not (ours.endswith(f".{theirs}") or theirs.endswith(f".{ours}")):
                return theirs, ours
            longer, shorter = (ours, theirs) if len(ours) > len(theirs) else (theirs, ours)
            if longer.removesuffix(shorter).count(".") > 1:
                return theirs, ours
    return None
