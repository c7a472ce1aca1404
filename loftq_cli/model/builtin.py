"""The models that come with the package, and how MODEL names one."""

from __future__ import annotations

from pathlib import Path

from loftq_cli.errors import UsageError

_BUILTIN = Path(__file__).parent / "builtin_models"


def resolve_model(model: str) -> Path:
    """The path that MODEL stands for: itself, or the folder of `builtin:NAME`."""
    if not model.startswith("builtin:"):
        return Path(model)
    known = builtin_models()
    name = model.removeprefix("builtin:")
    if name not in known:
        raise UsageError(f"no built-in model {name!r}", hint=f"there is {', '.join(known)}")
    return _BUILTIN / name


def builtin_models() -> list[str]:
    """Names of the models inside the package."""
    return sorted(path.name for path in _BUILTIN.iterdir() if (path / "config.json").is_file())
