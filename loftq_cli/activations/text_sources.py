"""The sources of text for a model: files, folders, conversations, random tokens, and text that the model writes. Each
becomes windows of token ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loftq_cli.activations import transformers_models
from loftq_cli.activations.foreign_tokenizer import cut_windows, read_facts
from loftq_cli.activations.text_windows import (
    DEFAULT_CONTEXT,
    TextFile,
    TokenizerFacts,
    Windows,
    read_text,
    window_length,
)
from loftq_cli.errors import InputError, UsageError
from loftq_cli.output.records import source_name
from loftq_cli.planning.recipe import RANDOM, SELF

if TYPE_CHECKING:
    import torch

# A text by the model itself is short: the first tokens of a window are the least sure, and a long window is slow.
WRITTEN_CONTEXT = 128

FILES = "files"  # the kind of a text from files


class Reading(Protocol):
    """How to read a text: the least options of `TextOptions`."""

    @property
    def tokens(self) -> int:
        """Most tokens to read, over all windows."""
        ...

    @property
    def context(self) -> int | None:
        """Tokens of a window; None for the default."""
        ...

    @property
    def lines(self) -> bool:
        """Whether each line of a file is a text."""
        ...


@dataclass(frozen=True, slots=True)
class TextSource:
    """A source of text, with the content of all files.

    kind    SELF, RANDOM, or FILES
    files   the files, in the order of reading; empty without files
    """

    kind: str
    files: tuple[TextFile, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of the kind and of the content of all files."""
        return hashlib.sha256(json.dumps([self.kind, [file.sha256 for file in self.files]]).encode()).hexdigest()

    def files_json(self) -> list[dict[str, str | int]]:
        """JSON values of the files: names without folders, sizes and hashes."""
        return [{"name": source_name(file.path), "nbytes": file.nbytes, "sha256": file.sha256} for file in self.files]


def open_text(names: Sequence[str]) -> TextSource:
    """Read the text called by `names`: SELF or RANDOM alone, or paths of files and folders. A folder stands for all
    files inside with UTF-8 text, in the order of the paths; hidden files and folders are left out.

    Raises UsageError for no names, and for SELF or RANDOM beside further names; InputError for a blank file, for a file
    without UTF-8 text, and for a folder without text; StorageError for an unreadable file.

    >>> open_text(["random"]).kind
    'random'
    """
    if not names:
        raise UsageError("no text to read", hint="--text FILE")
    words = [name for name in names if name in (SELF, RANDOM)]
    if words and len(names) > 1:
        hint = f"--text {words[0]} alone, or ./{words[0]} for a file of the name"
        raise UsageError(f"--text {words[0]} stands beside other text", hint=hint)
    if words:
        return TextSource(words[0])
    return TextSource(FILES, tuple(file for name in names for file in _read_path(Path(name))))


def _read_path(path: Path) -> list[TextFile]:
    if not path.is_dir():
        return [read_text(path)]
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    visible = [file for file in inside if not any(p.startswith(".") for p in file.relative_to(path).parts)]
    files = [text for file in visible if (text := _read_if_text(file)) is not None]
    if not files:
        raise InputError("holds no file of text", file=path, hint="--text FILE")
    return files


def _read_if_text(file: Path) -> TextFile | None:
    try:
        return read_text(file)
    except InputError:
        return None


def make_windows(
    source: TextSource,
    options: Reading,
    directory: Path,
    config: Any,
    *,
    seed: int,
    write: Callable[[TokenizerFacts, int, int], torch.Tensor | None],
    note: Callable[[str], None],
) -> Windows:
    """Cut or make windows of token ids.

    source      the text
    options     tokens, context and lines
    directory   the folder of the model and the tokenizer
    config      the result of `transformers_models.load_config`
    seed        start of random draws
    write       takes the facts about the tokenizer, a number of windows and a length, and lets the model write the
                windows, int64 [windows, length]; None from a model that cannot write
    note        takes a sentence for the user

    Raises InputError for a tokenizer that fails, a text that is too short and damaged conversations, UsageError for a
    context that the model does not take.
    """
    if source.kind == FILES:
        return cut_windows(
            directory, config, source.files, tokens=options.tokens, context=options.context, lines=options.lines
        )
    facts = read_facts(directory, config)
    longest, vocabulary = facts.longest, transformers_models.vocabulary_size(config)
    if source.kind == SELF:
        length = window_length(options.context or _at_most(WRITTEN_CONTEXT, longest), options.tokens, longest)
        written = write(facts, max(1, options.tokens // length), length)
        if written is not None:
            return Windows((written,))
        note("the model writes no text: random tokens in place of the model's own text")
    length = window_length(options.context or _at_most(DEFAULT_CONTEXT, longest), options.tokens, longest)
    return Windows((random_windows(facts, vocabulary, max(1, options.tokens // length), length, seed),))


def _at_most(wanted: int, longest: int | None) -> int:
    return min(wanted, longest or wanted)


def random_windows(facts: TokenizerFacts, vocabulary: int | None, count: int, length: int, seed: int) -> torch.Tensor:
    """Windows of random token ids, int64 [count, length]: uniform over the vocabulary without special tokens, between
    the tokens that the tokenizer adds to a text.

    >>> facts = TokenizerFacts((7,), (), special=(0,), size=300, start=7, mask=None, longest=None)
    >>> random_windows(facts, 256, count=2, length=5, seed=0).shape
    torch.Size([2, 5])
    """
    import torch

    size = min(facts.size, vocabulary or facts.size)
    special = set(facts.special)
    plain = torch.tensor([token for token in range(size) if token not in special])
    inside = length - len(facts.before) - len(facts.after)
    if inside < 1 or not len(plain):
        raise UsageError(f"windows of {length} tokens have no room for text", hint="a larger --context or --tokens")
    generator = torch.Generator().manual_seed(seed)
    ids = plain[torch.randint(len(plain), (count, inside), generator=generator)]
    before, after = (torch.tensor(added, dtype=torch.int64).expand(count, -1) for added in (facts.before, facts.after))
    return torch.cat([before, ids, after], 1)
