"""The class of the merged model, where an adapter brings the head of a task that the base does not have: a classifier
or a reward model, trained from a language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.errors import MismatchError
from loftq_cli.merging.adapters.placed import Placed, Replacement
from loftq_cli.merging.adapters.weighted import mismatch
from loftq_cli.model.loaded_names import LoadedNames, class_for_task, loaded_names
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import module_of
from loftq_cli.model.task_heads import LABELLED, TASK_CLASSES, label_names, with_labels

_LAST = ("out_proj.weight", "score.weight", ".classifier.weight", "classification_head.weight")
_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class NewHead:
    """The head of a task in place of the base's head.

    architecture   the class of the merged model
    labels         rows of the head, for a classifier; None for a task without labels
    names          names of the labels, from a config in the adapter's directory; None for LABEL_0, LABEL_1, …
    dropped        modules of the base without a place in the class, by the first parts of names

    >>> NewHead("LlamaForSequenceClassification", 1, None, ()).change({"vocab_size": 8})["id2label"]
    {'0': 'LABEL_0'}
    """

    architecture: str
    labels: int | None
    names: Mapping[str, str] | None
    dropped: tuple[str, ...]

    def change(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config with the class and the labels."""
        changed = {**config, "architectures": [self.architecture]}
        return changed if self.labels is None else with_labels(changed, self.labels, self.names)

    @property
    def note(self) -> str:
        """The remark about the class."""
        labels = "" if self.labels is None else f" with {self.labels} label{'s' if self.labels != 1 else ''}"
        dropped = f", without the base's {', '.join(self.dropped)}" if self.dropped else ""
        return f"the adapter brings the head of a {self.architecture}{labels}: the merged model is one{dropped}"


def settle_head(placed: Placed, base: BaseModel) -> NewHead | None:
    """The head that the adapters bring for another task than the base's; None for the base's own head. Tensors of the
    base without a place in the new class go into `placed.left`.

    Raises MismatchError for the head of a task for which the family has no class.
    """
    heads = _heads(placed, base)
    if not heads:
        return None
    task = next(iter(heads.values())).source.config.get("task_type")
    known = [task] if task in TASK_CLASSES else list(TASK_CLASSES) if task is None else []
    for candidate in known:
        architecture = _class_of(base, TASK_CLASSES[candidate])
        loader = None if architecture is None else _loader(base, architecture)
        if architecture is None or loader is None or not {_first(name) for name in heads} <= loader.children:
            continue
        stale = {name for name in base.tensors if not _is_in(loader, name) and name not in placed.whole}
        resized = {name: placed.whole.pop(name) for name in _resized(placed, base)}
        placed.left = frozenset(stale | resized.keys())
        placed.new |= resized
        labels = _count(heads) if candidate in LABELLED else None
        dropped = tuple(dict.fromkeys(_first(name) for name in base.tensors if name in stale))
        return NewHead(architecture, labels, _label_names(next(iter(heads.values())), labels), dropped)
    if task in TASK_CLASSES:
        name, replacement = next(iter(heads.items()))
        raise _no_class(base, name, replacement, TASK_CLASSES[str(task)])
    return None


def _heads(placed: Placed, base: BaseModel) -> dict[str, Replacement]:
    """The tensors of the head that the adapters bring: new ones, and those of a head of the base with other rows."""
    resized = _resized(placed, base)
    same_modules = {module.rpartition(".")[0] for module in resized}
    beside = {n: r for n, r in placed.whole.items() if n.rpartition(".")[0] in same_modules}
    is_vocabulary = ("lm_head.", "embed_out.")
    new = {name: head for name, head in placed.new.items() if not name.startswith(is_vocabulary)}
    return {**new, **beside, **resized}


def _resized(placed: Placed, base: BaseModel) -> dict[str, Replacement]:
    """The tensors of a head of the base that the adapters replace by others of another shape."""
    return {
        name: replacement
        for name, replacement in placed.whole.items()
        if _first(name) in ("score", "classifier", "qa_outputs", "classification_head")
        and replacement.source.weights.tensors[replacement.tensor].shape != base.tensors[name].shape
    }


def _count(heads: Mapping[str, Replacement]) -> int | None:
    """The number of labels: rows of the last matrix of the head."""
    rows = {
        name: head.source.weights.tensors[head.tensor].shape[0]
        for name, head in heads.items()
        if name.endswith(".weight") and len(head.source.weights.tensors[head.tensor].shape) == 2
    }
    # A head may have a layer before the last one: classifier.dense, pre_classifier, pooler.dense.
    last = [name for name in rows if f".{name}".endswith(_LAST)] or list(rows)
    return rows[last[-1]] if last else None


def _label_names(head: Replacement, labels: int | None) -> Mapping[str, str] | None:
    """Names of the labels in a config beside the adapter, which some trainers save."""
    file = head.source.path / _CONFIG
    names = label_names(read_json_object(file)) if file.is_file() else {}
    return names if names and len(names) == labels else None


def _class_of(base: BaseModel, ending: str) -> str | None:
    architectures = base.family.architectures
    return class_for_task(base.family.model_type, architectures[0] if architectures else "", ending)


def _loader(base: BaseModel, architecture: str) -> LoadedNames | None:
    return loaded_names({**base.config, "architectures": [architecture]})


def _is_in(loader: LoadedNames, name: str) -> bool:
    """Whether the class has a place for the tensor called `name` in the files."""
    first = {_first(loaded) for loaded in loader.find(module_of(name))}
    return first <= loader.children


def _first(name: str) -> str:
    return name.partition(".")[0]


def _no_class(base: BaseModel, name: str, head: Replacement, ending: str) -> MismatchError:
    family = base.family.model_type or "the base"
    message = f"is a head that the base's config knows nothing of, and {family} has no class {ending}"
    return mismatch(head.source, message, head.tensor, "train with the model's own class")
