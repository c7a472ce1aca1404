"""The models inside the package, and the names of the models on the command line."""

from __future__ import annotations

from pathlib import Path

from loftq_cli.errors import UsageError

_BUILTIN = Path(__file__).parent / "builtin_models"


def resolve_model(model: str) -> Path:
    """Resolve MODEL to a path: the folder of a model inside the package for `builtin:NAME`, else MODEL as a path.

    Raises UsageError for a NAME without a model.

    >>> resolve_model("builtin:tiny-llama").name, resolve_model("folder/model").name
    ('tiny-llama', 'model')
    """
    if not model.startswith("builtin:"):
        return Path(model)
    builtin_names = builtin_models()
    name = model.removeprefix("builtin:")
    if name not in builtin_names:
        raise UsageError(f"no built-in model {name!r}", hint=f"there is {', '.join(builtin_names)}")
    return _BUILTIN / name


def builtin_models() -> list[str]:
    """List the names of the models inside the package, in alphabetical order.

    >>> "tiny-llama" in builtin_models()
    True
    """
    return sorted(path.name for path in _BUILTIN.iterdir() if (path / "config.json").is_file())
