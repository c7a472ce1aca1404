"""Guidance for users: examples under the help of each command, and what a mistyped option probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

Example = tuple[str, str]

QUANTIZE: Sequence[Example] = (
    ("NF4 with a fitted adapter, for training with PEFT", "loftq quantize MODEL OUT --text self"),
    ("fitted to the later inputs, a file of yours", "loftq quantize MODEL OUT --text chats.jsonl"),
    ("4-bit integers, which vLLM serves", "loftq quantize MODEL OUT --recipe loftq-int4"),
    ("only the plan: which layers, how large", "loftq quantize MODEL OUT --dry-run"),
)
MERGE: Sequence[Example] = (
    ("a 16-bit checkpoint with the trained adapter", "loftq merge OUT trained MERGED"),
    ("the same in float32, without a rounding", "loftq merge OUT trained MERGED --dtype float32"),
    ("still 4 bits, and the surviving share is measured", "loftq merge OUT trained MERGED --requantize int4"),
    ("only the plan: which tensors, how large", "loftq merge OUT trained MERGED --dry-run"),
)
INSPECT: Sequence[Example] = (
    ("the error of every layer, largest first", "loftq inspect OUT --sort error --top 20"),
    ("is anything damaged?", "loftq inspect OUT --verify"),
    ("before a conversion: the error of number formats", "loftq inspect MODEL --try nf4 --try int3"),
    ("perplexity and KL on a text", "loftq inspect OUT --reference MODEL --text book.txt"),
)
CALIBRATE: Sequence[Example] = (
    ("statistics for several conversions", "loftq calibrate MODEL --text book.txt --output STATS"),
    ("without a text: the model writes one", "loftq calibrate MODEL --text self --output STATS"),
    ("sentences of an encoder, a line each", "loftq calibrate MODEL --text lines.txt --lines --output STATS"),
    ("then", "loftq quantize MODEL OUT --calibration STATS"),
)
RECIPES: Sequence[Example] = (("a preset, with another rank", "loftq quantize MODEL OUT --recipe loftq-nf4 --rank 32"),)


def format_examples(examples: Sequence[Example]) -> str:
    """The examples as a Markdown list for the end of a help text, as Typer reads it: items after blank lines.

    >>> format_examples([("the plan", "loftq quantize MODEL OUT --dry-run")])
    'Examples:\\n\\n- `loftq quantize MODEL OUT --dry-run`: the plan'
    """
    return "\n\n".join(["Examples:", *(f"- `{command}`: {comment}" for comment, command in examples)])


# An option of another tool -> the options here that do the same.
_ELSEWHERE = {
    "bits": ("--quant-type", "--requantize", "--try"),
    "wbits": ("--quant-type", "--requantize", "--try"),
    "type": ("--quant-type", "--requantize", "--try"),
    "format": ("--quant-type", "--layout"),
    "load-in-4bit": ("--quant-type",),
    "bnb-4bit-quant-type": ("--quant-type",),
    "bpw": ("--target-bpw",),
    "size": ("--target-size",),
    "r": ("--rank",),
    "lora-r": ("--rank",),
    "lora-rank": ("--rank",),
    "lora-alpha": ("--alpha",),
    "num-iter": ("--iterations",),
    "num-iters": ("--iterations",),
    "dataset": ("--text",),
    "data": ("--text",),
    "imatrix": ("--text", "--calibration"),
    "nsamples": ("--tokens",),
    "seqlen": ("--context",),
    "gpu": ("--device",),
    "cuda": ("--device",),
    "jobs": ("--threads",),
    "workers": ("--threads",),
    "num-proc": ("--threads",),
    "force": ("--overwrite", "--force"),
    "model": ("MODEL",),
    "model-name-or-path": ("MODEL", "BASE", "PATH"),
    "base": ("BASE", "MODEL"),
    "base-model": ("BASE", "MODEL"),
    "adapter": ("ADAPTER",),
    "lora": ("ADAPTER",),
    "output": ("OUTPUT",),
    "out": ("OUTPUT", "--output"),
    "output-dir": ("OUTPUT", "--output"),
    "outfile": ("OUTPUT", "--output"),
    "preset": ("--recipe",),
    "config": ("--recipe",),
}
_LEAST_LIKENESS = 0.6


def option_hint(option: str, known: Sequence[str]) -> str | None:
    """The likely meaning of an unknown `option`, as half a sentence; None without a likely meaning.

    known   the options and the metavars of the arguments of the typed command

    >>> option_hint("--rnak", ["--rank", "--text"]), option_hint("--bits", ["--quant-type", "--init"])
    ('did you mean --rank?', 'did you mean --quant-type?')
    >>> option_hint("--model", ["MODEL", "--rank"]), option_hint("--frobnicate", ["--rank"])
    ('MODEL is an argument, without a name before', None)
    """
    name = option.lstrip("-").replace("_", "-").lower()
    meant = next((target for target in _ELSEWHERE.get(name, ()) if target in known), None)
    if meant is None:
        near = difflib.get_close_matches(f"--{name}", known, n=1, cutoff=_LEAST_LIKENESS)
        meant = near[0] if near else None
    if meant is None:
        return None
    return f"did you mean {meant}?" if meant.startswith("-") else f"{meant} is an argument, without a name before"
