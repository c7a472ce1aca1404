"""Headers and a recipe become a plan; or one error that names the tensor and the option. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loftq_cli.adapter import config as adapter_config
from loftq_cli.errors import UsageError
from loftq_cli.layouts.layout import (
    DENSE_HINT,
    LAYOUTS,
    Fit,
    Layout,
    StoredMatrix,
    either,
    fused_modules,
    load_layout,
    mixing_layouts,
)
from loftq_cli.model.family import Family
from loftq_cli.model.targets import Target, choose_targets, module_of
from loftq_cli.planning.jobs import CopyJob, LayerJob, pack_shards
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.recipe import Recipe
from loftq_cli.planning.settings import decoded_dtype, layer_settings, spec_of
from loftq_cli.quant.formats import QuantSpec
from loftq_cli.tensors.headers import MODEL_DTYPES, OutTensor, TensorRef, config_file_beside


def build_plan(tensors: Mapping[str, TensorRef], config: Mapping[str, Any], recipe: Recipe) -> Plan:
    """The plan for a checkpoint's tensors and its config.json (empty where there is none).

    Raises UsageError when an option does not fit a tensor, or nothing is left to quantize; InputError for a config with
    a value of the wrong type.
    """
    family = Family(config, config_file_beside(tensors.values()))
    planner, jobs = _jobs(tensors, family, recipe)
    if planner.layout.row.stores_codes and not family.loads_in_4_bit():
        raise UsageError(f"transformers cannot load {family.model_type} from quantized tensors", hint=DENSE_HINT)
    if not any(isinstance(job, LayerJob) for job in jobs):
        if planner.unfit is not None:
            raise UsageError(f"no weight to quantize: {planner.unfit.reason}", hint=planner.unfit.hint)
        raise UsageError("no weight to quantize", hint="loftq inspect shows every tensor and why it is left alone")
    _check_overrides(recipe, jobs)
    notes = [*planner.notes, *_summary_notes(jobs, planner.recast), *_fused_notes(recipe, jobs)]
    shards = pack_shards([job.base_tensors for job in jobs], recipe.max_shard_nbytes)
    plan = Plan(recipe, planner.family, planner.dtype, tuple(jobs), shards, tuple(notes))
    plan.model_config(config)  # refuses a model that the container's loaders do not read
    return plan


def possible_jobs(
    tensors: Mapping[str, TensorRef], config: Mapping[str, Any], recipe: Recipe
) -> list[LayerJob | CopyJob]:
    """The jobs of a plan, for looking at a checkpoint: it is no error when there is nothing to quantize."""
    return _jobs(tensors, Family(config, config_file_beside(tensors.values())), recipe)[1]


def _jobs(
    tensors: Mapping[str, TensorRef], family: Family, recipe: Recipe
) -> tuple[_Planner, list[LayerJob | CopyJob]]:
    targets = choose_targets(tensors, family, recipe.include, recipe.exclude)
    dtype = family.dtype(tensors[name] for name, target in targets.items() if target.kind == "linear")
    if LAYOUTS[str(recipe.layout)].one_dtype:
        dtype = recipe.scale_dtype or dtype
    planner = _Planner(recipe, family, dtype, load_layout(str(recipe.layout)), [module_of(name) for name in tensors])
    return planner, [job for name, ref in tensors.items() if (job := planner.job(ref, targets[name])) is not None]


class _Planner:
    """Turns one tensor after the other into a job; collects what has to be said about it."""

    def __init__(self, recipe: Recipe, family: Family, dtype: str, layout: Layout, modules: Sequence[str]) -> None:
        self.recipe, self.family, self.dtype, self.layout, self.modules = recipe, family, dtype, layout, modules
        self.notes: list[str] = []
        self.recast = 0
        self.unfit: Fit | None = None

    def job(self, ref: TensorRef, target: Target) -> LayerJob | CopyJob | None:
        if ref.alias_of is not None and self.family.ties_embeddings():
            self.notes.append(f"{ref.name} is {ref.alias_of} (tied): stored once")
            return None
        if not target.quantize:
            return self._copy(ref, target.reason)
        return self._layer(ref)

    def _layer(self, ref: TensorRef) -> LayerJob | CopyJob:
        module = module_of(ref.name)
        transposed = self.family.is_transposed(module)
        shape = (ref.shape[1], ref.shape[0]) if transposed else (ref.shape[0], ref.shape[1])
        asked, lora, quantize = layer_settings(self.recipe, module, self.dtype)
        if not quantize:
            return self._copy(ref, "excluded by an override")
        fit = self.layout.fit(asked, shape, transposed=transposed)
        self._check_own_format(ref.name, asked, fit, shape, transposed=transposed)
        if fit.spec is None:
            self.unfit = self.unfit or fit
            reason = fit.reason or "does not fit the container"
            return self._copy(ref, reason, note=f"kept in full precision: {reason}")
        # A pooled adapter may have more rank than its input has groups: PEFT trains such ones.
        if lora.rank > min(shape):
            raise UsageError(
                f"rank {lora.rank} is more than the matrix has ({shape[0]} by {shape[1]})",
                tensor=ref.name,
                hint=f"--rank {min(shape)}, an [[override]] with a smaller rank, or --exclude '{module}'",
            )
        dtype = decoded_dtype(str(self.recipe.layout), fit.spec, self.dtype)
        matrix = StoredMatrix(ref.name, shape, fit.spec, dtype, transposed)
        loaded = self.family.loaded_name(module, self.modules)
        return LayerJob(
            matrix=matrix,
            module=loaded,
            lora=lora,
            base_tensors=self.layout.planned(matrix),
            adapter_tensors=adapter_config.planned(adapter_config.AdaptedModule(loaded, shape, lora)),
            note=fit.reason,
        )

    def _check_own_format(
        self, name: str, asked: QuantSpec, fit: Fit, shape: tuple[int, int], *, transposed: bool
    ) -> None:
        """Raises UsageError for integers of a layer's own that the container does not hold: they were asked for."""
        common, layout = spec_of(self.recipe, self.dtype), str(self.recipe.layout)
        if asked == common or not asked.is_affine:
            return
        mixed = self.layout.row.mixed
        if mixed == "none":
            what = f"layout {layout} has one quant_type and group size for all layers, and an override has another"
            mixing = either(mixing_layouts(asked.quant_type, with_offsets=False))
            raise UsageError(what, tensor=name, hint=f"--layout {mixing}")
        if mixed == "symmetric" and asked.zero_point_kind != "none":
            what = f"an override has another format, and loaders of {layout} mix formats without zero points only"
            mixing = either(mixing_layouts(asked.quant_type, with_offsets=True))
            raise UsageError(what, tensor=name, hint=f"--symmetric, or --layout {mixing}")
        if fit.spec is None and self.layout.fit(common, shape, transposed=transposed).spec is not None:
            raise UsageError(f"an override does not fit it: {fit.reason}", tensor=name, hint=fit.hint)

    def _copy(self, ref: TensorRef, reason: str, *, note: str | None = None) -> CopyJob:
        dtype = ref.dtype
        # transformers keeps what is called "weight" in a quantized checkpoint in its stored dtype, and two float dtypes
        # in one model do not compute: so these are stored in the model's own.
        row = self.layout.row
        parameter = (".weight", ".bias") if row.one_dtype else ".weight"
        if row.stores_codes and ref.name.endswith(parameter) and dtype in MODEL_DTYPES:
            dtype = self.dtype
        self.recast += dtype != ref.dtype
        return CopyJob(ref.name, OutTensor(ref.name, dtype, ref.shape), reason, note)


def _check_overrides(recipe: Recipe, jobs: Sequence[LayerJob | CopyJob]) -> None:
    for override in recipe.override:
        if not any(re.search(override.match, module_of(job.name)) for job in jobs):
            raise UsageError(f"the override {override.match!r} matches no module", hint="loftq inspect lists the names")


def _summary_notes(jobs: Sequence[LayerJob | CopyJob], recast: int) -> Iterator[str]:
    experts = [job for job in jobs if isinstance(job, CopyJob) and job.reason == "expert"]
    if experts:
        nbytes = sum(job.output.nbytes for job in experts)
        yield (
            f"{len(experts)} expert tensors ({nbytes / 1e6:.1f} MB) stay in full precision: loaders fuse experts into "
            "one parameter that the container does not hold"
        )
    without = [job for job in jobs if isinstance(job, CopyJob) and job.reason == "no adapter"]
    if without:
        yield f"{len(without)} linear layers stay in full precision: PEFT takes no adapter on them in this family"
    if recast:
        yield f"{recast} copied weights are converted to the model's dtype"
    yield from (f"{job.name}: {job.note}" for job in jobs if job.note)


def _fused_notes(recipe: Recipe, jobs: Sequence[LayerJob | CopyJob]) -> Iterator[str]:
    """What servers that fuse layers do not load: other loaders do, so it is said and not refused."""
    layout = str(recipe.layout)
    specs = {module_of(job.name): job.matrix.spec if isinstance(job, LayerJob) else None for job in jobs}
    uneven = [group for group in fused_modules(layout, specs) if len({specs[module] for module in group}) > 1]
    if uneven:
        parent = uneven[0][0].rpartition(".")[0]
        names = ", ".join(module.rpartition(".")[2] for module in uneven[0])
        first = f" (the first of {len(uneven)})" if len(uneven) > 1 else ""
        yield f"vLLM makes one matrix of {names} of {parent}, which do not have the one format that it needs{first}"
