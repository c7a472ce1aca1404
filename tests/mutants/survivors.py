"""survivors.toml: mutants that no test can or should notice, with the reason."""

from __future__ import annotations

import tomllib
from pathlib import Path

LIST = Path(__file__).with_name("survivors.toml")


def reasons() -> dict[str, str]:
    """The reason of every listed mutant, by the mutant's key."""
    groups = tomllib.loads(LIST.read_text())["group"]
    pairs = [(key, group["reason"]) for group in groups for key in group["mutants"]]
    twice = {key for key, _ in pairs if [other for other, _ in pairs].count(key) > 1}
    if twice:
        raise SystemExit(f"{LIST.name} lists twice: {sorted(twice)}")
    return dict(pairs)
