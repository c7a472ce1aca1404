"""Files are laid out first and filled in any order; the bytes are those that safetensors itself writes."""

from __future__ import annotations

import hashlib
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from loftq_cli.errors import StorageError
from loftq_cli.output.writer import SafetensorsWriter, tensor_bytes
from loftq_cli.tensors.headers import OutTensor


def assorted() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "b.weight": floats(5, 3),
        "a.weight": floats(7).to(torch.bfloat16),
        "half": floats(2, 2, 2).half(),
        "double": floats(3).double(),
        "codes": torch.arange(11, dtype=torch.uint8),
        "signed": torch.arange(-3, 4, dtype=torch.int8),
        "ids": torch.arange(4),
        "short": torch.arange(3, dtype=torch.int16),
        "int": torch.arange(3, dtype=torch.int32),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "eight": floats(4).to(torch.float8_e4m3fn),
        "ünïcode.重み": floats(2),
    }


def planned(tensors: dict[str, torch.Tensor]) -> list[OutTensor]:
    return [OutTensor(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()]


@pytest.mark.parametrize("order", [1, -1])
def test_bytes_are_those_of_the_library_in_whatever_order_tensors_come(tmp_path, order):
    tensors = assorted()
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    writer = SafetensorsWriter(tmp_path / "ours.safetensors", planned(tensors))
    for name in list(tensors)[::order]:
        writer.write(name, tensors[name])
    writer.close()
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    loaded = load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_sum_of_a_tensor_is_of_its_bytes_and_can_be_read_back(tmp_path):
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4)
    writer = SafetensorsWriter(tmp_path / "f.safetensors", [OutTensor("x", "float32", (3, 4))])
    expected = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert writer.write("x", tensor) == expected
    assert writer.sha256("x") == expected
    writer.close()


def test_a_tensor_that_is_not_as_planned_is_refused(tmp_path):
    writer = SafetensorsWriter(tmp_path / "f.safetensors", [OutTensor("x", "float32", (3, 4))])
    with pytest.raises(ValueError, match="planned"):
        writer.write("x", torch.zeros(4, 3))
    with pytest.raises(ValueError, match="planned"):
        writer.write("x", torch.zeros(3, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match="planned"):
        writer.write_chunks("x", [memoryview(b"\0" * 40)])
    with pytest.raises(ValueError, match="more bytes"):
        writer.write_chunks("x", [memoryview(b"\0" * 40), memoryview(b"\0" * 16)])


def test_short_writes_are_continued(tmp_path, monkeypatch):
    tensor = torch.arange(100, dtype=torch.float32)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, memoryview(data)[:7], offset))
    writer = SafetensorsWriter(tmp_path / "f.safetensors", [OutTensor("x", "float32", (100,))])
    writer.write("x", tensor)
    writer.close()
    assert torch.equal(load_file(tmp_path / "f.safetensors")["x"], tensor)


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, monkeypatch):
    def full(fd: int, data: object, offset: int) -> int:
        raise OSError(28, "No space left on device")

    writer = SafetensorsWriter(tmp_path / "f.safetensors", [OutTensor("x", "float32", (2,))])
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        StorageError, match=r"f\.safetensors: no space left on device, .* are free \(free some space"
    ) as caught:
        writer.write("x", torch.zeros(2))
    assert caught.value.exit_code == 3


def test_a_failing_fsync_is_an_error(tmp_path, monkeypatch):
    def fails(fd: int) -> None:
        raise OSError(5, "Input/output error")

    writer = SafetensorsWriter(tmp_path / "f.safetensors", [OutTensor("x", "float32", (2,))])
    writer.write("x", torch.zeros(2))
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(StorageError, match="input/output error"):
        writer.sync()


def test_non_contiguous_tensors_are_written_row_by_row():
    tensor = torch.arange(6, dtype=torch.int16).view(2, 3).T
    assert bytes(tensor_bytes(tensor)) == torch.tensor([0, 3, 1, 4, 2, 5], dtype=torch.int16).numpy().tobytes()


def test_rows_that_were_written_are_read_back(tmp_path):
    tensor = torch.arange(24, dtype=torch.int32).view(4, 3, 2)
    writer = SafetensorsWriter(tmp_path / "f.safetensors", planned({"before": torch.ones(3), "x": tensor}))
    writer.write("before", torch.ones(3))
    writer.write("x", tensor)
    assert torch.equal(writer.load("x"), tensor)
    assert torch.equal(writer.load_rows("x", 1, 3), tensor[1:3])
    with pytest.raises(ValueError, match="no rows 3:5"):
        writer.load_rows("x", 3, 5)
    writer.close()


def test_short_reads_are_continued(tmp_path, monkeypatch):
    tensor = torch.arange(100, dtype=torch.float32)
    writer = SafetensorsWriter(tmp_path / "f.safetensors", planned({"x": tensor}))
    writer.write("x", tensor)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:7]], offset))
    assert torch.equal(writer.load("x"), tensor)
    writer.close()


@pytest.mark.parametrize("read", [SafetensorsWriter.load, SafetensorsWriter.sha256])
def test_a_file_that_somebody_cut_is_named_and_never_read_for_ever(read, tmp_path):
    writer = SafetensorsWriter(tmp_path / "f.safetensors", planned({"x": torch.zeros(8)}))
    writer.write("x", torch.zeros(8))
    os.truncate(tmp_path / "f.safetensors", (tmp_path / "f.safetensors").stat().st_size - 1)
    with pytest.raises(StorageError, match=r"f\.safetensors: the file became shorter while it was written"):
        read(writer, "x")
    writer.close()
