"""A checkpoint becomes a quantized base and an adapter: `loftq.quantize`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loftq_cli.adapter.config import WEIGHTS_NAME
from loftq_cli.allocation.candidates import Budget
from loftq_cli.api.arguments import (
    AnyPath,
    AnySize,
    api_call,
    check_gpu_memory,
    is_done,
    nbytes_of,
    path_of,
    path_text,
    paths_of,
    size_text,
    texts_of,
    thread_count,
)
from loftq_cli.api.observer import Observer
from loftq_cli.api.results import PlannedFile, QuantizePlan, QuantizeResult
from loftq_cli.conversion.prepare import (
    Conversion,
    expert_rows,
    is_conversion_done,
    prepare_conversion,
    prepare_within_target,
)
from loftq_cli.conversion.report import ModelErrors, bits_per_weight, read_report
from loftq_cli.conversion.run import Outcome, convert_checkpoint
from loftq_cli.layouts.layout import PACKED_EXPERTS
from loftq_cli.planning.recipe_files import resolve_recipe
from loftq_cli.quant.formats import FORMATS
from loftq_cli.tensors.metrics import total_error


@api_call
def quantize(
    model: AnyPath,
    output: AnyPath,
    *,
    recipe: AnyPath | None = None,
    method: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    rslora: bool | None = None,
    fit: str | None = None,
    start: str | None = None,
    iterations: int | None = None,
    rounds: int | None = None,
    keep_base: float | None = None,
    svd: str | None = None,
    pooling: str | None = None,
    init: str | None = None,
    adapter_dtype: str | None = None,
    seed: int | None = None,
    quant_type: str | None = None,
    block_size: int | None = None,
    double_quant: bool | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    scale_dtype: str | None = None,
    scales: str | None = None,
    calibration: AnyPath | None = None,
    text: AnyPath | Iterable[AnyPath] | None = None,
    tokens: int | None = None,
    context: int | None = None,
    lines: bool | None = None,
    sequential: bool | None = None,
    layout: str | None = None,
    task: str | None = None,
    num_labels: int | None = None,
    max_shard_size: AnySize | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    target_bpw: float | None = None,
    target_size: AnySize | None = None,
    lora_budget: AnySize | None = None,
    threads: int | None = None,
    device: str = "cpu",
    max_memory: AnySize | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = True,
    remote_code: bool = True,
    base_name: str | None = None,
    observer: Observer | None = None,
) -> QuantizeResult | QuantizePlan:
    """Convert a checkpoint to quantized base weights plus a LoRA adapter.

    `output` becomes a model directory for transformers, with the adapter for PEFT in a folder inside `output`.
    Repeating an interrupted call continues the work. Sizes are bytes, or text such as "5GB". None leaves an option to
    the recipe or the default: `loftq quantize --help` lists choices and defaults.

    Args:
        model: a Hugging Face model directory, one weight file, or "builtin:NAME".
        output: the directory to write.
        recipe: a TOML file or the name of a preset; the remaining options override the recipe.
        method: how the adapter starts, "loftq", "pissa", "qlora" or "qalora".
        rank, alpha, rslora: rank of the adapter, lora_alpha, and whether the scaling is alpha/√rank.
        fit, start, iterations, rounds, svd: how base and adapter are fitted to each other.
        keep_base: share of the error that counts the base alone: 0 counts only base and adapter together, 1 makes the
            base as good as without an adapter.
        pooling, init: how a QA-LoRA adapter reads groups of inputs, and how the adapter starts.
        adapter_dtype, seed: dtype of the adapter; seed of random factors.
        quant_type: number format of the base: "nf4", "int4", ...
        block_size, double_quant: codebook formats only: weights with a common absmax; 8-bit block constants.
        group_size, symmetric, scale_dtype: integers only: weights of a row with a common scale; no zero points; dtype
            of the scales.
        scales: how constants are chosen: "absmax" or "search".
        calibration: the directory of an earlier `calibrate`; "weights" estimates statistics of the inputs from the
            weights alone, "none" counts all errors alike.
        text: files, folders or *.jsonl conversations that the model reads during the conversion, or "self" for text by
            the model, or "random" for random tokens: errors then count by the effect on the layers' outputs. Needs
            transformers 5 and accelerate: pip install transformers accelerate.
        tokens, context, lines: how many tokens of the text to read, the tokens of a window, and whether each line is a
            text.
        sequential: whether each block reads the outputs of the converted blocks before (the default), or of the
            original blocks.
        task: PEFT's task type, "SEQ_CLS" for a classifier or a reward model; None is the task of the model's class.
        num_labels: labels of a classifier; None is the number in the model's config, 1 on a language model.
        layout, max_shard_size: container of the base, and the largest size of a weight file.
        include, exclude: a regular expression or several: the modules to quantize, and not to.
        target_bpw, target_size, lora_budget: bounds for the choice of each layer's format and rank: bits of the base
            per weight; bytes of base and adapter; bytes of the adapter.
        threads: number of threads to compute with; None is the number of processors.
        device, max_memory: "cpu", "cuda", "cuda:N" or "auto", and the most memory of the GPU.
        dry_run: plan only, and write nothing. Needs no torch, except under a target.
        overwrite: replace an earlier result under `output`.
        restart: discard an interrupted run.
        verify: read the result back and check the reported errors.
        remote_code: keep the original's Python files and `auto_map`, which loaders run with trust_remote_code.
        base_name: the name of the base in the adapter's config, a hub id or a relative path; None is `output`, without
            the folders of an absolute path.
        observer: hears of the progress.

    Returns:
        A QuantizeResult; a QuantizePlan under `dry_run`.

    Raises:
        UsageError: an option without meaning for the model or the method, or an existing output.
        InputError: a damaged checkpoint, or a weight without a quantized form.
        MismatchError: statistics of another model.
        StorageError: reading or writing failed.
        MemoryShortage: the memory does not suffice.

    >>> import loftq_cli as loftq
    >>> plan = loftq.quantize("builtin:tiny-llama", "base", rank=4, include=r"layers\\.0\\.self_attn\\.q", dry_run=True)
    >>> [(layer.name, layer.matrix.shape) for layer in plan.layers]
    [('model.layers.0.self_attn.q_proj.weight', (192, 192))]
    >>> result = loftq.quantize("builtin:tiny-llama", "base", rank=4, include=r"layers\\.0\\.self_attn\\.q")
    >>> result.adapter.name, result.total.error < result.plain_error
    ('loftq_init', True)
    """
    settings: dict[str, Any] = {
        "method": method, "rank": rank, "alpha": alpha, "rslora": rslora, "fit": fit, "start": start,
        "iterations": iterations, "rounds": rounds, "keep_base": keep_base, "svd": svd, "pooling": pooling,
        "init": init, "adapter_dtype": adapter_dtype, "seed": seed, "quant_type": quant_type, "block_size": block_size,
        "double_quant": double_quant, "group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype,
        "scales": scales, "calibration": None if calibration is None else path_text(calibration),
        "text": None if text is None else tuple(map(str, paths_of(text))), "tokens": tokens, "context": context,
        "lines": lines, "sequential": sequential, "layout": layout, "task": task, "num_labels": num_labels,
        "max_shard_size": size_text(max_shard_size), "include": texts_of(include) or None,
        "exclude": texts_of(exclude) or None,
    }  # fmt: skip
    observer, gpu_memory = observer or Observer(), check_gpu_memory(device, max_memory)
    count = thread_count(threads)
    target = Budget(
        bits_per_weight=target_bpw,
        total_nbytes=nbytes_of(target_size, "target_size", least=1),
        adapter_nbytes=nbytes_of(lora_budget, "lora_budget", least=1),
    )
    source = None if recipe is None else path_text(recipe)
    conversion = _prepare(
        path_text(model), path_of(output), source, settings, target, count, observer, remote_code=remote_code,
        base_name=base_name,
    )  # fmt: skip
    done = is_done(lambda: is_conversion_done(conversion, overwrite=overwrite), dry_run=dry_run, note=observer.note)
    plan = _plan(conversion, already_done=done)
    if dry_run:
        return plan
    if plan.already_done:
        return _result(plan, _earlier_outcome(plan))
    observer.started(plan)
    outcome = convert_checkpoint(
        conversion,
        observer,
        overwrite=overwrite,
        restart=restart,
        verify=verify,
        threads=count,
        device=device,
        max_memory=gpu_memory,
    )
    return _result(plan, outcome)


def _prepare(
    model: str,
    output: Path,
    source: str | None,
    settings: dict[str, Any],
    target: Budget,
    threads: int,
    observer: Observer,
    *,
    remote_code: bool,
    base_name: str | None,
) -> Conversion:
    """The conversion, ready to run. A target needs the errors of every weight: the function measures the errors."""
    recipe = resolve_recipe(
        source,
        settings,
        mixes=target.chooses_formats,
        needs_integers=target.needs_integers,
        expert_rows=lambda: expert_rows(model, PACKED_EXPERTS),
    )
    is_chosen_here = source is None and settings["quant_type"] is None and FORMATS[recipe.quant_type].is_affine
    if target.needs_integers and is_chosen_here:
        observer.note(f"no codebook takes {target.bits_per_weight:g} bits a weight: integers, as --quant-type int4")
    if target == Budget():
        return prepare_conversion(model, output, recipe, remote_code=remote_code, base_name=base_name)
    return prepare_within_target(
        model,
        output,
        recipe,
        target,
        threads=threads,
        observe=observer.layer_measured,
        remote_code=remote_code,
        base_name=base_name,
    )


def _plan(conversion: Conversion, *, already_done: bool) -> QuantizePlan:
    plan = conversion.plan
    files = tuple(PlannedFile(s.file, sum(t.nbytes for t in s.tensors), len(s.tensors)) for s in plan.shards)
    adapter = PlannedFile(f"{plan.adapter_dir}/{WEIGHTS_NAME}", plan.adapter_nbytes, len(plan.adapter_tensors))
    return QuantizePlan(
        output=conversion.output,
        recipe=plan.recipe,
        dtype=plan.dtype,
        jobs=plan.jobs,
        files=files,
        adapter=adapter,
        base_nbytes=plan.base_nbytes,
        adapter_nbytes=plan.adapter_nbytes,
        peak_nbytes=plan.peak_nbytes,
        bits_per_weight=bits_per_weight(plan),
        notes=plan.notes,
        code_files=tuple(conversion.code_files),
        allocation=conversion.allocation,
        already_done=already_done,
    )


def _earlier_outcome(plan: QuantizePlan) -> Outcome:
    """The outcome of an earlier call, read from the report in the output."""
    report = read_report(plan.output)
    assert report is not None  # the output is complete and undamaged
    layers = tuple(report[1])
    adapter = (plan.output / plan.adapter.name).parent
    notes = tuple(map(str, report[0].get("notes", ())))
    return Outcome(plan.output, adapter, layers, total_error(layer.error for layer in layers), 0, False, notes)


def _result(plan: QuantizePlan, outcome: Outcome) -> QuantizeResult:
    errors = ModelErrors.of(outcome.layers)
    return QuantizeResult(
        output=outcome.output,
        adapter=outcome.adapter,
        plan=plan,
        layers=outcome.layers,
        total=outcome.total,
        plain_error=errors.plain_error,
        plain_output_error=errors.plain_output_error,
        base_output_error=errors.base_output_error,
        output_error=errors.output_error,
        resumed_layers=outcome.resumed_layers,
        verified=outcome.verified,
        notes=outcome.notes,
        already_done=plan.already_done,
    )
