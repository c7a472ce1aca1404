"""The plan and the result of `loftq merge`, as lines, a table and JSON."""

from __future__ import annotations

import json

from loftq_cli.api.results import MergePlan, MergeResult
from loftq_cli.cli.render.console import format_nbytes, format_shape, print_table, say, write_result
from loftq_cli.errors import printable
from loftq_cli.merging.report import finite_or_none, layer_json
from loftq_cli.output.side_files import code_note


def format_summary(plan: MergePlan) -> str:
    """The work of a merge in a line: number of layers and bytes to write."""
    return f"{plan.layers} layers to merge, {format_nbytes(plan.nbytes)} to write"


def print_plan(plan: MergePlan, *, as_json: bool, quiet: bool) -> None:
    """Print the plan of a dry run: output tensors as a table or as JSON on stdout, notes on stderr.

    quiet   whether the line with the number of layers is left out
    """
    if not quiet:
        say(format_summary(plan))
    for note in plan.notes:
        say(f"note: {note}")
    if as_json:
        values = [{"name": t.name, "dtype": t.dtype, "shape": t.shape} for t in plan.tensors]
        write_result(json.dumps({"tensors": values, "nbytes": plan.nbytes}, indent=2))
        return
    print_table(("tensor", "shape", "dtype"), ((t.name, format_shape(t.shape), t.dtype) for t in plan.tensors))


def print_result(outcome: MergeResult, *, as_json: bool) -> None:
    """Print the result of a finished merge on stdout: size, and the surviving or the lost share of the adapter."""
    plan = outcome.plan
    if as_json:
        values = {
            "output": str(outcome.output),
            "dtype": plan.dtype,
            "layout": plan.layout,
            "requantize": plan.requantize,
            "nbytes": plan.nbytes,
            "already_done": outcome.already_done,
            "retention": outcome.retention,
            "lost": finite_or_none(outcome.lost),
            "notes": outcome.notes,
            **({"code_files": plan.code_files} if plan.code_files else {}),
            "layers": [layer_json(layer) for layer in outcome.layers],
        }
        write_result(json.dumps(values, indent=2))
        return
    output, layers = printable(outcome.output), len(outcome.layers)
    write_result(f"merged   {output}  {format_nbytes(plan.nbytes)}, {layers} layers, {plan.form}")
    if plan.code_files:
        write_result(f"code     {code_note(plan.code_files)}")
    if outcome.retention is not None:
        write_result(f"retained {outcome.retention:.1%} of the adapter")
    if outcome.max_difference is not None and outcome.lost is not None:
        write_result(
            f"differs  by at most {outcome.max_difference:.1e} from base and adapter "
            f"({outcome.relative_difference:.1e} of the largest weight)"
        )
    if outcome.lost is not None and finite_or_none(outcome.lost) is not None:
        is_rounded = outcome.max_difference is None and plan.dtype != "float32"
        remedy = f", to {plan.dtype} (--dtype float32 loses none)" if is_rounded else ""
        write_result(f"lost     {outcome.lost:.2%} of the update{remedy}")
