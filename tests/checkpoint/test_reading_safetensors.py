"""A .safetensors file is believed only when every rule of the format holds; then it is read exactly."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loftq_cli.checkpoint.safetensors_file import SafetensorsFile, is_tensor_name
from loftq_cli.errors import InputError, StorageError
from loftq_cli.tensors.headers import ITEMSIZE

F32_2 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def written(path: Path, header: Any, data: bytes = b"", *, header_nbytes: int | None = None) -> Path:
    """A file with this header (an object, or the text itself) before this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    count = len(text) if header_nbytes is None else header_nbytes
    path.write_bytes(count.to_bytes(8, "little") + text + data)
    return path


def refusal(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        SafetensorsFile(path)
    assert caught.value.file == str(path)
    assert caught.value.hint is not None
    return caught.value


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_every_dtype_comes_back_as_safetensors_wrote_it(tmp_path: Path, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (3, 4 * ITEMSIZE[dtype]), generator=generator)
    expected = raw.to(torch.uint8).view(getattr(torch, dtype))  # [3, 4], every bit pattern, also NaN
    save_file({"w": expected}, tmp_path / "a.safetensors")

    file = SafetensorsFile(tmp_path / "a.safetensors")
    loaded = file.load("w")

    assert (file.tensors["w"].dtype, file.tensors["w"].shape) == (dtype, (3, 4))
    assert (loaded.dtype, loaded.shape, loaded.is_contiguous()) == (expected.dtype, expected.shape, True)
    assert bits(loaded) == bits(expected)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1, 1, 1), (2, 3, 4, 5)])
def test_every_shape_comes_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    expected = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    save_file({"before": torch.ones(3), "w": expected, "x": torch.ones(2)}, tmp_path / "a.safetensors")

    file = SafetensorsFile(tmp_path / "a.safetensors")

    assert torch.equal(file.load("w"), expected)
    assert b"".join(file.chunks("w")) == bits(expected)


def test_loaded_tensors_can_be_written_to_without_touching_the_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")

    file.load("w").zero_()

    assert torch.equal(file.load("w"), torch.ones(2))


def test_rows_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    whole = torch.arange(60, dtype=torch.bfloat16).reshape(5, 3, 4)
    save_file({"v": torch.ones(7), "w": whole}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")

    for start, stop in [(0, 5), (1, 3), (4, 5), (2, 2), (5, 5)]:
        assert torch.equal(file.load_rows("w", start, stop), whole[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 6), (3, 2)])
def test_rows_that_do_not_exist_are_the_callers_mistake(tmp_path: Path, start: int, stop: int) -> None:
    save_file({"w": torch.ones(5, 2), "s": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")

    with pytest.raises(ValueError, match="no rows"):
        file.load_rows("w", start, stop)
    with pytest.raises(ValueError, match="no rows"):
        file.load_rows("s", 0, 0)


@pytest.mark.parametrize("chunk_nbytes", [1, 3, 8, 239, 240, 241])
def test_chunks_join_to_the_tensors_bytes_and_keep_their_bound(tmp_path: Path, chunk_nbytes: int) -> None:
    whole = torch.arange(60, dtype=torch.float32)
    save_file({"v": torch.ones(7), "w": whole}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")

    pieces = list(file.chunks("w", chunk_nbytes))

    assert b"".join(pieces) == bits(whole)
    assert max(piece.nbytes for piece in pieces) <= chunk_nbytes


def test_chunks_of_no_size_are_the_callers_mistake(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")

    with pytest.raises(ValueError, match="chunk_nbytes is at least 1"):
        list(SafetensorsFile(tmp_path / "a.safetensors").chunks("w", 0))


def test_a_failing_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")

    def failing(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)

    with pytest.raises(StorageError, match=r"a\.safetensors: cannot be read: Input/output error"):
        file.load("w")


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.arange(100.0)}, tmp_path / "a.safetensors")
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))

    assert torch.equal(SafetensorsFile(tmp_path / "a.safetensors").load("w"), torch.arange(100.0))


def test_tensors_stand_in_the_order_of_their_data(tmp_path: Path) -> None:
    header = {
        "late": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]},
        "empty_b": {"dtype": "U8", "shape": [0], "data_offsets": [3, 3]},
        "early": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "empty_a": {"dtype": "U8", "shape": [4, 0], "data_offsets": [3, 3]},
    }
    file = SafetensorsFile(written(tmp_path / "a.safetensors", header, b"abcde"))

    assert list(file.tensors) == ["early", "empty_b", "empty_a", "late"]
    assert file.load("late").tolist() == list(b"de")


def test_metadata_is_read(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"format": "pt"})

    assert SafetensorsFile(tmp_path / "a.safetensors").metadata == {"format": "pt"}


def test_a_file_without_tensors_is_a_file(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")

    assert SafetensorsFile(tmp_path / "a.safetensors").tensors == {}


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    program = (
        "import sys; from pathlib import Path\n"
        "from loftq_cli.checkpoint.source import open_checkpoint\n"
        "checkpoint = open_checkpoint(Path(sys.argv[1]))\n"
        "assert list(checkpoint.tensors) == ['w'] and b''.join(checkpoint.chunks('w')) == b'\\0\\0\\x80?'\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )

    subprocess.run([sys.executable, "-c", program, tmp_path / "a.safetensors"], check=True, timeout=60)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2]}, "does not hold exactly dtype, shape and data_offsets"),
        ({**F32_2, "stride": [1]}, "does not hold exactly dtype, shape and data_offsets"),
        ([0, 8], "does not hold exactly dtype, shape and data_offsets"),
        ({**F32_2, "dtype": "F4"}, "its dtype F4 is not known"),
        ({**F32_2, "dtype": "f32"}, "its dtype f32 is not known"),
        ({**F32_2, "dtype": ["F32"]}, "its dtype is not text"),
        ({**F32_2, "shape": 2}, "its shape is not a list"),
        ({**F32_2, "shape": [1] * 64 + [2]}, "its shape is not a list of at most 64 sizes"),
        ({**F32_2, "shape": [2.0]}, "its shape holds something that is not a size"),
        ({**F32_2, "shape": [True, 2]}, "its shape holds something that is not a size"),
        ({**F32_2, "shape": [-2, -1]}, "its shape holds something that is not a size"),
        ({**F32_2, "shape": ["2"]}, "its shape holds something that is not a size"),
        ({**F32_2, "shape": [2**48 + 1]}, "its shape holds something that is not a size"),
        ({"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}, "something that is not a size"),
        ({"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}, "its shape is larger than any memory"),
        ({**F32_2, "shape": [2**32, 2**32]}, "its shape is larger than any memory"),
        ({**F32_2, "shape": [3]}, "its shape and dtype make 12 bytes, its offsets 8"),
        ({**F32_2, "dtype": "F16"}, "its shape and dtype make 4 bytes, its offsets 8"),
        ({**F32_2, "data_offsets": [8, 0]}, "its data_offsets are not two numbers in ascending order"),
        ({**F32_2, "data_offsets": [-8, 0]}, "its data_offsets are not two numbers in ascending order"),
        ({**F32_2, "data_offsets": [0, 8, 8]}, "its data_offsets are not two numbers in ascending order"),
        ({**F32_2, "data_offsets": [0.0, 8.0]}, "its data_offsets are not two numbers in ascending order"),
        ({**F32_2, "data_offsets": [False, 8]}, "its data_offsets are not two numbers in ascending order"),
        ({**F32_2, "data_offsets": [0, True]}, "its data_offsets are not two numbers in ascending order"),
        ({**F32_2, "data_offsets": 8}, "its data_offsets are not two numbers in ascending order"),
        ({**F32_2, "data_offsets": {"begin": 0}}, "its data_offsets are not two numbers in ascending order"),
        ({**F32_2, "data_offsets": [4, 12]}, "its data leaves a hole before it"),
        ({"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}, "its data ends at byte 9; the file holds 8"),
        ({"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}, "its data ends at byte 1099511627776"),
    ],
)
def test_an_entry_that_breaks_a_rule_is_refused_with_its_tensor(tmp_path: Path, entry: Any, message: str) -> None:
    error = refusal(written(tmp_path / "a.safetensors", {"model.w": entry}, bytes(8)))

    assert error.tensor == "model.w"
    assert message in error.message


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    second = {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}

    error = refusal(written(tmp_path / "a.safetensors", {"a": F32_2, "b": second}, bytes(12)))

    assert (error.tensor, error.message) == ("b", "its data overlaps the tensor before it")


def test_two_names_for_the_same_bytes_are_refused(tmp_path: Path) -> None:
    error = refusal(written(tmp_path / "a.safetensors", {"a": F32_2, "b": F32_2}, bytes(8)))

    assert error.message == "its data overlaps the tensor before it"


def test_bytes_that_belong_to_no_tensor_are_refused(tmp_path: Path) -> None:
    error = refusal(written(tmp_path / "a.safetensors", {"a": F32_2}, bytes(8) + b"#!/bin/sh"))

    assert error.message == "9 bytes after the last tensor belong to nothing"


def test_a_truncated_file_is_refused_with_the_tensor_it_cuts(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100)}, path)
    os.truncate(path, path.stat().st_size - 1)

    error = refusal(path)

    assert (error.tensor, error.message) == ("w", "its data ends at byte 400; the file holds 399 bytes of data")


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}',
        b'{"__metadata__":{"k":"1","k":"2"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    ],
)
def test_a_key_that_stands_twice_is_refused_though_other_readers_take_the_last(tmp_path: Path, header: bytes) -> None:
    assert "stands twice" in refusal(written(tmp_path / "a.safetensors", header, bytes(8))).message


@pytest.mark.parametrize("metadata", [{"a": 1}, {"a": None}, {"a": {}}, ["a"], "a", None])
def test_metadata_that_is_not_text_to_text_is_refused(tmp_path: Path, metadata: Any) -> None:
    error = refusal(written(tmp_path / "a.safetensors", {"__metadata__": metadata, "a": F32_2}, bytes(8)))

    assert error.message == "the header's __metadata__ does not map text to text"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "its name is empty or not Unicode text"),
        ("a\ud800", "the header holds half a character (a lone surrogate)"),
    ],
)
def test_a_name_that_cannot_be_written_again_is_refused(tmp_path: Path, name: str, message: str) -> None:
    assert refusal(written(tmp_path / "a.safetensors", {name: F32_2}, bytes(8))).message == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x02\0\0", "is too short for a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "is a git-LFS pointer"),
        (b"<!DOCTYPE html><html>", "its header claims"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "its header claims 100000001 bytes; 100000000 are allowed"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "its header claims 18446744073709551615 bytes"),
        ((3).to_bytes(8, "little") + b"{}", "its header claims 3 bytes; the file has 10"),
        ((0).to_bytes(8, "little"), "the header does not begin with {"),
        ((3).to_bytes(8, "little") + b" {}", "the header does not begin with {"),
        ((2).to_bytes(8, "little") + b"[]", "the header does not begin with {"),
        ((3).to_bytes(8, "little") + b"{\xff}", "the header is not UTF-8"),
        ((2).to_bytes(8, "little") + b"{x", "the header is not valid JSON"),
        ((200_005).to_bytes(8, "little") + b'{"a":' + b"[" * 200_000, "the header is nested too deeply"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)

    assert message in refusal(path).message


def test_a_tensor_name_cannot_steer_the_terminal(tmp_path: Path) -> None:
    name = "[bold red]\x1b[2J\r\n\u202eevil[/]" + "x" * 500

    error = refusal(written(tmp_path / "a.safetensors", {name: {**F32_2, "shape": [3]}}, bytes(8)))

    assert error.tensor is not None
    assert error.tensor.startswith(r"[bold red]\x1b[2J\r\n\u202eevil[/]xxx")  # markup stays text: see the console
    assert len(error.tensor) == 160
    assert str(error).isprintable()


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")

    assert refusal(tmp_path / "a.safetensors").message == "is not a regular file"


def test_a_file_cut_short_between_two_chunks_is_a_storage_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100)}, path)
    chunks = SafetensorsFile(path).chunks("w", 100)
    next(chunks)
    os.truncate(path, path.stat().st_size - 250)

    with pytest.raises(StorageError, match="changed while it was being read: it ends 50 bytes early"):
        list(chunks)


def test_a_file_cut_short_after_opening_is_a_storage_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100)}, path)
    file = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 1)

    with pytest.raises(StorageError, match="changed while it was being read"):
        file.load("w")


def test_a_file_that_vanished_is_a_storage_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100)}, path)
    file = SafetensorsFile(path)
    path.unlink()

    with pytest.raises(StorageError, match="changed while it was being read"):
        file.load("w")
    with pytest.raises(StorageError, match="changed while it was being read"):
        file.check_unchanged()


def test_a_file_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100)}, path)
    file = SafetensorsFile(path)
    file.check_unchanged()
    save_file({"w": torch.zeros(100)}, tmp_path / "b.safetensors")
    os.replace(tmp_path / "b.safetensors", path)

    with pytest.raises(StorageError, match="changed while it was being read") as caught:
        file.check_unchanged()
    assert caught.value.exit_code == 3
    with pytest.raises(StorageError, match="changed while it was being read"):
        file.load("w")


def test_a_file_rewritten_in_place_with_its_old_time_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100)}, path)
    before = path.stat()
    file = SafetensorsFile(path)
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the kernel's clock ticks in milliseconds
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(StorageError, match="changed while it was being read"):
        file.check_unchanged()


def test_no_file_stays_open_between_reads(tmp_path: Path) -> None:
    save_file({"w": torch.ones(100)}, tmp_path / "a.safetensors")
    before = len(os.listdir("/proc/self/fd"))

    file = SafetensorsFile(tmp_path / "a.safetensors")
    file.load("w")
    list(file.chunks("w"))

    assert len(os.listdir("/proc/self/fd")) == before


def test_the_sum_of_a_file_is_of_all_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(300_000)}, path)  # more than one piece of reading

    assert SafetensorsFile(path).file_sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("name", "is_name"), [("w", True), ("重み", True), ("", False), ("\ud800", False), (7, False)])
def test_names_are_texts_that_utf_8_can_write(name: object, is_name: bool) -> None:
    assert is_tensor_name(name) is is_name


def test_a_file_that_changed_says_what_to_do(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")

    for read in (file.check_unchanged, file.file_sha256):
        with pytest.raises(StorageError, match="changed while it was being read") as caught:
            read()
        assert caught.value.file == str(tmp_path / "a.safetensors")
        assert caught.value.hint == "run the command again when nothing else writes to it"
