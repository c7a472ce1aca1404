"""Headers and a recipe become a plan, or an error naming the tensor and the option. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loftq_cli.adapter import config as adapter_config
from loftq_cli.checkpoint.patterns import finds
from loftq_cli.errors import UsageError
from loftq_cli.layouts.layout import DENSE_HINT, LAYOUTS, fused_modules
from loftq_cli.model.family import Family
from loftq_cli.model.stored import check_names
from loftq_cli.model.targets import choose_targets, module_of
from loftq_cli.model.task_heads import TaskHead, head_of_task
from loftq_cli.planning.jobs import CopyJob, LayerJob, QuantizableMatrix, pack_shards
from loftq_cli.planning.matrices import MatrixPlanner, model_dtype
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.recipe import AffineOptions, Recipe
from loftq_cli.planning.settings import layer_settings, procedure_of, spec_of
from loftq_cli.quant.formats import QuantSpec
from loftq_cli.tensors.headers import TensorRef, config_file_beside


def build_plan(tensors: Mapping[str, TensorRef], config: Mapping[str, Any], recipe: Recipe) -> Plan:
    """Build the plan of a conversion from headers alone.

    tensors   the headers of the original
    config    the content of config.json; empty for a checkpoint without a config
    recipe    the settled options

    Raises UsageError when an option does not fit a tensor, when a tensor has the name of a part of a quantized weight,
    when no weight remains to quantize, and for a model that the container's loaders do not read; InputError for a
    config with a value of the wrong type.

    >>> from loftq_cli.checkpoint.source import open_checkpoint
    >>> from loftq_cli.model.builtin import resolve_model
    >>> from loftq_cli.planning.settle import make_recipe
    >>> checkpoint = open_checkpoint(resolve_model("builtin:tiny-llama"))
    >>> plan = build_plan(checkpoint.tensors, checkpoint.config(), make_recipe(rank=8))
    >>> len(plan.layers), [shard.file for shard in plan.shards]
    (28, ['model.safetensors'])
    """
    family = Family(config, config_file_beside(tensors.values()))
    head = _choose_head(config, recipe)
    family = family if head is None else Family(head.change(config), family.file)
    dtype, planner, jobs = _plan_tensors(tensors, family, recipe)
    if planner.layout.row.stores_codes and not family.loads_in_4_bit():
        raise UsageError(f"transformers cannot load {family.model_type} from quantized tensors", hint=DENSE_HINT)
    if not any(isinstance(job, LayerJob) for job in jobs):
        file = _place_of(tensors)
        if planner.unfit is not None:
            raise UsageError(f"no weight to quantize: {planner.unfit.reason}", file=file, hint=planner.unfit.hint)
        hint = "loftq inspect shows every tensor and why it is left alone"
        raise UsageError("no weight to quantize", file=file, hint=hint)
    _check_overrides(recipe, jobs)
    check_names(planner.layout, [job.name for job in jobs if isinstance(job, LayerJob)], [job.name for job in jobs])
    notes = [*planner.notes, *_summarize_copies(jobs, planner.recast), *_note_fused_layers(recipe, jobs)]
    shards = pack_shards([job.base_tensors for job in jobs], recipe.max_shard_nbytes)
    sources = {} if head is None else _head_sources(tensors, family, head)
    notes += [] if head is None else _note_head(head, sources)
    plan = Plan(recipe, family, dtype, tuple(jobs), shards, tuple(notes), head, sources)
    plan.model_config(config)  # raises for a model that the container's loaders do not read
    return plan


def _choose_head(config: Mapping[str, Any], recipe: Recipe) -> TaskHead | None:
    """The head of the recipe's task; None without a task.

    Raises UsageError for labels without a task, and for a base on which PEFT does not train: `loftq_cli.nn` trains
    factors and no head.
    """
    if recipe.task is None:
        if recipe.num_labels is not None:
            raise UsageError("--num-labels is for --task SEQ_CLS and TOKEN_CLS", hint="leave --num-labels out")
        return None
    head, row, pooling = head_of_task(config, recipe.task, recipe.num_labels), LAYOUTS[recipe.layout], recipe.pooling
    if not head.tensors or (
        row.in_transformers and (pooling is None or (row.peft_pools and pooling.convention == "peft"))
    ):
        return head
    kind = f"--layout {recipe.layout}" if pooling is None else f"pooled inputs on --layout {recipe.layout}"
    message = f"--task {recipe.task} needs PEFT, which trains the head, and PEFT does not train on {kind}"
    raise UsageError(message, hint=DENSE_HINT if pooling is None else "--method loftq")


def _head_sources(tensors: Mapping[str, TensorRef], family: Family, head: TaskHead) -> dict[str, str]:
    """Tensor of the head -> the original's tensor of the same name in the loaded model, and of the same shape."""
    modules = [module_of(name) for name in tensors]
    loaded = {family.loaded_name(name, modules): name for name in tensors}
    places = {name: loaded.get(name) for name in head.tensors}
    return {name: place for name, place in places.items() if place and tensors[place].shape == head.tensors[name]}


def _note_head(head: TaskHead, sources: Mapping[str, str]) -> list[str]:
    if not head.tensors:
        return []
    labels = "" if head.labels is None else f", {head.labels} label{'s' if head.labels != 1 else ''}"
    kind = "the model's own" if sources else "new"
    return [f"task {head.task}: {', '.join(head.modules)} trains in full in the adapter ({kind}{labels})"]


def _place_of(tensors: Mapping[str, TensorRef]) -> Path | None:
    """The file of all tensors, or the folder of the files; None without a tensor."""
    files = {ref.file for ref in tensors.values()}
    return next(iter(files), None) if len(files) < 2 else min(files).parent


def plan_jobs(tensors: Mapping[str, TensorRef], config: Mapping[str, Any], recipe: Recipe) -> list[LayerJob | CopyJob]:
    """Plan the jobs of `build_plan`, also for a checkpoint without weights to quantize.

    Parameters as in `build_plan`. Raises UsageError when an option does not fit a tensor; InputError for a config with
    a value of the wrong type.

    >>> from loftq_cli.planning.settle import make_recipe
    >>> plan_jobs({}, {}, make_recipe(rank=8))
    []
    """
    return _plan_tensors(tensors, Family(config, config_file_beside(tensors.values())), recipe)[2]


def _plan_tensors(
    tensors: Mapping[str, TensorRef], family: Family, recipe: Recipe
) -> tuple[str, MatrixPlanner, list[LayerJob | CopyJob]]:
    """Return the dtype of the stored model, the planner with notes, and the jobs."""
    targets = choose_targets(tensors, family, recipe.include, recipe.exclude)
    dtype = _choose_stored_dtype(recipe, model_dtype(tensors, targets, family))
    planner = _make_matrix_planner(tensors, family, recipe, dtype)
    units = ((ref, planner.plan(ref, targets[name])) for name, ref in tensors.items())
    return dtype, planner, [_make_job(recipe, planner, dtype, ref, unit) for ref, unit in units if unit is not None]


def _choose_stored_dtype(recipe: Recipe, dtype: str) -> str:
    """Choose the dtype of the stored model: the dtype of the scales for loaders of a single dtype, else `dtype`."""
    if LAYOUTS[recipe.layout].one_dtype and isinstance(recipe.quant, AffineOptions):
        return recipe.quant.scale_dtype or dtype
    return dtype


def _make_matrix_planner(tensors: Mapping[str, TensorRef], family: Family, recipe: Recipe, dtype: str) -> MatrixPlanner:
    def spec_for(module: str) -> QuantSpec | None:
        spec, _, is_quantized = layer_settings(recipe, module, dtype)
        return spec if is_quantized else None

    modules = [module_of(name) for name in tensors]
    return MatrixPlanner(family, recipe.layout, dtype, modules, spec_of(recipe.quant, recipe.layout, dtype), spec_for)


def _make_job(
    recipe: Recipe, planner: MatrixPlanner, dtype: str, ref: TensorRef, unit: QuantizableMatrix | CopyJob
) -> LayerJob | CopyJob:
    """Make the job of a tensor. Raises UsageError for a rank above the smaller side of the matrix."""
    if isinstance(unit, CopyJob):
        return unit
    module, shape = module_of(ref.name), unit.matrix.shape
    _, lora, _ = layer_settings(recipe, module, dtype)
    # A pooled adapter may have more rank than an input has groups: PEFT trains adapters of higher rank.
    if lora.rank > min(shape):
        raise UsageError(
            f"rank {lora.rank} is more than the matrix has ({shape[0]} by {shape[1]})",
            tensor=ref.name,
            hint=f"--rank {min(shape)}, an [[override]] with a smaller rank, or --exclude '{module}'",
        )
    return LayerJob(
        matrix=unit.matrix,
        module=unit.module,
        lora=lora,
        layout=recipe.layout,
        procedure=procedure_of(recipe),
        base_tensors=planner.layout.planned(unit.matrix),
        adapter_tensors=adapter_config.planned(adapter_config.AdaptedModule(unit.module, shape, lora)),
        note=unit.note,
    )


def _check_overrides(recipe: Recipe, jobs: Sequence[LayerJob | CopyJob]) -> None:
    for override in recipe.override:
        if not any(finds(override.match, module_of(job.name)) for job in jobs):
            raise UsageError(f"the override {override.match!r} matches no module", hint="loftq inspect lists the names")


def _summarize_copies(jobs: Sequence[LayerJob | CopyJob], recast: int) -> Iterator[str]:
    experts = [job for job in jobs if isinstance(job, CopyJob) and job.reason == "expert"]
    if experts:
        nbytes = sum(job.output.nbytes for job in experts)
        yield (
            f"{len(experts)} expert tensors ({nbytes / 1e6:.1f} MB) stay in full precision: loaders fuse experts into "
            "one parameter that the container does not hold"
        )
    unadapted = [job for job in jobs if isinstance(job, CopyJob) and job.reason == "no adapter"]
    if unadapted:
        yield f"{len(unadapted)} linear layers stay in full precision: PEFT takes no adapter on them in this family"
    converted = [job for job in jobs if isinstance(job, CopyJob) and job.reason == "converted at load"]
    if converted:
        yield (
            f"{len(converted)} matrices stay in full precision: transformers splits or merges them while loading, and "
            f"packed codes cannot be; the first is {converted[0].name}"
        )
    complex_names = [job.name for job in jobs if isinstance(job, CopyJob) and job.output.dtype.startswith("complex")]
    if complex_names:
        others = f" and {len(complex_names) - 1} others" if len(complex_names) > 1 else ""
        yield f"complex numbers are copied as they are: {complex_names[0]}{others}"
    if recast:
        yield f"{recast} copied weights are converted to the model's dtype"
    yield from (f"{job.name}: {job.note}" for job in jobs if job.note)


def _note_fused_layers(recipe: Recipe, jobs: Sequence[LayerJob | CopyJob]) -> Iterator[str]:
    """Yield a note about layers of different formats that vLLM fuses into a matrix. Loaders without fused layers read
    the model, so the plan is no error.
    """
    layout = recipe.layout
    specs = {module_of(job.name): job.matrix.spec if isinstance(job, LayerJob) else None for job in jobs}
    uneven = [group for group in fused_modules(layout, specs) if len({specs[module] for module in group}) > 1]
    if uneven:
        parent = uneven[0][0].rpartition(".")[0]
        names = ", ".join(module.rpartition(".")[2] for module in uneven[0])
        first = f" (the first of {len(uneven)})" if len(uneven) > 1 else ""
        yield f"vLLM makes one matrix of {names} of {parent}, which do not have the one format that it needs{first}"
