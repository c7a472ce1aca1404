"""What a merge measured, as records, and the files that ship with the merged weights: config, index, report, card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.record_schema import read_record
from loftq_cli.merging.plan import Merge
from loftq_cli.output.records import (
    MERGE_REPORT_NAME,
    TOOL,
    dump_json,
    index_json,
    source_name,
    write_texts,
)
from loftq_cli.output.side_files import copy_side_files
from loftq_cli.tensors.metrics import relative

if TYPE_CHECKING:
    from loftq_cli.quant.affine import OffsetDifference


@dataclass(frozen=True, slots=True)
class MergedLayer:
    """One merged weight.

    squared_weight   ||dequant(Q)||²
    squared_delta    ||s·B·A||² = ||Δ||²
    retained         <requantized − base, Δ>; None where it is not quantized again
    difference       of the stored values from the exact sum, where codes are kept
    """

    name: str
    rank: int
    scaling: float
    squared_weight: float
    squared_delta: float
    retained: float | None = None
    difference: OffsetDifference | None = None

    def to_json(self) -> dict[str, Any]:
        """Every number, for a journal."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MergedLayer:
        """The inverse of `to_json`. Raises RecordError for values of another shape."""
        from loftq_cli.quant.affine import OffsetDifference

        return read_record(cls, values, OffsetDifference=OffsetDifference)

    @property
    def retention(self) -> float | None:
        """The share of Δ that survives quantizing again: <requantized − base, Δ> / <Δ, Δ>."""
        return None if self.retained is None else retention(self.retained, self.squared_delta)

    @property
    def lost(self) -> float | None:
        """||W_merged − W_exact|| / ||Δ||, where codes are kept."""
        return None if self.difference is None else relative(self.difference.squared_difference, self.squared_delta)

    @property
    def relative_difference(self) -> float | None:
        """max|W_merged − W_exact| / max|W_exact|, where codes are kept."""
        found = self.difference
        return None if found is None else found.max_difference / (found.max_weight or 1.0)

    @property
    def relative_delta(self) -> float:
        """||Δ|| / ||dequant(Q)||."""
        return math.sqrt(self.squared_delta / self.squared_weight) if self.squared_weight else 0.0


@dataclass(frozen=True, slots=True)
class MergeOutcome:
    """What a finished merge reports. `notes` say what was checked about base and adapter, and what could not be."""

    layers: tuple[MergedLayer, ...]
    notes: tuple[str, ...]


def total_retention(layers: Sequence[MergedLayer]) -> float | None:
    """The share of the whole adapter that survives; None where nothing was quantized again."""
    measured = [layer for layer in layers if layer.retained is not None]
    if not measured:
        return None
    return retention(math.fsum(x.retained or 0.0 for x in measured), math.fsum(x.squared_delta for x in measured))


def retention(retained: float, squared_delta: float) -> float:
    """<change, Δ> / <Δ, Δ>; an adapter that adds nothing loses nothing."""
    return retained / squared_delta if squared_delta else 1.0


def total_lost(layers: Sequence[MergedLayer]) -> float | None:
    """The share of the whole update that offsets do not hold; None where no codes were kept."""
    measured = [layer for layer in layers if layer.difference is not None]
    if not measured:
        return None
    squares = math.fsum(x.difference.squared_difference for x in measured if x.difference)
    return relative(squares, math.fsum(x.squared_delta for x in measured))


def largest_difference(layers: Sequence[MergedLayer]) -> tuple[float, float] | None:
    """The largest difference from the exact sum, absolute and relative; None where no codes were kept."""
    found = [(x.difference.max_difference, x.relative_difference or 0.0) for x in layers if x.difference]
    return (max(a for a, _ in found), max(b for _, b in found)) if found else None


def layer_json(layer: MergedLayer) -> dict[str, Any]:
    """One merged layer as JSON values."""
    return {
        "name": layer.name,
        "rank": layer.rank,
        "scaling": layer.scaling,
        "relative_delta": layer.relative_delta,
        "retention": layer.retention,
        "lost": finite(layer.lost),
        "max_difference": None if layer.difference is None else layer.difference.max_difference,
        "relative_difference": layer.relative_difference,
    }


def finite(value: float | None) -> float | None:
    """JSON has no infinity: a loss where nothing was to be added is left out."""
    return value if value is None or math.isfinite(value) else None


def write_side_files(merge: Merge, directory: Path, outcome: MergeOutcome) -> None:
    """Tokenizer and the like, config, index, report and card. Raises StorageError."""
    base = merge.base
    copy_side_files(merge.side_files, directory)
    texts = {MERGE_REPORT_NAME: dump_json(_report(merge, outcome)), "README.md": _model_card(merge)}
    if len(merge.shards) > 1:
        shard_of = {tensor.name: shard.file for shard in merge.shards for tensor in shard.tensors}
        texts["model.safetensors.index.json"] = index_json(shard_of, merge.nbytes)
    if base.config:
        texts["config.json"] = dump_json(merge.model_config())
    write_texts(directory, texts)


def _report(merge: Merge, outcome: MergeOutcome) -> dict[str, Any]:
    return {
        **TOOL,
        "base": source_name(merge.base.path),
        "adapter": source_name(merge.adapter.path),
        "dtype": merge.dtype,
        "layout": merge.form.layout,
        "requantize": merge.options.requantize,
        "round_zeros": merge.options.round_zeros,
        "notes": list(outcome.notes),
        "retention": total_retention(outcome.layers),
        "lost": finite(total_lost(outcome.layers)),
        "layers": [layer_json(layer) for layer in outcome.layers],
        "replaced": [job.name for job in merge.jobs if job.replacement and job.name in merge.base.tensors],
        "added": [job.name for job in merge.jobs if job.name not in merge.base.tensors],
        "biases": [job.name for job in merge.jobs if job.lora_bias is not None],
    }


def _model_card(merge: Merge) -> str:
    form = f"{merge.form.layout}, {merge.dtype}"
    if merge.options.requantize:
        form = f"quantized again to {merge.options.requantize}"
    elif merge.form.keeps_codes:
        form = f"{merge.form.layout}, the base's codes with the adapter in their offsets"
    return (
        f"# {source_name(merge.base.path)} merged with {source_name(merge.adapter.path)}\n\n"
        f"{form}; merged in float32 by loftq-cli. `{MERGE_REPORT_NAME}` lists every merged layer.\n"
    )
