"""The tables and the JSON of `loftq inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from loftq_cli.activations.comparison import Comparison, Drift, Predictions
from loftq_cli.api.results import CheckpointInspection, ConvertedInspection
from loftq_cli.cli.render.console import format_errors, format_nbytes, format_shape, print_table, say, write_result
from loftq_cli.conversion.report import error_json
from loftq_cli.inspecting.converted import LayerRow
from loftq_cli.quant.formats import spec_json
from loftq_cli.tensors.metrics import GroupErrors, LayerError


def print_inspection(inspection: ConvertedInspection | CheckpointInspection, *, as_json: bool) -> None:
    """Print an inspection on stdout: the table and the totals, or with `as_json` every number as JSON."""
    if isinstance(inspection, ConvertedInspection):
        if as_json:
            write_result(json.dumps(_converted_json(inspection), indent=2))
        else:
            _print_converted(inspection)
    elif as_json:
        write_result(json.dumps(_checkpoint_json(inspection), indent=2))
    else:
        _print_checkpoint(inspection)


def _converted_json(inspection: ConvertedInspection) -> dict[str, Any]:
    outputs = inspection.outputs
    totals: dict[str, Any] = {"layers": inspection.layer_count, "bits_per_weight": inspection.bits_per_weight}
    totals |= error_json(inspection.total) if inspection.total else {}
    totals |= {"plain_error": inspection.plain_error} if inspection.plain_error is not None else {}
    layers = [_layer_json(row, outputs) for row in inspection.layers]
    source = "files" if inspection.recomputed else "report"
    values = {"path": str(inspection.path), "errors_from": source, "totals": totals, "layers": layers}
    if outputs is not None:
        totals |= {"base_output_error": outputs.total.base_error, "output_error": outputs.total.error}
        values["reference"] = _outputs_json(outputs)
    elif inspection.reported is not None:
        names = ("plain_output_error", "base_output_error", "output_error")
        known = {name: getattr(inspection.reported, name) for name in names}
        totals |= {name: error for name, error in known.items() if error is not None}
    return values


def _layer_json(row: LayerRow, outputs: Comparison | None) -> dict[str, Any]:
    values = {name: value for name, value in asdict(row).items() if name not in ("spec", "error")}
    if outputs is not None:
        error = outputs.layers.get(row.name)
        # The errors in the report are of the text of the calibration, and the text of the comparison may differ.
        values |= {"plain_output_error": None, "base_output_error": None, "output_error": None}
        values |= {"base_output_error": error.base_error, "output_error": error.error} if error else {}
    return {**values, **spec_json(row.spec), "error": error_json(row.error) if row.error else None}


def _outputs_json(outputs: Comparison) -> dict[str, Any]:
    """The outputs of both models on the text, and the size of the text, as JSON values."""
    kind = "predictions" if isinstance(outputs.outcome, Predictions) else "drift"
    read = {"tokens": outputs.tokens, "windows": outputs.windows, "context": outputs.context}
    return {**read, "has_adapter": outputs.has_adapter, kind: asdict(outputs.outcome)}


def _checkpoint_json(inspection: CheckpointInspection) -> dict[str, Any]:
    tensors = [
        {**asdict(row), "errors": {quant_type: error_json(error) for quant_type, error in row.errors.items()}}
        for row in inspection.tensors
    ]
    totals = {quant_type: error_json(total) for quant_type, total in inspection.totals.items()}
    return {"path": str(inspection.path), "tensors": tensors, "totals": totals}


def _print_converted(inspection: ConvertedInspection) -> None:
    rows, outputs = inspection.layers, inspection.outputs
    zero_point = ("zero point",) if any(row.spec.zero_point_kind for row in rows) else ()
    plain = ("plain error",) if any(row.plain_error is not None for row in rows) else ()
    has_reported_outputs = outputs is None and any(row.output_error is not None for row in rows)
    print_table(
        ("layer", "shape", "type", "per", *zero_point, "bits", "rank")
        + (*plain, "base error", "error", "max", "SQNR dB", "delta")
        + (("mean group", "worst group") if any(row.groups for row in rows) else ())
        + (("plain output",) if has_reported_outputs else ())
        + (("base output", "output") if outputs is not None or has_reported_outputs else ()),
        (
            (
                row.name,
                format_shape(row.shape),
                row.spec.quant_type,
                row.spec.size_text,
                *(row.spec.zero_point_kind or "-" for _ in zero_point),
                f"{row.bits_per_weight:.2f}",
                "-" if row.rank is None else str(row.rank),
                *(_cell(row.plain_error) for _ in plain),
                *_error_cells(row.error),
                *_group_cells(row.groups),
                *(_reported_output_cells(row) if has_reported_outputs else _output_cells(row.name, outputs)),
            )
            for row in rows
        ),
    )
    if inspection.total is not None:
        base_error, error, largest, sqnr, _ = _error_cells(inspection.total)
        plain_error = "" if inspection.plain_error is None else f"plain error {inspection.plain_error:.4f}, "
        write_result(
            f"{inspection.layer_count} layers, {inspection.bits_per_weight:.2f} bits a weight: {plain_error}base error "
            f"{base_error}, error {error}, max {largest}, SQNR {sqnr} dB"
        )
        say("errors recomputed from the files" if inspection.recomputed else "errors as reported by the conversion")
    else:
        say("no report of a conversion here: --against ORIGINAL computes the errors")
    reported = inspection.reported
    if outputs is not None:
        _print_outputs(outputs)
    elif reported is not None and reported.output_error is not None:
        line = format_errors(reported.plain_output_error, reported.base_output_error, reported.output_error)
        write_result(f"outputs on the text's inputs: {line}")


def _print_outputs(outputs: Comparison) -> None:
    """Print the lines below the table: the errors of the outputs on the text."""
    total, outcome = outputs.total, outputs.outcome
    write_result(
        f"on {outputs.tokens} tokens: base output error {total.base_error:.4f}, output error {total.error:.4f}"
        f"{'' if outputs.has_adapter else ' (there is no adapter)'}"
    )
    if isinstance(outcome, Drift):
        drift = f"base {outcome.base:.6f}, with adapter {outcome.adapted:.6f}"
        write_result(f"drift of the last hidden states (1 - cosine): {drift}")
        return
    write_result(
        f"perplexity: original {outcome.perplexity:.4f}, base {outcome.base_perplexity:.4f}, "
        f"with adapter {outcome.adapted_perplexity:.4f}"
    )
    write_result(
        f"KL from the original, nats a token: base {outcome.base_kl:.6f}, with adapter {outcome.adapted_kl:.6f}"
    )


def _print_checkpoint(inspection: CheckpointInspection) -> None:
    totals = inspection.totals
    print_table(
        ("tensor", "shape", "dtype", "becomes", *(f"{quant_type} error" for quant_type in totals)),
        (
            (row.name, format_shape(row.shape), row.dtype, row.becomes)
            + tuple(f"{row.errors[t].error:.4f}" if t in row.errors else "" for t in totals)
            for row in inspection.tensors
        ),
    )
    write_result(f"{inspection.tensor_count} tensors, {format_nbytes(inspection.nbytes)}")
    for quant_type, total in totals.items():
        write_result(f"{quant_type}: error {total.error:.4f}, SQNR {total.sqnr_db:.2f} dB")


def _error_cells(error: LayerError | None) -> tuple[str, ...]:
    if error is None:
        return ("-",) * 5
    return (
        f"{error.base_error:.4f}",
        f"{error.error:.4f}",
        f"{error.max_error:.4f}",
        f"{error.sqnr_db:.2f}",
        f"{error.delta_norm:.3f}",
    )


def _cell(error: float | None) -> str:
    return "-" if error is None else f"{error:.4f}"


def _reported_output_cells(row: LayerRow) -> tuple[str, ...]:
    return _cell(row.plain_output_error), _cell(row.base_output_error), _cell(row.output_error)


def _group_cells(groups: GroupErrors | None) -> tuple[str, ...]:
    return () if groups is None else (f"{groups.mean_error:.4f}", f"{groups.max_error:.4f}")


def _output_cells(name: str, outputs: Comparison | None) -> tuple[str, ...]:
    """The cells of the last columns of a layer: base output error and output error; none without outputs."""
    if outputs is None:
        return ()
    error = outputs.layers.get(name)
    return ("-", "-") if error is None else (f"{error.base_error:.4f}", f"{error.error:.4f}")
