"""Text files as windows of token ids, all of one length, so that nothing is padded. Knows no model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.watched_file import WatchedFile
from loftq_cli.errors import InputError, UsageError

if TYPE_CHECKING:
    import torch

DEFAULT_TOKENS = 65536
DEFAULT_CONTEXT = 512
_SHORTEST = 2  # tokens of a window: fewer predict nothing
_EXAMPLE = "one word of an example"


@dataclass(frozen=True, slots=True)
class TextFile:
    """A text that a user gave."""

    path: Path
    text: str
    nbytes: int
    sha256: str


def read_text(path: Path) -> TextFile:
    """The UTF-8 file `path`. Raises InputError where it is empty or no text."""
    file = WatchedFile.open(path)
    data = file.read(0, file.nbytes)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text", file=path, hint="give plain text") from None
    if not text.strip():
        raise InputError("holds no text", file=path, hint="give plain text")
    return TextFile(path, text, len(data), hashlib.sha256(data).hexdigest())


def choose_context(context: int | None, tokens: int, longest: int | None) -> int:
    """The length of a window. Raises UsageError for one that the model does not take."""
    if context is not None and longest is not None and context > longest:
        raise UsageError(f"--context {context} is more than the model takes", hint=f"at most {longest}")
    wanted = context or min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    if min(wanted, tokens) < _SHORTEST:
        raise UsageError(f"windows have at least {_SHORTEST} tokens", hint="a larger --context and --tokens")
    return min(wanted, tokens)


def text_windows(
    texts: Sequence[TextFile], tokenizer: Any, *, tokens: int, context: int, vocabulary: int | None
) -> torch.Tensor:
    """Windows of token ids, int64 [windows, context], together at most `tokens`, each with what the tokenizer puts
    before and after a text. Of a longer text they are spread evenly over it; a text shorter than one window is one
    window, which is then shorter too.

    Raises InputError where the text is too short, or has tokens that the model has not.
    """
    import torch

    before, after = _around(tokenizer)
    ids = [token for text in texts for token in _encoded(tokenizer, text.text)]
    inside = context - len(before) - len(after)
    if inside < 1:
        raise UsageError(f"windows of {context} tokens have no room for text", hint="a larger --context or --tokens")
    inside = min(inside, len(ids))
    if inside + len(before) + len(after) < _SHORTEST or not ids:
        raise InputError(f"is too short: it gives {len(ids)} tokens", file=texts[0].path, hint="give a longer text")
    if vocabulary is not None and max(*before, *after, *ids, 0) >= vocabulary:
        what = f"the tokenizer gives ids that the model, with {vocabulary}, has not"
        raise InputError(what, file=texts[0].path, hint="the tokenizer files are of another model")
    wanted = max(1, tokens // (inside + len(before) + len(after)))
    starts = _starts(len(ids), inside, wanted)
    return torch.tensor([[*before, *ids[start : start + inside], *after] for start in starts])


def _starts(length: int, window: int, wanted: int) -> list[int]:
    """Where windows begin: one after the other, or, of more text than `wanted` of them, evenly spread."""
    if length // window <= wanted:
        return [window * number for number in range(length // window)]
    if wanted == 1:
        return [(length - window) // 2]
    return [number * (length - window) // (wanted - 1) for number in range(wanted)]


def _encoded(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    # The text is longer than the model's context on purpose: no warning is due.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after any text."""
    plain, whole = (_encoded(tokenizer, _EXAMPLE, special=special) for special in (False, True))
    for begin in range(len(whole) - len(plain) + 1):
        if whole[begin : begin + len(plain)] == plain:
            return whole[:begin], whole[begin + len(plain) :]
    return [], []
