"""The adapters of one merge: folders with weights, opened one after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loftq_cli.adapter.config import is_adapter_directory
from loftq_cli.adapter.extras import take_extras
from loftq_cli.adapter.joined_weights import JoinedWeights
from loftq_cli.adapter.sorting import LoraTensors
from loftq_cli.adapter.source import AdapterSource, open_adapter
from loftq_cli.checkpoint.source import WeightsFile
from loftq_cli.conversion.report import read_report
from loftq_cli.errors import MismatchError, UsageError, printable
from loftq_cli.methods.method import find_init
from loftq_cli.model.stored import BaseModel
from loftq_cli.tensors.headers import TensorRef


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """An adapter of a merge.

    source   the opened adapter; tensors of the second adapter are called `2:NAME`, and so on
    weight   factor of the adapter's change
    notes    remarks about further weight files in the adapter's directory
    """

    source: AdapterSource
    weight: float = 1.0
    notes: tuple[str, ...] = ()


def parse_adapter(text: str) -> tuple[Path, float]:
    """Split `DIR` or `DIR:WEIGHT` into a path and a weight, 1 without a weight. A directory of the complete name wins.

    Raises UsageError for a weight that is no finite number.

    >>> parse_adapter("style:0.5"), parse_adapter("style")
    ((PosixPath('style'), 0.5), (PosixPath('style'), 1.0))
    """
    head, colon, tail = text.rpartition(":")
    if not colon or not head or is_adapter_directory(Path(text)):
        return Path(text), 1.0
    try:
        weight = float(tail)
    except ValueError:
        if "/" in tail:
            return Path(text), 1.0
        message = f"--adapter {printable(text, 200)}: the weight {printable(repr(tail), 80)} is no number"
        raise UsageError(message, hint="--adapter DIR:0.5") from None
    if not math.isfinite(weight):
        raise UsageError(f"--adapter {printable(text, 200)}: the weight is not finite", hint="--adapter DIR:0.5")
    return Path(head), weight


def open_adapters(
    adapters: Sequence[tuple[Path, float]], base: BaseModel, *, force: bool
) -> tuple[WeightedAdapter, ...]:
    """Open the adapters of a merge, with the tensors of further files in the directories.

    adapters   paths and weights, at least one
    force      whether a tensor without a place in a further file is left out, with a note

    Raises UsageError for a path that comes twice; the errors of `open_adapter` and `take_extras`.
    """
    opened = list[WeightedAdapter]()
    for number, (path, weight) in enumerate(adapters, 1):
        if any(other.source.path.resolve() == path.resolve() for other in opened):
            hint = "name it once, with the sum of the weights"
            raise UsageError("the adapter is named twice", file=path, hint=hint)
        source, notes = take_extras(open_adapter(path), base, force=force)
        opened.append(WeightedAdapter(source if number == 1 else _renamed(source, f"{number}:"), weight, notes))
    return tuple(opened)


def joined_weights(adapters: Sequence[WeightedAdapter]) -> JoinedWeights:
    """The tensors of all adapters under one list of names."""
    tensors, sources = dict[str, TensorRef](), dict[str, tuple[WeightsFile, str]]()
    for adapter in adapters:
        weights = adapter.source.weights
        tensors.update(weights.tensors)
        sources.update(
            weights.sources if isinstance(weights, JoinedWeights) else {n: (weights, n) for n in weights.tensors}
        )
    return JoinedWeights(adapters[0].source.weights.path, tensors, sources)


def weight_notes(adapters: Sequence[WeightedAdapter], base: BaseModel) -> Iterator[str]:
    """Yield the remarks about the sum of several adapters, or about a weight other than 1; nothing for one whole
    adapter.
    """
    if len(adapters) == 1 and adapters[0].weight == 1.0:
        return
    parts = [f"{adapter.weight:g} × {printable(adapter.source.path.name, 80)}" for adapter in adapters]
    whole = any(adapter.source.whole for adapter in adapters)
    note = f"merged: {' + '.join(parts)}, the sum of what each adapter alone adds to the base"
    yield f"{note}; tensors saved in full are taken as they are" if whole else note
    report, total = read_report(base.folder), sum(adapter.weight for adapter in adapters)
    recipe = {} if report is None else report[0]["recipe"]
    entry = find_init(recipe.get("method"), recipe.get("init"))
    if entry is not None and entry.is_fitted and not math.isclose(total, 1.0):
        yield (
            f"the weights of the adapters add up to {total:g}: adapters that started from this base's own hold the "
            "error of the base, which is right at a sum of 1"
        )


def _renamed(source: AdapterSource, mark: str) -> AdapterSource:
    """An adapter with `mark` before the names of all tensors."""
    weights = source.weights
    inner = weights.sources if isinstance(weights, JoinedWeights) else {n: (weights, n) for n in weights.tensors}
    tensors = {mark + name: replace(ref, name=mark + name) for name, ref in weights.tensors.items()}
    joined = JoinedWeights(weights.path, tensors, {mark + name: place for name, place in inner.items()})

    def marked(name: str | None) -> str | None:
        return None if name is None else mark + name

    def renamed(lora: LoraTensors) -> LoraTensors:
        return replace(
            lora,
            lora_A=mark + lora.lora_A,
            lora_B=mark + lora.lora_B,
            lora_bias=marked(lora.lora_bias),
            magnitude=marked(lora.magnitude),
        )

    return replace(
        source,
        weights=joined,
        lora={module: renamed(lora) for module, lora in source.lora.items()},
        parameters={name: renamed(lora) for name, lora in source.parameters.items()},
        whole={place: mark + name for place, name in source.whole.items()},
        unused={mark + name: reason for name, reason in source.unused.items()},
        tokens={module: replace(rows, tensor=mark + rows.tensor) for module, rows in source.tokens.items()},
    )


def mismatch(source: AdapterSource, message: str, tensor: str, hint: str | None = None) -> MismatchError:
    """The error about a tensor of an adapter."""
    return MismatchError(message, file=source.weights.path, tensor=tensor, hint=hint)
