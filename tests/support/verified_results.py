"""Results to verify: where tensors lie in their files, checksums signed again, and a flipped bit."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

from support.adapters import PREFIX, edit_json

Q0 = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
LORA_B = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight"
MODEL, ADAPTER = "model.safetensors", "loftq_init/adapter_model.safetensors"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Name of each tensor in a file -> where its bytes begin and end."""
    data = path.read_bytes()
    nbytes = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + nbytes])
    entries = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: (8 + nbytes + begin, 8 + nbytes + end) for name, (begin, end) in entries.items()}


def tensor_sums(path: Path) -> dict[str, str]:
    return {name: sha256(path.read_bytes()[begin:end]) for name, (begin, end) in places(path).items()}


def sign(directory: Path, *, tensors: bool = True) -> Path:
    """Write the checksums of what lies in `directory` now, as a conversion would."""
    listed = json.loads((directory / "checksums.json").read_text())["files"]
    files = {name: sha256((directory / name).read_bytes()) for name in listed}
    weights = [name for name in files if name.endswith(".safetensors")] if tensors else []
    edit_json(
        directory / "checksums.json", files=files, tensors={name: tensor_sums(directory / name) for name in weights}
    )
    return directory


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
