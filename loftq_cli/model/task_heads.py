"""The head of a task on a model: the class with the head, and the head's tensors. The table loaded_names.json holds the
heads of transformers' classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loftq_cli.errors import UsageError, printable
from loftq_cli.model.loaded_names import base_class, class_for_task, head_rows

# PEFT's task type -> the last part of the names of the classes with the head.
TASK_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
FEATURES = "FEATURE_EXTRACTION"
TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", *TASK_CLASSES, FEATURES)
LABELLED = ("SEQ_CLS", "TOKEN_CLS")
_DEFAULT_STD = 0.02  # of a new head; transformers' default for initializer_range


@dataclass(frozen=True, slots=True)
class TaskHead:
    """The head of a task.

    task           PEFT's task type
    architecture   the class with the head; None for the class of the config
    labels         number of labels; None for a task without labels
    tensors        name in the loaded model -> shape
    std            standard deviation of the numbers of a new head
    """

    task: str
    architecture: str | None
    labels: int | None
    tensors: Mapping[str, tuple[int, ...]]
    std: float

    @property
    def modules(self) -> list[str]:
        """The modules of the head, for PEFT's modules_to_save.

        >>> TaskHead("SEQ_CLS", None, 1, {"score.weight": (1, 8)}, 0.02).modules
        ['score']
        """
        return list(dict.fromkeys(name.partition(".")[0] for name in self.tensors))

    def change(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config with the class and the labels of the task.

        >>> TaskHead("SEQ_CLS", "LlamaForSequenceClassification", 1, {}, 0.02).change({})["num_labels"]
        1
        """
        named = dict(config) if self.architecture is None else {**config, "architectures": [self.architecture]}
        return named if self.labels is None else with_labels(named, self.labels)


def with_labels(config: Mapping[str, Any], count: int, names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A config with `count` labels: called by `names` of the form {"0": ...}, else as in `config`, else LABEL_0, ...

    >>> with_labels({"vocab_size": 8}, 1)["id2label"]
    {'0': 'LABEL_0'}
    """
    own = label_names(config)
    names = names or (own if len(own) == count else None) or {str(label): f"LABEL_{label}" for label in range(count)}
    ids = {name: int(label) for label, name in names.items()}
    return {**config, "num_labels": count, "id2label": dict(names), "label2id": ids}


def label_names(config: Mapping[str, Any]) -> dict[str, str]:
    """The names of the labels in a config, as {"0": ...}; empty for a config without names, or with other values.

    >>> label_names({"id2label": {"0": "no", "1": "yes"}}), label_names({"id2label": {"first": "no"}})
    ({'0': 'no', '1': 'yes'}, {})
    """
    names = config.get("id2label")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        return {}
    numbers = sorted(int(label) for label in names if isinstance(label, str) and label.isdecimal() and len(label) < 9)
    return dict(names) if numbers == list(range(len(names))) else {}


def head_of_task(config: Mapping[str, Any], task: str, labels: int | None) -> TaskHead:
    """The head of `task` on the model of a config.

    task     a member of TASKS
    labels   number of labels; None for the number in the config, else 1 on a language model and 2 on other models

    Raises UsageError for a family without a class or a known head for the task, and for labels of a task without.

    >>> head_of_task({"model_type": "llama", "hidden_size": 8}, "SEQ_CLS", 3).tensors
    {'score.weight': (3, 8)}
    """
    if task not in TASKS:
        raise UsageError(f"--task {printable(repr(task), 80)} does not exist", hint=f"one of {', '.join(TASKS)}")
    if labels is not None and task not in LABELLED:
        raise UsageError(f"--num-labels means nothing with --task {task}", hint="leave --num-labels out")
    if task not in TASK_CLASSES:
        return TaskHead(task, base_class(config) if task == FEATURES else None, None, {}, 0.0)
    names = config.get("architectures") or [""]
    family, ending = str(config.get("model_type", "")), TASK_CLASSES[task]
    architecture = class_for_task(family, str(names[0]), ending)
    rows = None if architecture is None else head_rows(architecture)
    if architecture is None or rows is None:
        message = f"--task {task}: no head of a class ...{ending} is known for the family {family or 'of no name'}"
        raise UsageError(message, hint="leave --task out, and train the head beside the adapter")
    count = (labels or _labels_of(config, str(names[0]))) if task in LABELLED else None
    sizes = {"labels": count or 2, **dict(_widths(config))}
    try:
        tensors = {name: tuple(s if isinstance(s, int) else sizes[s] for s in sides) for name, *sides in rows}
    except KeyError as error:
        message = f"--task {task}: the config does not say {error.args[0]}, the width of the head's input"
        raise UsageError(message, hint="leave --task out, and train the head beside the adapter") from None
    std = config.get("initializer_range", config.get("init_std", _DEFAULT_STD))
    is_usual = isinstance(std, (int, float)) and 0 <= std <= 1
    return TaskHead(task, architecture, count, tensors, float(std) if is_usual else _DEFAULT_STD)


def _labels_of(config: Mapping[str, Any], architecture: str) -> int:
    for value in (config.get("num_labels"), len(label_names(config))):
        if type(value) is int and value > 0:
            return value
    return 1 if architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) else 2


def _widths(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the whole numbers of a config by key; those of the text model first, if the config has parts."""
    nested = config.get("text_config")
    for part in (nested if isinstance(nested, dict) else {}, config):
        yield from ((key, value) for key, value in part.items() if type(value) is int and value > 0)
