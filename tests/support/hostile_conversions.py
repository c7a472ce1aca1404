"""Commands on hostile checkpoints: how they are saved, and what a refusal or a result looks like."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

NAME = "layers.0.proj.weight"
ONCE = ("--rank", 1, "--method", "qlora", "-q")


def fast(options=(), rank=1, iterations=1):
    """Options of a conversion in the least time, before `options`; qlora has no alternations to count."""
    count = () if "qlora" in options else ("--iterations", iterations)
    return ("--rank", rank, *count, "-q", *options)


def save(tensors, path):
    """A checkpoint of one file, in the format that its name says."""
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)
    return path.name


def refused(ran, output, file, *parts):
    """One line that names file and tensor, and nothing published."""
    status, err = ran
    assert status == 2, err
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error: {file}: tensor {NAME}: ")
    assert all(part in err for part in parts), err
    assert not output.exists()


def published(output):
    """Every tensor of a result and its adapter, after it was seen that all are finite."""
    tensors = {}
    for path in output.rglob("*.safetensors"):
        tensors |= load_file(path)
    for name, tensor in tensors.items():
        assert not tensor.is_floating_point() or bool(tensor.float().isfinite().all()), name
    return tensors
