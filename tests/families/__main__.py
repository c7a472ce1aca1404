"""`python -m tests.families`: every class through the whole way, and a line of the table for each.

python -m tests.families                  prints the table; exits with 1 where something is wrong
python -m tests.families --write          writes the table into tests/families/README.md too
python -m tests.families ViTModel ...     some classes only
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from support.loading import load as _load  # noqa: F401  # turns progress bars off

from families.table import PAGE, ROWS, line_of, page_with, run_row  # after the path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.families")
    parser.add_argument("classes", nargs="*", default=ROWS)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    lines, wrong = [], 0
    for row in arguments.classes:
        with tempfile.TemporaryDirectory() as folder:
            way = run_row(row, Path(folder))
        lines.append(line_of(row, way))
        print(lines[-1], *way.problems, sep="\n  wrong: ", flush=True)
        wrong += bool(way.problems)
    if arguments.write and not wrong:
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), lines), encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
