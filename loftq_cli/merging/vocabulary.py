"""A vocabulary that grew in training: the adapter holds every matrix over the vocabulary in full, with more rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from loftq_cli.adapter.naming import VOCABULARY_HEAD
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import kind_of, module_of
from loftq_cli.tensors.headers import TensorRef


@dataclass(frozen=True, slots=True)
class Growth:
    """A grown vocabulary.

    before, rows   number of rows in the base and in the adapter
    names          names in the base of the tensors with a row for each token

    >>> Growth(160, 168, frozenset({"lm_head.weight"})).shape_of("lm_head.weight", (160, 64))
    (168, 64)
    """

    before: int
    rows: int
    names: frozenset[str]

    def shape_of(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the merged tensor `name`; `shape` is the shape in the base."""
        return (self.rows, *shape[1:]) if name in self.names else shape

    def change(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config with the new size of the vocabulary, nested or not."""
        sized = {**config, "vocab_size": self.rows} if config.get("vocab_size") == self.before else dict(config)
        nested = sized.get("text_config")
        return {**sized, "text_config": self.change(nested)} if isinstance(nested, dict) else sized


def find_growth(
    base: BaseModel, whole: Mapping[str, str], tensors: Mapping[str, TensorRef], left: Collection[str] = ()
) -> Growth | None:
    """The growth of the vocabulary of `base`; None unless all tensors over the vocabulary grew to equal rows.

    whole     name in the base -> the adapter's tensor in place of the base's
    tensors   the tensors of the adapter
    left      names in the base that the merged model does not have
    """
    before = vocabulary_size(base)
    if before is None:
        return None
    names = [n for n, ref in base.tensors.items() if n not in left and _is_over_vocabulary(base, ref, before)]
    replaced = {name: tensors[whole[name]].shape for name in names if name in whole}
    is_tied = base.family.ties_embeddings()
    kept = [name for name in names if name not in replaced and not (is_tied and base.tensors[name].alias_of)]
    rows = next((shape[0] for shape in replaced.values() if shape), before)
    grew = all(shape == (rows, *_shape_of(base, name)[1:]) for name, shape in replaced.items())
    if kept or rows <= before or not grew or any(base.family.is_transposed(module_of(name)) for name in names):
        return None
    return Growth(before, rows, frozenset(names))


def vocabulary_size(base: BaseModel) -> int | None:
    """The number of tokens in the config of `base`, nested or not; None for a config without the number."""
    nested = base.config.get("text_config")
    sizes = [part.get("vocab_size") for part in (base.config, nested) if isinstance(part, dict)]
    return next((size for size in sizes if type(size) is int), None)


def is_vocabulary_head(module: str) -> bool:
    """True when `module` names the output layer over the vocabulary.

    >>> is_vocabulary_head("model.lm_head"), is_vocabulary_head("score")
    (True, False)
    """
    return bool(VOCABULARY_HEAD.search(module))


def _is_over_vocabulary(base: BaseModel, ref: TensorRef, before: int) -> bool:
    """Whether a tensor of the base has a number, or a row of numbers, for each token."""
    if ref.name.endswith("bias"):
        return before in ref.shape
    if not ref.name.endswith(".weight"):
        return False
    return is_vocabulary_head(module_of(ref.name)) or (
        kind_of(ref, base.family) == "embedding" and _shape_of(base, ref.name)[0] == before
    )


def _shape_of(base: BaseModel, name: str) -> tuple[int, ...]:
    return base.matrix_shape(name) if name.endswith(".weight") else base.tensors[name].shape
