"""Which files beside the weights belong to a result."""

from __future__ import annotations

import os
from pathlib import Path

from loftq_cli.output.side_files import find_side_files


def test_a_file_of_more_than_200_mb_is_left(tmp_path: Path) -> None:
    for name, nbytes in (("tokenizer.json", 200_000_000), ("corpus.json", 200_000_001)):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, nbytes)

    assert find_side_files(tmp_path) == ([Path("tokenizer.json")], [Path("corpus.json")])
