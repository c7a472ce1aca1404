"""One job of a plan: a tensor comes in, its outputs go to their places, and a journal entry says what was done.

One tensor is in memory at a time. The order of jobs, resuming and publishing are convert.py's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.checkpoint.staging import JournalEntry
from loftq_cli.checkpoint.writer import OutputFiles, tensor_bytes
from loftq_cli.errors import InputError, LoftqError
from loftq_cli.layouts import peft_adapter
from loftq_cli.layouts.layout import load_layout
from loftq_cli.methods.method import load_method
from loftq_cli.metrics import layer_error
from loftq_cli.plan import CopyJob, LayerJob
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.recipe import Recipe
from loftq_cli.report import LayerResult, layer_result

if TYPE_CHECKING:
    import torch

_SLAB_NUMEL = 1 << 22  # elements converted at once when a copy changes dtype: 16 MB of float32


def run_job(checkpoint: Checkpoint, recipe: Recipe, job: LayerJob | CopyJob, files: OutputFiles) -> JournalEntry:
    """Do one job of a plan: read its tensor, compute, write its outputs into their places. Says what was done.

    Raises InputError naming the tensor when its numbers cannot be quantized or stored.
    """
    if isinstance(job, CopyJob):
        digest = hashlib.sha256()
        chunks = _copied_chunks(checkpoint, job, digest)
        written = {job.output.name: files[job.output.name].write_chunks(job.output.name, chunks)}
        return JournalEntry(job.name, digest.hexdigest(), written, {})
    file = checkpoint.tensors[job.name].file
    try:
        tensors, result, sha256 = _quantize_layer(checkpoint, recipe, job)
    except LoftqError as error:
        raise error if error.tensor else error.at(file=file, tensor=job.name) from None
    written = {name: files[name].write(name, tensor) for name, tensor in tensors.items()}
    return JournalEntry(job.name, sha256, written, result.to_json())


def _quantize_layer(
    checkpoint: Checkpoint, recipe: Recipe, job: LayerJob
) -> tuple[dict[str, torch.Tensor], LayerResult, str]:
    """The tensors to write, what they are worth, and the sha256 of the weight they come from."""
    import torch

    stored = checkpoint.load(job.name)
    sha256 = hashlib.sha256(tensor_bytes(stored)).hexdigest()
    weight = as_matrix(stored, transposed=job.matrix.transposed)
    del stored
    quantizer = make_quantizer(job.matrix.spec, job.matrix.dtype, recipe.ranges)
    initial = load_method(recipe.method)(
        weight,
        quantizer,
        job.lora,
        iterations=recipe.iterations,
        svd=recipe.svd,
        init=recipe.init,
        generator=torch.Generator().manual_seed(_seed(recipe.seed, job.name)),
    )
    tensors = load_layout(str(recipe.layout)).pack(job.matrix, initial.quantized)
    tensors |= peft_adapter.pack(job.module, initial.lora)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{name} would not be finite in {str(tensor.dtype).removeprefix('torch.')}",
                hint="--adapter-dtype float32 holds more" if "lora_" in name else "--exclude it",
            )
    error = layer_error(weight, quantizer.dequantize(initial.quantized), initial.lora)
    result = layer_result(job, error, initial.quantization_error, initial.iteration_errors, initial.best_iteration)
    return tensors, result, sha256


def as_matrix(stored: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """A stored weight as contiguous float32 [out, in]."""
    return (stored.T if transposed else stored).float().contiguous()


def _seed(seed: int, name: str) -> int:
    """A seed for one tensor: the order of the jobs cannot change what is drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def _copied_chunks(checkpoint: Checkpoint, job: CopyJob, digest: Any) -> Iterator[memoryview]:
    """The bytes of a copied tensor, in pieces; `digest` takes in what was read."""
    ref = checkpoint.tensors[job.name]
    if job.output.dtype == ref.dtype:
        for chunk in checkpoint.chunks(job.name):
            digest.update(chunk)
            yield chunk
        return
    yield from recast_chunks(checkpoint, job.name, job.output.dtype, digest)


def recast_chunks(checkpoint: Checkpoint, name: str, dtype: str, digest: Any) -> Iterator[memoryview]:
    """The bytes of a floating-point tensor in another dtype, a slab of rows at a time.

    Raises InputError when a finite number becomes infinite.
    """
    import torch

    ref = checkpoint.tensors[name]
    rows = ref.shape[0] if ref.shape else 1
    step = max(1, _SLAB_NUMEL * rows // max(ref.numel, 1))
    for start in range(0, rows, step):
        slab = checkpoint.load_rows(name, start, min(start + step, rows)) if ref.shape else checkpoint.load(name)
        digest.update(tensor_bytes(slab))
        cast = slab.to(getattr(torch, dtype))
        if not torch.equal(torch.isfinite(cast), torch.isfinite(slab)):
            raise InputError(f"has numbers too large for {dtype}", file=ref.file, tensor=name)
        yield tensor_bytes(cast)


def is_intact(checkpoint: Checkpoint, entry: JournalEntry, files: OutputFiles) -> bool:
    """Whether a finished unit can be kept: its input and its output are re-hashed, existence proves nothing."""
    if checkpoint.sha256(entry.unit) != entry.input_sha256:
        return False
    return all(files[name].sha256(name) == sha256 for name, sha256 in entry.outputs.items())
