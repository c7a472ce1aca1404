"""A weight for reading: a read of numbers computes the weight, and a change is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

READ_ONLY = (
    "this weight is decoded from quantized codes whenever it is read: a change to it would be lost. To merge an "
    "adapter, save it and run `loftq merge`, or take what merge() of LoftQLinear, QLoRALinear or QALoRALinear returns"
)


class ReadOnlyWeight(torch.Tensor):
    """A weight for reading: a read of numbers calls `decode`, and a change raises RuntimeError. PEFT's merging would
    otherwise add the adapter to a temporary tensor, and the training would be lost.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _decode: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(
        cls, decode: Callable[[], torch.Tensor], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> ReadOnlyWeight:
        weight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight._decode = decode
        return weight

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed = args[place] if place < len(args) else kwargs.get(argument.name)
                if any(isinstance(leaf, cls) for leaf in tree_leaves(changed)):
                    raise RuntimeError(READ_ONLY)
        if func is torch.ops.aten.detach.default:
            return cls(args[0]._decode, args[0].shape, args[0].dtype, args[0].device)
        args, kwargs = tree_map_only(cls, lambda weight: weight._decode(), (args, kwargs))
        return func(*args, **kwargs)

    @property
    def data(self) -> torch.Tensor:
        """The weight, for reading."""
        return self

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise RuntimeError(READ_ONLY)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise RuntimeError(READ_ONLY)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self._decode())
