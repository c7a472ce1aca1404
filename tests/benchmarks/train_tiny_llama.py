"""Trains `builtin:tiny-llama`, the byte-level Llama that ships inside the package, and writes its directory.

    python -m tests.benchmarks.train_tiny_llama OUTPUT_DIR

With the default arguments this is the run that made the shipped weights: 2 CPU cores, about 42 minutes beside other
work. Another CPU or torch release rounds differently, so it gives equally good weights, not the same bits. Where other
programs use the same cores, OMP_WAIT_POLICY=PASSIVE in the environment saves most of what waiting threads would burn.
The package imports nothing from here.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tests.benchmarks.corpus import DOCUMENT_END, held_out_text, training_text
from tests.benchmarks.perplexity import CONTEXT, MAX_TOKENS, Score, load, score

END_OF_TEXT = 256
PADDING = 257
SPECIAL_TOKENS = {END_OF_TEXT: "<|endoftext|>", PADDING: "<|pad|>"}
VOCABULARY = 288  # 256 bytes, the specials, and unused rows up to a multiple of 32

TOKENS_PER_STEP = 4096
STEPS = 4500
WARM_UP = 200  # steps
PEAK_RATE = 3e-3
INITIAL_DEVIATION = 0.06  # the usual 0.02 is meant for wider layers and learns these more slowly
LAST_RATE = 0.02  # of the peak, where the cosine ends
LONG_CONTEXT_FROM = 0.75  # of the steps; attention is cheaper over half the context, and little is lost
PACE_STEPS = 20  # timed to fit `--minutes`


def architecture() -> LlamaConfig:
    """1.7 million parameters; every linear has in_features % 64 == 0 and out_features % 32 == 0, as kernels want."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        initializer_range=INITIAL_DEVIATION,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=PADDING,
    )


def byte_tokenizer() -> Tokenizer:
    """One token per UTF-8 byte, its id the byte's value."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    # ByteLevel shows the other bytes, in order, as the characters from U+0100 on.
    shifted = [byte for byte in range(256) if byte not in plain]
    vocabulary = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(shifted)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    return tokenizer


def plain_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention of full windows by two bfloat16 products; PyTorch's own takes twice as long on a CPU.

    `query` is [windows, heads, context, 32], `key` and `value` have half the heads; returns [windows, context, heads,
    32] and no weights. Padding masks are not looked at.
    """
    windows, heads, context, width = query.shape
    groups = heads // key.shape[1]
    with torch.autocast("cpu", enabled=False):
        q = query.bfloat16().reshape(-1, context, width)
        k, v = (x.bfloat16().repeat_interleave(groups, dim=1).reshape(-1, context, width) for x in (key, value))
        future = torch.full((context, context), float("-inf"), dtype=torch.bfloat16).triu(1)
        weights = torch.baddbmm(future, q, k.transpose(1, 2), alpha=width**-0.5).softmax(dim=-1)
        mixed = torch.bmm(weights, v).view(windows, heads, context, width)
    return mixed.transpose(1, 2), None


def token_ids(text: str) -> torch.Tensor:
    """int64 [bytes] of the training text, the end of a document as the end-of-text token."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(torch.int64)
    return torch.where(data == ord(DOCUMENT_END), END_OF_TEXT, data)


def batches(data: torch.Tensor, contexts: Iterator[int], seed: int) -> Iterator[torch.Tensor]:
    """For each context, int64 [TOKENS_PER_STEP / context, context] cut from `data` at random places."""
    generator = torch.Generator().manual_seed(seed)
    for context in contexts:
        starts = torch.randint(len(data) - context, (TOKENS_PER_STEP // context, 1), generator=generator)
        yield data[starts + torch.arange(context)]


def rate(step: int, steps: int) -> float:
    """Learning rate of `step`: linear warm-up, then a cosine down to `LAST_RATE` of the peak."""
    warm_up = min(WARM_UP, steps // 5 + 1)
    if step < warm_up:
        return PEAK_RATE * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return PEAK_RATE * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2)


def optimizer_for(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW whose weight decay leaves the norms alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def train_step(model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor, learning_rate: float) -> float:
    """One update; returns the mean loss in nats per byte."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with torch.autocast("cpu", dtype=torch.bfloat16):  # 1.7 times as fast as float32 where the CPU has AVX512-BF16
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.item())


def train(data: torch.Tensor, options: argparse.Namespace) -> tuple[Any, float, int]:
    """Train from scratch; returns the model, the last mean training loss (nats per byte) and the number of steps."""
    torch.manual_seed(options.seed)
    AttentionInterface.register("plain", plain_attention)
    model: Any = LlamaForCausalLM(architecture()).train()
    model.set_attn_implementation("plain")
    optimizer = optimizer_for(model)
    steps, average, started, saved = options.steps, float("nan"), time.monotonic(), time.monotonic()
    step = 0
    contexts = iter(lambda: CONTEXT if step >= LONG_CONTEXT_FROM * steps else CONTEXT // 2, None)
    for batch in batches(data, contexts, options.seed):
        loss = train_step(model, optimizer, batch, rate(step, steps))
        average = loss if step == 0 else 0.99 * average + 0.01 * loss
        step += 1
        elapsed = time.monotonic() - started
        if step == PACE_STEPS and options.minutes:
            steps = min(steps, max(PACE_STEPS + 1, int(options.minutes * 60 * step / elapsed)))
        if step % 100 == 0 or step == steps:
            pace = step * TOKENS_PER_STEP / elapsed
            print(f"step {step}/{steps} loss {average:.4f} {pace:.0f} tokens/s {elapsed / 60:.1f} min", flush=True)
        if step >= steps:
            break
        if options.checkpoints and time.monotonic() - saved > 240:
            save(model, options.checkpoints, average, step)
            saved = time.monotonic()
    return model, average, step


def save(model: Any, directory: Path, loss: float, steps: int) -> None:
    """Write the model directory, in bfloat16, with a card that says what the rounded weights score."""
    directory.mkdir(parents=True, exist_ok=True)
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    rounded.config.dtype = torch.bfloat16
    rounded.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=END_OF_TEXT, eos_token_id=END_OF_TEXT, pad_token_id=PADDING
    )
    rounded.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)  # safetensors gives it to its owner alone, a package is for all
    save_tokenizer(directory)
    result = score(*load(directory, None, "float32"), held_out_text(), CONTEXT, MAX_TOKENS)
    (directory / "README.md").write_text(card(result, loss, steps), encoding="utf-8")
    print(f"saved: held-out perplexity {result.perplexity:.4f}, {result.bits_per_byte:.4f} bits per byte", flush=True)


def save_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json by hand: transformers would name a class its version 4 lacks."""
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[END_OF_TEXT],
        "eos_token": SPECIAL_TOKENS[END_OF_TEXT],
        "pad_token": SPECIAL_TOKENS[PADDING],
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def card(result: Score, loss: float, steps: int) -> str:
    """README.md of the model directory."""
    return f"""# tiny-llama

A byte-level Llama of 1.7 million parameters (4 layers, hidden size 192, context {CONTEXT}, bfloat16), trained from
scratch so that a conversion can be tried, and what it costs measured, without a download. It writes text that looks
like Python documentation; it knows nothing and answers nothing.

| | |
|---|---|
| training text | docstrings and sources of the standard library of Python {platform.python_version()} |
| trained by | `tests/benchmarks/train_tiny_llama.py`, {steps} steps of {TOKENS_PER_STEP} bytes |
| training loss | {loss:.3f} nats per byte, mean of the last hundred steps or so |
| held-out text | `pydoc_data.topics`, the language reference behind `help()`, first {MAX_TOKENS} bytes |
| held-out score | perplexity {result.perplexity:.3f} per byte, {result.bits_per_byte:.3f} bits per byte |
| tokens | 0-255 are the bytes, {END_OF_TEXT} ends a text, {PADDING} pads, up to {VOCABULARY - 1} unused |

The score is that of the rounded bfloat16 weights computed in float32, `python -m tests.benchmarks.perplexity`.
No line of 40 characters or more of the held-out text is in the training text.

The training text is under the Python Software Foundation License Version 2, https://docs.python.org/3/license.html,
Copyright (c) 2001 Python Software Foundation; All Rights Reserved.
"""


def main() -> None:
    """Train and save from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.train_tiny_llama")
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--minutes", type=float, help="do fewer steps where the machine is too slow for this time")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="save the model so far there every 4 minutes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    model, loss, steps = train(token_ids(training_text()), options)
    save(model, options.output, loss, steps)


if __name__ == "__main__":
    main()
