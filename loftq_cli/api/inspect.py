"""Errors of a model, or damage of files: `loftq.inspect`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.activations.comparison import Comparison, compare
from loftq_cli.activations.text_windows import DEFAULT_TOKENS
from loftq_cli.api.arguments import AnyPath, api_call, check_least, path_text, paths_of, texts_of, thread_count
from loftq_cli.api.observer import Observer
from loftq_cli.api.results import CheckpointInspection, ConvertedInspection, WorstError, check_errors
from loftq_cli.checkpoint.quantized_source import describe
from loftq_cli.conversion.report import read_report
from loftq_cli.errors import UsageError
from loftq_cli.inspecting.converted import Inspection, LayerRow, check_sort_key, inspect_converted, sorted_rows
from loftq_cli.inspecting.dense import inspect_checkpoint, sorted_tensors
from loftq_cli.inspecting.findings import Verification
from loftq_cli.inspecting.verification import verify as verify_files
from loftq_cli.model.builtin import resolve_model
from loftq_cli.model.foreign import foreign_note
from loftq_cli.model.stored import BaseModel
from loftq_cli.output.records import REPORT_NAME
from loftq_cli.runtime.gpu import check_device_name
from loftq_cli.tensors.metrics import total_error

_BY_OUTPUT = "output_error"  # an order for calls with a reference


@dataclass(frozen=True, slots=True)
class _Request:
    """The options of a call, checked."""

    against: Path | None
    tries: tuple[str, ...]
    reference: Path | None
    texts: tuple[Path, ...]
    tokens: int
    context: int | None
    lines: bool
    sort: str
    top: int | None
    threads: int
    device: str


@api_call
def inspect(
    path: AnyPath,
    *,
    against: AnyPath | None = None,
    try_: str | Iterable[str] | None = None,
    sort: str = "name",
    top: int | None = None,
    fail_above: float | None = None,
    verify: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    reference: AnyPath | None = None,
    text: AnyPath | Iterable[AnyPath] | None = None,
    tokens: int | None = None,
    context: int | None = None,
    lines: bool = False,
    observer: Observer | None = None,
) -> ConvertedInspection | CheckpointInspection | Verification:
    """Report the quantization error of every layer, or the damage of files.

    The errors of a converted directory come from the report of the conversion; `against` recomputes the errors from the
    files. `reference` and `text` measure the outputs of layers and model on a text too. A full-precision checkpoint
    shows the work of `quantize`, and `try_` computes the error of a number format.

    Args:
        path: a converted directory, a full-precision checkpoint, or "builtin:NAME"; `verify` also takes an adapter.
        against: the original checkpoint: recompute every error from the files.
        try_: a number format or several, for a full-precision checkpoint.
        sort: "name", "error", "base_error" or "numel"; `reference` also allows "output_error".
        top: number of layers to list, 1 or more; None lists all layers.
        fail_above: the largest allowed relative error of a layer.
        verify: check checksums, index, config and numbers, and compute no errors; where transformers is installed, ask
            about the place of each layer and adapter of a result in the loaded model.
        threads: number of threads to compute with; None is the number of processors.
        device: the device of `against` and `try_`, "cpu", "cuda", "cuda:N" or "auto".
        reference: the original model, to run beside the converted model. Needs transformers.
        text: a UTF-8 file for `reference`, or several.
        tokens: for `reference`: number of tokens to read at most, 2 or more; None is 65536.
        context: for `reference`: tokens of a window, 2 or more; None is the model's longest input, at most 512.
        lines: for `reference`: each line of the text is a separate text.
        observer: hears of the progress, and of each problem of a verification.

    Returns:
        A ConvertedInspection, a CheckpointInspection, or with `verify` a Verification.

    Raises:
        UsageError: an option without meaning for the path, or beside another option.
        InputError: a damaged checkpoint or report; a missing path under `verify`.
        MismatchError: `against` or `reference` is another model.
        QualityError: the error of a layer is above `fail_above`.
        StorageError: reading failed.
        MemoryShortage: the memory does not suffice.

    >>> import loftq_cli as loftq
    >>> inspection = loftq.inspect("builtin:tiny-llama", try_=["nf4", "fp4"], top=3)
    >>> inspection.totals["nf4"].error < inspection.totals["fp4"].error
    True
    """
    check_device_name(device)
    for name, number, least in (("top", top, 1), ("threads", threads, 1), ("tokens", tokens, 2)):
        check_least(name, number, least)
    check_least("context", context, 2)
    check_least("fail_above", fail_above, 0)
    request = _Request(
        against=None if against is None else resolve_model(path_text(against)),
        tries=texts_of(try_),
        reference=None if reference is None else resolve_model(path_text(reference)),
        texts=paths_of(text),
        tokens=tokens or DEFAULT_TOKENS,
        context=context,
        lines=lines,
        sort=sort,
        top=top,
        threads=thread_count(threads),
        device=device,
    )
    _check_sort(request)
    _check_text_options(request, tokens)
    observer = observer or Observer()
    if verify:
        _check_only_verifies(request, fail_above)
        target = resolve_model(path_text(path))
        return verify_files(target, request.threads, lambda problem: observer.problem_found(problem, target))
    inspection = _inspect(resolve_model(path_text(path)), request, observer, has_threads=threads is not None)
    if fail_above is not None:
        check_errors(inspection, fail_above)
    return inspection


def _check_sort(request: _Request) -> None:
    if request.sort != _BY_OUTPUT:
        check_sort_key(request.sort)
    elif request.reference is None:
        raise UsageError(f"--sort {_BY_OUTPUT} needs outputs", hint="--reference ORIGINAL --text FILE gives them")


def _check_text_options(request: _Request, tokens: int | None) -> None:
    """Raises UsageError where a reference has no text, or where an option of the text has no reference."""
    if request.reference is not None:
        if not request.texts:
            raise UsageError("--reference needs a text to run the models on", hint="--text FILE")
        return
    options = {"--text": request.texts, "--tokens": tokens, "--context": request.context, "--lines": request.lines}
    for name, value in options.items():
        if value:
            raise UsageError(f"{name} is for --reference", hint="--reference ORIGINAL")


def _check_only_verifies(request: _Request, fail_above: float | None) -> None:
    """Raises UsageError for an option about errors."""
    options = {
        "--against": request.against is not None,
        "--try": bool(request.tries),
        "--top": request.top is not None,
        "--fail-above": fail_above is not None,
        "--reference": request.reference is not None,
        "--sort": request.sort != "name",
        "--device": request.device not in ("auto", "cpu"),
    }
    name = next((name for name, is_set in options.items() if is_set), None)
    if name is not None:
        raise UsageError(f"--verify computes no errors for {name}", hint="run inspect once for each")


def _inspect(
    path: Path, request: _Request, observer: Observer, *, has_threads: bool
) -> ConvertedInspection | CheckpointInspection:
    with BaseModel.open(path, any_format=True) as base:
        for note in (describe(base.checkpoint.scaled), base.unread, foreign_note(base.tensors)):
            if note is not None:
                observer.note(note)
        if base.quantized or (base.folder / REPORT_NAME).is_file():
            if request.tries:
                raise UsageError("--try is for a full-precision checkpoint, and this one is converted", file=base.path)
            has_work = request.against is not None
            _check_computes(request, "--against ORIGINAL", has_work=has_work, has_threads=has_threads)
            return _converted(base, request, observer)
        for name, value in (("--against", request.against), ("--reference", request.reference)):
            if value is not None:
                raise UsageError(f"{name} is for a converted directory, and this one is not", file=base.path)
        _check_computes(request, "--try TYPE", has_work=bool(request.tries), has_threads=has_threads)
        return _checkpoint(base, request)


def _check_computes(request: _Request, remedy: str, *, has_work: bool, has_threads: bool) -> None:
    """Raises UsageError for a device or threads where nothing is computed. `remedy` is an option with computing."""
    if has_work:
        return
    if request.device not in ("auto", "cpu"):
        if request.reference is not None:
            message = f"--reference runs the models on the processor, and --device {request.device} is for --against"
            raise UsageError(message, hint="leave --device out")
        raise UsageError(f"--device {request.device} has nothing to compute", hint=f"{remedy}, or leave --device out")
    if has_threads and request.reference is None:
        message = f"--threads {request.threads} has nothing to compute"
        raise UsageError(message, hint=f"{remedy}, or leave --threads out")


def _converted(base: BaseModel, request: _Request, observer: Observer) -> ConvertedInspection:
    inspection = inspect_converted(base, request.against, request.threads, request.device)
    outputs = _compare(base, inspection, request, observer)
    errors = [WorstError(row.name, row.error.error) for row in inspection.rows if row.error]
    return ConvertedInspection(
        path=base.path,
        layers=tuple(_sort_layers(inspection.rows, outputs, request.sort)[: request.top]),
        layer_count=len(inspection.rows),
        total=inspection.total,
        plain_error=inspection.plain_error,
        reported=inspection.reported,
        bits_per_weight=inspection.bits_per_weight,
        recomputed=inspection.recomputed,
        worst=max(errors, key=lambda worst: worst.error, default=None),
        outputs=outputs,
    )


def _compare(base: BaseModel, inspection: Inspection, request: _Request, observer: Observer) -> Comparison | None:
    """The comparison with the reference model; None without a reference."""
    if request.reference is None:
        return None
    report = read_report(base.folder)
    return compare(
        base,
        request.reference,
        [row.name for row in inspection.rows if row.name in base.tensors and len(base.tensors[row.name].shape) == 2],
        report[0]["adapter_dir"] if report else None,
        request.texts,
        tokens=request.tokens,
        context=request.context,
        lines=request.lines,
        threads=request.threads,
        say=observer.phase,
    )


def _sort_layers(rows: Sequence[LayerRow], outputs: Comparison | None, sort: str) -> list[LayerRow]:
    """The layers in order. The order "output_error" lists the layers with compared outputs, largest error first."""
    if outputs is None or sort != _BY_OUTPUT:
        return sorted_rows(rows, sort)
    rows_with_outputs = [row for row in rows if row.name in outputs.layers]
    return sorted(rows_with_outputs, key=lambda row: -outputs.layers[row.name].error)


def _checkpoint(base: BaseModel, request: _Request) -> CheckpointInspection:
    rows = list(inspect_checkpoint(base, request.tries, request.threads, request.device))
    errors = [WorstError(row.name, error.error) for row in rows for error in row.errors.values()]
    return CheckpointInspection(
        path=base.path,
        tensors=tuple(sorted_tensors(rows, request.sort)[: request.top]),
        tensor_count=len(rows),
        nbytes=sum(ref.nbytes for ref in base.tensors.values()),
        totals={t: total_error(row.errors[t] for row in rows if t in row.errors) for t in request.tries},
        worst=max(errors, key=lambda worst: worst.error, default=None),
    )
