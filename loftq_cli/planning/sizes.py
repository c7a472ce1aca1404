"""Sizes in people's spelling, like 5GB."""

from __future__ import annotations

import re

from loftq_cli.errors import UsageError, printable

MAX_INT = 2**63 - 1  # the limit of TOML; Python's TOML reader has no limit
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str, name: str = "max_shard_size", least: int = 10**6) -> int:
    """Read a size in people's spelling, "5GB", "500 MB", "1GiB" or "1000000", as a number of bytes.

    name    the option with the size, for the error
    least   the smallest size allowed, in bytes

    Raises UsageError for a text without a number or with an unknown unit, and for a size under `least` or over 64 bits.

    >>> parse_size("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise UsageError(f"{text!r} is not a size", hint="write it like 5GB or 500MB")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size > MAX_INT:
        raise UsageError(f"{printable(text, 80)} is larger than any disk", hint="write it like 5GB or 500MB")
    nbytes = int(size)
    if nbytes < least:
        raise UsageError(f"{name} {text} is less than 1 MB", hint="a whole tensor has to go in anyway")
    return nbytes
