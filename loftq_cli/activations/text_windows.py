"""Text files as windows of token ids, those of one length together, so that nothing is padded. Knows no model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
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


def _window_length(context: int | None, tokens: int, longest: int | None) -> int:
    """The length of a window. Raises UsageError for one that the model does not take."""
    if context is not None and longest is not None and context > longest:
        raise UsageError(f"--context {context} is more than the model takes", hint=f"at most {longest}")
    wanted = context or min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    if min(wanted, tokens) < _SHORTEST:
        raise UsageError(f"windows have at least {_SHORTEST} tokens", hint="a larger --context and --tokens")
    return min(wanted, tokens)


@dataclass(frozen=True, slots=True)
class Windows:
    """Token ids, int64 [windows, length]: a tensor for each length, the shortest first. Has at least one window."""

    by_length: tuple[torch.Tensor, ...]

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(map(len, self.by_length))

    @property
    def tokens(self) -> int:
        """In all of them."""
        return sum(ids.numel() for ids in self.by_length)

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return int(self.by_length[-1].shape[1])

    def batches(self, tokens: int) -> Iterator[torch.Tensor]:
        """All windows, at most so many tokens at once, or one window."""
        import torch

        for ids in self.by_length:
            yield from torch.split(ids, max(1, tokens // ids.shape[1]))


def text_windows(
    texts: Sequence[TextFile],
    tokenizer: Any,
    *,
    tokens: int,
    context: int | None,
    lines: bool,
    longest: int | None,
    vocabulary: int | None,
) -> Windows:
    """Windows of at most `context` tokens, together at most `tokens`, each with what the tokenizer puts before and
    after a text. Of a longer text they are spread evenly over it. `longest` and `vocabulary` are how many tokens, and
    how many different ones, the model takes; None where nothing says so.

    All are of `context` tokens, but for a text shorter than that, which is one window; with `lines`, each line is a
    text of its own, whose end is cut off where it is longer.
    Raises InputError where the text is too short, or has tokens that the model has not; UsageError for a length of
    windows that the model does not take.
    """
    import torch

    context = _window_length(context, tokens, longest)
    before, after = _around(tokenizer)
    inside = context - len(before) - len(after)
    if inside < 1:
        raise UsageError(f"windows of {context} tokens have no room for text", hint="a larger --context or --tokens")
    if lines:
        found = _of_lines(texts, tokenizer, inside, tokens, len(before) + len(after))
    else:
        ids = [token for text in texts for token in _encoded(tokenizer, text.text)]
        inside = min(inside, len(ids))
        wanted = max(1, tokens // max(1, inside + len(before) + len(after)))
        found = [ids[start : start + inside] for start in _starts(len(ids), inside, wanted)] if ids else []
    kept = [[*before, *ids, *after] for ids in found if ids and len(before) + len(ids) + len(after) >= _SHORTEST]
    if not kept:
        what = "has no line of two tokens" if lines else f"is too short: it gives {sum(map(len, found))} tokens"
        raise InputError(what, file=texts[0].path, hint="give a longer text")
    if vocabulary is not None and max(map(max, kept)) >= vocabulary:
        what = f"the tokenizer gives ids that the model, with {vocabulary}, has not"
        raise InputError(what, file=texts[0].path, hint="the tokenizer files are of another model")
    by_length: dict[int, list[list[int]]] = {}
    for window in kept:
        by_length.setdefault(len(window), []).append(window)
    return Windows(tuple(torch.tensor(by_length[length]) for length in sorted(by_length)))


def _of_lines(texts: Sequence[TextFile], tokenizer: Any, inside: int, tokens: int, around: int) -> list[list[int]]:
    """The first tokens of every line, or of as many, evenly spread, as have at most `tokens` in all."""
    read = [line.strip() for text in texts for line in text.text.splitlines() if line.strip()]
    found = [ids[:inside] for ids in tokenizer(read, add_special_tokens=False, verbose=False)["input_ids"]]
    total = sum(len(ids) + around for ids in found)
    wanted = len(found) if total <= tokens else max(1, len(found) * tokens // total)
    kept: list[list[int]] = []
    left = tokens
    for place in range(wanted):
        ids = found[place * len(found) // wanted]
        left -= len(ids) + around
        if left < 0 and kept:
            break
        kept.append(ids)
    return kept


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
