"""Names of tensors as trainers spell the names: wrappers of a training run, and the name of the adapter, are taken off.

torch.compile, DDP and FSDP wrap modules, and each wrapper is one more part of every name below the module. A file made
from `model.state_dict()` holds the adapter's name: `lora_A.default.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_MAX_COMPARED = 500  # names: a comparison of letters takes tens of microseconds
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_ADAPTER_NAME = re.compile(
    r"(?<=\.)(lora_(?:A|B)|lora_embedding_(?:A|B)|lora_magnitude_vector|trainable_tokens_delta|modules_to_save)"
    r"\.(?!weight$|bias$)([^.]+)(?=\.(?:weight|bias)$|$)"
)


def without_wrappers(name: str) -> str:
    """Take the parts that wrappers of a training run add off the name of a tensor or a module.

    >>> without_wrappers("_orig_mod.model.layers.0._fsdp_wrapped_module.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def wrappers_in(names: Iterable[str]) -> list[str]:
    """List the wrappers in `names`, each with the dot behind the name, in the order of `WRAPPERS`.

    >>> wrappers_in(["module.fc.weight", "fc.bias"])
    ['module.']
    """
    parts = {part for name in names for part in name.split(".")}
    return [f"{wrapper}." for wrapper in WRAPPERS if wrapper in parts]


def adapter_names_in(names: Iterable[str]) -> list[str]:
    """List the names of adapters in names of tensors without wrappers, sorted.

    >>> adapter_names_in(["fc.lora_A.default.weight", "fc.lora_B.default.weight", "fc.lora_A.weight"])
    ['default']
    """
    return sorted({match[2] for name in names if (match := _ADAPTER_NAME.search(name))})


def without_adapter_name(name: str) -> str:
    """Take the name of the adapter off the name of a tensor.

    >>> without_adapter_name("fc.lora_A.default.weight"), without_adapter_name("fc.lora_embedding_A.default")
    ('fc.lora_A.weight', 'fc.lora_embedding_A')
    """
    return _ADAPTER_NAME.sub(r"\1", name)


def nearest_name(name: str, names: Collection[str]) -> str | None:
    """The one of `names` most like `name`: most parts in common at the end, then most letters; None without names.

    >>> nearest_name("layers.9.self_attn.q_proj", ["lm_head", "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"])
    'layers.0.self_attn.q_proj'
    """
    from difflib import SequenceMatcher

    wanted = name.split(".")

    def common(other: str) -> int:
        pairs = zip(reversed(wanted), reversed(other.split(".")), strict=False)
        return next((count for count, (mine, theirs) in enumerate(pairs) if mine != theirs), len(other.split(".")))

    most = max(map(common, names), default=0)
    nearest = [other for other in names if common(other) == most][:_MAX_COMPARED]
    return max(nearest, key=lambda other: SequenceMatcher(None, name, other).ratio(), default=None)
