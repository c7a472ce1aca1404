"""Statistics of the inputs x of a model's linears: the mean of x·xᵀ over the tokens of a text, block by block, into a
file. Quantizes nothing, and needs transformers to run the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loftq_cli.activations import transformers_models
from loftq_cli.activations.input_sums import BATCH_TOKENS, MomentSums, share_inputs
from loftq_cli.activations.self_written import write_windows
from loftq_cli.activations.text_sources import FILES, TextSource, make_windows, open_text
from loftq_cli.activations.text_windows import Windows
from loftq_cli.activations.transformers_models import model_directory
from loftq_cli.checkpoint.source import Checkpoint, open_checkpoint
from loftq_cli.checkpoint.statistics import (
    CALIBRATION_NAME,
    FORMAT,
    STATISTICS_NAME,
    pack_triangle,
    triangle_numel,
)
from loftq_cli.errors import UsageError
from loftq_cli.layouts.layout import DENSE
from loftq_cli.model.foreign import check_read
from loftq_cli.output.checksums import file_sha256
from loftq_cli.output.records import TOOL, dump_json, source_name, write_texts
from loftq_cli.output.staging import Staging, check_apart, check_output, check_space
from loftq_cli.output.writer import OutputFiles
from loftq_cli.planning.jobs import QuantizableMatrix
from loftq_cli.planning.matrices import quantizable_matrices
from loftq_cli.runtime.workers import torch_threads
from loftq_cli.tensors.headers import OutTensor

if TYPE_CHECKING:
    import torch

_TRACE_TOKENS = 16  # tokens of the forward that groups the weights by input


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """The options of a user.

    tokens     most tokens to run, over all windows
    context    tokens of a window; None is the model's longest input, at most 512
    diagonal   measure mean squares of x in place of the mean of x·xᵀ
    lines      each line of a file is a text
    """

    tokens: int
    context: int | None = None
    diagonal: bool = False
    lines: bool = False

    @property
    def kind(self) -> str:
        """The kind of statistics in calibration.json: "full" or "diagonal"."""
        return "diagonal" if self.diagonal else "full"


class CalibrationObserver(Protocol):
    """Hears of the progress of a calibration: a part of `loftq_cli.api.observer.Observer`."""

    def calibration_started(self, inputs: int, windows: int, context: int, *, lines: bool, nbytes: int) -> None: ...
    def note(self, text: str) -> None: ...
    def block_calibrated(self, block: str, inputs: int) -> None: ...


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """The written statistics.

    output    the directory of the statistics
    kind      "full" for matrices x·xᵀ [in, in], "diagonal" for mean squares of x [in]
    layers    number of layers with a statistic
    inputs    number of statistics; layers with a common input tensor share a statistic
    unread    names of the weights that no text reaches
    tokens    tokens that the model read, over all windows
    windows   number of windows; with `lines`, each window is a line of the text
    context   tokens of the longest window
    lines     the option of the call
    nbytes    bytes of all statistics
    """

    output: Path
    kind: str
    layers: int
    inputs: int
    unread: tuple[str, ...]
    tokens: int
    windows: int
    context: int
    lines: bool
    nbytes: int


@dataclass(frozen=True)
class Prepared:
    """A calibration that can begin: everything but the weights is in memory.

    checkpoint   the source, open
    directory    the folder of the source, with config.json and the tokenizer
    output       the directory to write
    jobs         the weights to measure
    source       the text, with the content of all files
    overwrite    replace an `output` that exists
    """

    checkpoint: Checkpoint
    directory: Path
    output: Path
    options: CalibrationOptions
    jobs: tuple[QuantizableMatrix, ...]
    source: TextSource
    overwrite: bool


def prepare_calibration(
    model: Path, texts: Sequence[str | Path], output: Path, options: CalibrationOptions, *, overwrite: bool = False
) -> Prepared:
    """Open the checkpoint `model` and the text, and choose the weights to measure. Writes nothing; needs no torch.

    texts   paths of files and folders, or SELF or RANDOM alone, see `open_text`

    Raises LoftqError for every error that shows before the model is built: InputError for a damaged checkpoint, a
    weight file without config.json, or a file without UTF-8 text; UsageError when `output` exists and `overwrite` is
    false, when `texts` is empty, when no linear can be quantized, or when transformers is not installed.

    >>> from loftq_cli.model.builtin import resolve_model
    >>> model, text = resolve_model("builtin:tiny-llama"), Path("text.txt")
    >>> _ = text.write_text("The quick brown fox jumps over the lazy dog.")
    >>> len(prepare_calibration(model, [text], Path("statistics"), CalibrationOptions(tokens=64)).jobs)
    28
    """
    checkpoint = open_checkpoint(model)
    directory = model_directory(checkpoint)
    source = open_text([str(text) for text in texts])
    check_apart(output, [directory, *checkpoint.files, *(file.path for file in source.files)])
    check_output(output, overwrite=overwrite)
    if options.lines and source.kind != FILES:
        raise UsageError(f"--lines means nothing with --text {source.kind}", hint="leave --lines out")
    jobs = measurable_matrices(checkpoint)
    if not jobs:
        raise UsageError("no linear layer to measure", file=model, hint="loftq inspect shows every tensor")
    transformers_models.check_installed()
    return Prepared(checkpoint, directory, output, options, jobs, source, overwrite)


def measurable_matrices(checkpoint: Checkpoint) -> tuple[QuantizableMatrix, ...]:
    """The weights of `checkpoint` that `quantize` takes by default, in the order of the checkpoint. The dense container
    holds every shape, so the statistics serve a conversion into any container.

    >>> from loftq_cli.model.builtin import resolve_model
    >>> measurable_matrices(open_checkpoint(resolve_model("builtin:tiny-llama")))[0].name
    'model.layers.0.mlp.down_proj.weight'
    """
    check_read(checkpoint.tensors)
    jobs = quantizable_matrices(checkpoint.tensors, checkpoint.config(), layout=DENSE)
    return tuple(job for job in jobs if isinstance(job, QuantizableMatrix))


@transformers_models.silence()
def run_calibration(
    prepared: Prepared,
    observer: CalibrationObserver,
    *,
    threads: int = 1,
    device: torch.device | str = "cpu",
    batch_tokens: int = BATCH_TOKENS,
) -> CalibrationResult:
    """Run the model over the text and write the statistics: all files, or none.

    threads        number of threads; the statistics are the same with any number
    device         the device of the model
    batch_tokens   tokens that go through a block at once

    Memory holds one block in float32, the statistics of the block, and the hidden states of all tokens between two
    blocks. Raises InputError for a model or tokenizer that transformers does not load, for a missing weight, or for a
    text that is too short; UsageError for a model that does not run block by block; NumericError for an input that is
    not finite; StorageError when the disk is full.
    """
    from loftq_cli.activations.streamed_model import StreamedModel

    directory = prepared.directory
    config = transformers_models.load_config(directory)
    checkpoint = prepared.checkpoint

    def build() -> StreamedModel:
        return StreamedModel.of_config(directory, config, checkpoint.tensors, checkpoint.path, checkpoint.load, device)

    windows = make_windows(
        prepared.source,
        prepared.options,
        directory,
        config,
        seed=0,
        write=lambda facts, count, length: write_windows(build(), facts, count, length, seed=0, threads=threads),
        note=observer.note,
    )
    streamed = build()
    with torch_threads(threads):
        feed = transformers_models.text_inputs(config, windows.by_length[-1][:1, :_TRACE_TOKENS])
        measurement = _Measurement(prepared, windows, share_inputs(streamed, prepared.jobs, feed))
        measurement.announce(observer)
        check_space(prepared.output, measurement.nbytes)
        fingerprint = _fingerprint(measurement)
        staging = Staging(prepared.output, fingerprint=fingerprint, overwrite=prepared.overwrite, restart=True)
        with staging.whole(TOOL) as path:
            with OutputFiles(path, {STATISTICS_NAME: measurement.tensors}) as files:
                sums = MomentSums(streamed, measurement.jobs, diagonal=prepared.options.diagonal, path=directory)

                def write_means(block: str) -> None:
                    means = sums.take_means()
                    for name, mean in means.items():
                        files[name].write(name, mean.cpu() if mean.dim() == 1 else pack_triangle(mean.cpu()))
                    if means:
                        observer.block_calibrated(block, len(means))

                with sums.watch():
                    feeds = [transformers_models.text_inputs(config, batch) for batch in windows.batches(batch_tokens)]
                    streamed.run(feeds, sums.blocks, write_means, threads=threads, batch_done=sums.merge)
                write_means("outside of the blocks")
                sums.check_complete(job.name for job in measurement.jobs)
            prepared.checkpoint.check_unchanged()
            values = _calibration_json(measurement, file_sha256(path / STATISTICS_NAME))
            write_texts(path, {CALIBRATION_NAME: dump_json(values)})
    return measurement.result()


@dataclass(frozen=True)
class _Measurement:
    """The task of a calibration, after the first tokens have gone through the model.

    windows   token ids
    inputs    name of each reached weight -> the first weight with a common input, which names the statistic
    """

    prepared: Prepared
    windows: Windows
    inputs: Mapping[str, str]

    def __post_init__(self) -> None:
        """Raises UsageError when the text reaches no layer."""
        if not self.inputs:
            raise UsageError("the text reaches no linear layer of this model", file=self.prepared.directory)

    @property
    def jobs(self) -> list[QuantizableMatrix]:
        """The weights that name a statistic, in the order of the checkpoint."""
        names = set(self.inputs.values())
        return [job for job in self.prepared.jobs if job.name in names]

    @property
    def tensors(self) -> list[OutTensor]:
        """Headers of the statistics: float32 [in · (in + 1) / 2], or [in] with `diagonal`."""
        is_diagonal = self.prepared.options.diagonal
        features = {job.name: job.matrix.shape[1] for job in self.prepared.jobs}
        numels = {name: n if is_diagonal else triangle_numel(n) for name, n in features.items()}
        return [OutTensor(name, "float32", (numels[name],)) for name in dict.fromkeys(self.inputs.values())]

    @property
    def nbytes(self) -> int:
        """Bytes of all statistics."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def unread(self) -> tuple[str, ...]:
        """Names of the weights without a statistic: no text reaches the weight, or the model multiplies by the weight
        without a call of the module.
        """
        return tuple(job.name for job in self.prepared.jobs if job.name not in self.inputs)

    def announce(self, observer: CalibrationObserver) -> None:
        """Tell the observer the amount of work, a text shorter than the option, and layers without a statistic."""
        windows, tokens = self.windows, self.prepared.options.tokens
        lines = self.prepared.options.lines
        observer.calibration_started(len(self.tensors), windows.count, windows.longest, lines=lines, nbytes=self.nbytes)
        if windows.tokens + windows.longest <= tokens:
            observer.note(f"the text gives {windows.tokens} tokens, fewer than --tokens {tokens}")
        if self.unread:
            ending = " and others" if len(self.unread) > 1 else ""
            observer.note(f"{len(self.unread)} layers read no text and have no statistic: {self.unread[0]}{ending}")

    def result(self) -> CalibrationResult:
        """The result of the finished calibration."""
        return CalibrationResult(
            output=self.prepared.output,
            kind=self.prepared.options.kind,
            layers=len(self.inputs),
            inputs=len(self.tensors),
            unread=self.unread,
            tokens=self.windows.tokens,
            windows=self.windows.count,
            context=self.windows.longest,
            lines=self.prepared.options.lines,
            nbytes=self.nbytes,
        )


def _headers_sha256(checkpoint: Checkpoint) -> str:
    """The sha256 of the config and of the name, dtype and shape of every tensor."""
    refs = sorted([ref.name, ref.dtype, ref.shape] for ref in checkpoint.tensors.values())
    return hashlib.sha256(json.dumps([checkpoint.config(), refs], sort_keys=True).encode()).hexdigest()


def _fingerprint(measurement: _Measurement) -> str:
    prepared, windows = measurement.prepared, measurement.windows
    options = [prepared.options.kind, prepared.options.lines, windows.count, windows.longest, windows.tokens]
    values = [TOOL, _headers_sha256(prepared.checkpoint), options, prepared.source.sha256]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _calibration_json(measurement: _Measurement, sha256: str) -> dict[str, Any]:
    prepared, windows = measurement.prepared, measurement.windows
    return {
        **TOOL,
        "format": FORMAT,
        "text": prepared.source.kind,
        "model": source_name(prepared.directory),
        "model_fingerprint": _headers_sha256(prepared.checkpoint),
        "kind": prepared.options.kind,
        "tokens": windows.tokens,
        "windows": windows.count,
        "context": windows.longest,
        "lines": prepared.options.lines,
        "texts": prepared.source.files_json(),
        "statistics_sha256": sha256,
        "inputs": dict(measurement.inputs),
    }
