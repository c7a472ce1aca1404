"""`loftq inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from loftq_cli.activations.comparison import Comparison
from loftq_cli.cli import options
from loftq_cli.cli.console import megabytes, result, say, table
from loftq_cli.cli.outputs import (
    OUTPUT_ERROR,
    TextOptions,
    by_output_error,
    compared,
    layer_json,
    output_cells,
    outputs_json,
    print_outputs,
    text_options,
)
from loftq_cli.cli.verify import verified
from loftq_cli.conversion.report import error_json
from loftq_cli.errors import QualityError, UsageError
from loftq_cli.inspecting.converted import Inspection, LayerRow, check_sort_key, inspect_converted, sorted_rows
from loftq_cli.inspecting.dense import TensorRow, inspect_checkpoint, sorted_tensors
from loftq_cli.model.builtin import resolve_model
from loftq_cli.model.stored import BaseModel
from loftq_cli.output.records import REPORT_NAME
from loftq_cli.quant.formats import spec_json
from loftq_cli.runtime.gpu import check_device_name
from loftq_cli.runtime.workers import available_threads
from loftq_cli.tensors.metrics import GroupErrors, LayerError, total_error


def inspect(
    path: options.InspectPath,
    against: options.Against = None,
    try_: options.Try = None,
    sort: options.Sort = "name",
    top: options.Top = None,
    fail_above: options.FailAbove = None,
    verify: options.Verify = False,
    threads: options.Threads = None,
    device: options.Device = "cpu",
    reference: options.Reference = None,
    text: options.ReferenceText = None,
    tokens: options.ReferenceTokens = None,
    context: options.ReferenceContext = None,
    lines: options.ReferenceLines = False,
    as_json: options.Json = False,
) -> None:
    """Report the quantization error of every layer.

    On a converted directory the errors come from its report, or, with --against ORIGINAL, from the files themselves;
    with --reference ORIGINAL and --text FILE, also those of what layers and model give on a text.
    On a full-precision checkpoint: what quantize would do, and with --try the error that a quant type would give.
    With --verify, on any of them and on an adapter: what is damaged.
    """
    if sort != OUTPUT_ERROR:
        check_sort_key(sort)
    elif reference is None:
        raise UsageError(f"--sort {OUTPUT_ERROR} needs outputs", hint="--reference ORIGINAL --text FILE gives them")
    check_device_name(device)
    measured = text_options(reference, text, tokens, context, lines)
    threads = threads or available_threads()
    if verify:
        given = {"--against": against, "--try": try_, "--top": top, "--fail-above": fail_above}
        given["--reference"] = reference
        others = [*(name for name, value in given.items() if value is not None), *(["--sort"] * (sort != "name"))]
        others += ["--device"] * (device not in ("auto", "cpu"))
        if others:
            raise UsageError(f"--verify computes no errors for {others[0]}", hint="run inspect once for each")
        verified(resolve_model(path), threads, as_json=as_json)
        return
    with BaseModel.open(resolve_model(path)) as base:
        if base.quantized or (base.folder / REPORT_NAME).is_file():
            if try_:
                raise UsageError("--try is for a full-precision checkpoint, and this one is converted", file=base.path)
            worst = _converted(base, against, sort, top, threads, device, measured, as_json=as_json)
        else:
            if against:
                raise UsageError("--against is for a converted directory, and this one is not", file=base.path)
            if reference:
                raise UsageError("--reference is for a converted directory, and this one is not", file=base.path)
            worst = _checkpoint(base, tuple(try_ or ()), sort, top, threads, device, as_json=as_json)
    if fail_above is not None:
        _gate(worst, fail_above)


def _gate(worst: tuple[str, float] | None, limit: float) -> None:
    if worst is None:
        raise UsageError("--fail-above has no error to compare with", hint="--against ORIGINAL or --try TYPE gives one")
    if not worst[1] <= limit:
        raise QualityError(f"error {worst[1]:.4f} is above {limit:g}", tensor=worst[0], hint="--fail-above")


def _converted(
    base: BaseModel,
    against: str | None,
    sort: str,
    top: int | None,
    threads: int,
    device: str,
    measured: TextOptions | None,
    *,
    as_json: bool,
) -> tuple[str, float] | None:
    found = inspect_converted(base, resolve_model(against) if against else None, threads, device)
    outputs = None if measured is None else compared(base, found, measured, threads)
    if outputs is not None and sort == OUTPUT_ERROR:
        rows = by_output_error(found.rows, outputs)[:top]
    else:
        rows = sorted_rows(found.rows, sort)[:top]
    if as_json:
        totals: dict[str, Any] = {"layers": len(found.rows), "bits_per_weight": found.bits_per_weight}
        totals |= error_json(found.total) if found.total else {}
        layers = [_row_json(row, outputs) for row in rows]
        source = "files" if found.recomputed else "report"
        values = {"path": str(base.path), "errors_from": source, "totals": totals, "layers": layers}
        if outputs is not None:
            totals |= {"base_output_error": outputs.total.base_error, OUTPUT_ERROR: outputs.total.error}
            values["reference"] = outputs_json(outputs)
        result(json.dumps(values, indent=2))
    else:
        _print_converted(found, rows, outputs)
    errors = [(row.name, row.error.error) for row in found.rows if row.error]
    return max(errors, key=lambda item: item[1], default=None)


def _row_json(row: LayerRow, outputs: Comparison | None) -> dict[str, Any]:
    values = {name: value for name, value in asdict(row).items() if name not in ("spec", "error")}
    if outputs is not None:
        values |= layer_json(row.name, outputs)
    return {**values, **spec_json(row.spec), "error": error_json(row.error) if row.error else None}


def _print_converted(found: Inspection, rows: list[LayerRow], outputs: Comparison | None) -> None:
    zero_point = ("zero point",) if any(row.spec.zero_point_kind for row in rows) else ()
    table(
        ("layer", "shape", "type", "per", *zero_point, "bits", "rank")
        + ("base error", "error", "max", "SQNR dB", "delta")
        + (("mean group", "worst group") if any(row.groups for row in rows) else ())
        + (("base output", "output") if outputs is not None else ()),
        (
            (
                row.name,
                f"{row.shape[0]}×{row.shape[1]}",
                row.spec.quant_type,
                row.spec.size_text,
                *(row.spec.zero_point_kind or "-" for _ in zero_point),
                f"{row.bits_per_weight:.2f}",
                "-" if row.rank is None else str(row.rank),
                *_error_cells(row.error),
                *_group_cells(row.groups),
                *output_cells(row.name, outputs),
            )
            for row in rows
        ),
    )
    if found.total is not None:
        cells = _error_cells(found.total)
        result(
            f"{len(found.rows)} layers, {found.bits_per_weight:.2f} bits a weight: base error {cells[0]}, "
            f"error {cells[1]}, max {cells[2]}, SQNR {cells[3]} dB"
        )
        say("errors recomputed from the files" if found.recomputed else "errors as reported by the conversion")
    else:
        say("no report of a conversion here: --against ORIGINAL computes the errors")
    if outputs is not None:
        print_outputs(outputs)


def _checkpoint(
    base: BaseModel, tries: tuple[str, ...], sort: str, top: int | None, threads: int, device: str, *, as_json: bool
) -> tuple[str, float] | None:
    rows = list(inspect_checkpoint(base, tries, threads, device))
    shown = sorted_tensors(rows, sort)[:top]
    totals = {t: total_error(row.errors[t] for row in rows if t in row.errors) for t in tries}
    if as_json:
        _print_checkpoint_json(base, shown, totals)
    else:
        _print_checkpoint(shown, totals)
        total_nbytes = sum(ref.nbytes for ref in base.tensors.values())
        result(f"{len(rows)} tensors, {megabytes(total_nbytes)}")
        for quant_type, total in totals.items():
            result(f"{quant_type}: error {total.error:.4f}, SQNR {total.sqnr_db:.2f} dB")
    errors = [(row.name, error.error) for row in rows for error in row.errors.values()]
    return max(errors, key=lambda item: item[1], default=None)


def _print_checkpoint(rows: list[TensorRow], totals: dict[str, LayerError]) -> None:
    table(
        ("tensor", "shape", "dtype", "becomes", *(f"{quant_type} error" for quant_type in totals)),
        (
            (row.name, "×".join(map(str, row.shape)), row.dtype, row.becomes)
            + tuple(f"{row.errors[t].error:.4f}" if t in row.errors else "" for t in totals)
            for row in rows
        ),
    )


def _print_checkpoint_json(base: BaseModel, rows: list[TensorRow], totals: dict[str, LayerError]) -> None:
    tensors = [
        {**asdict(row), "errors": {quant_type: error_json(error) for quant_type, error in row.errors.items()}}
        for row in rows
    ]
    values = {
        "path": str(base.path),
        "tensors": tensors,
        "totals": {quant_type: error_json(total) for quant_type, total in totals.items()},
    }
    result(json.dumps(values, indent=2))


def _group_cells(groups: GroupErrors | None) -> tuple[str, ...]:
    return () if groups is None else (f"{groups.mean_error:.4f}", f"{groups.max_error:.4f}")


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
