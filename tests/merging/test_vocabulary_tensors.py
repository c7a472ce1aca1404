"""Which tensors of a base lie over its vocabulary, and when the vocabulary of an adapter counts as grown."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import models
from support.adapters import edit_json

from loftq_cli.merging.vocabulary import Growth, find_growth, is_vocabulary_head, vocabulary_size
from loftq_cli.model.stored import BaseModel
from loftq_cli.tensors.headers import TensorRef

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return BaseModel.open(models.llama(tmp_path_factory.mktemp("checkpoints") / "llama"))


def growth(base: BaseModel, shapes: dict[str, tuple[int, ...]]) -> Growth | None:
    """The growth by an adapter that holds whole tensors of the `shapes` by the base's names."""
    tensors = {f"a.{name}": TensorRef(f"a.{name}", "float32", shape, Path("a")) for name, shape in shapes.items()}
    return find_growth(base, {name: f"a.{name}" for name in shapes}, tensors)


def test_a_vocabulary_grows_where_every_matrix_over_it_grows_alike(base):
    rows, columns = base.tensors[EMBEDDING].shape
    grown = (rows + 8, columns)
    assert growth(base, {EMBEDDING: grown, HEAD: grown}) == Growth(rows, rows + 8, frozenset({EMBEDDING, HEAD}))


@pytest.mark.parametrize(
    ("embedding", "head"),
    [((8, 0), None), ((8, 0), (9, 0)), ((8, 1), (8, 1)), ((0, 0), (0, 0)), ((-8, 0), (-8, 0)), (None, None)],
    ids=["the head stays", "two sizes", "other columns", "no growth", "a smaller one", "nothing"],
)
def test_nothing_else_is_growth(embedding, head, base):
    rows, columns = base.tensors[EMBEDDING].shape
    added = {EMBEDDING: embedding, HEAD: head}
    shapes = {name: (rows + by[0], columns + by[1]) for name, by in added.items() if by is not None}
    assert growth(base, shapes) is None


def test_the_size_of_a_vocabulary_may_be_nested(tmp_path):
    folder = models.llama(tmp_path / "llama")
    size = vocabulary_size(BaseModel.open(folder))
    assert size == BaseModel.open(folder).tensors[EMBEDDING].shape[0]
    edit_json(folder / "config.json", vocab_size=None, text_config={"vocab_size": 7})
    assert vocabulary_size(BaseModel.open(folder)) == 7
    edit_json(folder / "config.json", vocab_size=None, text_config=None)
    assert vocabulary_size(BaseModel.open(folder)) is None


def test_a_config_says_the_new_size_at_each_place_of_the_old_one():
    grown = Growth(10, 12, frozenset())
    assert grown.change({"vocab_size": 10, "a": 1}) == {"vocab_size": 12, "a": 1}
    assert grown.change({"vocab_size": 9, "text_config": {"vocab_size": 10}}) == {
        "vocab_size": 9,
        "text_config": {"vocab_size": 12},
    }


@pytest.mark.parametrize(
    ("module", "is_head"),
    [("lm_head", True), ("model.lm_head", True), ("embed_out", True), ("cls.predictions.decoder", True)]
    + [("my_lm_head", False), ("lm_head.extra", False), ("score", False), ("model.decoder", False)],
)
def test_heads_over_the_vocabulary_are_known_by_their_whole_name(module, is_head):
    assert is_vocabulary_head(module) is is_head
