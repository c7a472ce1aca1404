"""The Markdown pages of this repository as records: code blocks, tables, links and anchors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

# Folders whose pages are written by a program or belong to other projects.
_SKIPPED_FOLDERS = {"build", "dist", "builtin_models", "node_modules"}

_BLOCK = re.compile(r"^(?:<!-- (?P<note>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_INLINE_CODE = re.compile(r"`[^`]*`")
_LINK = re.compile(r"\]\(([^()\s]+)\)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced code block.

    note       text of the HTML comment on the line above the fence, or ""
    language   word after the opening fence, or ""
    """

    note: str
    language: str
    text: str


@dataclass(frozen=True, slots=True)
class Page:
    """A Markdown page; `name` is the path relative to the repository."""

    name: str
    text: str

    @property
    def path(self) -> Path:
        """Absolute path of the page."""
        return ROOT / self.name

    def blocks(self, *languages: str) -> list[Block]:
        """All code blocks in order, or only the blocks in `languages`."""
        blocks = [Block(match["note"] or "", match["language"], match["text"]) for match in _BLOCK.finditer(self.text)]
        return [block for block in blocks if not languages or block.language in languages]

    def prose(self) -> str:
        """The text without code blocks and inline code."""
        return _INLINE_CODE.sub("", _BLOCK.sub("", self.text))

    def links(self) -> list[str]:
        """Targets of all links and images outside code."""
        return _LINK.findall(self.prose())

    def anchors(self) -> set[str]:
        """Anchors of all headings, made the way GitHub makes them."""
        text = _BLOCK.sub("", self.text)
        headings = re.findall(r"^#+ (.+)$", text, re.M)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def tables(self) -> list[list[list[str]]]:
        """All tables, each a list of rows (heading first), each row a list of cells."""
        tables: list[list[list[str]]] = []
        previous = ""
        for line in _BLOCK.sub("", self.text).splitlines():
            if line.startswith("|"):
                if not previous.startswith("|"):
                    tables.append([])
                cells = [cell.strip() for cell in line.strip("|").split("|")]
                if not re.fullmatch(r"[-:| ]+", line):
                    tables[-1].append(cells)
            previous = line
        return tables


@cache
def pages() -> dict[str, Page]:
    """Every page of the repository by name; pages that a program wrote are left out."""
    paths = [
        path.relative_to(ROOT)
        for path in sorted(ROOT.rglob("*.md"))
        if not any(part.startswith(".") or part in _SKIPPED_FOLDERS for part in path.relative_to(ROOT).parts)
    ]
    return {path.as_posix(): Page(path.as_posix(), (ROOT / path).read_text(encoding="utf-8")) for path in paths}
