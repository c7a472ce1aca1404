"""Where an inspection computes."""

from __future__ import annotations

from loftq_cli.errors import UsageError
from loftq_cli.model.stored import BaseModel
from loftq_cli.quant.gpu_matrix import BESIDE_NUMEL
from loftq_cli.runtime.gpu import SharedDevice, open_device
from loftq_cli.runtime.kernel_choice import choose_kernels
from loftq_cli.runtime.schedule import SMALL_NUMEL
from loftq_cli.tensors.rows import TensorRows


def check_idle_device(device: str, remedy: str) -> None:
    """Raises UsageError for a GPU that is asked for where an inspection computes no errors of weights: a report is
    read, and `--reference` runs models on the processor. `remedy` is the option that gives a GPU errors to compute.
    """
    if device not in ("auto", "cpu"):
        message = f"--device {device} is for errors of weights, and none are computed here"
        raise UsageError(message, hint=f"{remedy} computes them; or leave --device out")


def chosen_device(device: str, work: int) -> SharedDevice | None:
    """The GPU for so many weights; None for the processor, whose kernels are then chosen."""
    gpu = open_device(device, work)
    if gpu is None:
        choose_kernels(work)
    return None if gpu is None else SharedDevice(gpu)


def small_numel(gpu: SharedDevice | None) -> int:
    return SMALL_NUMEL if gpu is None else BESIDE_NUMEL


def loaded_rows(model: BaseModel, name: str) -> TensorRows:
    """A weight in full precision, all of it."""
    weight = model.whole(name)
    assert isinstance(weight, TensorRows)
    return weight
