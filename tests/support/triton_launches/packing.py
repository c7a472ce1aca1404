"""The bit stream."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loftq_cli.triton_kernels.packing.contract import pack_rows, unpack_rows


def packing_and_unpacking() -> None:
    for bits in (2, 3, 4):
        pack_rows(torch.zeros(16, 1024, dtype=torch.uint8), bits)
        unpack_rows(torch.empty(16, 32 * bits, dtype=torch.int32), bits, 1024)


CALLS: list[Callable[[], None]] = [packing_and_unpacking]
