"""What transformers knows and this tool does not: model classes, tokenizers, and the names and forms that the weights
of a checkpoint get in a loaded model. The one place that imports it, and only when asked; it uses no network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import InputError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

_INSTALL, _UPGRADE = "pip install transformers accelerate", "pip install --upgrade transformers"
# What transformers raises for a folder that it does not understand.
_FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)


def check_installed() -> None:
    """Raises UsageError where transformers is not installed, or is older than its loader of converted weights."""
    try:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
        from transformers import conversion_mapping, core_model_loading  # noqa: F401
    except ImportError:
        hint = _UPGRADE if find_spec("transformers") and find_spec("accelerate") else _INSTALL
        raise UsageError("this needs transformers 5 and accelerate", hint=hint) from None


@dataclass
class _Silence:
    """How many blocks want transformers silent, and how loud the library was before the first of them began."""

    lock: Lock = field(default_factory=Lock)
    blocks: int = 0
    verbosity: int = 0


_SILENCE = _Silence()
_BUILDING = Lock()  # accelerate replaces methods of torch's modules while a model is built without its weights


@contextmanager
def silenced() -> Iterator[None]:
    """transformers logs errors only, for the length of the block; then as before. Raises as `check_installed` does."""
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


def model_config(directory: Path) -> Any:
    """The config of the model in `directory`, as transformers has it. Raises InputError for one it does not know."""
    from transformers import AutoConfig

    with _reported(directory / "config.json", "transformers cannot read it"):
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def tokenizer(directory: Path) -> Any:
    """The tokenizer in `directory`. Raises InputError where there is none."""
    from transformers import AutoTokenizer

    with _reported(directory, "holds no tokenizer that transformers reads", "copy the model's tokenizer files into it"):
        found = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if not found.get_vocab():
        raise InputError("holds no tokenizer", file=directory, hint="copy the model's tokenizer files into it")
    return found


def longest_input(config: Any, tokenizer: Any) -> int | None:
    """How many tokens the model takes at most; None where nothing says so."""
    text = config.get_text_config()
    limits = [getattr(text, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len")]
    limits.append(tokenizer.model_max_length)  # of RoBERTa, fewer than it has positions
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 30]
    return min(known, default=None)


def vocabulary_size(config: Any) -> int | None:
    """How many token ids the model has a row for; None where nothing says so."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def empty_model(directory: Path, config: Any) -> Any:
    """The model of `config` in float32 and evaluation mode: parameters on the meta device, buffers as it computes them.

    Raises InputError where transformers has no such class, UsageError for a model that takes something else than text.
    """
    from accelerate import init_empty_weights

    kind = _model_class(directory, config)
    config.use_cache = False
    with _reported(directory / "config.json", "transformers cannot build the model"):
        with _BUILDING, init_empty_weights(include_buffers=False):
            model = kind(config)
        model.float().eval().requires_grad_(False)
        model.tie_weights()
    if model.main_input_name != "input_ids":
        what = f"takes {model.main_input_name} and not text, which is all that is fed to it here"
        raise UsageError(what, file=directory)
    return model


def predicts_next_token(model: Any) -> bool:
    """Whether the model is a language model that sees what comes before a token, and nothing of what follows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if getattr(model.config, "is_encoder_decoder", False):
        return False
    name = type(model).__name__
    # Models of images and text are no causal ones by name, and on text alone they are.
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith("ForConditionalGeneration")


def text_inputs(config: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model is called with for windows of token ids [windows, context]: a decoder beside an encoder gets the
    same text, shifted by one.
    """
    if not getattr(config, "is_encoder_decoder", False):
        return {"input_ids": ids}
    starts = [getattr(config, key, None) for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id")]
    shifted = ids.roll(1, dims=1)
    shifted[:, 0] = next((start for start in starts if isinstance(start, int)), 0)
    return {"input_ids": ids, "decoder_input_ids": shifted}


@dataclass(frozen=True, slots=True)
class LoadedWeight:
    """Tensors of a checkpoint that become tensors of a model together: one and one, or several that are fused.

    sources   names in the checkpoint, in the order in which they are joined
    targets   names in the model
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    patterns: tuple[str, ...]
    converter: Any

    def convert(self, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        """The tensors of the model by name, from those of the checkpoint by name."""
        if self.converter is None:
            return {self.targets[0]: tensors[self.sources[0]]}
        converter = deepcopy(self.converter)
        for source, pattern in zip(self.sources, self.patterns, strict=True):
            converter.add_tensor(self.targets[0], source, pattern, tensors[source])
        made = converter.convert(self.targets[0], model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def loaded_weights(model: Any, names: Iterable[str]) -> dict[str, LoadedWeight]:
    """For each tensor of `model`, what of a checkpoint with tensors called `names` makes it, as `from_pretrained` has
    it. What the checkpoint does not give is not in it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    own = model.state_dict()
    parts: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if target not in own and name in own:
            target, pattern = name, None
        if target in own:
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
    targets = (first.replace(converter.target_patterns[0], other) for other in converter.target_patterns[1:])
    names, patterns = tuple(name for name, _ in sources), tuple(str(pattern) for _, pattern in sources)
    return LoadedWeight(names, (first, *targets), patterns, converter)


def _model_class(directory: Path, config: Any) -> Any:
    import transformers

    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        what = f"names the class {names[0]}, which transformers has not" if names else "names no class of model"
        raise InputError(what, file=directory / "config.json", hint="models that bring code of their own are not run")
    return kind


@contextmanager
def _reported(file: Path, what: str, hint: str | None = None) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        said = str(error).strip().splitlines()
        raise InputError(f"{what}: {said[0] if said else type(error).__name__}", file=file, hint=hint) from None
