"""The --reference of `loftq inspect`: what was asked for, and how the outputs of layers and models are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loftq_cli.activations.comparison import Comparison, Drift, Predictions, compare
from loftq_cli.activations.text_windows import DEFAULT_TOKENS
from loftq_cli.cli.console import result, say
from loftq_cli.conversion.report import read_report
from loftq_cli.errors import UsageError
from loftq_cli.inspecting.converted import Inspection, LayerRow
from loftq_cli.model.builtin import resolve_model
from loftq_cli.model.stored import BaseModel

OUTPUT_ERROR = "output_error"


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What --reference was given with."""

    reference: str
    text: tuple[Path, ...]
    tokens: int
    context: int | None
    lines: bool


def text_options(
    reference: str | None, text: list[Path] | None, tokens: int | None, context: int | None, lines: bool
) -> TextOptions | None:
    """What --reference was given with. Raises UsageError where one is missing beside the other."""
    if reference is not None:
        if not text:
            raise UsageError("--reference needs a text to run the models on", hint="--text FILE")
        return TextOptions(reference, tuple(text), tokens or DEFAULT_TOKENS, context, lines)
    given = {"--text": text, "--tokens": tokens, "--context": context, "--lines": lines}
    for name, value in given.items():
        if value:
            raise UsageError(f"{name} is for --reference", hint="--reference ORIGINAL")
    return None


def compared(base: BaseModel, found: Inspection, asked: TextOptions, threads: int) -> Comparison:
    """Run the converted model and its reference."""
    names = [row.name for row in found.rows]
    reference, report = resolve_model(asked.reference), read_report(base.folder)
    return compare(
        base,
        reference,
        names,
        report[0]["adapter_dir"] if report else None,
        asked.text,
        tokens=asked.tokens,
        context=asked.context,
        lines=asked.lines,
        threads=threads,
        say=say,
    )


def outputs_json(outputs: Comparison) -> dict[str, Any]:
    """What is said of the models as a whole, and of the text."""
    kind = "predictions" if isinstance(outputs.outcome, Predictions) else "drift"
    read = {"tokens": outputs.tokens, "windows": outputs.windows, "context": outputs.context}
    return {**read, "has_adapter": outputs.has_adapter, kind: asdict(outputs.outcome)}


def layer_json(name: str, outputs: Comparison) -> dict[str, Any]:
    """What is said of one layer: None where it read no text."""
    error = outputs.layers.get(name)
    return {"base_output_error": error and error.base_error, OUTPUT_ERROR: error and error.error}


def by_output_error(rows: Sequence[LayerRow], outputs: Comparison) -> list[LayerRow]:
    """The layers that read text, the largest error first."""
    known = [row for row in rows if row.name in outputs.layers]
    return sorted(known, key=lambda row: -outputs.layers[row.name].error)


def print_outputs(outputs: Comparison) -> None:
    """The lines below the table."""
    total, found = outputs.total, outputs.outcome
    result(
        f"on {outputs.tokens} tokens: base output error {total.base_error:.4f}, output error {total.error:.4f}"
        f"{'' if outputs.has_adapter else ' (there is no adapter)'}"
    )
    if isinstance(found, Drift):
        result(f"drift of the last hidden states (1 - cosine): base {found.base:.6f}, with adapter {found.adapted:.6f}")
        return
    result(
        f"perplexity: original {found.perplexity:.4f}, base {found.base_perplexity:.4f}, "
        f"with adapter {found.adapted_perplexity:.4f}"
    )
    result(f"KL from the original, nats a token: base {found.base_kl:.6f}, with adapter {found.adapted_kl:.6f}")


def output_cells(name: str, outputs: Comparison | None) -> tuple[str, ...]:
    """The last columns of a layer's line in the table."""
    if outputs is None:
        return ()
    error = outputs.layers.get(name)
    return ("-", "-") if error is None else (f"{error.base_error:.4f}", f"{error.error:.4f}")
