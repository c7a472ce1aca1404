"""The command `loftq merge`."""

from __future__ import annotations

from loftq_cli.api.merge import merge as merge_checkpoint
from loftq_cli.api.results import MergePlan
from loftq_cli.cli import options
from loftq_cli.cli.render.console import say, say_done
from loftq_cli.cli.render.merging import format_summary, print_plan, print_result
from loftq_cli.cli.render.progress import CommandProgress


def merge(
    base: options.Base,
    adapter: options.Adapter,
    output: options.MergeOutput = None,
    adapters: options.FurtherAdapters = None,
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
    no_remote_code: options.NoRemoteCode = False,
    tokenizer: options.MergeTokenizer = None,
    threads: options.Threads = None,
    device: options.Device = "cpu",
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    restart: options.Restart = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Merge ADAPTER into BASE and write a deployment checkpoint.

    Arithmetic is float32. BASE is a converted directory or a full-precision checkpoint; ADAPTER is any PEFT LoRA
    directory made or trained on BASE. A QA-LoRA adapter merges into the offsets of BASE's groups: the result stays
    quantized, and computes the outputs of base and adapter.
    """
    adapter, output, further = options.adapters_and_output(adapter, output, adapters or [])
    with CommandProgress(quiet=quiet) as progress:
        result = merge_checkpoint(
            base,
            adapter,
            output,
            adapters=further,
            dtype=dtype,
            layout=layout,
            requantize=requantize,
            group_size=group_size,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
            round_zeros=round_zeros,
            pooling=pooling,
            max_shard_size=max_shard_size,
            force=force,
            remote_code=not no_remote_code,
            tokenizer=tokenizer,
            threads=threads,
            device=device,
            dry_run=dry_run,
            overwrite=overwrite,
            restart=restart,
            observer=progress,
        )
    if isinstance(result, MergePlan):
        print_plan(result, as_json=as_json, quiet=quiet)
    elif result.already_done:
        if not quiet:
            say(format_summary(result.plan))
        say(f"{output}: already done, with these inputs and options")
    else:
        if not quiet:
            say_done()
        print_result(result, as_json=as_json)
