"""A checkpoint to convert: a llama of any depth, written as fast as the disk takes it, read as fast as it gives it, and
taken out of the page cache again. Knows no GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from loftq_cli.output.writer import safetensors_layout, tensor_bytes
from loftq_cli.tensors.headers import OutTensor

_POOL_NUMEL = 1 << 26  # random numbers that all tensors are cut from, each from another place
_SHARD_LAYERS = 8
_CHUNK_NBYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Of Llama 2 7B, but for the depth."""

    layers: int
    hidden: int = 4096
    intermediate: int = 11008
    vocabulary: int = 32000

    @classmethod
    def of_gb(cls, gb: float) -> LlamaShape:
        """As deep as fits, and one layer at least."""
        one, two = (sum(tensor.nbytes for shard in cls(n).shards() for tensor in shard) for n in (1, 2))
        return cls(max(1, 1 + int((gb * 1e9 - one) / (two - one))))

    def shards(self) -> list[list[OutTensor]]:
        """Embeddings in the first and in the last."""
        h, m = self.hidden, self.intermediate
        attention = {f"self_attn.{name}_proj": (h, h) for name in "qkvo"}
        linears = {**attention, "mlp.gate_proj": (m, h), "mlp.up_proj": (m, h), "mlp.down_proj": (h, m)}
        norms = {"input_layernorm": (h,), "post_attention_layernorm": (h,)}
        shards: list[list[OutTensor]] = [[] for _ in range(0, self.layers, _SHARD_LAYERS)]
        for layer in range(self.layers):
            for name, shape in {**linears, **norms}.items():
                tensor = OutTensor(f"model.layers.{layer}.{name}.weight", "bfloat16", shape)
                shards[layer // _SHARD_LAYERS].append(tensor)
        shards[0].append(OutTensor("model.embed_tokens.weight", "bfloat16", (self.vocabulary, h)))
        shards[-1].append(OutTensor("model.norm.weight", "bfloat16", (h,)))
        shards[-1].append(OutTensor("lm_head.weight", "bfloat16", (self.vocabulary, h)))
        return shards

    def config(self) -> dict[str, object]:
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "torch_dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(1, self.hidden // 128),
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
        }


def write_llama(directory: Path, shape: LlamaShape, threads: int) -> list[Path]:
    """Its weight files, which are on the disk by then. No two matrices are equal."""
    directory.mkdir()
    shards = shape.shards()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    numel = max(_POOL_NUMEL // 64, 1) if shape.hidden < 1024 else _POOL_NUMEL
    pool = tensor_bytes(torch.randn(numel, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16())
    starts = iter(range(0, 1 << 62, 4098))  # a few rows further each time, and no multiple of a block
    places = {tensor.name: next(starts) for shard in shards for tensor in shard}

    def write(name: str, tensors: Sequence[OutTensor]) -> None:
        header, offsets, _ = safetensors_layout(tensors)
        with open(directory / name, "wb") as file:
            file.write(header)
            for tensor in sorted(tensors, key=lambda tensor: offsets[tensor.name]):
                for piece in _pieces(pool, places[tensor.name], tensor.nbytes):
                    file.write(piece)
            file.flush()
            os.fsync(file.fileno())

    with ThreadPoolExecutor(threads) as workers:
        list(workers.map(write, names, shards))
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    size = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")
    return [directory / name for name in names]


def _pieces(pool: memoryview, start: int, nbytes: int) -> Iterator[memoryview]:
    """So many bytes of the pool from a place in it, and from its beginning again when it ends."""
    start %= len(pool)
    while nbytes:
        piece = pool[start : start + nbytes]
        yield piece
        nbytes, start = nbytes - len(piece), 0


def reading_seconds(files: Sequence[Path], threads: int, *, hashes: bool = False) -> float:
    """What it takes to read all bytes in `threads` threads, into memory that is there; and to hash them."""

    def read(place: tuple[Path, int]) -> None:
        path, offset = place
        buffer = buffers.pop()
        with open(path, "rb", buffering=0) as file:
            n = os.preadv(file.fileno(), [buffer], offset)
        if hashes:
            hashlib.sha256(memoryview(buffer)[:n]).digest()
        buffers.append(buffer)

    buffers = [bytearray(_CHUNK_NBYTES) for _ in range(threads)]
    places = [(path, offset) for path in files for offset in range(0, path.stat().st_size, _CHUNK_NBYTES)]
    with ThreadPoolExecutor(threads) as workers:
        start = time.perf_counter()
        list(workers.map(read, places))
        return time.perf_counter() - start


def drop_from_cache(files: Sequence[Path]) -> float:
    """Ask the system to forget the files; gives the share of their bytes that it still holds. A virtual machine's host
    may hold more.
    """
    os.sync()
    held = size = 0
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        held += _cached_nbytes(path)
        size += path.stat().st_size
    return held / size


def _cached_nbytes(path: Path) -> int:
    """By mincore(2)."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), pages
        )
        del first  # or the map could not be closed
        return 0 if failed else int((torch.frombuffer(pages, dtype=torch.uint8) & 1).sum()) * mmap.PAGESIZE
