"""What a layer may become under a bound on size: number formats and ranks, what they store, and what they lose by
measured curves. Chooses nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from loftq_cli.adapter import config as adapter_config
from loftq_cli.allocation.error_curves import ErrorCurve
from loftq_cli.errors import UsageError
from loftq_cli.layouts.layout import LAYOUTS, StoredMatrix, either, fused_modules, load_layout, mixing_layouts
from loftq_cli.methods.method import METHODS
from loftq_cli.model.targets import module_of
from loftq_cli.planning.jobs import LayerJob
from loftq_cli.planning.recipe import AffineOptions, CodebookOptions, Recipe
from loftq_cli.planning.settle import revise
from loftq_cli.quant.formats import QuantSpec, specs_of_sizes

_GROUP_SIZES = (32, 64, 128)
_BLOCK_SIZES = (32, 64, 128, 256)
_RANKS = (4, 8, 16, 32, 64)  # PEFT has no adapter of rank 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bounds: bits of the stored base per quantized weight, constants included; bytes of base and adapter; bytes of the
    adapter. None is no bound; formats are chosen where one of the first two is given, ranks where the last is.
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
        """Whether layers may have other formats than the recipe's."""
        return self.bits_per_weight is not None or self.total_nbytes is not None

    @property
    def chooses_ranks(self) -> bool:
        """Whether layers may have other ranks than the recipe's."""
        return self.adapter_nbytes is not None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A number format and a rank for one layer: what they store, and the squared error that they leave, relative to
    the squared weight.
    """

    spec: QuantSpec
    rank: int
    base_nbytes: int
    adapter_nbytes: int
    relative_error: float


class Options:
    """What there is to choose from, by a recipe and a target. Raises UsageError for a layout that holds one format."""

    def __init__(self, recipe: Recipe, target: Budget) -> None:
        _check_layout(recipe, target)
        self.recipe, self.target = recipe, target
        self._layout, self._row = load_layout(recipe.layout), LAYOUTS[recipe.layout]
        # An adapter that starts at zero takes nothing off the error; its rank is for what training can put into it.
        self.counts_adapters = target.chooses_ranks or METHODS[recipe.method].is_fitted(recipe.init)

    @property
    def sizes(self) -> list[int]:
        """Of groups or blocks, ascending, the recipe's among them; a pooled adapter has one for all layers."""
        quant = self.recipe.quant
        if isinstance(quant, CodebookOptions):
            return sorted({*_BLOCK_SIZES, quant.block_size})
        if self.recipe.pooling is not None:
            return [quant.group_size]
        held = [size for size in _GROUP_SIZES if not self._row.group_sizes or size in self._row.group_sizes]
        return sorted({*held, quant.group_size})

    @property
    def widest(self) -> Recipe:
        """The recipe that quantizes every layer that one of the sizes fits, with a rank that all matrices have."""
        recipe = self.recipe
        if self.target.chooses_ranks and recipe.alpha is None:
            recipe = revise(recipe, rank=min(recipe.rank, _RANKS[0]))
        if isinstance(recipe.quant, CodebookOptions) or not self.target.chooses_formats:
            return recipe
        return revise(recipe, group_size=self.sizes[0])

    def matrices(self, job: LayerJob) -> list[StoredMatrix]:
        """The layer in every format that it may have."""
        if not self._has_choice(job):
            return [job.matrix]
        spec, matrix = job.matrix.spec, job.matrix
        specs = specs_of_sizes(spec, self._row.quant_types, self.sizes)
        fits = (s for s in specs if self._layout.fit(s, matrix.shape, transposed=matrix.transposed).spec == s)
        return [replace(matrix, spec=s) for s in fits]

    def together(self, layers: Sequence[LayerJob]) -> list[tuple[int, ...]]:
        """The places of `layers`, those in one tuple that need one format: servers make one matrix of them. Where an
        override says the format of one, it need not be that of the others.
        """
        places = {module_of(job.name): i for i, job in enumerate(layers)}
        groups = [tuple(map(places.__getitem__, g)) for g in fused_modules(self.recipe.layout, places)]
        fused = [group for group in groups if all(self._has_choice(layers[i]) for i in group)]
        alone = set(places.values()).difference(*fused)
        return sorted([*fused, *((i,) for i in alone)])

    def ranks(self, job: LayerJob) -> tuple[int, ...]:
        """Ascending."""
        if not self.target.chooses_ranks or self._has_own(job, ("rank", "alpha")):
            return (job.lora.rank,)
        most = min(job.matrix.shape)
        return tuple(rank for rank in _RANKS if rank <= most) or (most,)

    def nbytes(self, job: LayerJob, matrix: StoredMatrix, rank: int) -> tuple[int, int]:
        """What a format and a rank store of a layer in the base and in the adapter."""
        adapted = adapter_config.AdaptedModule(job.module, matrix.shape, replace(job.lora, rank=rank))
        base, adapter = self._layout.planned(matrix), adapter_config.planned(adapted)
        return sum(tensor.nbytes for tensor in base), sum(tensor.nbytes for tensor in adapter)

    def candidates(
        self, job: LayerJob, matrices: Sequence[StoredMatrix], ranks: Sequence[int], curve: ErrorCurve
    ) -> Iterator[Candidate]:
        """Every format with every rank."""
        for matrix in matrices:
            for rank, squared in zip(ranks, curve.squared_errors[matrix.spec], strict=True):
                relative = squared / curve.squared_weight if curve.squared_weight else 0.0
                yield Candidate(matrix.spec, rank, *self.nbytes(job, matrix, rank), relative)

    def _has_choice(self, job: LayerJob) -> bool:
        return self.target.chooses_formats and not self._has_own(job, ("quant_type", "group_size", "block_size"))

    def _has_own(self, job: LayerJob, fields: Sequence[str]) -> bool:
        module = module_of(job.name)
        return any(
            any(getattr(override, name) is not None for name in fields) and re.search(override.match, module)
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
        what = f"layout {recipe.layout} has one quant_type and group size for all layers"
        raise UsageError(what, hint=f"--layout {_mixing(recipe, with_offsets=False)}")
    if row.mixed == "symmetric" and not recipe.quant.symmetric:
        what = f"loaders of {recipe.layout} read layers of several formats without zero points only"
        raise UsageError(what, hint=f"--symmetric, or --layout {_mixing(recipe, with_offsets=True)}")


def _mixing(recipe: Recipe, *, with_offsets: bool) -> str:
    """Containers of several formats in one model, whose size a format changes."""
    mixing = mixing_layouts(recipe.quant.quant_type, with_offsets=with_offsets)
    return either([name for name in mixing if LAYOUTS[name].stores_codes])
