"""Model classes and tokenizers of transformers, and the names and forms of a checkpoint's weights in a loaded model. No
other module but loader_question imports transformers. Every import waits for a call, and nothing uses the network.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import InputError, LoftqError, UsageError, is_memory_shortage, printable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from loftq_cli.checkpoint.source import Checkpoint

_INSTALL, _UPGRADE = "pip install transformers accelerate", "pip install --upgrade transformers"


def check_installed() -> None:
    """Raises UsageError when transformers or accelerate is not installed, or transformers is older than 5 and cannot
    convert weights while loading.
    """
    try:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
        from transformers import conversion_mapping, core_model_loading  # noqa: F401
    except ImportError:
        hint = _UPGRADE if find_spec("transformers") and find_spec("accelerate") else _INSTALL
        raise UsageError("this needs transformers 5 and accelerate", hint=hint) from None


def library_versions() -> list[str]:
    """Versions of the libraries with an effect on tokens and on forwards. Raises UsageError without the libraries."""
    check_installed()
    return [f"{name} {version(name)}" for name in ("transformers", "tokenizers", "torch")]


def model_directory(checkpoint: Checkpoint) -> Path:
    """The folder with the config of a checkpoint. Raises InputError for a weight file without a config.

    >>> from loftq_cli.checkpoint.source import open_checkpoint
    >>> from loftq_cli.model.builtin import resolve_model
    >>> model_directory(open_checkpoint(resolve_model("builtin:tiny-llama"))).name
    'tiny-llama'
    """
    if checkpoint.directory is None:
        raise InputError("has no config.json beside it", file=checkpoint.path, hint="give the model's folder")
    return checkpoint.directory


@dataclass
class _Silence:
    """The state of `silence`, shared by all threads.

    lock        guards the fields below
    blocks      number of running `silence` blocks
    verbosity   log level of transformers before the first block
    """

    lock: Lock = field(default_factory=Lock)
    blocks: int = 0
    verbosity: int = 0


_SILENCE = _Silence()
_BUILDING = Lock()  # accelerate replaces methods of torch's modules while a model is built without its weights


@contextmanager
def silence() -> Iterator[None]:
    """Let transformers log errors only until the context ends. Blocks of several threads may overlap: the last block
    restores the log level. Raises UsageError when transformers or accelerate is not installed.
    """
    check_installed()
    from transformers.utils import logging

    with _SILENCE.lock:
        if not _SILENCE.blocks:
            _SILENCE.verbosity = logging.get_verbosity()
            logging.set_verbosity_error()
        _SILENCE.blocks += 1
    try:
        yield
    finally:
        with _SILENCE.lock:
            _SILENCE.blocks -= 1
            if not _SILENCE.blocks:
                logging.set_verbosity(_SILENCE.verbosity)


def load_config(directory: Path) -> Any:
    """The config of the model in `directory`, an object of transformers.

    Raises InputError for a config that transformers cannot read.

    >>> from loftq_cli.model.builtin import resolve_model
    >>> load_config(resolve_model("builtin:tiny-llama")).model_type
    'llama'
    """
    from transformers import AutoConfig

    with report_failures(directory / "config.json", "transformers cannot read it"):
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        config.get_text_config()
    return config


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of the model in `directory`, an object of transformers.

    Raises InputError when `directory` has no tokenizer, or a tokenizer without a vocabulary.

    >>> from loftq_cli.model.builtin import resolve_model
    >>> len(load_tokenizer(resolve_model("builtin:tiny-llama"))("A text.")["input_ids"])
    7
    """
    from transformers import AutoTokenizer

    hint = "copy the model's tokenizer files into it"
    with report_failures(directory, "holds no tokenizer that transformers reads", hint):
        loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if not loaded.get_vocab():
        raise InputError("holds no tokenizer", file=directory, hint=hint)
    return loaded


def longest_input(config: Any, tokenizer: Any) -> int | None:
    """The number of tokens that the model takes at most: the least limit in the config and the tokenizer. None when
    neither has a limit.

    >>> from loftq_cli.model.builtin import resolve_model
    >>> model = resolve_model("builtin:tiny-llama")
    >>> longest_input(load_config(model), load_tokenizer(model))
    512
    """
    text = config.get_text_config()
    limits = [getattr(text, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len")]
    limits.append(tokenizer.model_max_length)  # RoBERTa: less than the number of positions
    bounds = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 30]
    return min(bounds, default=None)


def vocabulary_size(config: Any) -> int | None:
    """The number of token ids with a row in the embedding, as the config has the number; None when the config has none.

    >>> from loftq_cli.model.builtin import resolve_model
    >>> vocabulary_size(load_config(resolve_model("builtin:tiny-llama")))
    288
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def build_empty_model(directory: Path, config: Any) -> Any:
    """The model of `config` in float32 and evaluation mode: parameters on the meta device, buffers with their values.

    directory   the model's folder, for errors
    config      the result of `load_config`; `use_cache` is set to False

    Raises InputError when transformers lacks the class or cannot build the model, UsageError for a model with an input
    other than text.

    >>> from loftq_cli.model.builtin import resolve_model
    >>> folder = resolve_model("builtin:tiny-llama")
    >>> build_empty_model(folder, load_config(folder)).lm_head.weight.is_meta
    True
    """
    from accelerate import init_empty_weights

    kind = model_class(directory, config)
    config.use_cache = False
    with report_failures(directory / "config.json", "transformers cannot build the model"):
        with _BUILDING, init_empty_weights(include_buffers=False):
            model = kind(config)
        model.float().eval().requires_grad_(False)
        model.tie_weights()
    if model.main_input_name != "input_ids":
        message = f"takes {model.main_input_name} and not text, which is all that is fed to it here"
        raise UsageError(message, file=directory)
    return model


def predicts_next_token(model: Any) -> bool:
    """True for a causal language model: the prediction of a token depends on earlier tokens only.

    >>> from loftq_cli.model.builtin import resolve_model
    >>> folder = resolve_model("builtin:tiny-llama")
    >>> predicts_next_token(build_empty_model(folder, load_config(folder)))
    True
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if getattr(model.config, "is_encoder_decoder", False):
        return False
    name = type(model).__name__
    # Models of images and text have no causal class name, and are causal on text alone.
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith("ForConditionalGeneration")


def fills_masks(model: Any) -> bool:
    """True for a masked language model: the model predicts tokens behind masks.

    >>> from loftq_cli.model.builtin import resolve_model
    >>> folder = resolve_model("builtin:tiny-llama")
    >>> fills_masks(build_empty_model(folder, load_config(folder)))
    False
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return type(model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()


def continue_tokens(
    model: Any, begin: torch.Tensor, length: int, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Continue token ids int64 [windows, tokens] up to `length` tokens by the largest changed logits: int64
    [windows, length]. The end of a text does not end a window.

    model    a causal language model with all weights in memory
    change   takes the logits of the next token [windows, vocabulary], float32, and returns changed logits
    """
    from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

    class Change(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return change(scores.float())

    settings = GenerationConfig(
        do_sample=False, max_length=length, min_length=length, use_cache=True, eos_token_id=None, pad_token_id=0
    )
    processors = LogitsProcessorList([Change()])
    tokens: torch.Tensor = model.generate(begin, generation_config=settings, logits_processor=processors)
    return tokens


def text_inputs(config: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keyword arguments of a forward for windows of token ids, int64 [windows, context]. The decoder of an
    encoder-decoder model gets the text of the encoder, shifted by a token, after the start token of the config.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=0)
    >>> text_inputs(config, torch.tensor([[5, 6, 7]]))["decoder_input_ids"]
    tensor([[0, 5, 6]])
    """
    if not getattr(config, "is_encoder_decoder", False):
        return {"input_ids": ids}
    starts = [getattr(config, key, None) for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id")]
    shifted = ids.roll(1, dims=1)
    shifted[:, 0] = next((start for start in starts if isinstance(start, int)), 0)
    return {"input_ids": ids, "decoder_input_ids": shifted}


@dataclass(frozen=True, slots=True)
class LoadedWeight:
    """Checkpoint tensors that become tensors of a loaded model: a renamed tensor, or several tensors that transformers
    fuses.

    sources     names in the checkpoint, in the order of fusing
    targets     names in the model
    patterns    the converter's pattern for each source; empty without a converter
    converter   a WeightConverter of transformers; None for a tensor that keeps its form
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    patterns: tuple[str, ...]
    converter: Any

    def convert(self, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        """Turn the checkpoint tensors `tensors`, by source name, into tensors of `model`, by target name."""
        if self.converter is None:
            return {self.targets[0]: tensors[self.sources[0]]}
        converter = deepcopy(self.converter)
        for source, pattern in zip(self.sources, self.patterns, strict=True):
            converter.add_tensor(self.targets[0], source, pattern, tensors[source])
        converted = converter.convert(self.targets[0], model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def match_weights(model: Any, names: Iterable[str]) -> dict[str, LoadedWeight]:
    """Map the name of each tensor of `model` to the checkpoint tensors that `from_pretrained` makes the tensor from.

    model   see `build_empty_model`
    names   names of the tensors in the checkpoint

    Tensors of the model without a source in the checkpoint are absent.

    >>> from loftq_cli.model.builtin import resolve_model
    >>> folder = resolve_model("builtin:tiny-llama")
    >>> model = build_empty_model(folder, load_config(folder))
    >>> match_weights(model, ["model.norm.weight", "unknown"])["model.norm.weight"].sources
    ('model.norm.weight',)
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = model.state_dict()
    parts: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = name, None
        if target in state:
            parts.setdefault(target, []).append((name, pattern))
    return {
        target: weight
        for first, sources in parts.items()
        for weight in [_loaded_weight(first, sources, converter_of)]
        for target in weight.targets
    }


def _loaded_weight(
    first: str, sources: Sequence[tuple[str, str | None]], converter_of: Mapping[str, Any]
) -> LoadedWeight:
    pattern = sources[0][1]
    if pattern is None:
        return LoadedWeight((sources[0][0],), (first,), (), None)
    converter = converter_of[pattern]
    targets = (first.replace(converter.target_patterns[0], pattern) for pattern in converter.target_patterns[1:])
    names, patterns = tuple(name for name, _ in sources), tuple(str(pattern) for _, pattern in sources)
    return LoadedWeight(names, (first, *targets), patterns, converter)


def model_class(directory: Path, config: Any) -> Any:
    """The class in the config: a model of transformers for configs of this kind, and nothing else of transformers.

    Raises InputError for a config without a class, and with any other class.

    >>> from loftq_cli.model.builtin import resolve_model
    >>> folder = resolve_model("builtin:tiny-llama")
    >>> model_class(folder, load_config(folder)).__name__
    'LlamaForCausalLM'
    """
    import transformers

    names, file = config.architectures or [], directory / "config.json"
    hint = "models that bring code of their own are not run"
    if not names:
        raise InputError("names no class of model", file=file, hint=hint)
    # transformers builds classes from docstrings, which `python -OO` leaves out.
    without = "run without PYTHONOPTIMIZE=2" if sys.flags.optimize > 1 else None
    with report_failures(file, f"transformers cannot import {printable(names[0], 80)}", without):
        kind = getattr(transformers, str(names[0]), None)
    if kind is None:
        raise InputError(f"names the class {names[0]}, which transformers has not", file=file, hint=hint)
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    wanted = getattr(kind, "config_class", None) if is_model else None
    if not (isinstance(wanted, type) and isinstance(config, wanted)):
        message = f"names the class {names[0]}, which is no model of transformers for a {config.model_type} config"
        raise InputError(message, file=file, hint="copy the model's config.json into it again")
    return kind


@contextmanager
def report_failures(file: Path, message: str, hint: str | None = None) -> Iterator[None]:
    """Turn every exception of a library inside the `with` block into an InputError about `file`: configs and tokenizers
    of strangers break libraries in every way. Errors of this package and shortages of memory pass.

    >>> with report_failures(Path("config.json"), "the model cannot be built"):
    ...     1 / 0
    Traceback (most recent call last):
    loftq_cli.errors.InputError: config.json: the model cannot be built: division by zero
    """
    try:
        yield
    except LoftqError:
        raise
    except Exception as error:
        if is_memory_shortage(error):
            raise
        raise InputError(f"{message}: {reason_of(error)}", file=file, hint=hint) from None


def reason_of(error: BaseException) -> str:
    """The first line of the text of an exception; the name of the class for an exception without a text.

    >>> reason_of(ValueError("too many heads\\nin the config")), reason_of(AssertionError())
    ('too many heads', 'AssertionError')
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
