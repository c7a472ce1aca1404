"""Views that would grow, archives that would inflate, damaged and foreign files are refused."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from support.torch_files import NO_PICKLE, members_of, patched, refusal, saved, with_pickle, zipped

from loftq_cli.checkpoint.torch_file import TorchFile
from loftq_cli.errors import StorageError


def test_an_expanded_tensor_is_refused_before_its_160_gb_are_made(tmp_path: Path) -> None:
    error = refusal(saved(tmp_path / "a.bin", {"w": torch.zeros(1).expand(200_000, 200_000)}))

    assert error.tensor == "w"
    assert error.message == "it is expanded (stride 0) to shape [200000, 200000], more than its storage holds"


def test_a_sliding_window_over_a_small_storage_is_refused(tmp_path: Path) -> None:
    window = torch.zeros(1999).as_strided((1000, 1000), (1, 1))  # a million elements over two thousand

    error = refusal(saved(tmp_path / "a.bin", {"w": window}))

    assert (error.tensor, error.message) == ("w", "its shape [1000, 1000] reaches outside its storage of 7996 bytes")


def test_thousands_of_views_of_one_storage_are_refused(tmp_path: Path) -> None:
    weight = torch.zeros(1000)

    error = refusal(saved(tmp_path / "a.bin", {f"w{i}": weight[i:] for i in range(100)}))

    assert (error.tensor, error.message) == ("w4", "it is one of too many views of storage 0")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\x02K\x03\x86", b"K\x02K\x04\x86", "its shape [2, 4] reaches outside its storage of 24 bytes"),
        (b"K\x03K\x01\x86", b"K\x04K\x01\x86", "its shape [2, 3] reaches outside its storage of 24 bytes"),
        (b"QK\x00K\x02", b"QK\x01K\x02", "its shape [2, 3] reaches outside its storage of 24 bytes"),
        (b"K\x06tq", b"K\x07tq", "its storage 0 should have 28 bytes and has 24 bytes"),
        (b"X\x01\0\0\x000", b"X\x01\0\0\x001", "its storage 1 should have 24 bytes and is missing"),
        (b"FloatStorage", b"HalfStorage", "its storage 0 should have 12 bytes and has 24 bytes"),
    ],
)
def test_a_tensor_that_leaves_its_storage_is_refused(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    error = refusal(patched(tmp_path / "a.bin", {"w": torch.ones(2, 3)}, old, new))

    assert (error.tensor, error.message) == ("w", message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\x02K\x03\x86", b"K\x02\x85", "whose shape, strides and offset do not fit together"),
        (b"K\x03K\x01\x86", b"J\xfd\xff\xff\xffK\x01\x86", "its shape holds something that is not a size"),
        (b"QK\x00K\x02", b"QJ\xff\xff\xff\xffK\x02", "whose shape, strides and offset do not fit together"),
        (b"QK\x00K\x02", b"Q\x88K\x02", "whose shape, strides and offset do not fit together"),
        (b"K\x02K\x03\x86", b"\x88K\x03\x86", "its shape holds something that is not a size"),
        (b"K\x02K\x03\x86", b"K\x00\x8a\x08" + b"\xff" * 7 + b"\x3f\x86", "something that is not a size"),
        (b"K\x06tq", b"J\xff\xff\xff\xfftq", "describes a storage in an unknown way"),
        (b"FloatStorage", b"bfloat16", "describes a storage in an unknown way"),
        (b"X\x01\0\0\x000", b"K\x00", "describes a storage in an unknown way"),
        (b")R", b")RX\x01\0\0\0aNs", "calls torch._utils._rebuild_tensor_v2 in a way"),
    ],
)
def test_a_tensor_described_with_nonsense_is_refused(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    path = patched(tmp_path / "a.bin", {"w": torch.ones(2, 3)}, old, new)

    assert message in refusal(path).message


def test_a_deflated_bomb_is_refused_without_inflating_it(tmp_path: Path) -> None:
    members = members_of(saved(tmp_path / "a.bin", {"w": torch.zeros(16_000_000)}))
    bomb = zipped(tmp_path / "bomb.bin", members, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 100_000
    del members

    tracemalloc.start()
    error = refusal(bomb)
    peak_nbytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert "is compressed or encrypted" in error.message
    assert peak_nbytes < 1_000_000  # inflated, it has 64 MB


def test_a_hostile_pickle_costs_a_small_multiple_of_its_size(tmp_path: Path) -> None:
    data = b"\x80\x02]" + (b"(" + b"}K\x01K\x01s" * 10_000 + b"e") * 10 + b"."
    path = with_pickle(tmp_path / "a.bin", data)

    tracemalloc.start()
    error = refusal(path)
    peak_nbytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert "needs more memory than its size allows" in error.message
    assert peak_nbytes < 25 * len(data)


@pytest.mark.parametrize("name", ["../w", "/etc/w", "archive/../../w", "archive\\..\\w"])
def test_a_member_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    members = members_of(saved(tmp_path / "a.bin", {"w": torch.ones(1)}))

    assert "has a name that leads elsewhere" in refusal(zipped(tmp_path / "b.bin", {**members, name: b""})).message


def test_a_member_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"w": torch.ones(1)})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a/data/0", bytes(4))

    assert "its member a/data/0 stands twice" in refusal(path).message


def test_a_member_of_two_sizes_is_refused(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.bin", b"\x80\x02}.")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 20] = 1  # the compressed size in the directory
    path.write_bytes(content)

    assert "its member archive/data.pkl has two sizes" in refusal(path).message


def test_a_member_name_with_a_hidden_end_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.bin", {"a/data.pkl": b"\x80\x02}.", "a/data/0~x": b""})
    path.write_bytes(path.read_bytes().replace(b"a/data/0~x", b"a/data/0\0x"))

    assert r"its member a/data/0\x00x has a name that leads elsewhere" in refusal(path).message


def test_a_zip_directory_above_the_limit_is_not_read(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.bin", b"\x80\x02}.")
    end = bytearray(path.read_bytes()[-22:])
    end[12:16] = (1 << 25).to_bytes(4, "little")  # the size of the directory
    os.truncate(path, 1 << 26)
    with path.open("ab") as stream:
        stream.write(end)

    assert refusal(path).message == "is not a usable torch file: its directory claims 33554432 bytes"


def test_two_pickles_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.bin", {"a/data.pkl": b"\x80\x02}.", "a/b/data.pkl": b"\x80\x02}."})

    assert refusal(path).message == "holds 2 pickles named data.pkl, not one"


def test_a_pickle_outside_a_folder_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.bin", {"data.pkl": b"\x80\x02}."})

    assert refusal(path).message == NO_PICKLE


def test_a_zip_file_of_something_else_is_refused(tmp_path: Path) -> None:
    assert refusal(zipped(tmp_path / "a.bin", {"a.txt": b""})).message == NO_PICKLE


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.bin", {"a/data.pkl": b"\x80\x02}.", "a/byteorder": b"big"})

    assert refusal(path).message == "was not written on a little-endian machine"


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.bin", b"\x80\x02}.")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # general purpose bit 0 of the first directory entry
    path.write_bytes(content)

    assert "its member archive/data.pkl is compressed or encrypted" in refusal(path).message


def test_a_member_whose_two_headers_disagree_is_refused(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.bin", b"\x80\x02}.")
    content = bytearray(path.read_bytes())
    content[30] = ord("x")  # the first letter of the name in the first local header
    path.write_bytes(content)

    assert "its member archive/data.pkl is described in two ways" in refusal(path).message


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.bin", {"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(4)})
    content = bytearray(path.read_bytes())
    second = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4)
    content[second + 42 : second + 46] = (30).to_bytes(4, "little")  # where its local header is said to be
    path.write_bytes(content)

    assert "its member a/data/0 overlaps the one before it" in refusal(path).message


def test_a_member_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.bin", b"\x80\x02}.")
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = (1 << 30).to_bytes(4, "little") * 2  # compressed and plain size
    path.write_bytes(content)

    assert "its member archive/data.pkl ends after the data" in refusal(path).message


def test_a_pickle_above_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as archive, archive.open("a/data.pkl", "w") as member:
        for _ in range(101):
            member.write(bytes(1_000_000))

    assert refusal(path).message == "its data.pkl has 101000000 bytes; 100000000 are allowed"


def test_a_legacy_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)

    error = refusal(tmp_path / "a.bin")

    assert error.message == "is a bare pickle of the legacy torch format, which is not read here"


def test_a_tar_file_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.bin", "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())

    assert refusal(tmp_path / "a.bin").message == "is a tar file of a very old torch, which is not read here"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a git-LFS pointer"),
        (b"hello", "is not a torch zip file"),
        (b"PK\x03\x04", "is not a usable torch file: its directory points outside the file"),
        (b"PK\x03\x04" + bytes(100), "is not a usable torch file: File is not a zip file"),
        (b"PK\x03\x04" + b"PK\x05\x06" + b"\xff" * 18, "is not a usable torch file"),
        (b"PK\x03\x04" + b"PK\x06\x07" + bytes(16) + b"PK\x05\x06" + b"\xff" * 18, "is not a usable torch file"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.bin").write_bytes(content)

    assert message in refusal(tmp_path / "a.bin").message


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"w": torch.ones(100)})
    os.truncate(path, path.stat().st_size - 200)

    assert refusal(path).message == "is not a usable torch file: File is not a zip file"


def test_a_file_cut_short_between_two_chunks_is_a_storage_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"w": torch.ones(1000)})
    chunks = TorchFile(path).chunks("w", 100)
    next(chunks)
    os.truncate(path, 2000)

    with pytest.raises(StorageError, match=r"changed while it was being read: it ends \d+ bytes early"):
        list(chunks)


def test_a_file_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"w": torch.ones(100)})
    file = TorchFile(path)
    file.check_unchanged()
    os.replace(saved(tmp_path / "b.bin", {"w": torch.zeros(100)}), path)

    with pytest.raises(StorageError, match="changed while it was being read"):
        file.check_unchanged()
    with pytest.raises(StorageError, match="changed while it was being read"):
        file.load("w")


@pytest.mark.parametrize("is_view", [False, True])
def test_chunks_of_no_size_are_the_callers_mistake(tmp_path: Path, is_view: bool) -> None:
    weight = torch.ones(2, 3)
    file = TorchFile(saved(tmp_path / "a.bin", {"w": weight.t() if is_view else weight}))

    with pytest.raises(ValueError, match="chunk_nbytes is at least 1"):
        list(file.chunks("w", 0))
