"""The plan and the result of `loftq quantize`, as lines, tables and JSON."""

from __future__ import annotations

import json
from pathlib import Path

from loftq_cli.allocation.allocation import Allocation
from loftq_cli.api.results import QuantizePlan, QuantizeResult
from loftq_cli.cli.render.console import format_errors, format_nbytes, format_shape, print_table, say, write_result
from loftq_cli.conversion.report import error_json, plain_name
from loftq_cli.errors import printable
from loftq_cli.output.side_files import code_note
from loftq_cli.planning.jobs import CopyJob, LayerJob
from loftq_cli.planning.recipe_files import recipe_json, recipe_toml
from loftq_cli.quant.formats import spec_json


def announce(plan: QuantizePlan) -> None:
    """Print the settled recipe, sizes and notes on stderr."""
    for line in recipe_toml(plan.recipe).strip().splitlines():
        say(f"  {line}" if line else "")
    say(
        f"{len(plan.layers)} layers to quantize, {len(plan.copies)} tensors to copy; about "
        f"{format_nbytes(plan.nbytes)} to write, {format_nbytes(plan.peak_nbytes)} of memory"
    )
    for note in plan.notes:
        say(f"note: {note}")
    if plan.allocation is not None:
        _announce_allocation(plan.allocation)


def announce_copies(plan: QuantizePlan) -> None:
    """Print a line with the reason on stderr for each copied tensor."""
    for job in plan.copies:
        say(f"copied: {job.name} ({job.reason})")


def print_plan(plan: QuantizePlan, *, as_json: bool, verbose: bool) -> None:
    """Print the plan of a dry run on stdout, as a table or as JSON; the table lists copied tensors with `verbose`."""
    if as_json:
        allocation = {} if plan.allocation is None else {"allocation": plan.allocation.to_json()}
        write_result(json.dumps({**_plan_json(plan), **allocation}, indent=2))
        return
    announce(plan)
    if plan.allocation is not None:
        _print_allocation(plan.allocation)
    jobs = plan.jobs if verbose else plan.layers
    print_table(("tensor", "shape", "becomes", "per", "rank", "bits"), map(_job_cells, jobs))
    for file in plan.files:
        write_result(f"{file.name}  {format_nbytes(file.nbytes)}, {file.tensors} tensors")
    write_result(f"{plan.adapter.name}  {format_nbytes(plan.adapter.nbytes)}")
    write_result(f"model  {_describe_model(plan)}")


def say_name_of_base(output: Path) -> None:
    """Print a note on stderr when the adapter's config names the base without the folders of an absolute OUTPUT."""
    if output.is_absolute():
        say(
            f"note: the adapter's config names the base {printable(output.name)}, without the path of this machine: "
            "--base-name gives another name, such as a hub id"
        )


def print_result(outcome: QuantizeResult, *, as_json: bool) -> None:
    """Print the result of a finished conversion on stdout: sizes and errors, or with `as_json` all as JSON."""
    plan = outcome.plan
    if as_json:
        write_result(json.dumps(_result_json(outcome), indent=2))
        return
    write_result(
        f"base     {printable(outcome.output)}  {format_nbytes(plan.base_nbytes)}, "
        f"{plan.bits_per_weight:.2f} bits a weight"
    )
    write_result(f"adapter  {printable(outcome.adapter)}  {format_nbytes(plan.adapter_nbytes)}")
    plain = plain_name(layer.spec for layer in outcome.layers)
    errors = format_errors(outcome.plain_error, outcome.total.base_error, outcome.total.error, plain)
    write_result(f"error    {errors} ({'read back and checked' if outcome.verified else 'not read back'})")
    if outcome.output_error is not None:
        outputs = format_errors(outcome.plain_output_error, outcome.base_output_error, outcome.output_error, plain)
        write_result(f"outputs  {outputs}, on the text's inputs")
    if plan.code_files:
        write_result(f"code     {code_note(plan.code_files)}")
    write_result(f"model    {_describe_model(plan)}")


def _describe_model(plan: QuantizePlan) -> str:
    """The bits over all parameters, the shares, and the size of base and adapter."""
    return f"{plan.shares.describe(plan.dtype)}; base + adapter {format_nbytes(plan.nbytes)}"


def _announce_allocation(allocation: Allocation) -> None:
    """Print the totals of the choice on stderr, and the best choice with equal options for all layers."""
    say(
        f"chosen: {allocation.bits_per_weight:.4f} bits a weight, base {format_nbytes(allocation.base_nbytes)}, "
        f"adapter {format_nbytes(allocation.adapter_nbytes)}; objective {allocation.objective:.4f}"
    )
    if allocation.uniform:
        best = allocation.uniform[0]
        say(
            f"the same for all layers: {best.spec.quant_type}, {best.spec.size_text}, rank {best.rank}, base "
            f"{format_nbytes(best.base_nbytes)}: objective {best.objective:.4f}"
        )


def _print_allocation(allocation: Allocation) -> None:
    print_table(
        ("tensor", "chosen", "per", "rank", "error", "base", "adapter"),
        (
            (layer.name, layer.candidate.spec.quant_type, layer.candidate.spec.size_text, str(layer.candidate.rank))
            + (f"{layer.predicted_error:.4f}", format_nbytes(layer.candidate.base_nbytes))
            + (format_nbytes(layer.candidate.adapter_nbytes),)
            for layer in allocation.layers
        ),
    )


def _job_cells(job: LayerJob | CopyJob) -> tuple[str, ...]:
    if isinstance(job, CopyJob):
        return (job.name, format_shape(job.output.shape), f"{job.output.dtype} ({job.reason})", "", "", "")
    spec, bits = job.matrix.spec, f"{job.bits_per_weight:.2f}"
    shape = (len(job.experts), *job.matrix.shape) if job.experts else job.matrix.shape
    return (job.name, format_shape(shape), spec.quant_type, spec.size_text, str(job.lora.rank), bits)


def _result_json(outcome: QuantizeResult) -> dict[str, object]:
    plan = outcome.plan
    values: dict[str, object] = {
        "output": str(outcome.output),
        "adapter": str(outcome.adapter),
        "layers": len(outcome.layers),
        "resumed_layers": outcome.resumed_layers,
        "verified": outcome.verified,
        "already_done": outcome.already_done,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        **plan.shares.to_json(),
        "base_nbytes": plan.base_nbytes,
        "adapter_nbytes": plan.adapter_nbytes,
        **error_json(outcome.total),
    }
    errors = {
        "plain_error": outcome.plain_error,
        "plain_output_error": outcome.plain_output_error,
        "base_output_error": outcome.base_output_error,
        "output_error": outcome.output_error,
    }
    known = {name: error for name, error in errors.items() if error is not None}
    code = {"code_files": plan.code_files} if plan.code_files else {}
    return {**values, **known, **code, "notes": list(outcome.notes)}


def _plan_json(plan: QuantizePlan) -> dict[str, object]:
    return {
        "recipe": recipe_json(plan.recipe),
        "dtype": plan.dtype,
        "base_nbytes": plan.base_nbytes,
        "adapter_nbytes": plan.adapter_nbytes,
        "peak_nbytes": plan.peak_nbytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        **plan.shares.to_json(),
        "layers": [
            {
                "name": job.name,
                "module": job.module,
                "shape": job.matrix.shape,
                **({"experts": len(job.experts)} if job.experts else {}),
                **spec_json(job.matrix.spec),
                "rank": job.lora.rank,
                "scaling": job.lora.scaling,
            }
            for job in plan.layers
        ],
        "copied": [{"name": job.name, "dtype": job.output.dtype, "reason": job.reason} for job in plan.copies],
        "files": [{"file": file.name, "tensors": file.tensors} for file in plan.files],
        "notes": plan.notes,
    }
