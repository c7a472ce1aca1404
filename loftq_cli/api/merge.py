"""An adapter is merged into a base: `loftq.merge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loftq_cli.api.arguments import AnyPath, AnySize, api_call, is_done, path_of, path_text, thread_count
from loftq_cli.api.observer import Observer
from loftq_cli.api.results import MergePlan, MergeResult
from loftq_cli.merging.adapters.weighted import parse_adapter
from loftq_cli.merging.form import MergeOptions
from loftq_cli.merging.plan import Merge, prepare_merge
from loftq_cli.merging.report import MergeOutcome, largest_difference, total_lost, total_retention
from loftq_cli.merging.run import is_merge_done, merge_adapter
from loftq_cli.model.builtin import resolve_model
from loftq_cli.runtime.gpu import check_device_name


@api_call
def merge(
    base: AnyPath,
    adapter: AnyPath,
    output: AnyPath,
    *,
    adapters: Sequence[AnyPath] | None = None,
    dtype: str | None = None,
    layout: str | None = None,
    requantize: str | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    scale_dtype: str | None = None,
    round_zeros: bool = False,
    pooling: str | None = None,
    max_shard_size: AnySize | None = None,
    force: bool = False,
    remote_code: bool = True,
    tokenizer: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    dry_run: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    observer: Observer | None = None,
) -> MergeResult | MergePlan:
    """Merge an adapter into a base, in float32, and write a deployment checkpoint.

    A QA-LoRA adapter merges into the offsets of the base's groups: the result stays quantized. Repeating an
    interrupted call continues the work.

    Args:
        base: a converted directory, a full-precision checkpoint, or "builtin:NAME".
        adapter: a PEFT LoRA directory made or trained on `base`; "DIR:0.5" multiplies what the adapter adds by 0.5.
        output: the directory to write.
        adapters: further adapters, with weights or without; what the adapters add to the base adds up.
        dtype: dtype of the merged weights; None is the model's dtype.
        layout: container of the merged weights; None is a container with float offsets for QA-LoRA, else
            "dense".
        requantize: number format to quantize the merged weights to: "nf4", "int4", ...
        group_size, symmetric: format options where `requantize` is an integer format.
        scale_dtype: dtype of scales and offsets.
        round_zeros: merge a QA-LoRA adapter into integer zero points.
        pooling: the pooling of a QA-LoRA adapter, where the adapter's config is silent or wrong.
        max_shard_size: largest size of a weight file, in bytes or as "5GB"; None is 5 GB.
        remote_code: keep the base's Python files and `auto_map`, which loaders run with trust_remote_code.
        tokenizer: "base" or "adapter"; None is the adapter's where the adapter's directory holds a tokenizer.
        force: merge although the adapter belongs to another base, or does not survive.
        threads: number of threads to compute with; None is the number of processors.
        device: "cpu", "cuda", "cuda:N" or "auto".
        dry_run: plan only, and write nothing.
        overwrite: replace an earlier result under `output`.
        restart: discard an interrupted run.
        observer: hears of the progress.

    Returns:
        A MergeResult; a MergePlan under `dry_run`.

    Raises:
        UsageError: options in conflict with options, the base or the adapter, or an existing output.
        InputError: a damaged base or adapter.
        MismatchError: an adapter of another base.
        QualityError: less than half of the adapter would survive, and `force` is false.
        StorageError: reading or writing failed.
        MemoryShortage: the memory does not suffice.

    >>> import loftq_cli as loftq
    >>> base = loftq.quantize("builtin:tiny-llama", "base", rank=4, include=r"layers\\.0\\.self_attn\\.q")
    >>> result = loftq.merge(base.output, base.adapter, "merged")
    >>> [layer.name for layer in result.layers], result.plan.form
    (['model.layers.0.self_attn.q_proj.weight'], 'bfloat16')
    """
    check_device_name(device)
    count, observer = thread_count(threads), observer or Observer()
    options = MergeOptions(
        dtype=dtype,
        layout=layout,
        requantize=requantize,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        round_zeros=round_zeros,
        pooling=pooling,
        max_shard_size="5GB" if max_shard_size is None else str(max_shard_size),
        force=force,
        remote_code=remote_code,
        tokenizer=tokenizer,
    )
    given = _adapters(adapter, *adapters or ())
    prepared = prepare_merge(resolve_model(path_text(base)), given, path_of(output), options)
    done = is_done(lambda: is_merge_done(prepared, overwrite=overwrite), dry_run=dry_run, note=observer.note)
    plan = _plan(prepared, already_done=done)
    if dry_run:
        return plan
    if plan.already_done:
        return _result(plan, MergeOutcome((), plan.notes))
    observer.started(plan)
    outcome = merge_adapter(prepared, observer, overwrite=overwrite, restart=restart, threads=count, device=device)
    return _result(plan, outcome)


def _adapters(*adapters: AnyPath) -> list[tuple[Path, float]]:
    """Paths and weights; only a text has a weight other than 1."""
    return [parse_adapter(path_text(one)) if isinstance(one, str) else (path_of(one), 1.0) for one in adapters]


def _plan(merge: Merge, *, already_done: bool) -> MergePlan:
    form_of_weights = merge.form.layout if merge.form.keeps_codes else merge.dtype
    return MergePlan(
        output=merge.output,
        dtype=merge.dtype,
        layout=merge.form.layout,
        requantize=merge.options.requantize,
        form=merge.options.requantize or form_of_weights,
        tensors=tuple(tensor for job in merge.jobs for tensor in job.outputs),
        layers=sum(bool(job.additions) for job in merge.jobs),
        nbytes=merge.nbytes,
        notes=(*merge.provenance.warnings, *merge.provenance.notes, *merge.notes),
        code_files=tuple(merge.code_files),
        already_done=already_done,
    )


def _result(plan: MergePlan, outcome: MergeOutcome) -> MergeResult:
    difference = largest_difference(outcome.layers)
    return MergeResult(
        output=plan.output,
        plan=plan,
        layers=outcome.layers,
        retention=total_retention(outcome.layers),
        lost=total_lost(outcome.layers),
        max_difference=None if difference is None else difference[0],
        relative_difference=None if difference is None else difference[1],
        notes=outcome.notes,
        already_done=plan.already_done,
    )
