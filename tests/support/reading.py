"""Reading all of a weight file that was accepted, whatever wrote it."""

from __future__ import annotations

from loftq_cli.checkpoint.source import WeightsFile


def read_everything(file: WeightsFile, file_nbytes: int) -> None:
    """What was accepted must also be readable, with the shape it claims, and not larger than the file allows."""
    for name, ref in file.tensors.items():
        assert ref.nbytes <= file_nbytes
        tensor = file.load(name)
        assert (tensor.shape, str(tensor.dtype)) == (ref.shape, f"torch.{ref.dtype}")
        assert sum(chunk.nbytes for chunk in file.chunks(name, 7)) == ref.nbytes
        if ref.shape:
            assert file.load_rows(name, 0, ref.shape[0]).shape == ref.shape
