"""Finds, opens and loads the adapter inside a converted directory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loftq_cli.adapter.config import is_adapter_directory
from loftq_cli.adapter.source import AdapterSource, open_adapter
from loftq_cli.errors import InputError
from loftq_cli.methods.method import METHODS
from loftq_cli.model.stored import BaseModel
from loftq_cli.output.records import REPORT_NAME
from loftq_cli.tensors.matrices import LoraPair


def adapter_folders(reported: str | None) -> tuple[str, ...]:
    """Names of the folders that may hold the adapter of a converted directory, in the order of the search.

    reported   the folder that the directory's report names; the last part of a path counts

    The folders that methods write to come first: a report that was changed cannot hide an adapter.

    >>> adapter_folders("../elsewhere/my_adapter")[-1]
    'my_adapter'
    """
    names = (*(entry.adapter_dir for entry in METHODS.values()), Path(reported or "").name)
    return tuple(dict.fromkeys(name for name in names if name not in ("", "..")))


def find_adapter(directory: Path, reported: str | None) -> Path | None:
    """The adapter's directory inside a converted `directory`; None where there is no adapter."""
    folders = (directory / name for name in adapter_folders(reported))
    return next((folder for folder in folders if is_adapter_directory(folder)), None)


def open_adapter_beside(base: BaseModel, reported: str | None) -> AdapterSource | None:
    """Open the adapter inside the converted directory of `base`; None where there is no adapter.

    Raises what `open_adapter` raises.
    """
    path = find_adapter(base.folder, reported)
    return None if path is None else open_adapter(path)


def load_adapter_pairs(base: BaseModel, names: Iterable[str], reported: str | None) -> dict[str, LoraPair]:
    """Load the adapter inside a converted directory: the factors for each adapted weight among `names`.

    Raises MismatchError naming a factor that does not fit the weight.
    """
    adapter = open_adapter_beside(base, reported)
    if adapter is None:
        return {}
    lora = adapter.lora_in(base)
    pairs = {name: adapter.pair(lora[name].module, matrix_shape_of(base, name)) for name in names if name in lora}
    return {name: pair for name, pair in pairs.items() if pair is not None}


def matrix_shape_of(base: BaseModel, name: str) -> tuple[int, int]:
    """The shape [out, in] of a layer that the report lists. Raises InputError for a tensor that is no matrix."""
    shape = base.matrix_shape(name)
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"is a layer in {REPORT_NAME} and no matrix in the files", file=base.path, tensor=name)
    return (shape[0], shape[1])
