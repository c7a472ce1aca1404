"""The device of an inspection: a GPU or the processor."""

from __future__ import annotations

from loftq_cli.model.stored import BaseModel
from loftq_cli.quant.gpu_matrix import BESIDE_NUMEL
from loftq_cli.runtime.gpu import SharedDevice, open_device
from loftq_cli.runtime.kernel_choice import choose_kernels
from loftq_cli.runtime.schedule import SMALL_NUMEL
from loftq_cli.tensors.rows import TensorRows


def open_inspection_device(device: str, work: int) -> SharedDevice | None:
    """Open the GPU for `work` weights; None for the processor, after a choice of kernels for `work`.

    Raises UsageError for an absent GPU.

    >>> open_inspection_device("cpu", 1000) is None
    True
    """
    gpu = open_device(device, work)
    if gpu is None:
        choose_kernels(work)
    return None if gpu is None else SharedDevice(gpu)


def small_numel(gpu: SharedDevice | None) -> int:
    """The largest number of weights in a matrix for work side by side with further matrices.

    >>> small_numel(None) == 1 << 22
    True
    """
    return SMALL_NUMEL if gpu is None else BESIDE_NUMEL


def load_weight(model: BaseModel, name: str) -> TensorRows:
    """Load the whole full-precision weight `name`, [out, in] in the stored dtype.

    Raises InputError for a tensor other than a matrix.

    >>> from loftq_cli.model.builtin import resolve_model
    >>> load_weight(BaseModel.open(resolve_model("builtin:tiny-llama")), "lm_head.weight").shape
    (288, 192)
    """
    weight = model.whole(name)
    assert isinstance(weight, TensorRows)
    return weight
