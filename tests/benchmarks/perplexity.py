"""How well a model directory predicts the held-out text: perplexity per token and bits per byte.

Loads with transformers (and peft for an adapter); it neither converts nor trains, and knows nothing of loftq_cli.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from tests.benchmarks.corpus import held_out_text

CONTEXT = 512  # tokens in a window
MAX_TOKENS = 131072
_WINDOWS_AT_ONCE = 16


class Score(NamedTuple):
    """What a model's predictions of a text cost."""

    nats: float  # summed over the predicted tokens
    tokens: int  # predicted; the first of each window is not
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)


def perplexity(model: Any, tokenizer: Any | None, text: str, context: int, max_tokens: int) -> float:
    """exp(mean negative log-likelihood per token) over the first `max_tokens` tokens of `text`; see `score`."""
    return score(model, tokenizer, text, context, max_tokens).perplexity


@torch.inference_mode()
def score(model: Any, tokenizer: Any | None, text: str, context: int, max_tokens: int) -> Score:
    """Predict `text` in consecutive windows of `context` tokens that share nothing; a shorter last one is dropped.

    Without a tokenizer the UTF-8 bytes are the token ids. A special token is never added. The model is put in
    evaluation mode and left there.
    """
    ids = list(text.encode()) if tokenizer is None else _encode(tokenizer, text)
    count = min(len(ids), max_tokens) // context
    if count == 0 or context < 2:
        raise ValueError(f"no window of {context} tokens in {min(len(ids), max_tokens)}")
    bytes_per_token = len(text.encode()) / len(ids)
    windows = torch.tensor(ids[: count * context], device=model.device).view(count, context)
    keep_packed_weights(model)
    model.eval()
    nats = 0.0
    for start in range(0, count, _WINDOWS_AT_ONCE):
        batch = windows[start : start + _WINDOWS_AT_ONCE]
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()  # [windows, context - 1, vocabulary]
        losses = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        nats += losses.double().sum().item()
    tokens = count * (context - 1)
    return Score(nats, tokens, nats / math.log(2) / (tokens * bytes_per_token))


def _encode(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: the text is longer than the model's context on purpose, no warning is due.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def keep_packed_weights(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for AVX512-BF16 CPUs at the first forward in evaluation mode.

    The repacked kernel rounds to bfloat16, so the same checkpoint would score differently from CPU to CPU, and the
    weights could no longer be saved.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def load(directory: Path, adapter: Path | None, dtype: str) -> tuple[Any, Any]:
    """The model (the adapter on top, not merged) and the tokenizer of `directory`; `dtype` "auto" is the config's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=wanted)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model, AutoTokenizer.from_pretrained(directory)


def main() -> None:
    """Score one model directory from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.perplexity", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--adapter", type=Path, metavar="DIR")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "auto"))
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens in a window")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    options = parser.parse_args()
    model, tokenizer = load(options.model, options.adapter, options.dtype)
    result = score(model, tokenizer, held_out_text(), options.context, options.max_tokens)
    print(f"perplexity {result.perplexity:.4f} per token, {result.bits_per_byte:.4f} bits per byte", end="")
    print(f" ({result.tokens} tokens, context {options.context}, {options.dtype})")


if __name__ == "__main__":
    main()
