"""Trained weights in further files of an adapter's directory: each tensor gets its place in the base, or an error.

Trainers leave such files: a projector (`non_lora_trainables.bin`), rows of new tokens (`new_embeddings.safetensors`), a
value head (`value_head.safetensors`). PEFT reads none of the files.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from loftq_cli.adapter.joined_weights import JoinedWeights
from loftq_cli.adapter.library_adapter import library_file_in, open_library_file
from loftq_cli.adapter.sorting import GATHER_ZERO3, plain_name
from loftq_cli.adapter.source import WEIGHTS_NAMES, AdapterSource
from loftq_cli.checkpoint.source import READERS, WeightsFile, open_weights_file
from loftq_cli.errors import InputError, MismatchError, printable
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import module_of
from loftq_cli.tensors.headers import WEIGHT_DTYPES

# The state of a training run, which holds no weights of the model.
_TRAINING_STATE = re.compile(
    r"(?:optimizer|scheduler|scaler|sampler|dataloader|random_states|rng_state|training_args|trainer_state)"
    r"(?:_\w+)?\.(?:bin|pt|pth)"
)
_WHOLE_MODEL = re.compile(r"(?:model|pytorch_model|consolidated)(?:-\d+-of-\d+|\.\d+)?\.(?:safetensors|bin|pth)")
_LEAVE = "--force leaves it out"
_MAX_NAMES = 3  # more names hide the sentence around them
_MAX_FILES = 10


def take_extras(adapter: AdapterSource, base: BaseModel, *, force: bool) -> tuple[AdapterSource, tuple[str, ...]]:
    """Give the tensors of further weight files in the adapter's directory a place in `base`.

    force   whether a tensor without a place is left out, with a note

    The result is the adapter with the placed tensors in `whole`, and notes about each file. Raises MismatchError naming
    a file or a tensor without a place, unless `force`.
    """
    taken = _Extras(adapter, base)
    own = {base_file.resolve() for base_file in base.checkpoint.files}
    for path in sorted(adapter.path.iterdir()):
        is_weights = path.suffix in READERS and path.is_file() and not _TRAINING_STATE.fullmatch(path.name)
        if is_weights and path != adapter.weights.path and path.resolve() not in own:
            taken.take_file(path)
    if not force:
        taken.check()
    if not taken.whole:
        return adapter, tuple(taken.notes)
    sources = {name: (adapter.weights, name) for name in adapter.weights.tensors} | taken.sources
    tensors = {name: replace(reader.tensors[inner], name=name) for name, (reader, inner) in sources.items()}
    joined = JoinedWeights(adapter.weights.path, tensors, sources)
    return replace(adapter, weights=joined, whole={**adapter.whole, **taken.whole}), tuple(taken.notes)


class _Extras:
    """The placed tensors of the further files of one adapter, and the notes about the files."""

    def __init__(self, adapter: AdapterSource, base: BaseModel) -> None:
        self._adapter = adapter
        self._places = set(adapter.names_in(base).values())
        self.whole: dict[str, str] = {}
        self.sources: dict[str, tuple[WeightsFile, str]] = {}
        self.notes: list[str] = []
        self.faults: list[MismatchError] = []

    def take_file(self, path: Path) -> None:
        """Place the tensors of a file; a tensor without a place becomes a fault."""
        if path == library_file_in(self._adapter.path):
            self._compare(path)
            return
        if path.name in WEIGHTS_NAMES:
            self.notes.append(f"{path.name} is not needed: PEFT reads {self._adapter.weights.path.name} instead")
            return
        if _WHOLE_MODEL.fullmatch(path.name):
            self._leave(MismatchError("is a model beside the adapter", file=path, hint=f"move it away; {_LEAVE}"))
            return
        try:
            weights = open_weights_file(path)
        except InputError as error:
            message = f"lies beside the adapter, and cannot be read: it {error.message}"
            self._leave(MismatchError(message, file=path, tensor=error.tensor, hint=_LEAVE))
            return
        placed = [self._take_tensor(weights, name) for name in weights.tensors]
        names = [name for name in placed if name is not None]
        if names:
            listed = ", ".join(printable(name, 80) for name in names[:_MAX_NAMES])
            more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
            self.notes.append(f"{path.name} beside the adapter replaces {listed}{more}")

    def _compare(self, path: Path) -> None:
        """Compare the library's own adapter file with PEFT's. A trainer may have written one of the two."""
        own, other = self._adapter.weights, open_library_file(path)[1]
        is_equal = own.tensors.keys() == other.tensors.keys()
        if not is_equal or any(own.sha256(name) != other.sha256(name) for name in own.tensors):
            hint = f"move away the file that training did not write; {_LEAVE}"
            self._leave(MismatchError(f"holds other numbers than {own.path.name}", file=path, hint=hint))

    def _take_tensor(self, weights: WeightsFile, name: str) -> str | None:
        """The place of a tensor in the loaded model, taken; None for a tensor left out."""
        ref, plain = weights.tensors[name], plain_name(name)
        place = next((place for place in (plain, plain.removeprefix("model.")) if place in self._places), None)
        message, hint = None, _LEAVE
        if place is None:
            message = "was trained beside the adapter, and the base has no such tensor"
        elif 0 in ref.shape:
            message, hint = "is empty: the save was incomplete", f"{GATHER_ZERO3}; {_LEAVE}"
        elif ref.dtype not in WEIGHT_DTYPES:
            message = f"is {ref.dtype}, not floating point"
        elif place in self._adapter.whole or place in self.whole:
            message = f"has the same place as {self._adapter.whole.get(place) or self.whole[place]}"
        elif module_of(place) in self._adapter.lora and place.endswith(".weight"):
            message = "is the weight under an adapter: the adapter may be merged into it already"
        if place is None or message is not None:
            self._leave(MismatchError(message or "", file=weights.path, tensor=name, hint=hint))
            return None
        key = f"{weights.path.name}:{name}"
        self.whole[place], self.sources[key] = key, (weights, name)
        return place

    def _leave(self, error: MismatchError) -> None:
        """Remember a fault: under force, a note says what is left out."""
        self.faults.append(error)
        tensor = f", tensor {error.tensor}" if error.tensor else ""
        self.notes.append(f"{_file_of(error)}{tensor} is left out: it {error.message}")

    def check(self) -> None:
        """Raises MismatchError for the first fault, which names the files of the remaining faults as well."""
        if not self.faults:
            return
        first = self.faults[0]
        others = [name for name in dict.fromkeys(map(_file_of, self.faults)) if name != _file_of(first)]
        listed = ", ".join(others[:_MAX_FILES]) + (" and more" if len(others) > _MAX_FILES else "")
        message = f"{first.message}; nor have all tensors of {listed} a place" if others else first.message
        raise MismatchError(message, file=first.file, tensor=first.tensor, hint=first.hint)


def _file_of(error: MismatchError) -> str:
    return Path(error.file or "").name
