"""Builds the table of names in loaded models, loaded_names.json, from the installed transformers.

python tests/support/loader_table.py          writes the table
python tests/support/loader_table.py --check  exits with 1 when the table in the package is another one
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import conversion_mapping, core_model_loading
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto

TABLE = Path(__file__).parents[2] / "loftq_cli/model/loaded_names.json"


def class_names() -> list[str]:
    """Names of all classes that an auto class of transformers loads."""
    tables = [v for k, v in vars(modeling_auto).items() if k.startswith("MODEL_") and k.endswith("MAPPING_NAMES")]
    found: set[str] = set()
    for classes in (c for table in tables for c in table.values()):
        found.update([classes] if isinstance(classes, str) else classes)
    return sorted(name for name in found if isinstance(getattr(transformers, name, None), type))


def transform_row(transform: Any) -> list[Any] | None:
    """A transform as [kind, source patterns, target patterns]; None for a kind that the reader does not know."""
    kinds = {
        core_model_loading.WeightRenaming: "rename",
        core_model_loading.PrefixChange: "rename",
        core_model_loading.WeightConverter: "convert",
    }
    kind = kinds.get(type(transform))
    return None if kind is None else [kind, list(transform.source_patterns), list(transform.target_patterns)]


def all_transforms() -> dict[str, list[list[Any]] | None]:
    """Class name or `model_type` -> rows of transforms; None where one of the transforms has no row."""
    conversion_mapping.get_checkpoint_conversion_mapping("legacy")
    found: dict[str, list[list[Any]] | None] = {}
    for name, transforms in conversion_mapping._checkpoint_conversion_mapping_cache.items():
        rows = [transform_row(transform) for transform in transforms]
        found[name] = None if None in rows else [row for row in rows if row is not None]
    return found


def _parts_of(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if part is not None and not isinstance(part, dict):
            yield path + key, part
            yield from _parts_of(part, f"{path}{key}.")


def _key_of(config: Any, whole: Any) -> str:
    """The path in the config `whole` of the part `config` of a submodel; "" for no part of its own."""
    parts = list(_parts_of(whole))
    same = [key for key, part in parts if part is config]
    like = [key for key, part in parts if type(part) is type(config)]
    return (same or (like if len(like) == 1 else []) or [""])[0]


def _children(model: Any) -> list[str]:
    own = [*(name for name, _ in model.named_children()), *model._parameters, *model._buffers]
    return sorted(set(own))


# Values for configs whose defaults build no model.
_VALUES: tuple[dict[str, Any], ...] = (
    {},
    {"vocab_size": 64},
    {"head_dim": 64},
    {"num_key_value_heads": 1},
    {"prediction_length": 4},
    {"is_decoder": True},
)


def build(name: str, **more: Any) -> Any:
    """The class called `name` with the defaults of the config, on the meta device; None where that fails.

    more   values of the config
    """
    kind = getattr(transformers, name)
    for values in _VALUES:
        try:
            with warnings.catch_warnings(), torch.device("meta"):
                warnings.simplefilter("ignore")
                return kind(kind.config_class(**values, **more))
        except Exception:
            continue
    return None


def class_row(name: str, known: Iterable[str]) -> list[Any] | None:
    """The row of a class, [model_type, prefix, children, inner, submodels]; None for a class that cannot be built from
    the defaults of the config.

    known   class names and model types with transforms
    """
    model = build(name)
    if model is None:
        return None
    prefix, submodels, seen = model.base_model_prefix or "", [], set()
    for path, part in model.named_modules():
        if not path or not isinstance(part, PreTrainedModel):
            continue
        key = _key_of(part.config, model.config)
        model_type = part.config.model_type or ""
        outermost = bool(key) and not any(k == key and path.startswith(f"{p}.") for p, k in seen)
        if outermost or type(part).__name__ in known or model_type in known:
            submodels.append([path, type(part).__name__, model_type, key])
            seen.add((path, key))
    inner = getattr(model, prefix, None) if prefix else None
    inside = _children(inner) if isinstance(inner, torch.nn.Module) else []
    return [model.config.model_type or "", prefix, " ".join(_children(model)), " ".join(inside), submodels]


_TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_LABELS = 11  # no width of a config
_WIDTHS = (
    *("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "emb_dim", "embedding_size"),
    *("pooler_hidden_size", "classifier_proj_size"),
)


def head_row(name: str) -> list[list[Any]] | None:
    """The tensors of the head of a class for a task: [name, side, ...] with each side "labels", a key of the config, or
    2 for the ends of an answer. None for a class with another form of head.
    """
    model = build(name, num_labels=_LABELS)
    if model is None:
        return None
    config = model.config.to_dict()
    configs, ends = (config, config.get("text_config") or {}), name.endswith("QuestionAnswering")

    def side(size: int) -> Any:
        if size == _LABELS:
            return "labels"
        return 2 if ends and size == 2 else next((key for key in _WIDTHS for c in configs if c.get(key) == size), None)

    prefix = f"{model.base_model_prefix}."
    own = [(key, value.shape) for key, value in model.named_parameters() if not key.startswith(prefix)]
    rows = [[key, *map(side, shape)] for key, shape in own]
    return rows if rows and not any(None in row for row in rows) else None


def build_table(names: Iterable[str] | None = None) -> dict[str, Any]:
    """The table, of the classes called `names` or of all classes."""
    transformers.utils.logging.set_verbosity_error()
    transforms = all_transforms()
    rows = {name: class_row(name, transforms) for name in (class_names() if names is None else names)}
    unknown = {name for name, found in transforms.items() if found is None}

    def is_told(name: str, row: list[Any]) -> bool:
        parts = [(name, row[0]), *((part[1], part[2]) for part in row[4])]
        return not any(unknown & set(part) for part in parts)

    base = modeling_auto.MODEL_MAPPING_NAMES
    classes = {name: row for name, row in rows.items() if row is not None and is_told(name, row)}
    return {
        "transformers": transformers.__version__,
        "transforms": {name: found for name, found in sorted(transforms.items()) if found is not None},
        "base_classes": {k: v if isinstance(v, str) else v[0] for k, v in sorted(base.items())},
        "classes": classes,
        "heads": {name: row for name in classes if name.endswith(_TASKS) and (row := head_row(name)) is not None},
    }


def written(table: dict[str, Any]) -> str:
    """The text of the file: a line for each entry."""

    def lines(entries: dict[str, Any]) -> str:
        rows = (f"  {json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in entries.items())
        return "{\n" + ",\n".join(rows) + "\n }"

    parts = (f" {json.dumps(k)}: {lines(v) if isinstance(v, dict) else json.dumps(v)}" for k, v in table.items())
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    text = written(build_table())
    if "--check" in sys.argv:
        sys.exit(TABLE.read_text(encoding="utf-8") != text)
    TABLE.write_text(text, encoding="utf-8")
