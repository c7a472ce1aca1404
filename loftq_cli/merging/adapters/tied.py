"""A head and an embedding with one weight: the pair stays one weight where an adapter changes both alike, and becomes
two weights where PEFT computes with two.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from loftq_cli.adapter.naming import VOCABULARY_HEAD
from loftq_cli.errors import MismatchError
from loftq_cli.merging.adapters.placed import Addition, Placed, Replacement, Rows
from loftq_cli.merging.adapters.weighted import mismatch
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import kind_of, module_of

# Model classes without an output layer over the vocabulary.
_HEADLESS_CLASS = re.compile(r"For\w*(?:Classification|QuestionAnswering|MultipleChoice)$|(?<!Head)(?<!Heads)Model$")
_TIED = "belongs to a weight that embedding and head share"
_HEADS = ("lm_head", "embed_out")  # attributes of classes
_DECODERS = ("cls.predictions.", "lm_head.")  # heads of BERT and RoBERTa: the matrix is called decoder


def settle_tied(placed: Placed, base: BaseModel, architectures: Sequence[str]) -> None:
    """Give the changes of a tied head a place: none where the embedding changes alike, else a new weight for the head,
    in `placed.copies` or `placed.new`. The embedding alone changes the head only by trained rows, as in PEFT.

    architectures   class names of the merged model

    Raises MismatchError for a change that would reach a part of the model that the adapter does not change, where the
    class has no second weight.
    """
    heads = [name for name in (*placed.lora, *placed.tokens, *placed.new) if VOCABULARY_HEAD.search(module_of(name))]
    is_headless = any(map(_HEADLESS_CLASS.search, architectures[:1]))
    if not base.family.ties_embeddings() or is_headless:
        for name in (*placed.lora, *placed.tokens):
            if name not in base.tensors:
                raise _error(placed, name, "its module is not in the base")
        return
    for embedding in _shared(base):
        head = heads[0] if heads else _stored_head(base) or _head_of_class(base)
        _settle_pair(placed, base, embedding, head)


def _settle_pair(placed: Placed, base: BaseModel, embedding: str, head: str | None) -> None:
    changes_head = head is not None and (placed.touches(head) or head in placed.new)
    if not changes_head and (not placed.touches(embedding) or _has_only_rows(placed, embedding)):
        return
    if head is not None and changes_head and _is_alike(placed, embedding, head):
        replaced = placed.new.pop(head, None) or placed.whole.get(head)
        for tensor in [replaced.tensor] if replaced else []:
            # PEFT saves head and embedding together; an untied file would hold equal numbers twice.
            placed.unused[tensor] = f"it equals {placed.whole[embedding].tensor}, whose weight the head shares"
        placed.drop(head)
        return
    is_shared_more = base.config.get("is_encoder_decoder") is True
    changes_others = head is None or is_shared_more or (not changes_head and _grows(placed, base, embedding))
    if placed.touches(embedding) and changes_others:
        raise _error(placed, embedding, f"{_TIED}: merged, it would change the head too")
    if head is None:
        return
    parent = head.removesuffix("decoder.weight")
    bias = f"{parent}decoder.bias"
    if parent != head and f"{parent}bias" in base.tensors and bias not in placed.new and bias not in base.tensors:
        placed.copies[bias] = f"{parent}bias"  # BERT's head shares the bias too, under another name
    if is_shared_more:
        placed.copies |= dict.fromkeys(_further_embeddings(base, embedding), embedding)
    if head not in placed.new and head not in placed.whole:
        placed.copies[head] = embedding


def _further_embeddings(base: BaseModel, embedding: str) -> list[str]:
    """Names of the embeddings of encoder and decoder, which have no tensor where one weight serves all."""
    parent = embedding.removesuffix("shared.weight")
    names = [f"{parent}{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
    return [name for name in names if parent != embedding and name not in base.tensors]


def _is_alike(placed: Placed, embedding: str, head: str) -> bool:
    """Whether the adapters change embedding and head by equal numbers."""
    whole = placed.whole.get(embedding), placed.new.get(head) or placed.whole.get(head)
    lora = placed.lora.get(embedding, ()), placed.lora.get(head, ())
    tokens = placed.tokens.get(embedding, ()), placed.tokens.get(head, ())
    if (whole[0] is None) != (whole[1] is None) or len(lora[0]) != len(lora[1]) or len(tokens[0]) < len(tokens[1]):
        return False
    if tokens[1] and len(tokens[0]) != len(tokens[1]):
        return False
    return (
        (whole[0] is None or whole[1] is None or _hash(whole[0]) == _hash(whole[1]))
        and all(_mirrors(one, other) for one, other in zip(*lora, strict=True))
        and all(_equals(one, other) for one, other in zip(tokens[0], tokens[1], strict=False))
    )


def _mirrors(embedding: Addition, head: Addition) -> bool:
    """Whether the factors for the head are those for the embedding, turned (PEFT's ensure_weight_tying)."""
    one, other = embedding.lora, head.lora
    if embedding.source is not head.source or one.magnitude or other.magnitude or one.scaling != other.scaling:
        return False
    import torch

    load, tensors = head.source.weights.load, head.source.weights.tensors
    pairs = [(other.lora_A, one.lora_B), (other.lora_B, one.lora_A)]
    return all(tensors[a].shape == tensors[b].shape[::-1] and torch.equal(load(a), load(b).T) for a, b in pairs)


def _equals(one: Rows, other: Rows) -> bool:
    """Whether two adapters' rows are the same tokens with the same numbers."""
    weights = one.source.weights, other.source.weights
    is_same = one.tokens.indices == other.tokens.indices
    return is_same and weights[0].sha256(one.tokens.tensor) == weights[1].sha256(other.tokens.tensor)


def _hash(replacement: Replacement) -> str:
    return replacement.source.weights.sha256(replacement.tensor)


def _has_only_rows(placed: Placed, name: str) -> bool:
    return name in placed.tokens and name not in placed.lora and name not in placed.whole


def _grows(placed: Placed, base: BaseModel, embedding: str) -> bool:
    replacement = placed.whole.get(embedding)
    if replacement is None:
        return False
    return replacement.source.weights.tensors[replacement.tensor].shape != base.tensors[embedding].shape


def _shared(base: BaseModel) -> list[str]:
    """Names of the embeddings over the vocabulary."""
    size = base.config.get("vocab_size")
    nested = base.config.get("text_config")
    size = nested.get("vocab_size") if size is None and isinstance(nested, dict) else size
    return [
        name
        for name, ref in base.tensors.items()
        if kind_of(ref, base.family) == "embedding" and ref.shape[0] == (size or ref.shape[0])
    ]


def _stored_head(base: BaseModel) -> str | None:
    return next((n for n in base.tensors if n.endswith(".weight") and VOCABULARY_HEAD.search(module_of(n))), None)


def _head_of_class(base: BaseModel) -> str | None:
    """The weight of the head, by the names of the files or the attributes of the class; None for an unknown class."""
    loader = base.family.loader
    decoder = next((parent for parent in _DECODERS if f"{parent}bias" in base.tensors), None)
    if decoder is not None:
        return f"{decoder}decoder.weight"
    return next((f"{head}.weight" for head in _HEADS if loader is not None and head in loader.children), None)


def _error(placed: Placed, name: str, message: str) -> MismatchError:
    """The error about the changes of the tensor `name`."""
    if name in placed.lora:
        addition = placed.lora[name][0]
        return mismatch(addition.source, message, addition.lora.lora_B)
    if name in placed.tokens:
        rows = placed.tokens[name][0]
        return mismatch(rows.source, message, rows.tokens.tensor)
    replacement = placed.whole.get(name) or placed.new[name]
    return mismatch(replacement.source, message, replacement.tensor)
