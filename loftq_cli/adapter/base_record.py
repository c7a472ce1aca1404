"""The record of the base of an adapter: method, name of the original and fingerprint of the base's quantized weights.

A conversion writes the record twice: as loftq_provenance.json beside the adapter, and in adapter_config.json, because
training with PEFT keeps no further file. PEFT reads adapter_config.json into a class and writes the class anew, so most
places are lost (PEFT 0.18 to 0.21): unknown keys, the metadata and the names of tensors are dropped, `loftq_config` is
emptied, `auto_mapping` is overwritten where the config has no task, and a pattern without a module is warned of. A
`revision` is kept, and is also looked up on the hub. `megatron_core` is a text that PEFT keeps, and reads only beside a
`megatron_config`, the config of a model of another library; without a record the text is "megatron.core".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq_cli.adapter.config import CONFIG_NAME
from loftq_cli.checkpoint.json_files import parse_json_object, read_json_object
from loftq_cli.errors import InputError, MismatchError, printable
from loftq_cli.output.records import PROVENANCE_NAME, TOOL

_PLACE = "megatron_core"


def with_record(config: Mapping[str, Any], record: Mapping[str, Any] | None) -> dict[str, Any]:
    """The content of adapter_config.json with the record of the base; None adds nothing.

    >>> config = with_record({"r": 8}, {"tool": "loftq-cli", "method": "loftq", "base_fingerprint": "8f3a"})
    >>> record_in(config)["base_fingerprint"]
    '8f3a'
    """
    return dict(config) if record is None else {**config, _PLACE: json.dumps(record)}


def record_in(config: Mapping[str, Any], file: Path = Path(CONFIG_NAME)) -> dict[str, Any] | None:
    """The record of the base in a config; None for a config without a record.

    config   the content of adapter_config.json
    file     the name for an error

    Raises InputError for a damaged record.

    >>> record_in({"megatron_core": "megatron.core"}) is None
    True
    """
    text = config.get(_PLACE)
    if not isinstance(text, str) or not text.startswith("{"):
        return None
    record = parse_json_object(text.encode(errors="replace"), file=file, what=_PLACE)
    return _checked(record, file, f"{_PLACE} in it is") if record.get("tool") == TOOL["tool"] else None


def read_base_record(adapter: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], Path] | None:
    """The record of the base of the adapter in the directory `adapter`, and the file with the record; None without.

    config   the content of adapter_config.json

    Raises InputError for a damaged record, MismatchError where config and file beside name two bases: training may have
    saved its adapter over an earlier adapter.

    >>> read_base_record(Path("no such folder"), {}) is None
    True
    """
    inside, file = record_in(config, adapter / CONFIG_NAME), adapter / PROVENANCE_NAME
    if not file.is_file():
        return None if inside is None else (inside, adapter / CONFIG_NAME)
    beside = _checked(read_json_object(file), file, "is")
    if inside is not None and inside["base_fingerprint"] != beside["base_fingerprint"]:
        bases = f"{describe_base(beside)}, and {CONFIG_NAME} names {describe_base(inside)}"
        hint = "delete the file, where the adapter was saved over an earlier adapter"
        raise MismatchError(f"names the base {bases}", file=file, hint=hint)
    return beside, file


def describe_base(record: Mapping[str, Any]) -> str:
    """The base of a record in words: the start of the fingerprint, and the name of the original.

    >>> describe_base({"base_fingerprint": "8f3a5d0b99c1e2f3", "source": "llama"})
    '8f3a5d0b99c1 of llama'
    """
    source = record.get("source", record.get("base_model"))
    name = "" if source is None else f" of {printable(source)}"
    return f"{printable(str(record['base_fingerprint'])[:12])}{name}"


def _checked(record: dict[str, Any], file: Path, start: str) -> dict[str, Any]:
    if not isinstance(record.get("base_fingerprint"), str) or not isinstance(record.get("method"), str):
        raise InputError(f"{start} not a provenance file of this tool", file=file, hint="delete it to merge without")
    return record
