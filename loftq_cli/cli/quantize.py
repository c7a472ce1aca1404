"""The command `loftq quantize`."""

from __future__ import annotations

from loftq_cli.api.quantize import quantize as quantize_checkpoint
from loftq_cli.api.results import QuantizePlan
from loftq_cli.cli import options, options_quantize
from loftq_cli.cli.render.console import say, say_done
from loftq_cli.cli.render.conversion import print_plan, print_result, say_name_of_base
from loftq_cli.cli.render.progress import CommandProgress
from loftq_cli.errors import UsageError


def quantize(
    model: options.Model,
    output: options.Output,
    recipe: options_quantize.Recipe = None,
    method: options_quantize.Method = None,
    rank: options_quantize.Rank = None,
    alpha: options_quantize.Alpha = None,
    rslora: options_quantize.Rslora = None,
    fit: options_quantize.Fit = None,
    start: options_quantize.Start = None,
    iterations: options_quantize.Iterations = None,
    rounds: options_quantize.Rounds = None,
    keep_base: options_quantize.KeepBase = None,
    svd: options_quantize.Svd = None,
    pooling: options_quantize.Pooling = None,
    init: options_quantize.Init = None,
    adapter_dtype: options_quantize.AdapterDtype = None,
    seed: options_quantize.Seed = None,
    quant_type: options_quantize.QuantType = None,
    block_size: options_quantize.BlockSize = None,
    double_quant: options_quantize.DoubleQuant = None,
    group_size: options_quantize.GroupSize = None,
    symmetric: options_quantize.Symmetric = None,
    scale_dtype: options_quantize.ScaleDtype = None,
    scales: options_quantize.Scales = None,
    calibration: options_quantize.Calibration = None,
    text: options_quantize.Text = None,
    tokens: options_quantize.Tokens = None,
    context: options_quantize.Context = None,
    lines: options_quantize.Lines = None,
    sequential: options_quantize.Sequential = None,
    layout: options_quantize.Layout = None,
    task: options_quantize.Task = None,
    num_labels: options_quantize.NumLabels = None,
    max_shard_size: options.MaxShardSize = None,
    include: options_quantize.Include = None,
    exclude: options_quantize.Exclude = None,
    target_bpw: options_quantize.TargetBpw = None,
    target_size: options_quantize.TargetSize = None,
    lora_budget: options_quantize.LoraBudget = None,
    threads: options.Threads = None,
    device: options.Device = "cpu",
    max_memory: options_quantize.MaxMemory = None,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    restart: options.Restart = False,
    no_verify: options_quantize.NoVerify = False,
    no_remote_code: options.NoRemoteCode = False,
    base_name: options_quantize.BaseName = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Convert MODEL to quantized base weights plus a LoRA adapter.

    OUTPUT becomes a model directory for transformers, with the adapter for PEFT in OUTPUT/METHOD_init and every layer's
    error in OUTPUT/loftq_report.json.
    """
    if quiet and verbose and not dry_run:
        raise UsageError("--quiet and --verbose contradict each other", hint="one of the two")
    with CommandProgress(quiet=quiet, verbose=verbose) as progress:
        result = quantize_checkpoint(
            model, output, recipe=recipe, method=method, rank=rank, alpha=alpha, rslora=rslora, fit=fit, start=start,
            iterations=iterations, rounds=rounds, keep_base=keep_base, svd=svd, pooling=pooling, init=init,
            adapter_dtype=adapter_dtype, seed=seed, quant_type=quant_type, block_size=block_size,
            double_quant=double_quant, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype,
            scales=scales, calibration=calibration, text=text, tokens=tokens, context=context, lines=lines,
            sequential=sequential, layout=layout, task=task, num_labels=num_labels, max_shard_size=max_shard_size,
            include=include, exclude=exclude, target_bpw=target_bpw, target_size=target_size, lora_budget=lora_budget,
            threads=threads, device=device, max_memory=max_memory, dry_run=dry_run, overwrite=overwrite,
            restart=restart, verify=not no_verify, remote_code=not no_remote_code, base_name=base_name,
            observer=progress,
        )  # fmt: skip
    if isinstance(result, QuantizePlan):
        print_plan(result, as_json=as_json, verbose=verbose)
    elif result.already_done:
        say(f"{output}: already done, with this input and these options")
        if as_json:
            print_result(result, as_json=True)
    else:
        if not quiet:
            if base_name is None:
                say_name_of_base(output)
            say_done()
        print_result(result, as_json=as_json)
