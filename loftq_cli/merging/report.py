"""The measurements of a merge as records, and the files beside the merged weights: config, index, report, card."""

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
    without_local_path,
    write_texts,
)
from loftq_cli.output.side_files import code_paragraph, copy_side_files
from loftq_cli.tensors.metrics import relative

if TYPE_CHECKING:
    from loftq_cli.quant.affine import OffsetDifference


@dataclass(frozen=True, slots=True)
class MergedLayer:
    """A merged weight: base weight dequant(Q) plus update Δ = s·B·A.

    name             tensor name in the base
    rank, scaling    rank and factor s of the adapter
    squared_weight   ||dequant(Q)||²
    squared_delta    ||Δ||²
    retained         <stored − base, Δ>; None where the codes were kept
    squared_rounding ||stored − exact sum||², the rounding to the dtype of the file; None for a quantized result
    difference       distance of the stored values from the exact sum; None unless the codes were kept
    experts          the retention of each expert in a tensor of all experts; empty for any other tensor

    >>> layer = MergedLayer("q_proj.weight", 16, 2.0, squared_weight=100.0, squared_delta=4.0, retained=3.0)
    >>> layer.retention, layer.relative_delta, layer.lost
    (0.75, 0.2, None)
    """

    name: str
    rank: int
    scaling: float
    squared_weight: float
    squared_delta: float
    retained: float | None = None
    difference: OffsetDifference | None = None
    squared_rounding: float | None = None
    experts: tuple[float | None, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON values, for a journal."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MergedLayer:
        """Read the values of `to_json`. Raises RecordError for values with unknown keys or wrong types."""
        from loftq_cli.quant.affine import OffsetDifference

        return read_record(cls, values, OffsetDifference=OffsetDifference)

    @property
    def retention(self) -> float | None:
        """The share of Δ in the file: <stored − base, Δ> / <Δ, Δ>; None where the codes were kept."""
        return None if self.retained is None else retained_share(self.retained, self.squared_delta)

    @property
    def lost(self) -> float | None:
        """||W_merged − W_exact|| / ||Δ||. None for a layer quantized again, and for a layer in full precision without
        an update: rounding the base takes nothing from the adapter.
        """
        if self.difference is not None:
            return relative(self.difference.squared_difference, self.squared_delta)
        if self.squared_rounding is None or not self.squared_delta:
            return None
        return relative(self.squared_rounding, self.squared_delta)

    @property
    def relative_difference(self) -> float | None:
        """max|W_merged − W_exact| / max|W_exact|; None unless the codes were kept."""
        difference = self.difference
        return None if difference is None else difference.max_difference / (difference.max_weight or 1.0)

    @property
    def relative_delta(self) -> float:
        """||Δ|| / ||dequant(Q)||."""
        return math.sqrt(self.squared_delta / self.squared_weight) if self.squared_weight else 0.0


@dataclass(frozen=True, slots=True)
class MergeOutcome:
    """The report of a finished merge.

    layers   every weight under an adapter, in the order of the jobs
    notes    remarks about the pair of base and adapter, checked or not, and about copied numbers
    """

    layers: tuple[MergedLayer, ...]
    notes: tuple[str, ...]


def total_retention(layers: Sequence[MergedLayer]) -> float | None:
    """The surviving share of the adapter over all layers with other numbers than the base's codes in new offsets,
    Σ<stored − base, Δ> / Σ||Δ||².

    None when all layers kept their codes.

    >>> half = MergedLayer("k_proj.weight", 8, 1.0, squared_weight=9.0, squared_delta=2.0, retained=1.0)
    >>> total_retention([half, half]), total_retention([])
    (0.5, None)
    """
    measured = [layer for layer in layers if layer.retained is not None]
    if not measured:
        return None
    return retained_share(math.fsum(x.retained or 0.0 for x in measured), math.fsum(x.squared_delta for x in measured))


def retained_share(retained: float, squared_delta: float) -> float:
    """`retained` / `squared_delta`, the surviving share of an update; 1.0 for an update of zero: nothing is lost.

    >>> retained_share(3.0, 4.0), retained_share(0.0, 0.0)
    (0.75, 1.0)
    """
    return retained / squared_delta if squared_delta else 1.0


def total_lost(layers: Sequence[MergedLayer]) -> float | None:
    """The distance from the exact sum beside the size of the update, ||W_merged − W_exact|| / ||Δ|| over all layers
    that were not quantized again: the part of the update outside the offsets, or the rounding to the dtype of the file.

    None when every layer was quantized again; infinite for an error without an update.

    >>> from loftq_cli.quant.affine import OffsetDifference
    >>> rounding = OffsetDifference(max_difference=0.5, max_weight=2.0, squared_difference=1.0)
    >>> total_lost([MergedLayer("q_proj.weight", 8, 1.0, 9.0, squared_delta=4.0, difference=rounding)])
    0.5
    """
    measured = [layer for layer in layers if layer.lost is not None]
    if not measured:
        return None
    squares = [x.difference.squared_difference if x.difference else x.squared_rounding or 0.0 for x in measured]
    return relative(math.fsum(squares), math.fsum(x.squared_delta for x in measured))


def largest_difference(layers: Sequence[MergedLayer]) -> tuple[float, float] | None:
    """The largest difference from the exact sum over all layers: absolute, and relative to the layer's largest weight.

    None when no layer kept codes.

    >>> from loftq_cli.quant.affine import OffsetDifference
    >>> rounding = OffsetDifference(max_difference=0.5, max_weight=2.0, squared_difference=1.0)
    >>> largest_difference([MergedLayer("q_proj.weight", 8, 1.0, 9.0, 4.0, difference=rounding)])
    (0.5, 0.25)
    """
    differences = [(x.difference.max_difference, x.relative_difference or 0.0) for x in layers if x.difference]
    return (max(a for a, _ in differences), max(b for _, b in differences)) if differences else None


def layer_json(layer: MergedLayer) -> dict[str, Any]:
    """A merged layer as JSON values for the report and for --json; an infinite loss becomes None.

    >>> layer_json(MergedLayer("q_proj.weight", 16, 2.0, squared_weight=100.0, squared_delta=4.0))["relative_delta"]
    0.2
    """
    return {
        "name": layer.name,
        "rank": layer.rank,
        "scaling": layer.scaling,
        "relative_delta": layer.relative_delta,
        "retention": layer.retention,
        "lost": finite_or_none(layer.lost),
        "max_difference": None if layer.difference is None else layer.difference.max_difference,
        "relative_difference": layer.relative_difference,
        **({"experts": [finite_or_none(retention) for retention in layer.experts]} if layer.experts else {}),
    }


def finite_or_none(value: float | None) -> float | None:
    """`value` for JSON, which has no infinity: None for an infinite loss, the error of an update of zero.

    >>> finite_or_none(0.5), finite_or_none(math.inf)
    (0.5, None)
    """
    return value if value is None or math.isfinite(value) else None


def write_side_files(merge: Merge, directory: Path, outcome: MergeOutcome) -> None:
    """Write every file beside the weights into `directory`: tokenizer, config, index, report and card.

    Raises StorageError when the disk refuses a file.
    """
    base, part = merge.base, merge.base.checkpoint.part
    copy_side_files(merge.side_files, directory, remote_code=merge.options.remote_code)
    texts = {MERGE_REPORT_NAME: dump_json(_report(merge, outcome)), "README.md": _model_card(merge)}
    if len(merge.shards) > 1:
        shard_of = {tensor.name: Path(shard.file).name for shard in merge.shards for tensor in shard.tensors}
        texts[f"{part}{base.family.library.weights}.safetensors.index.json"] = index_json(shard_of, merge.nbytes)
    if base.config:
        texts[f"{part}config.json"] = dump_json(without_local_path(merge.model_config()))
    write_texts(directory, texts)


def _report(merge: Merge, outcome: MergeOutcome) -> dict[str, Any]:
    with_rows = [job for job in merge.jobs if job.tokens]
    further = [{"adapter": source_name(a.source.path), "weight": a.weight} for a in merge.adapters]
    return {
        **TOOL,
        "base": source_name(merge.base.path),
        "adapter": source_name(merge.adapter.path),
        **({"adapters": further} if len(further) > 1 or further[0]["weight"] != 1.0 else {}),
        "dtype": merge.dtype,
        "layout": merge.form.layout,
        "requantize": merge.options.requantize,
        "round_zeros": merge.options.round_zeros,
        "notes": list(outcome.notes),
        "retention": total_retention(outcome.layers),
        "lost": finite_or_none(total_lost(outcome.layers)),
        "layers": [layer_json(layer) for layer in outcome.layers],
        "replaced": [job.name for job in merge.jobs if job.replacement and job.name in merge.base.tensors],
        "added": [job.name for job in merge.jobs if job.name not in merge.base.tensors and not job.stacked],
        "biases": [job.name for job in merge.jobs if job.biases],
        "tokens": {job.name: sorted({i for rows in job.tokens for i in rows.tokens.indices}) for job in with_rows},
    }


def _model_card(merge: Merge) -> str:
    form = f"{merge.form.layout}, {merge.dtype}"
    if merge.options.requantize:
        form = f"quantized again to {merge.options.requantize}"
    elif merge.form.keeps_codes:
        form = f"{merge.form.layout}, the base's codes with the adapter in their offsets"
    adapters = " and ".join(source_name(adapter.source.path) for adapter in merge.adapters)
    return (
        f"# {source_name(merge.base.path)} merged with {adapters}\n\n"
        f"{form}; merged in float32 by loftq-cli. `{MERGE_REPORT_NAME}` lists every merged layer.\n"
        f"{code_paragraph(merge.code_files)}"
    )
