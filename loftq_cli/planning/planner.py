"""Headers and a recipe become a plan, or an error naming the tensor and the option. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loftq_cli.adapter import config as adapter_config
from loftq_cli.adapter import library_adapter
from loftq_cli.adapter.expert_factors import DOWN, AdaptedParameter, parameter_tensor_names
from loftq_cli.checkpoint.patterns import finds
from loftq_cli.errors import UsageError
from loftq_cli.layouts.fused import fused_modules
from loftq_cli.layouts.layout import DENSE_HINT, LAYOUTS, StoredMatrix
from loftq_cli.model.experts import ExpertGroup
from loftq_cli.model.family import Family
from loftq_cli.model.foreign import check_merged, check_read
from loftq_cli.model.skipping import join_skipped
from loftq_cli.model.stored import check_names
from loftq_cli.model.targets import Target, choose_targets, module_of
from loftq_cli.model.task_heads import TaskHead, head_of_task
from loftq_cli.planning.format_options import check_library
from loftq_cli.planning.jobs import CopyJob, ExpertMatrix, LayerJob, QuantizableMatrix, pack_shards
from loftq_cli.planning.matrices import ExpertChoice, MatrixPlanner, choose_experts, model_dtype
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.recipe import AffineOptions, Recipe
from loftq_cli.planning.settings import decoded_dtype, layer_settings, procedure_of, spec_of
from loftq_cli.quant.formats import QuantSpec
from loftq_cli.tensors.headers import OutTensor, TensorRef, config_file_beside


def build_plan(
    tensors: Mapping[str, TensorRef],
    config: Mapping[str, Any],
    recipe: Recipe,
    *,
    modules_only: bool = False,
    part: str = "",
) -> Plan:
    """Build the plan of a conversion from headers alone.

    tensors        the headers of the original
    config         the content of config.json; empty for a checkpoint without a config
    recipe         the settled options
    modules_only   whether to quantize linears whose adapter is one of a module, and no experts: for a model in memory
    part           the folder of the model inside a pipeline, with a slash at the end; empty for a model folder

    Raises UsageError when an option does not fit a tensor, when a tensor has the name of a part of a quantized weight,
    when no weight remains to quantize, and for a model that the container's loaders do not read; UnreadFormat for
    quantized weights; InputError for a config with a value of the wrong type.

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
    check_merged(tensors)
    check_read(tensors)
    check_library(recipe.layout, family.library)
    dtype, planner, jobs = _plan_tensors(tensors, family, recipe, modules_only=modules_only)
    if planner.layout.row.stores_codes and not family.loads_in_4_bit() and not _are_experts_modules(jobs):
        raise UsageError(f"transformers cannot load {family.model_type} from quantized tensors", hint=DENSE_HINT)
    if not any(isinstance(job, LayerJob) for job in jobs):
        file = _place_of(tensors)
        if planner.unfit is not None:
            raise UsageError(f"no weight to quantize: {planner.unfit.reason}", file=file, hint=planner.unfit.hint)
        hint = "loftq inspect shows every tensor and why it is left alone"
        raise UsageError("no weight to quantize", file=file, hint=hint)
    _check_overrides(recipe, jobs)
    stored = [name for job in jobs if isinstance(job, LayerJob) for name in job.stored_names]
    check_names(planner.layout, stored, [*stored, *(job.name for job in jobs if isinstance(job, CopyJob))])
    _check_expert_formats(recipe, jobs)
    notes = [*planner.notes, *_summarize_copies(jobs, planner), *_note_fused_layers(recipe, jobs)]
    stem = f"{part}{family.library.weights}"
    shards = pack_shards([job.base_tensors for job in jobs], recipe.max_shard_nbytes, stem)
    sources = {} if head is None else _head_sources(tensors, family, head)
    notes += [] if head is None else _note_head(head, sources)
    plan = Plan(recipe, family, dtype, tuple(jobs), shards, tuple(notes), head, sources, part)
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
    if not head.tensors or (row.libraries and (pooling is None or (row.peft_pools and pooling.convention == "peft"))):
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


def plan_jobs(
    tensors: Mapping[str, TensorRef], config: Mapping[str, Any], recipe: Recipe, *, modules_only: bool = False
) -> list[LayerJob | CopyJob]:
    """Plan the jobs of `build_plan`, also for a checkpoint without weights to quantize.

    Parameters as in `build_plan`. Raises UsageError when an option does not fit a tensor; InputError for a config with
    a value of the wrong type.

    >>> from loftq_cli.planning.settle import make_recipe
    >>> plan_jobs({}, {}, make_recipe(rank=8))
    []
    """
    family = Family(config, config_file_beside(tensors.values()))
    return _plan_tensors(tensors, family, recipe, modules_only=modules_only)[2]


def _are_experts_modules(jobs: Sequence[LayerJob | CopyJob]) -> bool:
    """Whether a loader makes modules of all experts."""
    layers = [job for job in jobs if isinstance(job, LayerJob) and job.experts]
    kept = any(isinstance(job, CopyJob) and job.reason == "expert" and len(job.output.shape) == 3 for job in jobs)
    return bool(layers) and not any(job.is_parameter for job in layers) and not kept


def _plan_tensors(
    tensors: Mapping[str, TensorRef], family: Family, recipe: Recipe, *, modules_only: bool
) -> tuple[str, MatrixPlanner, list[LayerJob | CopyJob]]:
    """Return the dtype of the stored model, the planner with notes, and the jobs."""
    choice = ExpertChoice() if modules_only else choose_experts(tensors, family, recipe)
    by_parameter = bool(LAYOUTS[recipe.layout].experts) and recipe.pooling is None and not modules_only
    targets = choose_targets(
        tensors, family, recipe.include, recipe.exclude, choice.tensors, moves_adapters=by_parameter
    )
    notes: list[str] = []
    if LAYOUTS[recipe.layout].stores_codes:
        targets, notes = join_skipped(targets, tensors, family)
    dtype = _choose_stored_dtype(recipe, model_dtype(tensors, targets, family))
    planner = _make_matrix_planner(tensors, family, recipe, dtype)
    planner.notes += notes
    planner.expert_reason = choice.reason
    experts, kept = _plan_experts(recipe, planner, dtype, choice.groups, targets), choice.tensors | choice.others
    jobs: list[LayerJob | CopyJob] = []
    for name, ref in tensors.items():
        if name in experts:
            # A group stands at the place of its first tensor.
            jobs += [job for job in experts[name] if job.experts[0].parts[0].tensor == name]
            continue
        unit = planner.copy(ref, "expert") if name in kept else planner.plan(ref, targets[name])
        jobs += [] if unit is None else [_make_job(recipe, planner, dtype, ref, unit)]
    return dtype, planner, jobs


def _plan_experts(
    recipe: Recipe,
    planner: MatrixPlanner,
    dtype: str,
    groups: Sequence[ExpertGroup],
    targets: Mapping[str, Target],
) -> dict[str, list[LayerJob]]:
    """Plan the experts of each layer. Returns tensor of the original -> jobs that read the tensor. Experts of which
    some are excluded stay as they are, all of them: loaders have no place for both kinds in one parameter.
    """
    chosen: list[tuple[ExpertGroup, tuple[ExpertMatrix, ...]]] = []
    for group in groups:
        if not all(targets[name].quantize for name in group.tensors):
            planner.expert_reason = "some experts of a layer are excluded"
            continue
        matrices = planner.plan_experts(group)
        if isinstance(matrices, str):
            planner.expert_reason = matrices
        else:
            chosen.append((group, matrices))
    parameters = sorted((group.name for group, _ in chosen if not group.modules), key=_is_last)
    names = parameter_tensor_names(parameters)
    jobs: dict[str, list[LayerJob]] = {}
    for group, matrices in chosen:
        job = _make_expert_job(recipe, planner, dtype, group, matrices, names.get(group.name))
        for name in group.tensors:
            jobs.setdefault(name, []).append(job)
    return jobs


def _is_last(parameter: str) -> bool:
    """Whether a parameter stands behind the others of its class: transformers' classes declare down_proj last."""
    return parameter.endswith(DOWN)


def _make_expert_job(
    recipe: Recipe,
    planner: MatrixPlanner,
    dtype: str,
    group: ExpertGroup,
    matrices: tuple[ExpertMatrix, ...],
    names: tuple[str, str] | None,
) -> LayerJob:
    """Make the job of the experts of a layer; `names` are those of the joined lora_A and lora_B, None for modules."""
    first, shape = group.experts[0][0], group.shape
    modules = {module_of(part.stored or part.tensor): part for parts in group.experts for part in parts}
    settings = {module: layer_settings(recipe, module, dtype) for module in modules}
    module, (spec, lora, _) = next(iter(settings.items()))
    uneven = next((name for name, (_, other, _) in settings.items() if other != lora), None)
    if uneven is not None and not group.modules:
        message = "the experts of a layer have adapters of one rank, and an override has another"
        raise UsageError(message, tensor=modules[uneven].tensor, hint="match all experts of the layer")
    _check_rank(lora.rank, shape, first.tensor, module)
    adapted = [adapter_config.AdaptedModule(name, shape, lora) for name in group.modules]
    adapter_tensors = tuple(tensor for module in adapted for tensor in adapter_config.planned(module))
    if names is not None:
        peft_shape = shape[::-1] if group.is_turned else shape
        shapes = AdaptedParameter(group.name, (len(matrices), *peft_shape)).factor_shapes(lora.rank)
        adapter_tensors = tuple(OutTensor(n, lora.dtype, s) for n, s in zip(names, shapes, strict=True))
    stored_dtype = decoded_dtype(recipe.layout, spec, dtype)
    return LayerJob(
        matrix=StoredMatrix(group.name, shape, spec, stored_dtype, transposed=False),
        module=group.name,
        lora=lora,
        layout=recipe.layout,
        procedure=procedure_of(recipe),
        base_tensors=_plan_expert_tensors(planner, matrices, stored_dtype),
        adapter_tensors=adapter_tensors,
        note=None,
        experts=matrices,
        is_parameter=not group.modules,
        is_turned=group.is_turned,
    )


def _plan_expert_tensors(
    planner: MatrixPlanner, matrices: Sequence[ExpertMatrix], stored_dtype: str
) -> tuple[OutTensor, ...]:
    """Plan the tensors of experts in the base: those of each part, or the tensor of all experts of the original."""
    stored = [matrix for expert in matrices for matrix in expert.stored]
    if stored:
        return tuple(tensor for matrix in stored for tensor in planner.layout.planned(matrix))
    ref = planner.tensors[matrices[0].parts[0].tensor]
    return (OutTensor(ref.name, stored_dtype, ref.shape),)


def _check_rank(rank: int, shape: tuple[int, int], tensor: str, module: str) -> None:
    """Raises UsageError for a rank above the smaller side of a matrix of `shape`."""
    # A pooled adapter may have more rank than an input has groups: PEFT trains adapters of higher rank.
    if rank > min(shape):
        raise UsageError(
            f"rank {rank} is more than the matrix has ({shape[0]} by {shape[1]})",
            tensor=tensor,
            hint=f"--rank {min(shape)}, an [[override]] with a smaller rank, or --exclude '{module}'",
        )


def _choose_stored_dtype(recipe: Recipe, dtype: str) -> str:
    """Choose the dtype of the stored model: the dtype of the scales for loaders of a single dtype, else `dtype`."""
    if LAYOUTS[recipe.layout].one_dtype and isinstance(recipe.quant, AffineOptions):
        return recipe.quant.scale_dtype or dtype
    return dtype


def _make_matrix_planner(tensors: Mapping[str, TensorRef], family: Family, recipe: Recipe, dtype: str) -> MatrixPlanner:
    def spec_for(module: str) -> QuantSpec | None:
        spec, _, is_quantized = layer_settings(recipe, module, dtype)
        return spec if is_quantized else None

    return MatrixPlanner(family, recipe.layout, dtype, tensors, spec_of(recipe.quant, recipe.layout, dtype), spec_for)


def _make_job(
    recipe: Recipe,
    planner: MatrixPlanner,
    dtype: str,
    ref: TensorRef,
    unit: QuantizableMatrix | CopyJob,
) -> LayerJob | CopyJob:
    """Make the job of a tensor. Raises UsageError for a rank above the smaller side of the matrix."""
    if isinstance(unit, CopyJob):
        return unit
    module, shape = module_of(ref.name), unit.matrix.shape
    _, lora, _ = layer_settings(recipe, module, dtype)
    _check_rank(lora.rank, shape, ref.name, module)
    adapted = adapter_config.AdaptedModule(unit.module, shape, lora)
    is_own = planner.family.library.adapter_weights is not None and lora.pooling is None
    return LayerJob(
        matrix=unit.matrix,
        module=unit.module,
        lora=lora,
        layout=recipe.layout,
        procedure=procedure_of(recipe),
        base_tensors=planner.layout.planned(unit.matrix),
        adapter_tensors=adapter_config.planned(adapted),
        note=unit.note,
        is_parameter=planner.family.moves_adapter(module),
        library_tensors=library_adapter.planned(adapted, planner.family) if is_own else (),
    )


def _check_overrides(recipe: Recipe, jobs: Sequence[LayerJob | CopyJob]) -> None:
    for override in recipe.override:
        if not any(finds(override.match, module_of(name)) for job in jobs for name in _names_in_files(job)):
            raise UsageError(f"the override {override.match!r} matches no module", hint="loftq inspect lists the names")


def _names_in_files(job: LayerJob | CopyJob) -> tuple[str, ...]:
    return job.stored_names if isinstance(job, LayerJob) else (job.name,)


def _check_expert_formats(recipe: Recipe, jobs: Sequence[LayerJob | CopyJob]) -> None:
    """Raises UsageError for packed experts in a model of several formats: such a model is decoded after loading, and
    experts are decoded while loading.
    """
    layers = [job for job in jobs if isinstance(job, LayerJob)]
    experts = next((job for job in layers if job.experts), None)
    if experts is not None and LAYOUTS[recipe.layout].stores_codes and len({job.matrix.spec for job in layers}) > 1:
        message = "loaders decode the experts of a model by one format, and an override has another"
        raise UsageError(message, tensor=experts.sources[0], hint="one quant_type and group_size for all layers")


def _summarize_copies(jobs: Sequence[LayerJob | CopyJob], planner: MatrixPlanner) -> Iterator[str]:
    experts = [job for job in jobs if isinstance(job, CopyJob) and job.reason == "expert"]
    if any(len(job.output.shape) == 3 or job.name.endswith(".weight") for job in experts):
        nbytes = sum(job.output.nbytes for job in experts)
        yield (f"{len(experts)} expert tensors ({nbytes / 1e6:.1f} MB) stay in full precision: {planner.expert_reason}")
    recast = planner.recast
    unadapted = [job for job in jobs if isinstance(job, CopyJob) and job.reason == "no adapter"]
    if unadapted:
        yield f"{len(unadapted)} linear layers stay in full precision: PEFT takes no adapter on them in this family"
    modulation = [job for job in jobs if isinstance(job, CopyJob) and job.reason == "modulation"]
    if modulation:
        yield (
            f"{len(modulation)} modulation layers stay in full precision, since their numbers scale whole blocks "
            f"(--include with a name chooses them); the first is {modulation[0].name}"
        )
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
