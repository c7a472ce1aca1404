"""A stranger's tokenizer, run in a child process with a time limit: an expression of a tokenizer may take for ever, and
the library in Rust below a tokenizer may panic. The child sends token ids; a hostile tokenizer ends the child only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loftq_cli.activations import transformers_models
from loftq_cli.activations.child_process import MEMORY_NBYTES, Subject, run_in_child
from loftq_cli.activations.text_windows import TextFile, TokenizerFacts, Windows, cut_ids

_SECONDS = 120.0  # to load a tokenizer: the largest take seconds
_NBYTES_PER_SECOND = 50_000  # of text beside; a tokenizer in Python has twice the speed, in Rust twenty times
_TOKENIZER = Subject(
    "its tokenizer",
    "fails on this text",
    "give less text, or the tokenizer files of another source",
    "copy the model's tokenizer files into it again",
)
_MEMORY_PER_NBYTE = 400  # of text: a token of one character is a Python number, a text and two offsets


def cut_windows(
    directory: Path, config: Any, texts: Sequence[TextFile], *, tokens: int, context: int | None, lines: bool
) -> Windows:
    """Cut texts into windows with the tokenizer of the model in `directory`. The tokenizer is loaded and runs in a
    child process; the child ends after 120 seconds and a second for every 50 kB of text.

    config                   the result of `transformers_models.load_config`
    tokens, context, lines   see `cut_ids`

    Raises InputError when the folder has no tokenizer, or the tokenizer fails, panics or takes too long, and in the
    cases of `cut_ids`; UsageError as `cut_ids` does; StorageError when no process can start; MemoryError when the child
    lacks memory.

    >>> from loftq_cli.activations.text_windows import read_text
    >>> from loftq_cli.model.builtin import resolve_model
    >>> model, text = resolve_model("builtin:tiny-llama"), Path("text.txt")
    >>> _ = text.write_text("A text.")
    >>> config = transformers_models.load_config(model)
    >>> cut_windows(model, config, [read_text(text)], tokens=64, context=None, lines=False).tokens
    7
    """

    def cut() -> dict[int, list[list[int]]]:
        tokenizer = transformers_models.load_tokenizer(directory)
        longest = transformers_models.longest_input(config, tokenizer)
        vocabulary = transformers_models.vocabulary_size(config)
        return cut_ids(
            texts, tokenizer, tokens=tokens, context=context, lines=lines, longest=longest, vocabulary=vocabulary
        )

    nbytes = sum(text.nbytes for text in texts)
    memory = MEMORY_NBYTES + _MEMORY_PER_NBYTE * nbytes
    by_length = run_in_child(cut, _SECONDS + nbytes / _NBYTES_PER_SECOND, directory, _TOKENIZER, memory_nbytes=memory)
    return Windows.of({int(length): windows for length, windows in by_length.items()})


def read_facts(directory: Path, config: Any) -> TokenizerFacts:
    """The facts about the tokenizer of the model in `directory`, found in a child process as in `cut_windows`. Raises
    as `cut_windows` does.

    config   the result of `transformers_models.load_config`

    >>> from loftq_cli.model.builtin import resolve_model
    >>> model = resolve_model("builtin:tiny-llama")
    >>> read_facts(model, transformers_models.load_config(model)).longest
    512
    """

    def find() -> dict[str, Any]:
        tokenizer = transformers_models.load_tokenizer(directory)
        return dataclasses.asdict(TokenizerFacts.of(tokenizer, transformers_models.longest_input(config, tokenizer)))

    facts = run_in_child(find, _SECONDS, directory, _TOKENIZER, memory_nbytes=MEMORY_NBYTES)
    lists = {key: tuple(facts[key]) for key in ("before", "after", "special")}
    return TokenizerFacts(**{**facts, **lists})
