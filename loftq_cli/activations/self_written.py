"""Text that a model writes: a language model continues the start token, and a masked model fills masks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from loftq_cli.activations import transformers_models
from loftq_cli.activations.text_windows import TokenizerFacts
from loftq_cli.runtime.workers import Workers

if TYPE_CHECKING:
    import torch

    from loftq_cli.activations.streamed_model import StreamedModel

_BATCH_WINDOWS = 32  # windows that a thread writes at once: the same for every number of threads
_PASSES = 8  # forwards that fill all masks, an equal number of masks each


def write_windows(
    streamed: StreamedModel, facts: TokenizerFacts, count: int, length: int, *, seed: int, threads: int
) -> torch.Tensor | None:
    """Let a model write `count` windows, int64 [count, length], by sampling at temperature 1. None from a model that
    writes nothing: an encoder without a head, and a model with an encoder and a decoder.

    streamed   the model; holds all weights in memory afterwards
    facts      about the tokenizer
    seed       start of all draws; windows do not depend on the number of threads

    A language model continues the start token of the config or the tokenizer. A masked model fills masks, a part of the
    masks of all windows in each of a few forwards.
    """
    import torch

    config = streamed.model.config
    starts = (_token(config, "bos_token_id"), facts.start, _token(config, "eos_token_id"))
    start = next((token for token in starts if token is not None), None)
    is_causal = transformers_models.predicts_next_token(streamed.model) and start is not None
    if not is_causal and (facts.mask is None or not transformers_models.fills_masks(streamed.model)):
        return None
    model = streamed.load_all()

    def write(batch: tuple[int, int]) -> torch.Tensor:
        first, size = batch
        generator = torch.Generator(device=model.device).manual_seed((seed << 20) + first)
        with torch.no_grad():
            if is_causal:
                begin = torch.full((size, 1), int(start or 0), device=model.device)
                change = partial(add_noise, generator=generator)
                return transformers_models.continue_tokens(model, begin, length, change).cpu()
            return _fill_masks(model, facts, size, length, generator).cpu()

    workers = Workers(threads, inline=False)  # torch computes with one thread in each
    try:
        return torch.cat(list(workers.map(write, _batches(count))))
    finally:
        workers.close()


def _token(config: Any, key: str) -> int | None:
    value = getattr(config.get_text_config(), key, None)
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) else None


def _batches(count: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, _BATCH_WINDOWS):
        yield first, min(_BATCH_WINDOWS, count - first)


def _fill_masks(model: Any, facts: TokenizerFacts, size: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Windows [size, length]: masks between the tokens that the tokenizer adds, filled in random order."""
    import torch

    before, after = facts.before, facts.after
    ids = torch.full((size, length), int(facts.mask or 0))
    ids[:, : len(before)] = torch.tensor(before, dtype=torch.int64)
    if after:
        ids[:, -len(after) :] = torch.tensor(after, dtype=torch.int64)
    ids = ids.to(model.device)
    inside = length - len(before) - len(after)
    order = torch.rand(size, inside, generator=generator, device=model.device).argsort(1) + len(before)
    for places in torch.split(order, max(1, math.ceil(inside / _PASSES)), dim=1):
        logits = model(input_ids=ids).logits.float()
        drawn = draw(logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1])), generator)
        ids.scatter_(1, places, drawn)
    return ids


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a token for each row of `logits` [..., vocabulary] with the probabilities softmax(logits): int64 [...].

    >>> import torch
    >>> draw(torch.tensor([[0.0, 1000.0]]), torch.Generator().manual_seed(0))
    tensor([1])
    """
    return add_noise(logits, generator).argmax(-1)


def add_noise(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add Gumbel noise to `logits` [..., vocabulary]: the place of the largest sum is a draw by softmax(logits)."""
    import torch

    return logits - torch.empty_like(logits).exponential_(generator=generator).log_()
