"""JSON files are read strictly: each way in which one can lie, be damaged or be of another kind is refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loftq_cli.checkpoint.json_files import parse_json_object, read_json_object
from loftq_cli.errors import InputError, StorageError

HERE = Path("config.json")


def test_a_config_is_read_with_its_types_kept(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1, "b": [true, null, 1.5], "c": {"d": "\\u00e9"}, "limit": 1000000000000000019884624838656}')

    content = read_json_object(path)

    assert content == {"a": 1, "b": [True, None, 1.5], "c": {"d": "é"}, "limit": int(1e30)}
    assert type(content["a"]) is int


def test_a_linked_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "config.json").symlink_to(tmp_path / "blob")

    assert read_json_object(tmp_path / "config.json") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"r": 8, "r": 16}', "the key r stands twice"),
        (b'{"a": {"r": 8, "r": 8}}', "the key r stands twice"),
        (b'{"a\\u001b[31m": 1, "a\\u001b[31m": 1}', r"the key a\x1b[31m stands twice"),
        (b'{"alpha": NaN}', "NaN is not a JSON number"),
        (b'{"alpha": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"alpha": 1e400}', "the number 1e400 is too large"),
        (b'{"alpha": -1e999}', "the number -1e999 is too large"),
        (b'{"r": ' + b"9" * 5000 + b"}", "a number of 5000 digits is too large"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested too deeply"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b'{"a": [{"\\uDC00\\ud800": 1}]}', "half a character"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b"[1, 2]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"a": 1} {"b": 2}', "not valid JSON: Extra data"),
        (b'{"a": 1', "not valid JSON: Expecting ',' delimiter"),
        (b"<html>404</html>", "not valid JSON: Expecting value"),
    ],
)
def test_what_is_not_one_strict_object_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_json_object(text, file=HERE)

    assert message in caught.value.message
    assert caught.value.file == "config.json"
    assert caught.value.hint is not None


def test_a_whole_character_may_be_escaped_in_two_halves() -> None:
    assert parse_json_object(b'{"a": "\\ud83d\\ude00"}', file=HERE) == {"a": "\U0001f600"}


def test_a_whole_number_has_at_most_64_digits() -> None:
    # Tokenizers write int(1e30), of 31 digits, for "no limit".
    assert parse_json_object(b'{"r": ' + b"9" * 64 + b"}", file=HERE) == {"r": 10**64 - 1}
    with pytest.raises(InputError, match="a number of 65 digits is too large"):
        parse_json_object(b'{"r": ' + b"9" * 65 + b"}", file=HERE)


def test_a_file_of_more_than_100_mb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"{")
    os.truncate(path, 100_000_001)
    with pytest.raises(InputError, match="is larger than the 100000000 bytes allowed here"):
        read_json_object(path)


def test_ninety_nine_levels_are_read() -> None:
    assert parse_json_object(b'{"a": ' + b"[" * 99 + b"]" * 99 + b"}", file=HERE)


@pytest.mark.parametrize("item", ["[]", "{}", '{"a":0}', '"":[]', '"abcd":1', "[[[[]]]]", '"\\"[":[]'])
def test_a_large_text_of_little_else_than_lists_objects_or_keys_is_refused(item: str) -> None:
    items = ",".join([item] * (1_200_000 // len(item)))
    text = f"{{{items}}}" if item.startswith('"') else f'{{"a": [{items}]}}'

    with pytest.raises(InputError, match="holds too many lists or objects for its size"):
        parse_json_object(text.encode(), file=HERE)


def test_brackets_in_texts_are_no_lists() -> None:
    value = {f"params['layers'][{i}]['w']": '[[{{"\\":' * 3 for i in range(30_000)}
    text = json.dumps(value).encode()

    assert len(text) > 1_000_000 and text.count(b"[") > len(text) // 16
    assert parse_json_object(text, file=HERE) == value


PEAK = """
import sys
from pathlib import Path
from loftq_cli.checkpoint.safetensors_file import SafetensorsFile
from loftq_cli.cli.render.console import peak_nbytes
from loftq_cli.errors import InputError
before = peak_nbytes()
try:
    print(len(SafetensorsFile(Path(sys.argv[1])).tensors), end=" ")
except InputError as error:
    print("refused", end=" ")
print(peak_nbytes() - before)
"""


def header_of(path: Path, text: bytes, data_nbytes: int = 0) -> tuple[str, int]:
    """What reading a file of this header gives, in a process of its own, and what that takes at its peak."""
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + data_nbytes)
    run = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    said, peak = run.stdout.split()
    return said, int(peak)


@pytest.mark.parametrize("item", [b"[],", b"{},", b'{"a":[[]]},'])
def test_a_hostile_header_of_20_mb_takes_few_times_its_size(tmp_path: Path, item: bytes) -> None:
    text = b'{"a":[' + (item * (20_000_000 // len(item)))[:-1] + b"]}"

    said, peak = header_of(tmp_path / "a.safetensors", text)

    assert said == "refused"
    assert peak < 8 * len(text)


def test_a_header_of_100_000_tensors_is_read(tmp_path: Path) -> None:
    # As short as entries can be: scalars of one byte, names of six characters.
    entry = {"dtype": "U8", "shape": []}
    header = {f"t{i:05}": {**entry, "data_offsets": [i, i + 1]} for i in range(100_000)}
    text = json.dumps(header, separators=(",", ":")).encode()

    said, _ = header_of(tmp_path / "a.safetensors", text, data_nbytes=100_000)

    assert said == "100000"


def test_the_message_says_which_part_of_the_file_is_wrong() -> None:
    with pytest.raises(InputError, match=r"^config\.json: the header is not a JSON object"):
        parse_json_object(b"[]", file=HERE, what="the header")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InputError, match=r"^/nowhere/config\.json: no such file \(check the path"):
        read_json_object(Path("/nowhere/config.json"))


def test_a_dangling_link_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(tmp_path / "gone")

    with pytest.raises(InputError, match="is a link to a file that is not there"):
        read_json_object(tmp_path / "config.json")


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()

    with pytest.raises(InputError, match="is empty"):
        read_json_object(tmp_path / "config.json")


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n")

    with pytest.raises(InputError, match="is a git-LFS pointer") as caught:
        read_json_object(path)

    assert caught.value.hint is not None and "git lfs pull" in caught.value.hint


def test_a_file_above_the_limit_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 1 << 40)  # a sparse file: reading it whole would need 1 TB

    with pytest.raises(InputError, match="is larger than the 1000 bytes allowed here"):
        read_json_object(path, max_nbytes=1000)


def test_a_file_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"a": 1}')

    assert read_json_object(tmp_path / "config.json", max_nbytes=8) == {"a": 1}


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")

    with pytest.raises(InputError, match="is not a regular file"):
        read_json_object(tmp_path / "config.json")


@pytest.mark.parametrize("path", ["/dev/zero", "/"])
def test_devices_and_folders_are_refused(path: str) -> None:
    with pytest.raises(InputError, match="is not a regular file"):
        read_json_object(Path(path))


def test_an_error_of_the_system_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to(tmp_path / "b.json")
    (tmp_path / "b.json").symlink_to(tmp_path / "a.json")

    with pytest.raises(StorageError, match=r"a\.json: cannot be opened: Too many levels of symbolic links"):
        read_json_object(tmp_path / "a.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_storage_error(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    path.chmod(0)

    with pytest.raises(StorageError, match="cannot be opened: Permission denied"):
        read_json_object(path)


def test_a_failing_disk_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match=r"^/proc/self/mem: cannot be read: Input/output error"):
        read_json_object(Path("/proc/self/mem"))  # opens as a regular file; its first page cannot be read


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="is not a possible file name"):
        read_json_object(Path(name))


def test_colons_in_texts_are_no_keys() -> None:
    """In a large file: texts that are shorter than a key may be, beside as many colons."""
    values = {"short": ["x"] * 300_000, "colons": ":" * 300_000}

    assert parse_json_object(json.dumps(values, separators=(",", ":")).encode(), file=Path("a.json")) == values
