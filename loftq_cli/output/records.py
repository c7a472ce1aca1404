"""The small files of an output directory beside the weights."""

from __future__ import annotations

import json
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
    return printable(path.name or path.resolve().name)


def dump_json(values: Mapping[str, Any]) -> str:
    """JSON text, as in every JSON file of a result.

    >>> dump_json({"rank": 16})
    '{\\n  "rank": 16\\n}\\n'
    """
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
