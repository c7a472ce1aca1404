"""A converted model beside the one that it was made from, on a text: what each quantized layer does to its outputs, and
all of them together to the model's. Holds both models in memory; changes neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.activations import transformers_models
from loftq_cli.activations.text_windows import read_text, text_windows
from loftq_cli.adapter.beside import load_adapter_pairs
from loftq_cli.errors import InputError, MismatchError, NumericError
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import module_of
from loftq_cli.runtime.workers import torch_threads
from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.metrics import relative

if TYPE_CHECKING:
    import torch

_BATCH_TOKENS = 1024  # at once: a few times so many rows of the vocabulary's size are in memory, in float64


@dataclass(frozen=True, slots=True)
class OutputError:
    """Sums over the rows x that a layer reads in the original: ‖W·x‖², and ‖(W − W')·x‖² for the base alone and with
    its adapter.
    """

    squared_output: float
    squared_base: float
    squared_error: float

    @property
    def base_error(self) -> float:
        """√(Σ‖(W − base)·x‖² / Σ‖W·x‖²)."""
        return relative(self.squared_base, self.squared_output)

    @property
    def error(self) -> float:
        """√(Σ‖(W − base − s·B·A)·x‖² / Σ‖W·x‖²)."""
        return relative(self.squared_error, self.squared_output)


@dataclass(frozen=True, slots=True)
class Predictions:
    """How a language model predicts the text: perplexity a token, and the mean of KL(original ‖ converted) a token in
    nats. Without an adapter, base and adapted are the same.
    """

    perplexity: float
    base_perplexity: float
    adapted_perplexity: float
    base_kl: float
    adapted_kl: float


@dataclass(frozen=True, slots=True)
class Drift:
    """How far an encoder's answers move: 1 − the cosine similarity of the means over a window of the last hidden
    states, the mean over windows.
    """

    base: float
    adapted: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found on `tokens` tokens. `layers` is by the name of the weight in the converted directory; those that
    read no text are not in it.
    """

    layers: Mapping[str, OutputError]
    outcome: Predictions | Drift
    has_adapter: bool
    tokens: int
    windows: int
    context: int

    @property
    def total(self) -> OutputError:
        """All layers together."""
        errors = self.layers.values()
        return OutputError(
            sum(e.squared_output for e in errors),
            sum(e.squared_base for e in errors),
            sum(e.squared_error for e in errors),
        )


@transformers_models.silenced()
def compare(
    base: BaseModel,
    reference: Path,
    names: Sequence[str],
    adapter_dir: str | None,
    texts: Sequence[Path],
    *,
    tokens: int,
    context: int | None,
    lines: bool,
    threads: int,
    say: Callable[[str], None],
) -> Comparison:
    """The converted `base` beside the full-precision model in `reference`; `names` are the quantized weights, and
    `adapter_dir` is the folder of its adapter as its report has it.

    Everything is computed in float32, in the memory of both models. Raises MismatchError where they are not the same
    model, InputError for a text or a tokenizer that gives no tokens. For `tokens`, `context` and `lines` see
    `loftq_cli.activations.text_windows`.
    """
    import torch

    read = [read_text(path) for path in texts]
    with BaseModel.open(reference) as original:
        if original.quantized:
            what = "is quantized itself"
            raise MismatchError(what, file=original.path, hint="--reference the full-precision checkpoint")
        config, tokenizer = (
            transformers_models.model_config(original.folder),
            transformers_models.tokenizer(original.folder),
        )
        windows = text_windows(
            read,
            tokenizer,
            tokens=tokens,
            context=context,
            lines=lines,
            longest=transformers_models.longest_input(config, tokenizer),
            vocabulary=transformers_models.vocabulary_size(config),
        )
        pairs = load_adapter_pairs(base, names, adapter_dir)
        whole = _model(original, original.folder, config)
        converted = _model(base, original.folder, config)
    nbytes = sum(p.nbytes for model in (whole, converted) for p in model.parameters())
    say(f"both models are in memory, {nbytes / 1e9:.2f} GB in float32; {windows.count} windows of {windows.longest}")
    called = base.loaded_names()
    layers = [_Layer.of(whole, converted, base, name, module_of(called[name]), pairs.get(name)) for name in names]
    meter: _Meter = _PredictionMeter() if transformers_models.predicts_next_token(whole) else _DriftMeter()
    done = 0
    with torch_threads(threads), torch.no_grad():
        for batch in windows.batches(_BATCH_TOKENS):
            feed = transformers_models.text_inputs(config, batch)
            with _measuring(layers):
                meter.start(whole, feed)
            meter.add(0, converted, feed)
            if pairs:
                with _adapted(layers):
                    meter.add(1, converted, feed)
            done += len(batch)
            say(f"[{done}/{windows.count}] windows")
    errors = {layer.name: layer.error() for layer in layers if layer.is_read}
    return Comparison(
        errors, meter.outcome(has_adapter=bool(pairs)), bool(pairs), windows.tokens, windows.count, windows.longest
    )


def _model(base: BaseModel, reference: Path, config: Any) -> Any:
    """The model of the reference's config with the weights of `base`, decoded."""
    from loftq_cli.activations.streamed_model import StreamedModel

    def load(name: str) -> torch.Tensor:
        if name not in base.quantized:
            return base.load(name)
        matrix = base.matrix(name)
        return matrix.T.contiguous() if base.quantized[name].transposed else matrix

    model = transformers_models.empty_model(reference, config)
    return StreamedModel(model, base.path, load, transformers_models.loaded_weights(model, base.tensors)).load_all()


class _Layer:
    """One quantized linear in both models, and sums over what it reads and gives in the original."""

    def __init__(self, name: str, original: Any, converted: Any, pair: LoraPair | None, *, transposed: bool) -> None:
        self.name, self.original, self.converted = name, original, converted
        self._pair, self._transposed = pair, transposed
        self._sums, self.is_read = [0.0, 0.0, 0.0], False

    @classmethod
    def of(cls, whole: Any, converted: Any, base: BaseModel, name: str, module: str, pair: LoraPair | None) -> _Layer:
        """Raises MismatchError where the models have no such linear."""
        modules = dict(whole.named_modules())
        if module not in modules or not hasattr(modules[module], "weight"):
            raise MismatchError("is no layer of the reference", file=base.path, tensor=name)
        transposed = base.family.is_transposed(module_of(name))
        return cls(name, modules[module], converted.get_submodule(module), pair, transposed=transposed)

    def measure(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """Add what the original's layer gives of x [..., in]."""
        from torch.nn import functional

        self.is_read = True
        rows = x.reshape(-1, x.shape[-1])
        difference = self.converted.weight - self.original.weight
        of_base = functional.linear(rows, difference.T if self._transposed else difference)
        of_adapter = self.added(rows)
        bias = self.original.bias
        exact = (output if bias is None else output - bias).reshape(of_base.shape)
        of_both = of_base if of_adapter is None else of_base + of_adapter
        for place, values in enumerate((exact, of_base, of_both)):
            self._sums[place] += float(values.double().square().sum())

    def added(self, x: torch.Tensor) -> torch.Tensor | None:
        """s·B·A·x, where there is an adapter."""
        from torch.nn import functional

        if self._pair is None:
            return None
        size = self._pair.group_size
        read = x if size == 1 else x.reshape(*x.shape[:-1], x.shape[-1] // size, size).sum(-1)
        lora_A, lora_B = self._pair.lora_A.float(), self._pair.lora_B.float()
        return functional.linear(functional.linear(read, lora_A), lora_B) * self._pair.scaling

    def error(self) -> OutputError:
        """Raises NumericError for sums that are not finite."""
        if not all(map(math.isfinite, self._sums)):
            raise NumericError("its output is not finite on this text", tensor=self.name)
        return OutputError(*self._sums)


@contextmanager
def _measuring(layers: Sequence[_Layer]) -> Iterator[None]:
    def hook(layer: _Layer) -> Callable[..., None]:
        return lambda module, args, kwargs, output: layer.measure(_input(args, kwargs), output)

    with _hooked([(layer.original, hook(layer)) for layer in layers]):
        yield


@contextmanager
def _adapted(layers: Sequence[_Layer]) -> Iterator[None]:
    """The converted model with its adapter."""

    def hook(layer: _Layer) -> Callable[..., Any]:
        def add(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
            added = layer.added(_input(args, kwargs))
            return output if added is None else output + added

        return add

    with _hooked([(layer.converted, hook(layer)) for layer in layers]):
        yield


@contextmanager
def _hooked(hooks: Sequence[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input(args: tuple[torch.Tensor, ...], kwargs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a linear is called with, whether by its place or by its name."""
    return args[0] if args else next(iter(kwargs.values()))


class _Meter:
    """Compares what a model gives with what the original gave; the first converted one is the base alone."""

    def start(self, model: Any, feed: Mapping[str, torch.Tensor]) -> None:
        raise NotImplementedError

    def add(self, which: int, model: Any, feed: Mapping[str, torch.Tensor]) -> None:
        raise NotImplementedError

    def outcome(self, *, has_adapter: bool) -> Predictions | Drift:
        raise NotImplementedError


class _PredictionMeter(_Meter):
    """Perplexity and KL over all tokens but the first of each window."""

    def __init__(self) -> None:
        self._tokens, self._nats, self._of, self._kl = 0, 0.0, [0.0, 0.0], [0.0, 0.0]

    def start(self, model: Any, feed: Mapping[str, torch.Tensor]) -> None:
        self._log = self._predicted(model, feed)
        self._nats += self._cost(self._log, feed)
        self._tokens += self._log.shape[0] * self._log.shape[1]

    def add(self, which: int, model: Any, feed: Mapping[str, torch.Tensor]) -> None:
        found = self._predicted(model, feed)
        self._of[which] += self._cost(found, feed)
        self._kl[which] += float((self._log.exp() * (self._log - found)).sum())

    def outcome(self, *, has_adapter: bool) -> Predictions:
        last = int(has_adapter)
        return Predictions(
            math.exp(self._nats / self._tokens),
            math.exp(self._of[0] / self._tokens),
            math.exp(self._of[last] / self._tokens),
            self._kl[0] / self._tokens,
            self._kl[last] / self._tokens,
        )

    @staticmethod
    def _predicted(model: Any, feed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logarithms of probabilities [windows, context - 1, vocabulary]."""
        logits: torch.Tensor = model(**feed).logits[:, :-1]
        return logits.double().log_softmax(-1)  # of two that are nearly the same, float32 leaves no difference

    @staticmethod
    def _cost(log: torch.Tensor, feed: Mapping[str, torch.Tensor]) -> float:
        """Nats, summed."""
        return -float(log.gather(-1, feed["input_ids"][:, 1:, None]).sum())


class _DriftMeter(_Meter):
    """The angle between pooled last hidden states."""

    def __init__(self) -> None:
        self._windows, self._drift = 0, [0.0, 0.0]

    def start(self, model: Any, feed: Mapping[str, torch.Tensor]) -> None:
        self._pooled = self._answer(model, feed)
        self._windows += len(self._pooled)

    def add(self, which: int, model: Any, feed: Mapping[str, torch.Tensor]) -> None:
        from torch.nn import functional

        similar = functional.cosine_similarity(self._pooled, self._answer(model, feed), dim=-1)
        self._drift[which] += float((1 - similar).sum())

    def outcome(self, *, has_adapter: bool) -> Drift:
        return Drift(self._drift[0] / self._windows, self._drift[int(has_adapter)] / self._windows)

    @staticmethod
    def _answer(model: Any, feed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float64 [windows, hidden]: nearly 1 is taken from 1."""
        given = model(**feed, output_hidden_states=True)
        last = given.get("last_hidden_state")
        if last is None:
            states = given.get("decoder_hidden_states") or given.get("hidden_states")
            if not states:
                raise InputError("the model shows no hidden states to compare", file=model.config.name_or_path)
            last = states[-1]
        pooled: torch.Tensor = last.double().mean(1)
        return pooled
