"""Candidates for a layer under a bound on size: number formats and ranks, with stored bytes and errors from measured
curves. Chooses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from loftq_cli.adapter import config as adapter_config
from loftq_cli.allocation.error_curves import ErrorCurve
from loftq_cli.checkpoint.patterns import finds
from loftq_cli.errors import UsageError
from loftq_cli.layouts.fused import fused_modules
from loftq_cli.layouts.layout import LAYOUTS, StoredMatrix, either, load_layout, mixing_layouts
from loftq_cli.methods.method import METHODS
from loftq_cli.model.targets import module_of
from loftq_cli.planning.jobs import LayerJob
from loftq_cli.planning.recipe import AffineOptions, CodebookOptions, Recipe
from loftq_cli.planning.settle import revise
from loftq_cli.quant.formats import FORMATS, QuantSpec, specs_of_sizes

_GROUP_SIZES = (32, 64, 128)
_BLOCK_SIZES = (32, 64, 128, 256)
_RANKS = (4, 8, 16, 32, 64)  # PEFT has no adapter of rank 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bounds on the size of a result; None is no bound.

    bits_per_weight   bits of the stored base per quantized weight, constants included
    total_nbytes      bytes of base and adapter, copied tensors included
    adapter_nbytes    bytes of the adapter

    Formats are chosen under `bits_per_weight` or `total_nbytes`, ranks under `adapter_nbytes`. Raises UsageError for
    `bits_per_weight` beside `total_nbytes`, and for `bits_per_weight` outside of the positive finite numbers.

    >>> Budget(bits_per_weight=3.5).chooses_formats, Budget(bits_per_weight=3.5).chooses_ranks
    (True, False)
    """

    bits_per_weight: float | None = None
    total_nbytes: int | None = None
    adapter_nbytes: int | None = None

    def __post_init__(self) -> None:
        if self.bits_per_weight is not None and self.total_nbytes is not None:
            raise UsageError("--target-bpw and --target-size both bound the base", hint="one of the two")
        bits = self.bits_per_weight
        if bits is not None and not (math.isfinite(bits) and bits > 0):
            raise UsageError(f"--target-bpw must be a positive number, not {bits}")

    @property
    def chooses_formats(self) -> bool:
        """Whether the format of a layer may differ from the recipe's."""
        return self.bits_per_weight is not None or self.total_nbytes is not None

    @property
    def needs_integers(self) -> bool:
        """Whether fewer bits than those of any codebook are asked for.

        >>> Budget(bits_per_weight=3.5).needs_integers, Budget(bits_per_weight=4.5).needs_integers
        (True, False)
        """
        fewest = min(row.bits for row in FORMATS.values() if not row.is_affine)
        return self.bits_per_weight is not None and self.bits_per_weight < fewest

    @property
    def chooses_ranks(self) -> bool:
        """Whether the rank of a layer may differ from the recipe's."""
        return self.adapter_nbytes is not None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A number format and a rank for a layer.

    spec             the number format
    rank             the rank of the adapter
    base_nbytes      bytes of the layer in the base
    adapter_nbytes   bytes of the layer in the adapter
    relative_error   squared error of the layer, relative to the squared weight
    """

    spec: QuantSpec
    rank: int
    base_nbytes: int
    adapter_nbytes: int
    relative_error: float


class Options:
    """Formats and ranks to choose from, by a recipe and a target.

    recipe, target    as passed
    counts_adapters   whether adapters lower the predicted errors

    Raises UsageError for a target that chooses formats under an unfit container: the stored size does not depend on the
    format, or loaders read a single format only.
    """

    def __init__(self, recipe: Recipe, target: Budget) -> None:
        _check_layout(recipe, target)
        self.recipe, self.target = recipe, target
        self._layout, self._row = load_layout(recipe.layout), LAYOUTS[recipe.layout]
        # An adapter that starts at zero lowers no error. Ranks under a bound still count: training fills the adapter.
        self.counts_adapters = target.chooses_ranks or METHODS[recipe.method].is_fitted(recipe.init)

    @property
    def sizes(self) -> list[int]:
        """Sizes of groups or blocks, ascending, the recipe's size included; a pooled adapter allows a single size."""
        quant = self.recipe.quant
        if isinstance(quant, CodebookOptions):
            return sorted({*_BLOCK_SIZES, quant.block_size})
        if self.recipe.pooling is not None:
            return [quant.group_size]
        fitting = [size for size in _GROUP_SIZES if not self._row.group_sizes or size in self._row.group_sizes]
        return sorted({*fitting, quant.group_size})

    @property
    def widest(self) -> Recipe:
        """The recipe of the most quantizable layers: integers in the smallest groups where formats are chosen, and at
        most the smallest rank to choose where ranks are chosen and no alpha is set.
        """
        recipe = self.recipe
        if self.target.chooses_ranks and recipe.alpha is None:
            recipe = revise(recipe, rank=min(recipe.rank, _RANKS[0]))
        if isinstance(recipe.quant, CodebookOptions) or not self.target.chooses_formats:
            return recipe
        return revise(recipe, group_size=self.sizes[0])

    def list_matrices(self, job: LayerJob) -> list[StoredMatrix]:
        """The matrix of a layer in every format to choose from, or in the plan's format alone where an override sets
        the format or the target chooses no formats.
        """
        if not self._has_choice(job):
            return [job.matrix]
        spec, matrix = job.matrix.spec, job.matrix
        specs = specs_of_sizes(spec, self._row.quant_types, self.sizes)
        fits = (s for s in specs if self._layout.fit(s, matrix.shape, transposed=matrix.transposed).spec == s)
        return [replace(matrix, spec=s) for s in fits]

    def group_fused(self, layers: Sequence[LayerJob]) -> list[tuple[int, ...]]:
        """Indices into `layers`, a tuple for each set of layers in need of a common format, since servers fuse the
        layers into a matrix. Layers fused with a layer of fixed format stand alone, each in a tuple.
        """
        indices = {module_of(job.name): i for i, job in enumerate(layers)}
        groups = [tuple(map(indices.__getitem__, g)) for g in fused_modules(self.recipe.layout, indices)]
        fused = [group for group in groups if all(self._has_choice(layers[i]) for i in group)]
        alone = set(indices.values()).difference(*fused)
        return sorted([*fused, *((i,) for i in alone)])

    def list_ranks(self, job: LayerJob) -> tuple[int, ...]:
        """Ranks to choose from, ascending, up to the smaller side of the matrix; the plan's rank alone where an
        override sets rank or alpha or the target chooses no ranks.
        """
        if not self.target.chooses_ranks or self._is_overridden(job, ("rank", "alpha")):
            return (job.lora.rank,)
        most = min(job.matrix.shape)
        return tuple(rank for rank in _RANKS if rank <= most) or (most,)

    def count_nbytes(self, job: LayerJob, matrix: StoredMatrix, rank: int) -> tuple[int, int]:
        """Bytes of a layer in the base and in the adapter, for the format of `matrix` and a rank."""
        adapted = adapter_config.AdaptedModule(job.module, matrix.shape, replace(job.lora, rank=rank))
        base, adapter = self._layout.planned(matrix), adapter_config.planned(adapted)
        return sum(tensor.nbytes for tensor in base), sum(tensor.nbytes for tensor in adapter)

    def make_candidates(
        self, job: LayerJob, matrices: Sequence[StoredMatrix], ranks: Sequence[int], curve: ErrorCurve
    ) -> Iterator[Candidate]:
        """Yield a candidate for every format with every rank; `curve` has an error for each of `ranks`."""
        for matrix in matrices:
            for rank, squared in zip(ranks, curve.squared_errors[matrix.spec], strict=True):
                relative = squared / curve.squared_weight if curve.squared_weight else 0.0
                yield Candidate(matrix.spec, rank, *self.count_nbytes(job, matrix, rank), relative)

    def _has_choice(self, job: LayerJob) -> bool:
        return self.target.chooses_formats and not self._is_overridden(job, ("quant_type", "group_size", "block_size"))

    def _is_overridden(self, job: LayerJob, fields: Sequence[str]) -> bool:
        module = module_of(job.name)
        return any(
            any(getattr(override, name) is not None for name in fields) and finds(override.match, module)
            for override in self.recipe.override
        )


def _check_layout(recipe: Recipe, target: Budget) -> None:
    row = LAYOUTS[recipe.layout]
    if not target.chooses_formats:
        return
    if not row.stores_codes:
        raise UsageError(
            f"layout {recipe.layout} stores decoded values, whose size no format changes",
            hint="another --layout, or leave out --target-bpw and --target-size",
        )
    if not isinstance(recipe.quant, AffineOptions):
        return
    if row.mixed == "none":
        message = f"layout {recipe.layout} has one quant_type and group size for all layers"
        raise UsageError(message, hint=f"--layout {_name_mixing_layouts(recipe, with_offsets=False)}")
    if row.mixed == "symmetric" and not recipe.quant.symmetric:
        message = f"loaders of {recipe.layout} read layers of several formats without zero points only"
        raise UsageError(message, hint=f"--symmetric, or --layout {_name_mixing_layouts(recipe, with_offsets=True)}")


def _name_mixing_layouts(recipe: Recipe, *, with_offsets: bool) -> str:
    """Name the containers that hold codes in several formats in a model, as a choice in a sentence."""
    mixing = mixing_layouts(recipe.quant.quant_type, with_offsets=with_offsets)
    return either([name for name in mixing if LAYOUTS[name].stores_codes])


def refuse_experts(layers: Sequence[LayerJob]) -> None:
    """Raises UsageError for quantized experts: one format and one rank hold for the experts of a layer together.

    >>> refuse_experts([])
    """
    experts = next((job for job in layers if job.experts), None)
    if experts is not None:
        message = "a bound on the size chooses formats and ranks of weights alone, and experts are quantized together"
        has_codes = LAYOUTS[experts.layout].stores_codes
        hint = "--quant-type nf4 keeps experts as they are" if has_codes else "--exclude experts"
        raise UsageError(message, tensor=experts.sources[0], hint=hint)
