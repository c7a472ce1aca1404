"""Text files as windows of token ids. A tensor holds windows of equal length, so nothing is padded. Knows no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.watched_file import read_small_file, refuse_placeholder
from loftq_cli.errors import InputError, UsageError, printable

if TYPE_CHECKING:
    import torch

DEFAULT_TOKENS = 65536
DEFAULT_CONTEXT = 512
MAX_TEXT_NBYTES = 1_000_000_000  # of a file; the tokens of the whole file are in memory at once
_SHORTEST = 2  # tokens of a window: a single token predicts nothing
_EXAMPLE = "one word of an example"


@dataclass(frozen=True, slots=True)
class TextFile:
    """The content of a text file.

    text     the decoded content
    nbytes   size of the file
    sha256   hex digest of the file's bytes
    """

    path: Path
    text: str
    nbytes: int
    sha256: str


def read_text(path: Path) -> TextFile:
    """Read the UTF-8 file `path`. Raises InputError when the file is no regular file, is larger than MAX_TEXT_NBYTES,
    blank or not UTF-8, StorageError when reading fails.

    >>> _ = Path("text.txt").write_text("A text.")
    >>> read_text(Path("text.txt")).nbytes
    7
    """
    data = read_small_file(path, MAX_TEXT_NBYTES, hint="give a part of the text: --tokens bounds what is read of it")
    refuse_placeholder(path, data)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text", file=path, hint="give plain text") from None
    if not text.strip():
        raise InputError("holds no text", file=path, hint="give plain text")
    return TextFile(path, text, len(data), hashlib.sha256(data).hexdigest())


def window_length(context: int | None, tokens: int, longest: int | None) -> int:
    """Tokens of a window: `context`, or DEFAULT_CONTEXT; at most `longest` and `tokens`.

    Raises UsageError when `context` is more than `longest`, and for a window of fewer than two tokens.

    >>> window_length(None, tokens=10_000, longest=2048)
    512
    """
    if context is not None and longest is not None and context > longest:
        raise UsageError(f"--context {context} is more than the model takes", hint=f"at most {longest}")
    wanted = context or min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    if min(wanted, tokens) < _SHORTEST:
        raise UsageError(f"windows have at least {_SHORTEST} tokens", hint="a larger --context and --tokens")
    return min(wanted, tokens)


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of token ids, a window or more.

    by_length   int64 [windows, length]: a tensor for each length, the shortest windows first

    >>> import torch
    >>> windows = Windows((torch.zeros(3, 4, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)))
    >>> windows.count, windows.tokens, windows.longest, [len(batch) for batch in windows.batches(8)]
    (4, 20, 8, [2, 1, 1])
    """

    by_length: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, by_length: Mapping[int, list[list[int]]]) -> Windows:
        """Windows from the result of `cut_ids`.

        >>> Windows.of({2: [[5, 6]]}).by_length
        (tensor([[5, 6]]),)
        """
        import torch

        return cls(tuple(torch.tensor(by_length[length]) for length in sorted(by_length)))

    @property
    def count(self) -> int:
        """Number of windows."""
        return sum(map(len, self.by_length))

    @property
    def tokens(self) -> int:
        """Tokens over all windows."""
        return sum(ids.numel() for ids in self.by_length)

    @property
    def longest(self) -> int:
        """Tokens of the longest window."""
        return int(self.by_length[-1].shape[1])

    def batches(self, tokens: int) -> Iterator[torch.Tensor]:
        """All windows in batches [windows, length] of at most `tokens` tokens; a longer window is a batch."""
        import torch

        for ids in self.by_length:
            yield from torch.split(ids, max(1, tokens // ids.shape[1]))


def cut_ids(
    texts: Sequence[TextFile],
    tokenizer: Any,
    *,
    tokens: int,
    context: int | None,
    lines: bool,
    longest: int | None,
    vocabulary: int | None,
) -> dict[int, list[list[int]]]:
    """Cut texts into windows of token ids: length -> the windows of the length. Each window includes the tokens that
    the tokenizer adds before and after a text. Needs no torch.

    tokenizer    a tokenizer of transformers
    tokens       most tokens over all windows; windows of a longer text are spread evenly over the text
    context      tokens of a window; None is the smaller of DEFAULT_CONTEXT and `longest`
    lines        each line is a text: a window is the beginning of a line, at most `context` tokens
    longest      most tokens that the model takes; None when unknown
    vocabulary   number of token ids that the model has; None when unknown

    Without `lines`, the texts are joined and every window has `context` tokens, at most `tokens`; a shorter text is a
    single shorter window. Raises InputError
    when the text is too short, or has a token id beyond `vocabulary`; UsageError when `context` is more than `longest`,
    or leaves no room for text.

    >>> text = TextFile(Path("text.txt"), "abcdefgh", nbytes=8, sha256="")
    >>> spell = lambda text, **options: {"input_ids": [ord(letter) - 97 for letter in text]}
    >>> cut_ids([text], spell, tokens=6, context=3, lines=False, longest=None, vocabulary=26)
    {3: [[0, 1, 2], [3, 4, 5]]}
    """
    context = window_length(context, tokens, longest)
    before, after = find_added_tokens(tokenizer)
    inside = context - len(before) - len(after)
    if inside < 1:
        raise UsageError(f"windows of {context} tokens have no room for text", hint="a larger --context or --tokens")
    if lines:
        pieces = _cut_lines(texts, tokenizer, inside, tokens, len(before) + len(after))
    else:
        documents = [document for text in texts for document in split_documents(text, tokenizer)]
        ids = [token for document in documents for token in _encode(tokenizer, document)]
        inside = min(inside, len(ids))
        count = max(1, tokens // max(1, inside + len(before) + len(after)))
        pieces = [ids[start : start + inside] for start in _window_starts(len(ids), inside, count)] if ids else []
    windows = [[*before, *ids, *after] for ids in pieces if ids and len(before) + len(ids) + len(after) >= _SHORTEST]
    if not windows:
        message = "has no line of two tokens" if lines else f"is too short: it gives {sum(map(len, pieces))} tokens"
        raise InputError(message, file=texts[0].path, hint="give a longer text")
    if vocabulary is not None and max(map(max, windows)) >= vocabulary:
        message = f"the tokenizer gives ids that the model, with {vocabulary}, has not"
        raise InputError(message, file=texts[0].path, hint="the tokenizer files are of another model")
    by_length: dict[int, list[list[int]]] = {}
    for window in windows:
        by_length.setdefault(len(window), []).append(window)
    return by_length


def split_documents(text: TextFile, tokenizer: Any, *, lines: bool = False) -> list[str]:
    """The separate texts of a file: a whole file, or the lines of the file with `lines`. A file called *.jsonl has a
    JSON object for a text on each line: with "text", with "prompt" and "completion", or with "messages" for the chat
    template of `tokenizer`.

    Raises InputError naming the line for anything else in such a file.

    >>> file = TextFile(Path("a.jsonl"), '{"text": "one"}\\n{"prompt": "two ", "completion": "three"}', 0, "")
    >>> split_documents(file, None)
    ['one', 'two three']
    """
    if text.path.suffix != ".jsonl":
        return [line.strip() for line in text.text.splitlines() if line.strip()] if lines else [text.text]
    # A JSON text may hold the further characters that end a line for `splitlines`.
    numbered = [(number, line) for number, line in enumerate(text.text.split("\n"), 1) if line.strip()]
    documents = []
    for number, line in numbered:
        try:
            documents.append(_render_record(json.loads(line), tokenizer))
            documents[-1].encode()  # JSON can escape half a character, and no tokenizer takes half a character
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            message = f"line {number} is no text: {printable(str(error), 200)}"
            hint = 'lines of {"text": "..."}, {"messages": [...]} or {"prompt": ..., "completion": ...}'
            raise InputError(message, file=text.path, hint=hint) from None
    return documents


def _render_record(record: Any, tokenizer: Any) -> str:
    if not isinstance(record, dict):
        raise TypeError("not a JSON object")
    if isinstance(record.get("text"), str):
        return str(record["text"])
    if "messages" in record:
        messages = record["messages"]
    else:
        messages = [record["prompt"], record["completion"]]
        if all(isinstance(part, str) for part in messages):
            return "".join(messages)
        messages = [message for part in messages for message in part]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is code of the model's author, and raises what the author likes
        raise ValueError(f"the chat template of the tokenizer does not take the messages ({error})") from None


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """The facts about a tokenizer behind texts without a file.

    before    tokens that the tokenizer adds before a text
    after     tokens that the tokenizer adds after a text
    special   ids of all special tokens
    size      number of token ids
    start     id of the token that begins a text; None without such a token
    mask      id of the mask; None without a mask
    longest   most tokens that the model takes; None when unknown
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    special: tuple[int, ...]
    size: int
    start: int | None
    mask: int | None
    longest: int | None

    @classmethod
    def of(cls, tokenizer: Any, longest: int | None) -> TokenizerFacts:
        """The facts about a tokenizer of transformers."""
        before, after = find_added_tokens(tokenizer)
        special = tuple(map(int, tokenizer.all_special_ids))
        start, mask = tokenizer.bos_token_id, tokenizer.mask_token_id
        return cls(tuple(before), tuple(after), special, len(tokenizer), start, mask, longest)


def _cut_lines(texts: Sequence[TextFile], tokenizer: Any, inside: int, tokens: int, around: int) -> list[list[int]]:
    """The first `inside` tokens of every line, or of evenly spread lines when all lines have more than `tokens` tokens.
    `around` counts the tokens that the tokenizer adds to a line.
    """
    line_texts = [line for text in texts for line in split_documents(text, tokenizer, lines=True)]
    lines = [ids[:inside] for ids in tokenizer(line_texts, add_special_tokens=False, verbose=False)["input_ids"]]
    total = sum(len(ids) + around for ids in lines)
    count = len(lines) if total <= tokens else max(1, len(lines) * tokens // total)
    pieces: list[list[int]] = []
    budget = tokens
    for place in range(count):
        ids = lines[place * len(lines) // count]
        budget -= len(ids) + around
        if budget < 0 and pieces:
            break
        pieces.append(ids)
    return pieces


def _window_starts(length: int, window: int, count: int) -> list[int]:
    """The places of the first tokens of at most `count` windows, each of `window` tokens, in a text of `length` tokens:
    adjacent windows, or evenly spread windows when more than `count` windows fit.
    """
    if length // window <= count:
        return [window * number for number in range(length // window)]
    if count == 1:
        return [(length - window) // 2]
    return [number * (length - window) // (count - 1) for number in range(count)]


def _encode(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    # verbose=False: a text longer than the context of the model is no reason to warn.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def find_added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer adds before and after any text.

    >>> find_added_tokens(lambda text, add_special_tokens, **options: {"input_ids": [1] * add_special_tokens + [7]})
    ([1], [])
    """
    plain, framed = (_encode(tokenizer, _EXAMPLE, special=special) for special in (False, True))
    for begin in range(len(framed) - len(plain) + 1):
        if framed[begin : begin + len(plain)] == plain:
            return framed[:begin], framed[begin + len(plain) :]
    return [], []
