"""`loftq quantize`."""

from __future__ import annotations

import json

from loftq_cli.adapter.config import WEIGHTS_NAME
from loftq_cli.allocation.allocation import Allocation
from loftq_cli.allocation.candidates import Budget
from loftq_cli.cli import options
from loftq_cli.cli.console import ConversionProgress, megabytes, peak_nbytes, result, say, table
from loftq_cli.conversion.prepare import Conversion, is_conversion_done, prepare_conversion, prepare_within_target
from loftq_cli.conversion.report import bits_per_weight, error_json, mean_output_error
from loftq_cli.conversion.run import Outcome, convert_checkpoint
from loftq_cli.errors import printable
from loftq_cli.planning.jobs import LayerJob
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.recipe_files import recipe_json, recipe_toml, resolve_recipe
from loftq_cli.planning.sizes import parse_size
from loftq_cli.quant.formats import size_of, spec_json
from loftq_cli.runtime.gpu import check_device_name
from loftq_cli.runtime.workers import available_threads


def quantize(
    model: options.Model,
    output: options.Output,
    recipe: options.Recipe = None,
    method: options.Method = None,
    rank: options.Rank = None,
    alpha: options.Alpha = None,
    rslora: options.Rslora = None,
    fit: options.Fit = None,
    start: options.Start = None,
    iterations: options.Iterations = None,
    rounds: options.Rounds = None,
    svd: options.Svd = None,
    pooling: options.Pooling = None,
    init: options.Init = None,
    adapter_dtype: options.AdapterDtype = None,
    seed: options.Seed = None,
    quant_type: options.QuantType = None,
    block_size: options.BlockSize = None,
    double_quant: options.DoubleQuant = None,
    group_size: options.GroupSize = None,
    symmetric: options.Symmetric = None,
    scale_dtype: options.ScaleDtype = None,
    scales: options.Scales = None,
    calibration: options.Calibration = None,
    layout: options.Layout = None,
    max_shard_size: options.MaxShardSize = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    target_bpw: options.TargetBpw = None,
    target_size: options.TargetSize = None,
    lora_budget: options.LoraBudget = None,
    threads: options.Threads = None,
    device: options.Device = "cpu",
    max_memory: options.MaxMemory = None,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    restart: options.Restart = False,
    no_verify: options.NoVerify = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Convert MODEL to quantized base weights plus a LoRA adapter.

    OUTPUT becomes a model directory that transformers loads as it is, with the adapter for PEFT in OUTPUT/METHOD_init
    and every layer's error in OUTPUT/loftq_report.json.
    """
    flags = {
        "method": method,
        "rank": rank,
        "alpha": alpha,
        "rslora": rslora,
        "fit": fit,
        "start": start,
        "iterations": iterations,
        "rounds": rounds,
        "svd": svd,
        "pooling": pooling,
        "init": init,
        "adapter_dtype": adapter_dtype,
        "seed": seed,
        "quant_type": quant_type,
        "block_size": block_size,
        "double_quant": double_quant,
        "group_size": group_size,
        "symmetric": symmetric,
        "scale_dtype": scale_dtype,
        "scales": scales,
        "calibration": None if calibration is None else str(calibration),
        "layout": layout,
        "max_shard_size": max_shard_size,
        "include": tuple(include) if include else None,
        "exclude": tuple(exclude) if exclude else None,
    }
    memory = None if max_memory is None else parse_size(max_memory, "max_memory")
    check_device_name(device, memory)
    target = Budget(
        bits_per_weight=target_bpw,
        total_nbytes=None if target_size is None else parse_size(target_size, "target_size", least=1),
        adapter_nbytes=None if lora_budget is None else parse_size(lora_budget, "lora_budget", least=1),
    )
    resolved = resolve_recipe(recipe, flags, mixes=target.chooses_formats)
    if target == Budget():
        conversion = prepare_conversion(model, output, resolved)
    else:
        observe, measuring = (_say_nothing if quiet else _say_measured), threads or available_threads()
        conversion = prepare_within_target(model, output, resolved, target, threads=measuring, observe=observe)
    done = is_conversion_done(conversion, overwrite=overwrite)
    if dry_run:
        _print_plan(conversion, as_json=as_json, verbose=verbose)
        return
    if done:
        say(f"{output}: already done, with this input and these options")
        return
    if not quiet:
        _announce(conversion.plan)
        if conversion.allocation is not None:
            _announce_allocation(conversion.allocation)
        if verbose:
            for job in conversion.plan.copies:
                say(f"copied: {job.name} ({job.reason})")
    with ConversionProgress(len(conversion.plan.layers), quiet=quiet, verbose=verbose) as progress:
        outcome = convert_checkpoint(
            conversion,
            progress,
            overwrite=overwrite,
            restart=restart,
            verify=not no_verify,
            threads=threads or available_threads(),
            device=device,
            max_memory=memory,
        )
    if not quiet:
        say(f"done, peak memory {megabytes(peak_nbytes())}")
    _print_outcome(conversion.plan, outcome, as_json=as_json)


def _announce(plan: Plan) -> None:
    """The resolved recipe and what has to be known before the work starts."""
    for line in recipe_toml(plan.recipe).strip().splitlines():
        say(f"  {line}" if line else "")
    say(
        f"{len(plan.layers)} layers to quantize, {len(plan.copies)} tensors to copy; about "
        f"{megabytes(plan.base_nbytes + plan.adapter_nbytes)} to write, {megabytes(plan.peak_nbytes)} of memory"
    )
    for note in plan.notes:
        say(f"note: {note}")


def _print_outcome(plan: Plan, outcome: Outcome, *, as_json: bool) -> None:
    errors = {
        "quantization_error": outcome.quantization_error,
        **error_json(outcome.total),
    }
    values = {
        "output": str(outcome.output),
        "adapter": str(outcome.adapter),
        "layers": len(outcome.layers),
        "resumed_layers": outcome.resumed_layers,
        "verified": outcome.verified,
        "bits_per_weight": round(bits_per_weight(plan), 4),
        "base_nbytes": plan.base_nbytes,
        "adapter_nbytes": plan.adapter_nbytes,
        **errors,
    }
    lost = mean_output_error(outcome.layers)
    if lost is not None:
        values["output_error"] = lost
    if as_json:
        result(json.dumps(values, indent=2))
        return
    base = printable(outcome.output)
    result(f"base     {base}  {megabytes(plan.base_nbytes)}, {bits_per_weight(plan):.2f} bits a weight")
    result(f"adapter  {printable(outcome.adapter)}  {megabytes(plan.adapter_nbytes)}")
    result(
        f"error    {outcome.quantization_error:.4f} quantized alone -> {outcome.total.error:.4f} with the adapter "
        f"({'read back and checked' if outcome.verified else 'not read back'})"
    )
    if lost is not None:
        result(f"outputs  {lost:.4f} of the layers' outputs on the calibration's text")


def _say_measured(name: str, done: int, of: int) -> None:
    say(f"measured [{done}/{of}] {name}")


def _say_nothing(name: str, done: int, of: int) -> None:
    del name, done, of


def _announce_allocation(allocation: Allocation) -> None:
    """What was chosen in all, and what the best single choice for all layers would have been."""
    say(
        f"chosen: {allocation.bits_per_weight:.4f} bits a weight, base {megabytes(allocation.base_nbytes)}, adapter "
        f"{megabytes(allocation.adapter_nbytes)}; objective {allocation.objective:.4f}"
    )
    if allocation.uniform:
        best = allocation.uniform[0]
        say(
            f"the same for all layers: {best.spec.quant_type}, {size_of(best.spec)}, rank {best.rank}, base "
            f"{megabytes(best.base_nbytes)}: objective {best.objective:.4f}"
        )


def _print_allocation(allocation: Allocation) -> None:
    table(
        ("tensor", "chosen", "per", "rank", "error", "base", "adapter"),
        (
            (layer.name, layer.candidate.spec.quant_type, size_of(layer.candidate.spec), str(layer.candidate.rank))
            + (f"{layer.predicted_error:.4f}", megabytes(layer.candidate.base_nbytes))
            + (megabytes(layer.candidate.adapter_nbytes),)
            for layer in allocation.layers
        ),
    )


def _print_plan(conversion: Conversion, *, as_json: bool, verbose: bool) -> None:
    plan, allocation = conversion.plan, conversion.allocation
    if as_json:
        chosen = {} if allocation is None else {"allocation": allocation.to_json()}
        result(json.dumps({**_plan_json(plan), **chosen}, indent=2))
        return
    _announce(plan)
    if allocation is not None:
        _announce_allocation(allocation)
        _print_allocation(allocation)
    jobs = plan.jobs if verbose else plan.layers
    table(
        ("tensor", "shape", "becomes", "per", "rank", "bits"),
        (
            (job.name, _by(job.matrix.shape), job.matrix.spec.quant_type, size_of(job.matrix.spec))
            + (str(job.lora.rank), f"{job.bits_per_weight:.2f}")
            if isinstance(job, LayerJob)
            else (job.name, _by(job.output.shape), f"{job.output.dtype} ({job.reason})", "", "", "")
            for job in jobs
        ),
    )
    for shard in plan.shards:
        result(f"{shard.file}  {megabytes(sum(t.nbytes for t in shard.tensors))}, {len(shard.tensors)} tensors")
    result(f"{plan.adapter_dir}/{WEIGHTS_NAME}  {megabytes(plan.adapter_nbytes)}")


def _plan_json(plan: Plan) -> dict[str, object]:
    return {
        "recipe": recipe_json(plan.recipe),
        "dtype": plan.dtype,
        "base_nbytes": plan.base_nbytes,
        "adapter_nbytes": plan.adapter_nbytes,
        "peak_nbytes": plan.peak_nbytes,
        "bits_per_weight": round(bits_per_weight(plan), 4),
        "layers": [
            {
                "name": job.name,
                "module": job.module,
                "shape": job.matrix.shape,
                **spec_json(job.matrix.spec),
                "rank": job.lora.rank,
                "scaling": job.lora.scaling,
            }
            for job in plan.layers
        ],
        "copied": [{"name": job.name, "dtype": job.output.dtype, "reason": job.reason} for job in plan.copies],
        "files": [{"file": shard.file, "tensors": len(shard.tensors)} for shard in plan.shards],
        "notes": plan.notes,
    }


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
