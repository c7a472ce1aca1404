"""Statistics of what a model's linears read: the mean of x·xᵀ over the tokens of a text, block by block, into a file.
Quantizes nothing, and needs transformers to run the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loftq_cli.activations import transformers_models
from loftq_cli.activations.text_windows import TextFile, Windows, read_text, text_windows
from loftq_cli.checkpoint.source import Checkpoint, open_checkpoint
from loftq_cli.checkpoint.statistics import CALIBRATION_NAME, FORMAT, STATISTICS_NAME
from loftq_cli.errors import InputError, NumericError, UsageError
from loftq_cli.layouts.layout import DENSE
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

    from loftq_cli.activations.streamed_model import StreamedModel

_TRACED = 16  # tokens of the forward that finds out who reads what
_BATCH_TOKENS = 4096  # that go through a block at once: enough to use all processors, and small beside a block
_ROWS = 4096  # of an input that are multiplied at once


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """What a user asks for. `context` None is the model's own, at most 512; with `lines` each line is a text."""

    tokens: int
    context: int | None = None
    diagonal: bool = False
    lines: bool = False

    @property
    def kind(self) -> str:
        return "diagonal" if self.diagonal else "full"


class CalibrationObserver(Protocol):
    """What a calibration tells: the part of `loftq_cli.api.observer.Observer` that it calls."""

    def calibration_started(self, inputs: int, windows: int, context: int, *, lines: bool) -> None: ...
    def note(self, text: str) -> None: ...
    def block_calibrated(self, block: str, inputs: int) -> None: ...


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """The statistics in the directory `output`, `nbytes` in all: matrices x·xᵀ where `kind` is "full", mean squares of
    x where `kind` is "diagonal". There are `inputs` statistics for `layers` layers: layers that read the same tensor
    share one. `unread` names the weights that no text reaches. The model read `tokens` tokens in `windows` windows of
    at most `context`; with `lines`, each window is a line of the text.
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
    """A calibration that can begin: everything but the weights has been read."""

    checkpoint: Checkpoint
    directory: Path
    output: Path
    options: CalibrationOptions
    jobs: tuple[QuantizableMatrix, ...]
    texts: tuple[TextFile, ...]
    overwrite: bool


def prepare_calibration(
    model: Path, texts: Sequence[Path], output: Path, options: CalibrationOptions, *, overwrite: bool = False
) -> Prepared:
    """Open the source and the texts, and see what there is to measure. Writes nothing; needs no torch.

    Raises LoftqError for everything that can be known to go wrong before the model is built.
    """
    checkpoint = open_checkpoint(model)
    if checkpoint.directory is None:
        raise InputError("has no config.json beside it", file=model, hint="give the model's folder")
    check_apart(output, [checkpoint.directory, *checkpoint.files, *texts])
    check_output(output, overwrite=overwrite)
    if not texts:
        raise UsageError("no text to read", hint="--text FILE")
    read = tuple(read_text(path) for path in texts)
    jobs = measurable(checkpoint)
    if not jobs:
        raise UsageError("no linear layer to measure", file=model, hint="loftq inspect shows every tensor")
    transformers_models.check_installed()
    return Prepared(checkpoint, checkpoint.directory, output, options, jobs, read, overwrite)


def measurable(checkpoint: Checkpoint) -> tuple[QuantizableMatrix, ...]:
    """The weights that `quantize` takes by default, whatever the container: a dense one fits every shape."""
    jobs = quantizable_matrices(checkpoint.tensors, checkpoint.config(), layout=DENSE)
    return tuple(job for job in jobs if isinstance(job, QuantizableMatrix))


@transformers_models.silenced()
def run_calibration(
    prepared: Prepared, observer: CalibrationObserver, *, threads: int = 1, batch_tokens: int = _BATCH_TOKENS
) -> CalibrationResult:
    """Run the model over the text and write the statistics: complete, or not at all.

    Windows of `batch_tokens` tokens go through a block at once. Takes the memory of one block in float32, of its
    statistics, and of what all tokens carry from block to block.
    """
    from loftq_cli.activations.streamed_model import StreamedModel

    directory = prepared.directory
    config, tokenizer = transformers_models.model_config(directory), transformers_models.tokenizer(directory)
    windows = _windows(prepared, config, tokenizer)
    model = transformers_models.empty_model(directory, config)
    weights = transformers_models.loaded_weights(model, prepared.checkpoint.tensors)
    streamed = StreamedModel(model, prepared.checkpoint.path, prepared.checkpoint.load, weights)
    with torch_threads(threads):
        inputs = _trace(
            streamed, prepared, transformers_models.text_inputs(config, windows.by_length[-1][:1, :_TRACED])
        )
        found = _Found(prepared, windows, inputs)
        found.announce(observer)
        check_space(prepared.output, found.nbytes)
        staging = Staging(prepared.output, fingerprint=_fingerprint(found), overwrite=prepared.overwrite, restart=True)
        with staging.whole(TOOL) as path:
            with OutputFiles(path, {STATISTICS_NAME: found.tensors}) as files:
                sums = _Sums(streamed, found, lambda name, mean: files[name].write(name, mean), observer)
                with sums.watching():
                    feeds = [transformers_models.text_inputs(config, batch) for batch in windows.batches(batch_tokens)]
                    streamed.run(feeds, sums.blocks, sums.flush, threads=threads)
                sums.check_complete()
            prepared.checkpoint.check_unchanged()
            values = _calibration_json(found, file_sha256(path / STATISTICS_NAME))
            write_texts(path, {CALIBRATION_NAME: dump_json(values)})
    return found.calibration()


def _windows(prepared: Prepared, config: Any, tokenizer: Any) -> Windows:
    asked = prepared.options
    return text_windows(
        prepared.texts,
        tokenizer,
        tokens=asked.tokens,
        context=asked.context,
        lines=asked.lines,
        longest=transformers_models.longest_input(config, tokenizer),
        vocabulary=transformers_models.vocabulary_size(config),
    )


@dataclass(frozen=True)
class _Found:
    """What is known when the first tokens have gone through the model.

    windows   token ids
    inputs    the weights that text reaches -> the first one that reads the same
    """

    prepared: Prepared
    windows: Windows
    inputs: Mapping[str, str]

    def __post_init__(self) -> None:
        """Raises UsageError where text reaches nothing."""
        if not self.inputs:
            raise UsageError("the text reaches no linear layer of this model", file=self.prepared.directory)

    @property
    def tensors(self) -> list[OutTensor]:
        """What is written."""
        ndim = 1 if self.prepared.options.diagonal else 2
        features = {job.name: job.matrix.shape[1] for job in self.prepared.jobs}
        return [OutTensor(name, "float32", (features[name],) * ndim) for name in dict.fromkeys(self.inputs.values())]

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def unread(self) -> tuple[str, ...]:
        """Weights that no text reaches, or that the model multiplies by past the module that holds them."""
        return tuple(job.name for job in self.prepared.jobs if job.name not in self.inputs)

    def announce(self, observer: CalibrationObserver) -> None:
        """Say what there is to do, and what a user may not expect."""
        windows, asked = self.windows, self.prepared.options.tokens
        lines = self.prepared.options.lines
        observer.calibration_started(len(self.tensors), windows.count, windows.longest, lines=lines)
        if windows.tokens + windows.longest <= asked:
            observer.note(f"the text gives {windows.tokens} tokens, fewer than --tokens {asked}")
        if self.unread:
            others = " and others" if len(self.unread) > 1 else ""
            observer.note(f"{len(self.unread)} layers read no text and have no statistic: {self.unread[0]}{others}")

    def calibration(self) -> CalibrationResult:
        """What was done, when it is."""
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


def _trace(streamed: StreamedModel, prepared: Prepared, feed: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For each weight that text reaches, in the order of the plan, the first one that reads the same tensor."""
    seen: list[tuple[torch.Tensor, int, str]] = []  # held until the block is left: an address is used again
    groups: dict[str, str] = {}

    def see(name: str, x: torch.Tensor) -> None:
        same = next((other for y, version, other in seen if y is x and version == x._version), None)
        groups.setdefault(name, same or name)
        if same is None:
            seen.append((x, x._version, name))

    modules = _modules(streamed, prepared.jobs)
    with _seeing(modules, see):
        streamed.run([feed], _blocks(streamed, prepared.jobs), lambda block: seen.clear())
    first: dict[str, str] = {}
    names = [job.name for job in prepared.jobs if job.name in groups]
    for name in names:
        first.setdefault(groups[name], name)
    return {name: first[groups[name]] for name in names}


class _Sums:
    """Sums of x·xᵀ of the block that batches are in, and where their means go."""

    def __init__(
        self,
        streamed: StreamedModel,
        found: _Found,
        write: Callable[[str, torch.Tensor], object],
        observer: CalibrationObserver,
    ) -> None:
        prepared, named = found.prepared, set(found.inputs.values())
        jobs = [job for job in prepared.jobs if job.name in named]
        self.blocks = _blocks(streamed, jobs)
        self._modules = _modules(streamed, jobs)
        self._diagonal, self._write, self._observer = prepared.options.diagonal, write, observer
        self._missing = named
        self._model = prepared.directory
        self._sums: dict[str, _Sum] = {}

    def watching(self) -> Any:
        """Add up what the layers read, for the length of the block."""
        return _seeing(self._modules, self._add)

    def flush(self, block: str) -> None:
        """Write the means of a block that all batches have left."""
        for name, found in self._sums.items():
            if name not in self._missing:
                raise UsageError("runs again after other blocks, which is not supported", file=self._model, tensor=name)
            mean = found.mean()
            if not bool(mean.isfinite().all()):
                raise NumericError("its input is not finite on this text").at(file=self._model, tensor=name)
            self._write(name, mean)
            self._missing.discard(name)
        if self._sums:
            self._observer.block_calibrated(block, len(self._sums))
        self._sums.clear()

    def check_complete(self) -> None:
        """Raises UsageError for a layer that the first tokens reached and the text did not."""
        if self._sums:
            self.flush("outside of the blocks")
        if self._missing:
            what = "reads the beginning of the text and nothing of the rest"
            raise UsageError(what, file=self._model, tensor=min(self._missing))

    def _add(self, name: str, x: torch.Tensor) -> None:
        if name not in self._sums:
            self._sums[name] = _Sum(x.shape[-1], diagonal=self._diagonal)
        self._sums[name].add(x)


class _Sum:
    """The sum of x·xᵀ over rows x, or of its diagonal. Products are float32; there are few of them to add up."""

    def __init__(self, features: int, *, diagonal: bool) -> None:
        import torch

        self._diagonal, self._rows = diagonal, 0
        dtype = torch.float64 if diagonal else torch.float32
        self._sum = torch.zeros((features,) if diagonal else (features, features), dtype=dtype)

    def add(self, x: torch.Tensor) -> None:
        """x: [..., in]."""
        import torch

        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self._rows += len(rows)
        for chunk in torch.split(rows, _ROWS):
            if self._diagonal:
                self._sum += chunk.double().square().sum(0)
            else:
                self._sum.addmm_(chunk.T, chunk)

    def mean(self) -> torch.Tensor:
        """float32, symmetric."""
        if self._diagonal:
            return (self._sum / self._rows).float()
        return (self._sum + self._sum.T).mul_(0.5 / self._rows)


def _modules(streamed: StreamedModel, jobs: Sequence[QuantizableMatrix]) -> dict[str, tuple[Any, int]]:
    """The module and the inputs of each weight; one that the loaded model has in another form is left out."""
    modules = dict(streamed.model.named_modules())
    return {job.name: (modules[job.module], job.matrix.shape[1]) for job in jobs if job.module in modules}


def _blocks(streamed: StreamedModel, jobs: Sequence[QuantizableMatrix]) -> set[str]:
    modules = dict(streamed.model.named_modules())
    found = {streamed.block_of(job.module) for job in jobs if job.module in modules}
    return {block for block in found if block is not None}


@contextmanager
def _seeing(modules: Mapping[str, tuple[Any, int]], see: Callable[[str, Any], None]) -> Iterator[None]:
    """`see(name, input)` at each call of a module, for the length of the block."""

    def hook(name: str, features: int) -> Callable[..., None]:
        def call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if x.shape[-1] == features and x.numel():
                see(name, x)

        return call

    handles = [
        module.register_forward_pre_hook(hook(name, features), with_kwargs=True)
        for name, (module, features) in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _headers_sha256(checkpoint: Checkpoint) -> str:
    """Of all that headers and config say."""
    refs = sorted([ref.name, ref.dtype, ref.shape] for ref in checkpoint.tensors.values())
    return hashlib.sha256(json.dumps([checkpoint.config(), refs], sort_keys=True).encode()).hexdigest()


def _fingerprint(found: _Found) -> str:
    prepared = found.prepared
    windows = found.windows
    options = [prepared.options.kind, prepared.options.lines, windows.count, windows.longest, windows.tokens]
    values = [TOOL, _headers_sha256(prepared.checkpoint), options, [text.sha256 for text in prepared.texts]]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _calibration_json(found: _Found, sha256: str) -> dict[str, Any]:
    prepared, windows = found.prepared, found.windows
    texts = [{"name": source_name(text.path), "nbytes": text.nbytes, "sha256": text.sha256} for text in prepared.texts]
    return {
        **TOOL,
        "format": FORMAT,
        "model": source_name(prepared.directory),
        "model_fingerprint": _headers_sha256(prepared.checkpoint),
        "kind": prepared.options.kind,
        "tokens": windows.tokens,
        "windows": windows.count,
        "context": windows.longest,
        "lines": prepared.options.lines,
        "texts": texts,
        "statistics_sha256": sha256,
        "inputs": dict(found.inputs),
    }
