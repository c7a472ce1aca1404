"""The tokenizer of a merged model: of the base, or of the adapter's directory, where trainers save new tokens and the
chat template.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.errors import UsageError, printable
from loftq_cli.output.checksums import file_sha256
from loftq_cli.output.side_files import find_side_files, side_file_copies

_CONFIG = "tokenizer_config.json"
_VOCABULARY = re.compile(
    r"(?:tokenizer|vocab|tekken)\.json|vocab\.(?:txt|bpe)|merges\.txt|bpe\.codes|.+\.(?:model|tiktoken|spm)"
)
_TEMPLATE = re.compile(r"chat_template\.(?:jinja|json)|additional_chat_templates/.+\.jinja")
_BESIDE = re.compile(r"tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json")


@dataclass(frozen=True, slots=True)
class TokenizerChoice:
    """The files of a tokenizer for a merged model.

    left    names of the base's files without a place in the merged model
    taken   name of each copy -> file in the adapter's directory
    note    the remark about the choice; None where base and adapter agree

    >>> TokenizerChoice().apply({"merges.txt": Path("base/merges.txt")})
    {'merges.txt': PosixPath('base/merges.txt')}
    """

    left: frozenset[str] = frozenset()
    taken: Mapping[str, Path] | None = None
    note: str | None = None

    def apply(self, copies: Mapping[str, Path]) -> dict[str, Path]:
        """The side files of the merged model: `copies` of the base, with the adapter's tokenizer where chosen."""
        return {name: path for name, path in copies.items() if name not in self.left} | dict(self.taken or {})


def choose_tokenizer(choice: str | None, base_files: Mapping[str, Path], adapter: Path) -> TokenizerChoice:
    """Choose the tokenizer of a merged model.

    choice       "base" or "adapter"; None for the adapter's tokenizer where the directory holds one
    base_files   name of each copy -> small file of the base
    adapter      the adapter's directory

    An adapter's directory with a vocabulary replaces the base's tokenizer; a directory without a vocabulary replaces
    files of equal names. The base's chat template stays where the adapter has no template.

    Raises UsageError for the choice "adapter" and a directory without a tokenizer, InputError for a link out of the
    directory.
    """
    ours, theirs = {n: p for n, p in base_files.items() if is_tokenizer_file(n)}, _tokenizer_files(adapter)
    if choice == "adapter" and not theirs:
        raise UsageError("--tokenizer adapter: holds no tokenizer", file=adapter, hint="--tokenizer base")
    differing = [name for name, path in theirs.items() if name not in ours or not _are_equal(ours[name], path)]
    if not differing:
        return TokenizerChoice()
    listed = ", ".join(printable(name, 80) for name in differing)
    if choice == "base":
        note = f"the adapter's tokenizer differs and is left out (--tokenizer adapter takes it): {listed}"
        return TokenizerChoice(note=note)
    left = frozenset(_replaced(ours, theirs))
    gone = sorted(left - theirs.keys())
    without = f"; without the base's {', '.join(printable(name, 80) for name in gone)}" if gone else ""
    note = f"the tokenizer is the adapter's, which differs from the base's (--tokenizer base): {listed}{without}"
    if _CONFIG in left and not _has_template(theirs) and "chat_template" in _config_of(ours):
        note += "; the base's chat template, which the adapter's tokenizer lacks, is left out"
    return TokenizerChoice(left, theirs, note)


def is_tokenizer_file(name: str) -> bool:
    """True for the name of a file of a tokenizer, chat templates included.

    >>> is_tokenizer_file("tokenizer.json"), is_tokenizer_file("chat_template.jinja"), is_tokenizer_file("config.json")
    (True, True, False)
    """
    return any(kind.fullmatch(name) for kind in (_VOCABULARY, _TEMPLATE, _BESIDE))


def _tokenizer_files(adapter: Path) -> dict[str, Path]:
    names = [path.as_posix() for path in find_side_files(adapter)[0]]
    return side_file_copies(adapter, leave={name for name in names if not is_tokenizer_file(name)})


def _replaced(ours: Collection[str], theirs: Mapping[str, Path]) -> set[str]:
    """Names of the base's files that give way to the adapter's."""
    if not any(map(_VOCABULARY.fullmatch, theirs)):
        # transformers reads chat_template.jinja before any other place of a template.
        return {n for n in ours if n in theirs or (_TEMPLATE.fullmatch(n) and _has_template(theirs))}
    return {name for name in ours if not _TEMPLATE.fullmatch(name) or _has_template(theirs)}


def _has_template(files: Mapping[str, Path]) -> bool:
    return any(map(_TEMPLATE.fullmatch, files)) or "chat_template" in _config_of(files)


def _config_of(files: Mapping[str, Path]) -> Mapping[str, object]:
    return read_json_object(files[_CONFIG]) if _CONFIG in files else {}


def _are_equal(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and file_sha256(one) == file_sha256(other)
