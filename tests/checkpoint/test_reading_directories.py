"""A model folder: which files are read, and every way in which files, index and folder can disagree."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loftq_cli.checkpoint.source import READERS, Checkpoint, open_checkpoint, open_weights_file
from loftq_cli.errors import InputError, StorageError

INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((2,), float(ord(name[0]))) for name in names}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of two shards, [b, c] and [a, d], and its index."""
    save_file(tensors("b", "c"), tmp_path / SHARDS[0])
    save_file(tensors("a", "d"), tmp_path / SHARDS[1])
    write_index(tmp_path, {"a": SHARDS[1], "b": SHARDS[0], "c": SHARDS[0], "d": SHARDS[1]})
    return tmp_path


def write_index(directory: Path, weight_map: Any, name: str = INDEX) -> None:
    (directory / name).write_text(json.dumps({"metadata": {"total_size": -1}, "weight_map": weight_map}))


def refusal(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert caught.value.hint is not None
    return caught.value


def test_a_sharded_model_is_read_in_the_order_of_its_files(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)

    assert list(checkpoint.tensors) == ["b", "c", "a", "d"]
    assert checkpoint.files == tuple(sharded / name for name in SHARDS)
    assert checkpoint.index_file == sharded / INDEX
    assert (checkpoint.path, checkpoint.directory) == (sharded, sharded)
    assert checkpoint.tensors["d"].file == sharded / SHARDS[1]
    for name, expected in tensors("a", "b", "c", "d").items():
        assert torch.equal(checkpoint.load(name), expected)
        assert torch.equal(checkpoint.load_rows(name, 1, 2), expected[1:])
        assert b"".join(checkpoint.chunks(name, 3)) == bytes(expected.view(torch.uint8).tolist())


def test_a_sharded_torch_model_is_read(tmp_path: Path) -> None:
    torch.save(tensors("b"), tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(tensors("a"), tmp_path / "pytorch_model-00002-of-00002.bin")
    names = {"a": "pytorch_model-00002-of-00002.bin", "b": "pytorch_model-00001-of-00002.bin"}
    write_index(tmp_path, names, "pytorch_model.bin.index.json")

    checkpoint = open_checkpoint(tmp_path)

    assert list(checkpoint.tensors) == ["b", "a"]
    assert torch.equal(checkpoint.load("a"), tensors("a")["a"])


def test_the_files_of_a_model_are_searched_in_a_fixed_order(sharded: Path) -> None:
    save_file(tensors("e"), sharded / "model.safetensors")
    torch.save(tensors("f"), sharded / "pytorch_model-00001-of-00001.bin")
    write_index(sharded, {"f": "pytorch_model-00001-of-00001.bin"}, "pytorch_model.bin.index.json")
    torch.save(tensors("g"), sharded / "pytorch_model.bin")
    for name in SHARDS:
        (sharded / name).rename(sharded / name.replace("-of-", "_of_"))
    shutil.copy(sharded / "model-00001_of_00002.safetensors", sharded / SHARDS[0])
    shutil.copy(sharded / "model-00002_of_00002.safetensors", sharded / SHARDS[1])

    found = []
    for name in (INDEX, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin"):
        found.append(list(open_checkpoint(sharded).tensors))
        (sharded / name).unlink()

    assert found == [["b", "c", "a", "d"], ["e"], ["f"], ["g"]]


def test_one_other_safetensors_file_is_taken_for_the_model(tmp_path: Path) -> None:
    save_file(tensors("a"), tmp_path / "consolidated.safetensors")
    save_file(tensors("b"), tmp_path / "adapter_model.safetensors")

    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_several_files_without_an_index_are_refused_by_name(sharded: Path) -> None:
    (sharded / INDEX).unlink()

    error = refusal(sharded)

    assert error.message == f"holds 2 .safetensors files and no index that joins them: {SHARDS[0]}, {SHARDS[1]}"
    assert error.hint is not None and "looked for model.safetensors.index.json, model.safetensors" in error.hint


@pytest.mark.parametrize("ending", sorted(READERS))
def test_a_lone_weight_file_is_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"weights{ending}"
    if ending == ".safetensors":
        save_file(tensors("a"), path)
    else:
        torch.save(tensors("a"), path)

    checkpoint = open_checkpoint(path)

    assert torch.equal(checkpoint.load("a"), tensors("a")["a"])
    assert (checkpoint.files, checkpoint.directory, checkpoint.index_file) == ((path,), None, None)
    assert list(open_weights_file(path).tensors) == ["a"]


def test_a_lone_file_beside_a_config_belongs_to_that_folder(tmp_path: Path) -> None:
    save_file(tensors("a"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")

    assert open_checkpoint(tmp_path / "model.safetensors").directory == tmp_path


def test_a_folder_of_links_is_read(tmp_path: Path, sharded: Path) -> None:
    snapshot = tmp_path / "snapshot"  # how the Hugging Face cache keeps its files
    snapshot.mkdir()
    for name in [*SHARDS, INDEX]:
        (sharded / name).rename(tmp_path / f"blob-{name}")
        (snapshot / name).symlink_to(f"../blob-{name}")

    checkpoint = open_checkpoint(snapshot)

    assert list(checkpoint.tensors) == ["b", "c", "a", "d"]
    checkpoint.check_unchanged()


def test_other_pickles_in_the_folder_are_never_opened(tmp_path: Path) -> None:
    save_file(tensors("a"), tmp_path / "model.safetensors")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        os.mkfifo(tmp_path / name)

    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_a_checkpoint_can_stand_in_a_with_statement(sharded: Path) -> None:
    with open_checkpoint(sharded) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)


def test_an_unknown_name_is_the_callers_mistake(sharded: Path) -> None:
    with pytest.raises(KeyError):
        open_checkpoint(sharded).load("z")


@pytest.mark.parametrize("changed", [*SHARDS, INDEX])
def test_a_file_that_changes_meanwhile_is_named(sharded: Path, changed: str) -> None:
    checkpoint = open_checkpoint(sharded)
    checkpoint.check_unchanged()
    shutil.copy(sharded / changed, sharded / "copy")
    os.replace(sharded / "copy", sharded / changed)

    with pytest.raises(StorageError, match="changed while it was being read") as caught:
        checkpoint.check_unchanged()

    assert caught.value.file == str(sharded / changed)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "..",
        ".",
        "",
        "model.safetensors\0.safetensors",
        ".safetensors",
        "pytorch_model.bin",
        "model.safetensors.index.json",
    ],
)
def test_a_shard_name_that_is_not_a_plain_weight_file_is_refused(sharded: Path, name: str) -> None:
    save_file(tensors("a"), sharded.parent / "model.safetensors")
    write_index(sharded, {"a": name})

    error = refusal(sharded)

    assert error.file == str(sharded / INDEX)
    assert error.tensor == "a"
    assert error.message.endswith("is not the name of a .safetensors file beside the index")


def test_half_a_character_in_an_index_is_refused(sharded: Path) -> None:
    write_index(sharded, {"a": "\ud800.safetensors"})

    assert "half a character" in refusal(sharded).message


def test_a_torch_index_may_only_name_torch_files(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    write_index(sharded, {"b": SHARDS[0]}, "pytorch_model.bin.index.json")

    assert "is not the name of a .bin file beside the index" in refusal(sharded).message


@pytest.mark.parametrize("name", [1, None, ["x.safetensors"], [[[]]]])
def test_a_shard_name_that_is_not_text_is_refused(sharded: Path, name: Any) -> None:
    write_index(sharded, {"a": name})

    assert refusal(sharded).message == "its file is not given as text"


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_an_index_without_a_weight_map_is_refused(sharded: Path, weight_map: Any) -> None:
    write_index(sharded, weight_map)

    assert refusal(sharded).message == "has no weight_map"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "the key a stands twice"),
        ('{"weight_map": {"a": ', "the file is not valid JSON"),
        ("[]", "the file is not a JSON object"),
        ("", "is empty"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a git-LFS pointer"),
    ],
)
def test_a_damaged_index_is_refused(sharded: Path, text: str, message: str) -> None:
    (sharded / INDEX).write_text(text)

    error = refusal(sharded)

    assert error.file == str(sharded / INDEX)
    assert message in error.message


def test_an_index_above_the_limit_is_not_read(sharded: Path) -> None:
    os.truncate(sharded / INDEX, 1 << 40)  # a sparse file: reading it whole would need 1 TB

    assert refusal(sharded).message == "is larger than the 100000000 bytes allowed here"


@pytest.mark.parametrize("change", ["edited", "replaced", "removed"])
def test_a_config_that_changes_during_a_run_is_noticed(sharded: Path, change: str) -> None:
    config = sharded / "config.json"
    config.write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(sharded)
    checkpoint.check_unchanged()
    if change == "removed":
        config.unlink()
    elif change == "edited":
        config.write_text('{"model_type": "gpt2_"}')
    else:
        shutil.copy(config, sharded / "copy")
        os.replace(sharded / "copy", config)

    for use in (checkpoint.check_unchanged, checkpoint.config):
        with pytest.raises(StorageError, match="changed while it was being read") as caught:
            use()
        assert caught.value.file == str(config)


def test_a_config_is_read_as_it_was_when_the_checkpoint_was_opened(sharded: Path) -> None:
    (sharded / "config.json").write_text('{"model_type": "llama"}')

    assert open_checkpoint(sharded).config() == {"model_type": "llama"}
    (sharded / "config.json").unlink()
    assert open_checkpoint(sharded).config() == {}


@pytest.mark.parametrize("content", ["", "version https://git-lfs.github.com/spec/v1\n"])
def test_a_config_that_was_not_downloaded_is_refused_at_once(sharded: Path, content: str) -> None:
    (sharded / "config.json").write_text(content)

    assert refusal(sharded).file == str(sharded / "config.json")


def test_missing_shards_are_named(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()

    error = refusal(sharded)

    assert (error.file, error.message) == (str(sharded / INDEX), f"names files that are not there: {SHARDS[1]}")
    assert error.hint == "download the missing files again"


def test_a_message_names_ten_files_at_most(sharded: Path) -> None:
    write_index(sharded, {f"w{i}": f"model-{i:02}.safetensors" for i in range(30)})

    message = refusal(sharded).message

    assert "model-00.safetensors, model-01.safetensors" in message
    assert message.endswith("model-09.safetensors and 20 more")


def test_a_link_to_a_shard_that_was_not_downloaded_is_missing(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    (sharded / SHARDS[1]).symlink_to("../blobs/0")

    assert refusal(sharded).message == f"names files that are not there: {SHARDS[1]}"


def test_a_listed_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    save_file(tensors("a"), sharded / SHARDS[1])

    error = refusal(sharded)

    assert error.file == str(sharded / SHARDS[1])
    assert error.message == f"does not hold d, which {INDEX} expects in it"


def test_a_tensor_that_the_index_does_not_list_is_named(sharded: Path) -> None:
    save_file(tensors("a", "d", "extra"), sharded / SHARDS[1])

    error = refusal(sharded)

    assert error.file == str(sharded / SHARDS[1])
    assert error.message == f"holds extra, which {INDEX} does not list"


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    save_file(tensors("a", "b", "d"), sharded / SHARDS[1])

    assert refusal(sharded).message == f"holds b, which {INDEX} expects in {SHARDS[0]}"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a git-LFS pointer")],
)
def test_a_shard_that_was_not_downloaded_is_named(sharded: Path, content: bytes, message: str) -> None:
    (sharded / SHARDS[1]).write_bytes(content)

    error = refusal(sharded)

    assert error.file == str(sharded / SHARDS[1])
    assert message in error.message


def test_a_shard_that_is_a_folder_is_refused(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    (sharded / SHARDS[1]).mkdir()

    assert refusal(sharded).message == "is not a regular file"


def test_a_pipe_in_the_place_of_the_model_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")

    assert refusal(tmp_path).message == "is not a regular file"


def test_a_folder_without_weights_says_what_it_holds_and_what_is_looked_for(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"file{i:02}.txt").touch()
    (tmp_path / "\x1b[2J").touch()

    error = refusal(tmp_path)

    assert error.message.startswith(r"holds no weights; found \x1b[2J, file00.txt, file01.txt")
    assert error.message.endswith("file08.txt and 3 more")
    assert error.hint is not None and error.hint.endswith("pytorch_model.bin or one other .safetensors file")


def test_an_empty_folder_is_called_empty(tmp_path: Path) -> None:
    assert refusal(tmp_path).message == "is an empty folder"


def test_an_adapter_is_not_taken_for_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file(tensors("a"), tmp_path / "adapter_model.safetensors")

    error = refusal(tmp_path)

    assert error.message == "is an adapter, not a model"
    assert error.hint == "give the folder of the base model that it was trained on"


def test_a_model_beside_an_adapter_is_read(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file(tensors("a"), tmp_path / "adapter_model.safetensors")
    save_file(tensors("b"), tmp_path / "model.safetensors")

    assert list(open_checkpoint(tmp_path).tensors) == ["b"]


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["llama-q4.gguf"], "GGUF"),
        (["tf_model.h5"], "TensorFlow"),
        (["flax_model.msgpack", "tf_model.h5", "config.json"], "Flax and TensorFlow"),
    ],
)
def test_a_folder_of_other_formats_says_which(tmp_path: Path, names: list[str], kinds: str) -> None:
    for name in names:
        (tmp_path / name).touch()

    assert refusal(tmp_path).message == f"holds only {kinds} weights, which are not read here"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.gguf", "is a GGUF file, which is not read here"),
        ("model.ckpt", "is not a weight file that is read here"),
        ("config.json", "is not a weight file that is read here"),
        (INDEX, "is an index"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_its_name(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text("{}")

    error = refusal(tmp_path / name)

    assert error.message == message
    assert error.hint == "give a model folder or a file that ends in .safetensors, .bin, .pt, .pth"


def test_a_name_of_the_hub_leads_to_the_download_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    error = refusal(Path("meta-llama/Llama-3.2-1B"))

    assert (error.file, error.message) == ("meta-llama/Llama-3.2-1B", "no such file or folder")
    assert error.hint is not None
    assert error.hint.endswith("hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B")


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "../x/y", "a/b/c", "org/model.safetensors", "-x/y z"])
def test_another_path_that_does_not_exist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)

    error = refusal(Path(path))

    assert (error.message, error.hint) == ("no such file or folder", "check the path")


def test_a_dangling_link_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tmp_path / "gone")

    assert refusal(tmp_path / "model").message == "is a link to something that is not there"


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    assert refusal(Path(name)).message == "is not a possible file name"


def test_an_error_of_the_system_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")

    with pytest.raises(StorageError, match="cannot be opened: Too many levels of symbolic links"):
        open_checkpoint(tmp_path / "a")


def test_a_folder_that_may_not_be_listed_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(_: object) -> list[str]:  # root may list every folder
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "listdir", refusing)

    with pytest.raises(StorageError, match="cannot be listed: Permission denied"):
        open_checkpoint(tmp_path)
