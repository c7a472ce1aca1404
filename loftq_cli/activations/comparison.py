"""A converted model beside the original model, on a text: the output error of each quantized layer, and the effect of
all layers on the output of the model. Holds both models in memory and changes no weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.activations import transformers_models
from loftq_cli.activations.foreign_tokenizer import cut_windows
from loftq_cli.activations.layer_outputs import ComparedLayer, OutputError, add_adapters, measure_layers
from loftq_cli.activations.text_windows import read_text
from loftq_cli.adapter.beside import load_adapter_pairs
from loftq_cli.errors import InputError, MismatchError
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import module_of
from loftq_cli.runtime.workers import torch_threads

if TYPE_CHECKING:
    import torch

_BATCH_TOKENS = 1024  # per forward: memory holds a few matrices [tokens, vocabulary] in float64
_DOES_NOT_RUN = "the model of its config does not run"
_BASE, _ADAPTED = 0, 1  # places of the two converted models in the sums of a meter


@dataclass(frozen=True, slots=True)
class Predictions:
    """Next-token predictions of a language model on the text, over all tokens but the first of each window. Without an
    adapter, the adapted figures equal the base figures.

    perplexity           of the original model
    base_perplexity      of the base alone
    adapted_perplexity   of base and adapter
    base_kl              mean of KL(original ‖ base) per token, in nats
    adapted_kl           mean of KL(original ‖ base and adapter) per token, in nats
    """

    perplexity: float
    base_perplexity: float
    adapted_perplexity: float
    base_kl: float
    adapted_kl: float


@dataclass(frozen=True, slots=True)
class Drift:
    """The change of an encoder's output: 1 − cosine similarity to the original, averaged over windows. The output of a
    window is the mean of the last hidden states over tokens.

    base      drift of the base alone
    adapted   drift of base and adapter; equal to `base` without an adapter
    """

    base: float
    adapted: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The errors of a converted model on a text.

    layers        name of the weight in the converted directory -> output error; layers without text are absent
    outcome       Predictions for a language model, Drift for another model
    has_adapter   whether the converted directory has an adapter
    tokens        tokens over all windows
    windows       number of windows
    context       tokens of the longest window
    """

    layers: Mapping[str, OutputError]
    outcome: Predictions | Drift
    has_adapter: bool
    tokens: int
    windows: int
    context: int

    @property
    def total(self) -> OutputError:
        """The sums over all layers."""
        errors = self.layers.values()
        return OutputError(
            sum(e.squared_output for e in errors),
            sum(e.squared_base for e in errors),
            sum(e.squared_error for e in errors),
        )


@transformers_models.silence()
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
    """Run the converted `base` and the original on windows of a text, and compare the outputs.

    base                     the converted model, open
    reference                the original: a checkpoint with config.json and a tokenizer
    names                    names of the quantized weights
    adapter_dir              folder of the adapter according to the report; None without a report
    texts                    UTF-8 files
    tokens, context, lines   see `cut_windows`
    threads                  number of torch's threads
    say                      takes a line about the progress

    Both models are in memory and compute in float32. Raises MismatchError when the original is quantized or lacks a
    layer of `base`; InputError for a text, a tokenizer or a model that cannot be read; UsageError for a context that
    the model does not take; NumericError when the output of a layer is not finite.
    """
    import torch

    contents = [read_text(path) for path in texts]
    with BaseModel.open(reference) as original:
        if original.quantized:
            hint = "--reference the full-precision checkpoint"
            raise MismatchError("is quantized itself", file=original.path, hint=hint)
        folder = original.folder
        config = transformers_models.load_config(folder)
        windows = cut_windows(folder, config, contents, tokens=tokens, context=context, lines=lines)
        pairs = load_adapter_pairs(base, names, adapter_dir)
        original_model = _load_model(original, folder, config)
        converted_model = _load_model(base, folder, config)
    nbytes = sum(p.nbytes for model in (original_model, converted_model) for p in model.parameters())
    say(f"both models are in memory, {nbytes / 1e9:.2f} GB in float32; {windows.count} windows of {windows.longest}")
    loaded_names = base.loaded_names()
    layers = [
        ComparedLayer.find(original_model, converted_model, base, name, module_of(loaded_names[name]), pairs.get(name))
        for name in names
    ]
    meter: _Meter = _PredictionMeter() if transformers_models.predicts_next_token(original_model) else _DriftMeter()
    done = 0
    with torch_threads(threads), torch.no_grad():
        for batch in windows.batches(_BATCH_TOKENS):
            feed = transformers_models.text_inputs(config, batch)
            with measure_layers(layers):
                meter.start(original_model, feed)
            meter.add(_BASE, converted_model, feed)
            if pairs:
                with add_adapters(layers):
                    meter.add(_ADAPTED, converted_model, feed)
            done += len(batch)
            say(f"[{done}/{windows.count}] windows")
    errors = {layer.name: layer.error() for layer in layers if layer.is_read}
    return Comparison(
        errors, meter.summarize(has_adapter=bool(pairs)), bool(pairs), windows.tokens, windows.count, windows.longest
    )


def _load_model(base: BaseModel, folder: Path, config: Any) -> Any:
    """The model of `config`, the config of the original in `folder`, with the decoded weights of `base` in float32."""
    from loftq_cli.activations.streamed_model import StreamedModel

    def load(name: str) -> torch.Tensor:
        if name not in base.quantized:
            return base.load(name)
        matrix = base.matrix(name)
        return matrix.T.contiguous() if base.quantized[name].transposed else matrix

    return StreamedModel.of_config(folder, config, base.tensors, base.path, load).load_all()


class _Meter:
    """Compares the output of the converted models with the output of the original, batch by batch."""

    def start(self, model: Any, feed: Mapping[str, torch.Tensor]) -> None:
        """Run the original on a batch, and hold the output until the next batch."""
        raise NotImplementedError

    def add(self, place: int, model: Any, feed: Mapping[str, torch.Tensor]) -> None:
        """Run a converted model on the batch of `start`; `place` is _BASE or _ADAPTED."""
        raise NotImplementedError

    def summarize(self, *, has_adapter: bool) -> Predictions | Drift:
        """The figures over all batches; the adapted figures equal the base figures without an adapter."""
        raise NotImplementedError


class _PredictionMeter(_Meter):
    """Perplexity and KL over all tokens but the first of each window."""

    def __init__(self) -> None:
        self._tokens, self._nats, self._converted_nats, self._kl = 0, 0.0, [0.0, 0.0], [0.0, 0.0]

    def start(self, model: Any, feed: Mapping[str, torch.Tensor]) -> None:
        self._log = self._log_probabilities(model, feed)
        self._nats += self._sum_nats(self._log, feed)
        self._tokens += self._log.shape[0] * self._log.shape[1]

    def add(self, place: int, model: Any, feed: Mapping[str, torch.Tensor]) -> None:
        converted_log = self._log_probabilities(model, feed)
        self._converted_nats[place] += self._sum_nats(converted_log, feed)
        self._kl[place] += float((self._log.exp() * (self._log - converted_log)).sum())

    def summarize(self, *, has_adapter: bool) -> Predictions:
        last = _ADAPTED if has_adapter else _BASE
        return Predictions(
            math.exp(self._nats / self._tokens),
            math.exp(self._converted_nats[_BASE] / self._tokens),
            math.exp(self._converted_nats[last] / self._tokens),
            self._kl[_BASE] / self._tokens,
            self._kl[last] / self._tokens,
        )

    @staticmethod
    def _log_probabilities(model: Any, feed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logarithms of next-token probabilities, float64 [windows, context - 1, vocabulary]."""
        with transformers_models.report_failures(Path(model.config.name_or_path), _DOES_NOT_RUN):
            logits: torch.Tensor = model(**feed).logits[:, :-1]
        return logits.double().log_softmax(-1)  # the difference of two nearly equal logarithms vanishes in float32

    @staticmethod
    def _sum_nats(log: torch.Tensor, feed: Mapping[str, torch.Tensor]) -> float:
        """The sum of −log p over all predicted tokens, in nats."""
        return -float(log.gather(-1, feed["input_ids"][:, 1:, None]).sum())


class _DriftMeter(_Meter):
    """1 − cosine similarity between pooled last hidden states."""

    def __init__(self) -> None:
        self._windows, self._drift = 0, [0.0, 0.0]

    def start(self, model: Any, feed: Mapping[str, torch.Tensor]) -> None:
        self._pooled = self._pool_states(model, feed)
        self._windows += len(self._pooled)

    def add(self, place: int, model: Any, feed: Mapping[str, torch.Tensor]) -> None:
        from torch.nn import functional

        similarity = functional.cosine_similarity(self._pooled, self._pool_states(model, feed), dim=-1)
        self._drift[place] += float((1 - similarity).sum())

    def summarize(self, *, has_adapter: bool) -> Drift:
        last = _ADAPTED if has_adapter else _BASE
        return Drift(self._drift[_BASE] / self._windows, self._drift[last] / self._windows)

    @staticmethod
    def _pool_states(model: Any, feed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The mean of the last hidden states over tokens [windows, hidden]. float64, because `add` subtracts a cosine
        near 1 from 1.
        """
        with transformers_models.report_failures(Path(model.config.name_or_path), _DOES_NOT_RUN):
            outputs = model(**feed, output_hidden_states=True)
        last = outputs.get("last_hidden_state")
        if last is None:
            states = outputs.get("decoder_hidden_states") or outputs.get("hidden_states")
            if not states:
                raise InputError("the model shows no hidden states to compare", file=model.config.name_or_path)
            last = states[-1]
        pooled: torch.Tensor = last.double().mean(1)
        return pooled
