"""The table of families in README.md: a row for each class, written from a way and read back."""

from __future__ import annotations

import shutil
from pathlib import Path

import transformers
from support.families import SIZES, as_on_the_hub, build_family

from families.ways import Way, follow

PAGE = Path(__file__).with_name("README.md")
_HUB = " (names of the hub)"
# Every class, and a class whose hub checkpoints have other names than the class saves.
ROWS = (*SIZES, f"Gemma3ForConditionalGeneration{_HUB}", f"LlavaForConditionalGeneration{_HUB}")
_HEAD = ("| class | family | result | in 4 bits | in 16 bits | adapters reached |", "|---|---|---|--:|---|--:|")


def run_row(row: str, folder: Path) -> Way:
    """Build the model of a row in `folder`, follow the way, and delete what it wrote."""
    name, build = row.removesuffix(_HUB), as_on_the_hub if row.endswith(_HUB) else build_family
    try:
        way = follow(name, build(name, folder / "model"), folder)
    finally:
        for path in folder.iterdir():
            shutil.rmtree(path)
    return way


def line_of(row: str, way: Way) -> str:
    """The line of a way in the table."""
    config = getattr(transformers, way.name).config_class
    kept = ", ".join(f"{count} {reason}" for reason, count in way.kept)
    is_dense = way.outcome.startswith("refused") and way.quantized > 0
    result = f"{way.outcome}; dense: {way.quantized} fitted" if is_dense else way.outcome
    cells = (row, config.model_type, result, "" if is_dense else str(way.quantized), kept, str(way.reached))
    return f"| {' | '.join(cells)} |".replace("  ", " ")


def lines_in(text: str) -> dict[str, str]:
    """Row -> line of the table in a page."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and line != _HEAD[0]]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def page_with(text: str, lines: list[str]) -> str:
    """The page `text` with another table."""
    before, after = text.partition(_HEAD[0])[0], text.rpartition("|\n")[2]
    return before + "\n".join([*_HEAD, *lines]) + "\n" + after
