"""Finds, opens and loads the adapter inside a converted directory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loftq_cli.adapter.config import is_adapter_directory
from loftq_cli.adapter.experts.factors import load_pair
from loftq_cli.adapter.experts.planned import lora_with_experts
from loftq_cli.adapter.source import AdapterSource, open_adapter
from loftq_cli.errors import InputError
from loftq_cli.methods.method import METHODS
from loftq_cli.model.stored import BaseModel
from loftq_cli.output.records import REPORT_NAME
from loftq_cli.tensors.matrices import LoraPair


def adapter_folders(reported: str | None) -> tuple[str, ...]:
    """List the possible folders of the adapter in a converted directory, in the order of the search.

    reported   the adapter's folder in the directory's report, or None; the last part of a path counts

    The methods' own folders come first: a changed report cannot hide an adapter.

    >>> adapter_folders("../elsewhere/my_adapter")[-1]
    'my_adapter'
    """
    names = (*(entry.adapter_dir for entry in METHODS.values()), Path(reported or "").name)
    return tuple(dict.fromkeys(name for name in names if name not in ("", "..")))


def find_adapter(directory: Path, reported: str | None) -> Path | None:
    """Find the adapter's directory inside a converted `directory`; None for a directory without an adapter.

    reported   as in `adapter_folders`

    >>> find_adapter(Path("no such folder"), None) is None
    True
    """
    folders = (directory / name for name in adapter_folders(reported))
    return next((folder for folder in folders if is_adapter_directory(folder)), None)


def open_adapter_beside(base: BaseModel, reported: str | None) -> AdapterSource | None:
    """Open the adapter inside the converted directory of `base`; None for a directory without an adapter.

    reported   as in `adapter_folders`

    Raises the errors of `open_adapter`.
    """
    path = find_adapter(base.folder, reported)
    return None if path is None else open_adapter(path)


def load_adapter_pairs(base: BaseModel, names: Iterable[str], reported: str | None) -> dict[str, LoraPair]:
    """Load the adapter inside a converted directory: weight name -> factors for each adapted weight among `names`.

    base       the open base
    names      names of weights of the base
    reported   as in `adapter_folders`

    The result is empty for a directory without an adapter. Raises MismatchError naming a factor of a wrong shape, and
    the errors of `open_adapter`.
    """
    adapter = open_adapter_beside(base, reported)
    if adapter is None:
        return {}
    lora = lora_with_experts(base, adapter)
    pairs = {name: load_pair(adapter, lora[name], matrix_shape_of(base, name)) for name in names if name in lora}
    return {name: pair for name, pair in pairs.items() if pair is not None}


def matrix_shape_of(base: BaseModel, name: str) -> tuple[int, int]:
    """The shape [out, in] of a layer in the report. Raises InputError for an empty matrix and for no matrix."""
    shape = base.matrix_shape(name)
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"is a layer in {REPORT_NAME} and no matrix in the files", file=base.path, tensor=name)
    return (shape[0], shape[1])
