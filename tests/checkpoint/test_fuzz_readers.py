"""Readers under mutated input: a file is read, or refused with our own error; nothing else may escape."""

from __future__ import annotations

import io
import json
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from support.reading import read_everything

from loftq_cli.adapter.source import open_adapter
from loftq_cli.checkpoint.json_files import parse_json_object
from loftq_cli.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.checkpoint.torch_file import TorchFile
from loftq_cli.errors import LoftqError
from loftq_cli.output.checksums import read_checksums

bounded = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

STATE = {
    "w": torch.arange(6.0).reshape(2, 3),
    "v": torch.arange(4.0).to(torch.bfloat16),
    "e": torch.zeros(0, 3),
    "t": torch.arange(6.0).reshape(2, 3).t().contiguous(),
}


def torch_bytes(state: dict[str, torch.Tensor]) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


SAFETENSORS = save(STATE)
TORCH = torch_bytes({**STATE, "v": torch.zeros(3, dtype=torch.float8_e5m2), "t": STATE["w"].t(), "x": STATE["w"]})
with zipfile.ZipFile(io.BytesIO(TORCH)) as genuine:
    MEMBERS = {name: genuine.read(name) for name in genuine.namelist()}
PICKLE_NAME = next(name for name in MEMBERS if name.endswith("/data.pkl"))

hostile_ints = st.sampled_from([0, 1, 2, 3, 6, 24, -1, 2**31, 2**48, 2**62, 2**63, 10**30, 2**2000])
json_values = st.recursive(
    st.none() | st.booleans() | hostile_ints | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
edits = st.lists(
    st.tuples(
        st.integers(0, 10_000),
        st.integers(0, 8),
        st.binary(max_size=8) | st.sampled_from([op.code.encode("latin-1") for op in pickletools.opcodes]),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    """`content` with some bytes at some places taken out and others put in."""
    data = bytearray(content)
    for place, n_removed, inserted in changes:
        begin = place % (len(data) + 1)
        data[begin : begin + n_removed] = inserted
    return bytes(data)


def open_and_read(reader: type[SafetensorsFile] | type[TorchFile], path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        file = reader(path)
    except LoftqError as error:
        assert str(path) in str(error)
        assert str(error).isprintable()
        return
    read_everything(file, len(content))


@bounded
@given(st.binary(max_size=64) | json_values.map(lambda value: json.dumps(value).encode()))
def test_json_is_an_object_or_refused(text: bytes) -> None:
    try:
        assert isinstance(parse_json_object(text, file=Path("config.json")), dict)
    except LoftqError as error:
        assert "config.json" in str(error)


@bounded
@given(st.integers(0, 3000), st.sampled_from(["[", '{"a":', '{"a":[', "[[{}],"]))
def test_any_depth_of_json_is_read_or_refused(depth: int, opening: str) -> None:
    closing = "".join("]" if c == "[" else "}" for c in reversed(opening) if c in "[{")
    text = f'{{"deep": {opening * depth}0{closing * depth}}}'.encode()
    try:
        parse_json_object(text, file=Path("config.json"))
    except LoftqError as error:
        assert "config.json" in str(error)


entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(DTYPES)) | json_values,
        "shape": st.lists(hostile_ints, max_size=4) | json_values,
        "data_offsets": st.tuples(hostile_ints, hostile_ints) | json_values,
    },
    optional={"extra": json_values},
)
headers = st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), entries | json_values, max_size=4)


@bounded
@given(headers, st.integers(0, 64), st.integers(-3, 3))
def test_a_safetensors_header_of_any_content_is_read_or_refused(
    tmp_path: Path, header: dict[str, Any], data_nbytes: int, lie: int
) -> None:
    text = json.dumps(header).encode()
    content = max(0, len(text) + lie).to_bytes(8, "little") + text + bytes(data_nbytes)

    open_and_read(SafetensorsFile, tmp_path / "a.safetensors", content)


@bounded
@given(edits)
def test_an_edited_safetensors_file_is_read_or_refused(tmp_path: Path, changes: list[tuple[int, int, bytes]]) -> None:
    open_and_read(SafetensorsFile, tmp_path / "a.safetensors", edited(SAFETENSORS, changes))


@bounded
@given(st.data())
def test_a_well_formed_safetensors_file_is_always_read(tmp_path: Path, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=4))
    names = [name for name in names if name != "__metadata__"]
    shapes = [tuple(data.draw(st.lists(st.integers(0, 3), max_size=4))) for _ in names]
    state = {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=True)}
    path = tmp_path / "a.safetensors"
    path.write_bytes(save(state))

    file = SafetensorsFile(path)

    assert file.tensors.keys() == state.keys()
    assert all(torch.equal(file.load(name), value) for name, value in state.items())


@bounded
@given(edits)
def test_an_edited_torch_file_is_read_or_refused(tmp_path: Path, changes: list[tuple[int, int, bytes]]) -> None:
    open_and_read(TorchFile, tmp_path / "a.bin", edited(TORCH, changes))


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


@bounded
@given(edits)
def test_an_edited_pickle_is_read_or_refused(tmp_path: Path, changes: list[tuple[int, int, bytes]]) -> None:
    pickled = edited(MEMBERS[PICKLE_NAME], changes)

    open_and_read(TorchFile, tmp_path / "a.bin", zipped({**MEMBERS, PICKLE_NAME: pickled}))


PIECES = [
    *(op.code.encode("latin-1") for op in pickletools.opcodes if op.arg is None),
    *(b"K\x00", b"K\x01", b"K\x02", b"J\xff\xff\xff\xff", b"\x8a\x01\x05", b"G" + bytes(8), b"\x8a\x09" + b"\xff" * 9),
    *(b"X\x01\0\0\0w", b"X\x07\0\0\0storage", b"X\x01\0\0\x000", b"X\x03\0\0\0cpu", b"X\x09\0\0\0_metadata"),
    *(b"q\x00", b"q\x01", b"h\x00", b"h\x01"),
    *(
        b"ccollections\nOrderedDict\n",
        b"ctorch\nFloatStorage\n",
        b"ctorch.storage\nUntypedStorage\n",
        b"ctorch\nint8\n",
    ),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_tensor_v3\n"),
    b"ctorch._utils\n_rebuild_parameter\n",
    b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ",
    b"(X\x07\0\0\0storagectorch.storage\nUntypedStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x18tQ",
]


@bounded
@given(st.lists(st.sampled_from(PIECES), max_size=24))
def test_any_sequence_of_opcodes_is_read_or_refused(tmp_path: Path, pieces: list[bytes]) -> None:
    members = {"a/data.pkl": b"\x80\x02" + b"".join(pieces) + b".", "a/data/0": bytes(24)}

    open_and_read(TorchFile, tmp_path / "a.bin", zipped(members))


@bounded
@given(
    st.integers(0, 8),
    st.lists(st.integers(0, 4), max_size=4),
    st.lists(st.integers(0, 13), min_size=4, max_size=4),
)
def test_a_view_is_read_exactly_as_torch_reads_it_or_refused(
    tmp_path: Path, offset: int, shape: list[int], strides: list[int]
) -> None:
    base = torch.arange(24, dtype=torch.int16)
    reach = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=False))
    if 0 not in shape and reach >= 24:
        return  # torch itself does not make such a view
    view = base.as_strided(shape, strides[: len(shape)], offset)
    torch.save({"w": view}, tmp_path / "a.bin")
    try:
        file = TorchFile(tmp_path / "a.bin")
    except LoftqError as error:
        assert "expanded" in str(error) or "reaches outside" in str(error)
        return

    assert torch.equal(file.load("w"), view)
    if shape:
        assert torch.equal(file.load_rows("w", shape[0] // 2, shape[0]), view[shape[0] // 2 :])


@bounded
@given(
    st.dictionaries(
        st.sampled_from(["weight_map", "metadata"]),
        st.dictionaries(
            st.sampled_from(["w", "v", "e", "t"]) | st.text(max_size=4),
            st.sampled_from(["a.safetensors", "b.safetensors", "../a.safetensors", "a.bin"])
            | st.text(max_size=8).map(lambda text: text + ".safetensors")
            | json_values,
            max_size=6,
        )
        | json_values,
    )
    | json_values
)
def test_an_index_of_any_content_is_read_or_refused(tmp_path: Path, index: Any) -> None:
    (tmp_path / "a.safetensors").write_bytes(SAFETENSORS)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        checkpoint = open_checkpoint(tmp_path)
    except LoftqError as error:
        assert str(tmp_path) in str(error)
        assert str(error).isprintable()
        return

    assert checkpoint.tensors.keys() == STATE.keys()


ADAPTER = {
    f"base_model.model.layers.{i}.proj.{part}.weight": torch.zeros(shape)
    for i in range(2)
    for part, shape in (("lora_A", (4, 8)), ("lora_B", (6, 4)))
}
ADAPTER_CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["proj"]}
ADAPTER_KEYS = [
    *ADAPTER_CONFIG,
    *("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern", "use_dora"),
    *("modules_to_save", "fan_in_fan_out", "init_lora_weights", "use_rslora", "use_qalora", "qalora_group_size"),
]
patterns = st.dictionaries(st.text(max_size=6) | st.sampled_from(["proj", "layers.0.proj", "(", "p.*j"]), hostile_ints)


@bounded
@given(st.dictionaries(st.sampled_from(ADAPTER_KEYS), json_values | patterns, max_size=4))
def test_an_adapter_config_of_any_values_is_read_or_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(save(ADAPTER))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**ADAPTER_CONFIG, **values}))
    try:
        adapter = open_adapter(tmp_path)
    except LoftqError as error:
        assert str(tmp_path) in str(error)
        assert str(error).isprintable()
        return

    assert {x.scaling > 0 for x in adapter.lora.values()} == {True}
    assert len(adapter.lora) == 2


CHECKSUMS_VALUES = {
    "tool": "loftq-cli",
    "fingerprint": "f",
    "files": {"a/b.safetensors": "0" * 64},
    "tensors": {"a/b.safetensors": {"w": "1" * 64}},
}
sums = st.dictionaries(
    st.text(max_size=6) | st.sampled_from(["../a", "/a", "a//b", "a/./b", "a/b.safetensors"]),
    st.sampled_from(["0" * 64, "A" * 64, ""]) | json_values,
    max_size=3,
)


@bounded
@given(st.dictionaries(st.sampled_from(sorted(CHECKSUMS_VALUES)), json_values | sums, max_size=2))
def test_checksums_of_any_values_are_read_or_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "checksums.json").write_text(json.dumps({**CHECKSUMS_VALUES, **values}))
    try:
        found = read_checksums(tmp_path)
    except LoftqError as error:
        assert "checksums.json" in str(error)
        return

    assert found is not None
    assert all((tmp_path / name).resolve().is_relative_to(tmp_path) for name in found.files)


@bounded
@given(st.text(max_size=32))
def test_any_text_as_a_path_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "nothing" / text
    try:
        open_checkpoint(path)
    except LoftqError as error:
        assert str(error).isprintable()
    else:
        raise AssertionError("there is nothing to open")
