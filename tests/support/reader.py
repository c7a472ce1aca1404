"""A reader who follows a page: types its commands, pastes its Python, in a directory of their own.

Pages repeat commands, since each page starts from nothing. A command that an earlier page ran from equal inputs is not
run again: the reader gets a copy of the output directory and the printed lines.
"""

from __future__ import annotations

import io
import shlex
import shutil
from collections.abc import Callable
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from support.conversions import loftq, loftq_here
from support.pages import ROOT, Page

# What a shell block has before a command of the tool.
FIRST_COMMAND = "pip install '.[hf]' && "


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that a page tells to do: a `loftq` command with the lines shown below the command, or Python code."""

    command: str | None
    code: str | None
    shown: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command printed (stdout, then stderr), and the directory that the command wrote, if there is one."""

    printed: str
    directory: Path | None


@dataclass(slots=True)
class Shelf:
    """Outcomes of commands that were run already, by command and by the keys of the inputs; `directory` holds a copy of
    every output.
    """

    directory: Path
    outcomes: dict[tuple[object, ...], Outcome] = field(default_factory=dict)

    def add(self, key: tuple[object, ...], printed: str, written: Path) -> None:
        """Keep what a command printed and wrote; `written` need not exist."""
        own = None
        if written.is_dir():
            own = self.directory / str(len(self.outcomes))
            shutil.copytree(written, own)
        self.outcomes[key] = Outcome(printed, own)


def steps(page: Page) -> list[Step]:
    """The steps of a page in order. Python blocks that follow each other are pasted into one session."""
    result: list[Step] = []
    for block in page.blocks("sh", "console", "python"):
        if block.note.startswith(("not run", "file:", "insert:", "append:")):
            continue
        if block.language == "sh":
            commands = [line.removeprefix(FIRST_COMMAND) for line in block.text.splitlines() if FIRST_COMMAND in line]
            result += [Step(command, None) for command in commands]
        elif block.language == "python":
            if result and result[-1].code is not None:
                block_before = result.pop()
                result.append(Step(None, f"{block_before.code}\n{block.text}"))
            else:
                result.append(Step(None, block.text))
        else:
            result += _commands(block.text)
    return result


def _commands(text: str) -> list[Step]:
    commands: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            commands.append((line[2:], []))
        elif line.strip():
            commands[-1][1].append(line)
    return [Step(command, None, tuple(shown)) for command, shown in commands]


@dataclass(slots=True)
class Reader:
    """Follows one page in `directory`.

    shelf     outcomes shared by all readers
    prepare   changes code before the code runs: adds checks
    """

    directory: Path
    shelf: Shelf
    prepare: Callable[[str], str]
    environment: dict[str, str] = field(default_factory=dict)
    keys: dict[str, tuple[object, ...]] = field(default_factory=dict)  # of directories, by name

    def follow(self, page: Page) -> list[tuple[Step, str]]:
        """Every step of `page` with the printed text."""
        shutil.copy(ROOT / "LICENSE", self.directory)  # a text to calibrate with
        return [(step, self._take(step)) for step in steps(page)]

    def _take(self, step: Step) -> str:
        if step.command is not None:
            return self._run(step.command)
        assert step.code is not None
        return python(self.prepare(step.code), self.directory)

    def _run(self, command: str) -> str:
        program, *arguments = shlex.split(command)
        assert program == "loftq", f"a console block runs {program}"
        name = output_name(arguments)
        inputs = [top for top in (argument.split("/")[0] for argument in arguments) if top in self.keys and top != name]
        key = (command, *(self.keys[top] for top in inputs))
        if key not in self.shelf.outcomes:
            self.shelf.add(key, self._printed(arguments), self.directory / (name or "nothing"))
        elif name is not None and self.shelf.outcomes[key].directory is not None:
            shutil.rmtree(self.directory / name, ignore_errors=True)
            shutil.copytree(self.shelf.outcomes[key].directory, self.directory / name)
        if name is not None and self.shelf.outcomes[key].directory is not None:
            self.keys[name] = key
        return self.shelf.outcomes[key].printed

    def _printed(self, arguments: list[str]) -> str:
        """Run a command, in a process of its own where an environment is given, and return the printed text."""
        if not self.environment:
            return loftq_here(*arguments, cwd=self.directory)[1]
        run = loftq(*arguments, cwd=self.directory, **self.environment)
        assert "Traceback" not in run.stderr, f"$ {arguments}\n{run.stderr}"
        return run.stdout + run.stderr


def output_name(arguments: list[str]) -> str | None:
    """The directory that a `loftq` command writes, as typed; None for a command that writes nothing."""
    if "-o" in arguments:
        return arguments[arguments.index("-o") + 1]
    places = {"quantize": 2, "merge": 3}
    return arguments[places[arguments[0]]] if arguments[0] in places else None


def python(code: str, directory: Path) -> str:
    """Run a Python program in `directory` and return the printed text. The program runs in this process, where other
    tests have loaded the libraries.
    """
    printed = io.StringIO()
    with chdir(directory), redirect_stdout(printed):
        exec(compile(code, "a page", "exec"), {"__name__": "__main__"})
    return printed.getvalue()
