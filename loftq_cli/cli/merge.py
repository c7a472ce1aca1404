"""`loftq merge`."""

from __future__ import annotations

import json

from loftq_cli.cli import options
from loftq_cli.cli.console import megabytes, peak_nbytes, result, say, table
from loftq_cli.errors import printable
from loftq_cli.merging.form import MergeOptions
from loftq_cli.merging.plan import Merge, prepare_merge
from loftq_cli.merging.report import (
    MergedLayer,
    MergeOutcome,
    finite,
    largest_difference,
    layer_json,
    total_lost,
    total_retention,
)
from loftq_cli.merging.run import is_merge_done, merge_adapter
from loftq_cli.model.builtin import resolve_model
from loftq_cli.runtime.gpu import check_device_name
from loftq_cli.runtime.workers import available_threads


def merge(
    base: options.Base,
    adapter: options.Adapter,
    output: options.Output,
    dtype: options.Dtype = None,
    layout: options.MergeLayout = None,
    requantize: options.Requantize = None,
    group_size: options.MergeGroupSize = None,
    symmetric: options.MergeSymmetric = None,
    scale_dtype: options.MergeScaleDtype = None,
    round_zeros: options.RoundZeros = False,
    pooling: options.MergePooling = None,
    max_shard_size: options.MaxShardSize = None,
    force: options.Force = False,
    threads: options.Threads = None,
    device: options.Device = "cpu",
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    restart: options.Restart = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Merge ADAPTER into BASE and write a deployment checkpoint.

    Arithmetic is float32. BASE is a converted directory or a dense checkpoint; ADAPTER any PEFT LoRA directory on it,
    ours or trained from ours. A QA-LoRA adapter merges into the offsets of BASE's groups: the result stays quantized,
    and computes what base and adapter did.
    """
    check_device_name(device)
    choices = MergeOptions(
        dtype=dtype,
        layout=layout,
        requantize=requantize,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        round_zeros=round_zeros,
        pooling=pooling,
        max_shard_size=max_shard_size or "5GB",
        force=force,
    )
    prepared = prepare_merge(resolve_model(base), adapter, output, choices)
    done = is_merge_done(prepared, overwrite=overwrite)
    if not quiet:
        say(f"{len(prepared.adapter.lora)} layers to merge, {megabytes(prepared.nbytes)} to write")
    if dry_run:
        for note in (*prepared.provenance.notes, *prepared.notes):
            say(f"note: {note}")
        _print_plan(prepared, as_json=as_json)
        return
    if done:
        say(f"{output}: already done, with these inputs and options")
        return
    progress = _Progress(len(prepared.adapter.lora), quiet=quiet)
    outcome = merge_adapter(
        prepared,
        progress,
        overwrite=overwrite,
        restart=restart,
        threads=threads or available_threads(),
        device=device,
    )
    if not quiet:
        say(f"done, peak memory {megabytes(peak_nbytes())}")
    _print_outcome(prepared, outcome, as_json=as_json)


class _Progress:
    """One line per note and merged layer on stderr."""

    def __init__(self, n_layers: int, *, quiet: bool) -> None:
        self._n_layers, self._quiet, self._done = n_layers, quiet, 0

    def note(self, text: str) -> None:
        """What was checked, and what could not be."""
        if not self._quiet:
            say(f"note: {text}")

    def layer_merged(self, layer: MergedLayer) -> None:
        """A finished layer."""
        self._done += 1
        if not self._quiet:
            kept = "" if layer.retention is None else f", {layer.retention:.1%} of it retained"
            if layer.lost is not None:
                kept = f", {layer.lost:.2g} of it lost"
            say(f"[{self._done}/{self._n_layers}] {layer.name}: changed by {layer.relative_delta:.2%}{kept}")


def _print_plan(prepared: Merge, *, as_json: bool) -> None:
    outputs = [tensor for job in prepared.jobs for tensor in job.outputs]
    if as_json:
        values = [{"name": t.name, "dtype": t.dtype, "shape": t.shape} for t in outputs]
        result(json.dumps({"tensors": values, "nbytes": prepared.nbytes}, indent=2))
        return
    table(("tensor", "shape", "dtype"), ((t.name, "×".join(map(str, t.shape)), t.dtype) for t in outputs))


def _print_outcome(prepared: Merge, outcome: MergeOutcome, *, as_json: bool) -> None:
    total = total_retention(outcome.layers)
    if as_json:
        values = {
            "output": str(prepared.output),
            "dtype": prepared.dtype,
            "layout": prepared.form.layout,
            "requantize": prepared.options.requantize,
            "nbytes": prepared.nbytes,
            "retention": total,
            "lost": finite(total_lost(outcome.layers)),
            "notes": outcome.notes,
            "layers": [layer_json(layer) for layer in outcome.layers],
        }
        result(json.dumps(values, indent=2))
        return
    form = prepared.options.requantize or (prepared.form.layout if prepared.form.keeps_codes else prepared.dtype)
    result(f"merged   {printable(prepared.output)}  {megabytes(prepared.nbytes)}, {len(outcome.layers)} layers, {form}")
    if total is not None:
        result(f"retained {total:.1%} of the adapter")
    largest, lost = largest_difference(outcome.layers), total_lost(outcome.layers)
    if largest is not None and lost is not None:
        result(f"differs  by at most {largest[0]:.1e} from base and adapter ({largest[1]:.1e} of the largest weight)")
        if finite(lost) is not None:
            result(f"lost     {lost:.2%} of the update")
