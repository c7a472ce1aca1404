"""Headers and a recipe become a plan: every job, every output tensor in its file, every size; or one error that names
the tensor and the option. Needs no torch: `--dry-run` prints what this module returns.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loftq_cli import __version__
from loftq_cli.errors import UsageError, printable
from loftq_cli.family import Family
from loftq_cli.kernels import COMPILER_NBYTES, is_worth_compiling
from loftq_cli.layouts import peft_adapter
from loftq_cli.layouts.layout import (
    LAYOUTS,
    Fit,
    Layout,
    ModelFacts,
    StoredMatrix,
    common_spec,
    fused_modules,
    load_layout,
)
from loftq_cli.methods.method import METHODS
from loftq_cli.quant.formats import FORMATS, QuantSpec
from loftq_cli.recipe import Recipe, recipe_json
from loftq_cli.targets import Target, choose_targets, module_of
from loftq_cli.tensors import (
    MODEL_DTYPES,
    AffineSpec,
    CodebookSpec,
    LoraSpec,
    OutTensor,
    Pooling,
    TensorRef,
    config_file_beside,
)

_TORCH_NBYTES = 280_000_000  # importing torch and its first operations, measured on Linux
_WEIGHTED_NBYTES = (
    20  # for each entry of the statistics of a layer's inputs: they, their root, and what is made of them
)

# What a search for constants, and a round of refinement, takes in passes of plain quantizing over the weights.
_SEARCH_PASSES, _ROUND_PASSES = 4, 256


@dataclass(frozen=True, slots=True)
class LayerJob:
    """One weight to quantize.

    matrix            what is stored; `matrix.name` is the tensor's name in the source
    module            the linear's name in the loaded model, by which the adapter knows it
    base_tensors      what goes into the base; adapter_tensors what goes into the adapter
    note              what differs from the recipe, and why
    """

    matrix: StoredMatrix
    module: str
    lora: LoraSpec
    base_tensors: tuple[OutTensor, ...]
    adapter_tensors: tuple[OutTensor, ...]
    note: str | None

    @property
    def name(self) -> str:
        """The tensor's name in the source."""
        return self.matrix.name

    @property
    def numel(self) -> int:
        """Weights in the matrix."""
        return math.prod(self.matrix.shape)

    @property
    def bits_per_weight(self) -> float:
        """True bits of the stored base, constants included."""
        return 8 * sum(t.nbytes for t in self.base_tensors) / self.numel


@dataclass(frozen=True, slots=True)
class CopyJob:
    """One tensor that is written as it is, or in the model's dtype; and why it is not quantized.

    note   what has to be said about it, beside its reason
    """

    name: str
    output: OutTensor
    reason: str
    note: str | None = None

    @property
    def base_tensors(self) -> tuple[OutTensor, ...]:
        """What goes into the base."""
        return (self.output,)

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.output.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file of the base, and its tensors."""

    file: str
    tensors: tuple[OutTensor, ...]


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do."""

    recipe: Recipe
    family: Family
    dtype: str
    jobs: tuple[LayerJob | CopyJob, ...]
    shards: tuple[Shard, ...]
    notes: tuple[str, ...]

    @cached_property
    def layers(self) -> tuple[LayerJob, ...]:
        """The jobs that quantize."""
        return tuple(job for job in self.jobs if isinstance(job, LayerJob))

    @cached_property
    def copies(self) -> tuple[CopyJob, ...]:
        """The jobs that copy."""
        return tuple(job for job in self.jobs if isinstance(job, CopyJob))

    @property
    def layout(self) -> str:
        """The container of the base."""
        return str(self.recipe.layout)

    @property
    def adapter_dir(self) -> str:
        """The adapter's folder inside the output."""
        return METHODS[self.recipe.method].adapter_dir

    @property
    def adapter_tensors(self) -> tuple[OutTensor, ...]:
        """All tensors of the adapter file."""
        return tuple(t for job in self.layers for t in job.adapter_tensors)

    @property
    def base_nbytes(self) -> int:
        """Bytes of all tensors of the base."""
        return sum(t.nbytes for shard in self.shards for t in shard.tensors)

    @property
    def adapter_nbytes(self) -> int:
        """Bytes of all tensors of the adapter."""
        return sum(t.nbytes for t in self.adapter_tensors)

    @property
    def peak_nbytes(self) -> int:
        """About how much memory the conversion takes: it depends on the largest matrix, not on their number."""
        method = METHODS[self.recipe.method]
        per_weight, per_gram = method.exact_nbytes if self.recipe.svd == "exact" else (0, 0)
        per_weight += method.nbytes_per_weight
        per_input = _WEIGHTED_NBYTES if self.recipe.calibration is not None else 0
        compiler = COMPILER_NBYTES if is_worth_compiling(self.work) else 0
        return (
            _TORCH_NBYTES
            + compiler
            + max(
                per_weight * job.numel + per_gram * min(job.matrix.shape) ** 2 + per_input * job.matrix.shape[1] ** 2
                for job in self.layers
            )
        )

    @property
    def work(self) -> int:
        """Weights times the passes over them."""
        recipe = self.recipe
        passes = int(recipe.iterations or 1) if METHODS[recipe.method].iterates else 1
        passes *= _SEARCH_PASSES if recipe.scales == "search" else 1
        passes += _ROUND_PASSES * (recipe.rounds or 0)
        return passes * sum(job.numel for job in self.layers)

    @property
    def shard_of(self) -> dict[str, str]:
        """Output tensor name -> file, as a safetensors index has it."""
        return {tensor.name: shard.file for shard in self.shards for tensor in shard.tensors}

    def model_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the output."""
        names = [module_of(job.name) for job in self.jobs]
        kept = [self.family.loaded_name(name, names) for name in _unquantized_linears(self.copies)]
        has_experts = any(job.reason == "expert" and job.name.endswith(".weight") for job in self.copies)
        spec, others = spec_of(self.recipe, self.dtype), dict[str, QuantSpec]()
        if isinstance(spec, AffineSpec):  # of a codebook, each weight says its own
            spec, others = common_spec({job.module: job.matrix.spec for job in self.layers})
        facts = ModelFacts(self.dtype, spec, [job.module for job in self.layers], kept, has_experts, others)
        layout = load_layout(self.layout)
        # Loaders of quantized weights decode to what the config says; nothing else would name it.
        named = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": self.dtype}
        unnamed = (layout.QUANTIZED_ON_DISK or config) and not ("dtype" in config or "torch_dtype" in config)
        return layout.model_config(named if unnamed or LAYOUTS[self.layout].one_dtype else config, facts)

    def adapter_config(self, base_model: str) -> dict[str, Any]:
        """adapter_config.json of the output."""
        return peft_adapter.adapter_config(
            [peft_adapter.AdaptedModule(job.module, job.matrix.shape, job.lora) for job in self.layers],
            base_model=base_model,
            task_type=peft_adapter.task_type_of(
                self.family.architectures, is_encoder_decoder=self.family.config.get("is_encoder_decoder") is True
            ),
            fan_in_fan_out=any(job.matrix.transposed for job in self.layers),
        )

    def fingerprint(self, tensors: Mapping[str, TensorRef], base_model: str, statistics: str | None = None) -> str:
        """A hash of all that decides the bytes of the result, other than the numbers in the input; `statistics` is that
        of a calibration, wherever it lies.
        """
        recipe = {name: value for name, value in recipe_json(self.recipe).items() if name != "calibration"}
        return hashlib.sha256(
            json.dumps(
                [
                    [__version__, version("torch"), recipe, dict(self.family.config), base_model, statistics],
                    sorted([ref.name, ref.dtype, ref.shape] for ref in tensors.values()),
                ],
                sort_keys=True,
            ).encode()
        ).hexdigest()


def build_plan(tensors: Mapping[str, TensorRef], config: Mapping[str, Any], recipe: Recipe) -> Plan:
    """The plan for a checkpoint's tensors and its config.json (empty where there is none).

    Raises UsageError when an option does not fit a tensor, or nothing is left to quantize; InputError for a config with
    a value of the wrong type.
    """
    family = Family(config, config_file_beside(tensors.values()))
    planner, jobs = _jobs(tensors, family, recipe)
    if planner.layout.QUANTIZED_ON_DISK and not family.loads_in_4_bit():
        raise UsageError(f"transformers cannot load {family.model_type} from quantized tensors", hint="--layout dense")
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
            adapter_tensors=peft_adapter.planned(peft_adapter.AdaptedModule(loaded, shape, lora)),
            note=fit.reason,
        )

    def _check_own_format(
        self, name: str, asked: QuantSpec, fit: Fit, shape: tuple[int, int], *, transposed: bool
    ) -> None:
        """Raises UsageError for integers of a layer's own that the container does not hold: they were asked for."""
        common, layout = spec_of(self.recipe, self.dtype), str(self.recipe.layout)
        if asked == common or not isinstance(asked, AffineSpec):
            return
        mixed = LAYOUTS[layout].mixed
        if mixed == "none":
            what = f"layout {layout} has one quant_type and group size for all layers, and an override has another"
            raise UsageError(what, tensor=name, hint="--layout compressed-tensors, mlx or dense")
        if mixed == "symmetric" and not asked.symmetric:
            what = f"an override has another format, and loaders of {layout} mix formats without zero points only"
            raise UsageError(what, tensor=name, hint="--symmetric, or --layout mlx or dense")
        if fit.spec is None and self.layout.fit(common, shape, transposed=transposed).spec is not None:
            raise UsageError(f"an override does not fit it: {fit.reason}", tensor=name, hint=fit.hint)

    def _copy(self, ref: TensorRef, reason: str, *, note: str | None = None) -> CopyJob:
        dtype = ref.dtype
        # transformers keeps what is called "weight" in a quantized checkpoint in its stored dtype, and two float dtypes
        # in one model do not compute: so these are stored in the model's own.
        parameter = (".weight", ".bias") if LAYOUTS[str(self.recipe.layout)].one_dtype else ".weight"
        if self.layout.QUANTIZED_ON_DISK and ref.name.endswith(parameter) and dtype in MODEL_DTYPES:
            dtype = self.dtype
        self.recast += dtype != ref.dtype
        return CopyJob(ref.name, OutTensor(ref.name, dtype, ref.shape), reason, note)


def spec_of(recipe: Recipe, dtype: str) -> QuantSpec:
    """The number format of a recipe for a model of `dtype`."""
    if not FORMATS[recipe.quant_type].is_affine:
        return CodebookSpec(recipe.quant_type, int(recipe.block_size or 0), bool(recipe.double_quant))
    return affine_spec(
        str(recipe.layout),
        recipe.quant_type,
        int(recipe.group_size or 0),
        symmetric=bool(recipe.symmetric),
        dtype=dtype,
        scale_dtype=recipe.scale_dtype,
    )


def affine_spec(
    layout: str, quant_type: str, group_size: int, *, symmetric: bool, dtype: str, scale_dtype: str | None
) -> AffineSpec:
    """An integer format as the container called `layout` holds it, in a model of `dtype`."""
    row = LAYOUTS[layout]
    scales = scale_dtype or row.scale_dtype or dtype
    return AffineSpec(FORMATS[quant_type].bits, group_size, symmetric, row.zero_point, scales)


def decoded_dtype(layout: str, spec: QuantSpec, dtype: str) -> str:
    """What the loaders of a container decode a matrix to, in a model of `dtype`."""
    if LAYOUTS[layout].keeps_dtype or not isinstance(spec, AffineSpec):
        return dtype
    return spec.scale_dtype


def layer_settings(recipe: Recipe, module: str, dtype: str) -> tuple[QuantSpec, LoraSpec, bool]:
    """The specification, the adapter and whether to quantize, after the overrides that match `module`."""
    spec, quantize = spec_of(recipe, dtype), True
    pooling = Pooling(recipe.pooling, int(recipe.group_size or 0)) if recipe.pooling else None
    default = LoraSpec(recipe.rank, recipe.alpha or recipe.rank, recipe.rslora, recipe.adapter_dtype, pooling)
    rank, alpha = recipe.rank, None
    for override in recipe.override:
        if re.search(override.match, module):
            quantize = quantize if override.quantize is None else override.quantize
            rank, alpha = override.rank or rank, override.alpha or alpha
            if isinstance(spec, CodebookSpec):
                codebook, block_size = override.quant_type or spec.codebook, override.block_size or spec.block_size
                spec = replace(spec, codebook=codebook, block_size=block_size)
                if override.double_quant is not None:
                    spec = replace(spec, double_quant=override.double_quant)
            else:
                bits = spec.bits if override.quant_type is None else FORMATS[override.quant_type].bits
                spec = replace(spec, bits=bits, group_size=override.group_size or spec.group_size)
    # Servers apply one scaling to the whole model, so another rank brings the alpha that keeps it.
    kept = default.scaling * (math.sqrt(rank) if recipe.rslora else rank)
    return spec, replace(default, rank=rank, alpha=kept if alpha is None else alpha), quantize


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


def pack_shards(units: Sequence[Sequence[OutTensor]], max_nbytes: int) -> tuple[Shard, ...]:
    """Files for `units` in their order, each as full as `max_nbytes` allows; the tensors of one unit stay together."""
    groups: list[list[OutTensor]] = [[]]
    filled = 0
    for unit in units:
        nbytes = sum(t.nbytes for t in unit)
        if groups[-1] and filled + nbytes > max_nbytes:
            groups.append([])
            filled = 0
        groups[-1].extend(unit)
        filled += nbytes
    if len(groups) == 1:
        return (Shard("model.safetensors", tuple(groups[0])),)
    return tuple(
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)
    )


def _unquantized_linears(copies: Sequence[CopyJob]) -> Iterator[str]:
    """Modules that a loader might take for linears to quantize: matrices, and the prefixes of experts."""
    seen = set()
    for job in copies:
        module = module_of(job.name)
        if job.reason == "expert":
            module = re.split(r"(?<=experts)(?:\.|$)", module, maxsplit=1)[0]
        elif len(job.output.shape) != 2 or not job.name.endswith(".weight"):
            continue
        if module not in seen:
            seen.add(module)
            yield module


def source_name(path: Path) -> str:
    """How a checkpoint is called in reports: its last path component, without what is no text."""
    return printable(path.name or path.resolve().name)
