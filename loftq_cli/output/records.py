"""The small files of an output directory beside the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq_cli.errors import printable
from loftq_cli.output import disk
from loftq_cli.runtime.version import VERSION

REPORT_NAME = "loftq_report.json"
RECIPE_NAME = "loftq_recipe.toml"
PROVENANCE_NAME = "loftq_provenance.json"
MERGE_REPORT_NAME = "loftq_merge_report.json"
TOOL = {"tool": "loftq-cli", "version": VERSION}


def write_texts(directory: Path, texts: Mapping[str, str]) -> None:
    """Write small files into `directory`, relative name -> text. Raises StorageError.

    >>> write_texts(Path(), {"README.md": "A model."})
    >>> Path("README.md").read_text()
    'A model.'
    """
    for name, text in texts.items():
        disk.write_file(directory / name, text.encode())


def index_json(shard_of: Mapping[str, str], total_nbytes: int) -> str:
    """The text of model.safetensors.index.json, from tensor name -> file name and the bytes of all tensors.

    >>> json.loads(index_json({"lm_head.weight": "model-1.safetensors"}, 64))["weight_map"]
    {'lm_head.weight': 'model-1.safetensors'}
    """
    return dump_json({"metadata": {"total_size": total_nbytes}, "weight_map": dict(sorted(shard_of.items()))})


def source_name(path: Path) -> str:
    """The name of a checkpoint in reports: the last path component, unprintable characters escaped.

    >>> source_name(Path("models/MiniLM"))
    'MiniLM'
    """
    return printable(path.name if path.name not in ("", "..") else path.resolve().name)


def without_local_path(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without `_name_or_path` where an absolute path names a folder of the machine that trained the
    model. No loader reads the key.

    >>> without_local_path({"_name_or_path": "/home/ada/model", "vocab_size": 32}), without_local_path({"a": 1})
    ({'vocab_size': 32}, {'a': 1})
    """
    name = config.get("_name_or_path")
    is_local = isinstance(name, str) and os.path.isabs(name)
    return {key: value for key, value in config.items() if key != "_name_or_path" or not is_local}


def dump_json(values: Mapping[str, Any]) -> str:
    """JSON text, as in every JSON file of a result.

    >>> dump_json({"rank": 16})
    '{\\n  "rank": 16\\n}\\n'
    """
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
