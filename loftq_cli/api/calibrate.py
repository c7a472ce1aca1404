"""Statistics of the inputs of a model's layers: `loftq.calibrate`."""

from __future__ import annotations

from collections.abc import Iterable

from loftq_cli.activations.calibration import (
    CalibrationOptions,
    CalibrationResult,
    prepare_calibration,
    run_calibration,
)
from loftq_cli.activations.text_windows import DEFAULT_TOKENS
from loftq_cli.api.arguments import AnyPath, api_call, check_least, path_of, path_text, paths_of, thread_count
from loftq_cli.api.observer import Observer
from loftq_cli.model.builtin import resolve_model
from loftq_cli.runtime.gpu import check_device_name, open_device


@api_call
def calibrate(
    model: AnyPath,
    text: AnyPath | Iterable[AnyPath],
    output: AnyPath,
    *,
    tokens: int = DEFAULT_TOKENS,
    context: int | None = None,
    lines: bool = False,
    diagonal: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    observer: Observer | None = None,
) -> CalibrationResult:
    """Measure the inputs x of a model's linear layers on a text: the mean of x·xᵀ over the tokens.

    The model runs in float32, and a single block of the model is in memory at a time. The call needs
    transformers 5 and accelerate: pip install transformers accelerate.

    Args:
        model: a Hugging Face model directory with a tokenizer, or "builtin:NAME".
        text: files, folders or *.jsonl conversations like the text of the model's later use; "self" for text by the
            model, "random" for random tokens.
        output: the directory to write.
        tokens: how many tokens of the text to read at most, 2 or more.
        context: tokens of a window, 2 or more; None is the model's longest input, at most 512.
        lines: each line of the text is a separate text.
        diagonal: store the mean square of each input only.
        threads: number of threads to compute with; None is the number of processors.
        device: "cpu", "cuda", "cuda:N" or "auto": where the model runs.
        overwrite: replace an earlier result under `output`.
        observer: hears of the progress.

    Returns:
        A CalibrationResult.

    Raises:
        UsageError: an option without meaning, an output that exists, or no transformers.
        InputError: a damaged checkpoint, a file without text, or a folder without a tokenizer.
        StorageError: reading or writing failed.
        MemoryShortage: the memory does not suffice.

    >>> import loftq_cli as loftq
    >>> from pathlib import Path
    >>> _ = Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    >>> result = loftq.calibrate("builtin:tiny-llama", "text.txt", "statistics", tokens=32, context=16)
    >>> result.layers, result.inputs, result.tokens
    (28, 16, 32)
    """
    count = thread_count(threads)
    check_device_name(device)
    check_least("tokens", tokens, 2)
    check_least("context", context, 2)
    options = CalibrationOptions(tokens, context, diagonal, lines)
    path = resolve_model(path_text(model))
    prepared = prepare_calibration(path, tuple(map(str, paths_of(text))), path_of(output), options, overwrite=overwrite)
    gpu = open_device(device, work=options.tokens * sum(job.numel for job in prepared.jobs))
    place = "cpu" if gpu is None else gpu.device
    return run_calibration(prepared, observer or Observer(), threads=count, device=place)
