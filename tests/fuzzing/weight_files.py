"""Targets: JSON objects, safetensors files, torch files, their pickles, and model folders with an index."""

from __future__ import annotations

import io
import json
import pickletools
import zipfile
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save, save_file

from loftq_cli.checkpoint.json_files import parse_json_object
from loftq_cli.checkpoint.safetensors_file import SafetensorsFile
from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.checkpoint.torch_file import TorchFile
from loftq_cli.checkpoint.torch_pickle import read_state_dict
from loftq_cli.errors import InputError
from tests.fuzzing.engine import Session
from tests.fuzzing.mutations import HOSTILE, changed, edited, json_bytes, pick
from tests.support.reading import read_everything

STATE = {
    "w": torch.arange(6.0).reshape(2, 3),
    "v": torch.arange(4.0).to(torch.bfloat16),
    "e": torch.zeros(0, 3),
}
_SAFETENSORS = save(STATE, metadata={"format": "pt"})
_DTYPES = ("F32", "BF16", "F16", "I64", "BOOL", "F8_E4M3", "U8", "F4", "C64")
_SIZES = (0, 1, 2, 3, 4, 6, 8, 24, 28, 32, -1, 2**31, 2**48, 2**62, 2**63)
_HEADER_VALUES = (*HOSTILE, *_DTYPES, *_SIZES, [2, 3], [6], [], [1] * 70, [0, 2**62, 2**62], [0, 8], [8, 32], [0, 0])


def json_objects(directory: Path) -> Session:
    """Any JSON text, in memory."""
    value = {"a": 1, "b": [True, None, 1.5], "c": {"d": "é", "e": [{}, {"f": [1, 2, 3]}]}, "g": "text"}
    return Session(
        lambda random: json_bytes(value, random), lambda data: parse_json_object(data, file=directory / "config.json")
    )


def safetensors(directory: Path) -> Session:
    """Headers of any content over the same data, and edited files."""
    path, header_nbytes = directory / "a.safetensors", int.from_bytes(_SAFETENSORS[:8], "little")
    header, numbers = json.loads(_SAFETENSORS[8 : 8 + header_nbytes]), _SAFETENSORS[8 + header_nbytes :]

    def make(random: Random) -> bytes:
        kind = random.random()
        if kind < 0.15:
            return edited(_SAFETENSORS, random, range(8 + header_nbytes))
        text = json_bytes(header, random, _HEADER_VALUES)
        lie = 0 if kind < 0.95 else pick(random, (-1, 1, 8, 2**20, 2**62))
        return max(0, len(text) + lie).to_bytes(8, "little") + text + numbers

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_everything(SafetensorsFile(path), len(data))

    return Session(make, read)


def torch_zip(directory: Path) -> Session:
    """Edited torch files, half of the edits where the zip format itself is."""
    path, original = directory / "a.bin", _torch_bytes()
    starts = [at for at in range(len(original)) if original[at : at + 2] == b"PK"]
    places = [at + i for at in starts for i in range(46) if at + i < len(original)]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_everything(TorchFile(path), len(data))

    return Session(lambda random: edited(original, random, places), read)


_PIECES = (
    *(op.code.encode("latin-1") for op in pickletools.opcodes if op.arg is None),
    *(b"K\x00", b"K\x01", b"K\x02", b"J\xff\xff\xff\xff", b"\x8a\x01\x05", b"G" + bytes(8), b"\x8a\x09" + b"\xff" * 9),
    *(b"X\x01\0\0\0w", b"X\x07\0\0\0storage", b"X\x01\0\0\x000", b"X\x03\0\0\0cpu", b"X\xff\xff\xff\x7f", b"q\x00"),
    *(b"h\x00", b"h\x01", b"r\xff\xff\xff\xff", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n"),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nint8\n"),
    *(
        b"ctorch._utils\n_rebuild_parameter\n",
        b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ",
    ),
)


def torch_pickle(directory: Path) -> Session:
    """The opcodes of a genuine pickle, some of them left out, doubled, exchanged, replaced or edited."""
    del directory
    data = next(content for name, content in _members().items() if name.endswith("/data.pkl"))
    starts = [position for _, _, position in pickletools.genops(data)] + [len(data)]
    opcodes = [data[a:b] for a, b in pairwise(starts)]

    def make(random: Random) -> bytes:
        if random.random() < 0.1:
            return b"\x80\x02" + b"".join(pick(random, _PIECES) for _ in range(int(random.random() * 24))) + b"."
        pieces = list(opcodes)
        for _ in range(1 + int(random.random() * 3)):
            kind, at = random.random(), int(random.random() * len(pieces))
            if kind < 0.2:
                del pieces[at]
            elif kind < 0.4:
                pieces.insert(at, pick(random, _PIECES))
            elif kind < 0.5:
                pieces[at] = pick(random, _PIECES)
            elif kind < 0.6:
                pieces.insert(at, pieces[at])
            elif kind < 0.7:
                other = int(random.random() * len(pieces))
                pieces[at], pieces[other] = pieces[other], pieces[at]
            else:
                pieces[at] = edited(pieces[at], random)
        return b"".join(pieces)

    def read(pickled: bytes) -> None:
        try:
            tensors = read_state_dict(bytearray(pickled))
        except ValueError as error:  # as TorchFile takes it
            raise InputError(str(error)) from None
        assert all(name and len(tensor.shape) == len(tensor.stride) for name, tensor in tensors.items())

    return Session(make, read)


def folder(directory: Path) -> Session:
    """A folder of two shards, with an index or a config.json of any content."""
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file({"w": STATE["w"], "e": STATE["e"]}, directory / shards[0])
    save_file({"v": STATE["v"]}, directory / shards[1])
    index = {"metadata": {"total_size": 32}, "weight_map": {"w": shards[0], "e": shards[0], "v": shards[1]}}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    hostile = (*HOSTILE, *shards, f"../{shards[0]}", "a/../b.safetensors", "\ud800.safetensors", "pytorch_model.bin")
    index_file, config_file = directory / "model.safetensors.index.json", directory / "config.json"

    def make(random: Random) -> tuple[bytes, bytes]:
        if random.random() < 0.8:
            return json_bytes(index, random, hostile), json.dumps(config).encode()
        return json.dumps(index).encode(), json_bytes(changed(config, random), random)

    def read(texts: tuple[bytes, bytes]) -> None:
        index_file.write_bytes(texts[0])
        config_file.write_bytes(texts[1])
        checkpoint = open_checkpoint(directory)
        checkpoint.config()
        assert checkpoint.tensors.keys() <= STATE.keys()
        assert all(checkpoint.load(name).shape == STATE[name].shape for name in checkpoint.tensors)
        checkpoint.check_unchanged()

    return Session(make, read)


def _torch_bytes() -> bytes:
    stream = io.BytesIO()
    views: dict[str, Any] = {"v": torch.zeros(3, dtype=torch.float8_e5m2), "t": STATE["w"].t(), "x": STATE["w"]}
    torch.save({**STATE, **views}, stream)
    return stream.getvalue()


def _members() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(_torch_bytes())) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
