"""Recipes and plans for the package: options become jobs, and jobs become numbers. No further file of the package asks
planning for a decision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loftq_cli.errors import InputError, UsageError
from loftq_cli.layouts.layout import StoredMatrix, load_layout
from loftq_cli.methods.method import SVD_MODES, Fitting, Initialization, load_method
from loftq_cli.methods.weighting import Weighting
from loftq_cli.nn.starts.option_types import check_options
from loftq_cli.planning.jobs import LayerJob
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.planner import build_plan, plan_jobs
from loftq_cli.planning.recipe import NONE, TEXT_OPTIONS, WEIGHTS, Override, Recipe, RecipeFields
from loftq_cli.planning.recipe_files import resolve_recipe
from loftq_cli.planning.settings import decoded_dtype, layer_settings, procedure_of
from loftq_cli.quant.formats import FORMATS, Cost, QuantizedTensor, Quantizer, QuantSpec
from loftq_cli.runtime.kernel_choice import is_worth_compiling
from loftq_cli.runtime.workers import SERIAL, Workers, available_threads, started
from loftq_cli.tensors.headers import MODEL_DTYPES, TensorRef
from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.metrics import delta_rows, is_finite
from loftq_cli.tensors.rows import Rows, TensorRows, slabs_of
from loftq_cli.triton_kernels.backend import has_kernels, use_compiled_kernels, use_reference_kernels

# Options without an effect in memory, and options without an effect on a single linear.
_OF_FILES = ("max_shard_size", "task", "num_labels", *TEXT_OPTIONS)
_OF_MODELS = ("calibration", *TEXT_OPTIONS, "include", "exclude", "override")

# Defaults in the signatures of `from_linear`. A method without a solver, or without random draws, has no such option.
_SIGNATURE_DEFAULTS: dict[str, Any] = {"svd": "fast", "seed": 0}


def model_recipe(source: str | Path | None, options: Mapping[str, Any]) -> Recipe:
    """The recipe of a model from a preset's name or a TOML file, and from options by keyword.

    Raises UsageError for an unknown name, a value of another type, and an option without meaning beside the rest.

    >>> model_recipe(None, {"method": "qlora", "rank": 8}).rank
    8
    """
    checked = check_options(options, RecipeFields, without=_OF_FILES)
    if overrides := checked.get("override"):
        checked["override"] = tuple(map(_override, overrides))
    return resolve_recipe(None if source is None else str(source), checked)


def layer_recipe(options: Mapping[str, Any]) -> Recipe:
    """The recipe of a single linear from options by keyword, the rank among them. Raises UsageError as `model_recipe`
    does.

    >>> layer_recipe({"rank": 8, "quant_type": "int4", "group_size": 32}).quant.group_size
    32
    """
    if options.get("rank") is None:
        raise UsageError("rank must be a whole number, not None", hint="rank=16")
    settings = {name: value for name, value in options.items() if _SIGNATURE_DEFAULTS.get(name, ...) != value}
    checked = check_options(settings, RecipeFields, without=_OF_FILES + _OF_MODELS)
    recipe = resolve_recipe(None, checked)
    # A single linear has no model that shows the inputs.
    return resolve_recipe(None, {**checked, "calibration": NONE}) if recipe.calibration == WEIGHTS else recipe


def layer_job(
    recipe: Recipe, name: str, shape: tuple[int, int], dtype: str, *, transposed: bool, is_container_named: bool
) -> LayerJob:
    """The job of a matrix called `name`, without output tensors.

    shape               [out, in]
    dtype               of the model, "bfloat16" for example
    transposed          the weight is stored [in, out]
    is_container_named  the caller chose the recipe's container

    The number format follows the recipe's container. A matrix beyond the default container gets the format of the
    recipe unchanged, because nothing is stored.
    Raises UsageError for a rank above min(out, in), for groups unfit for `in`, and for a matrix beyond the named
    container.

    >>> recipe = layer_recipe({"rank": 4})
    >>> job = layer_job(recipe, "head", (64, 128), "float32", transposed=False, is_container_named=False)
    >>> job.matrix.spec.quant_type, job.lora.rank
    ('nf4', 4)
    """
    model_dtype = dtype if dtype in MODEL_DTYPES else "float32"
    spec, lora, _ = layer_settings(recipe, name, model_dtype)
    _check_rank(lora.rank, shape, name)
    _check_groups(spec, shape, name)
    layout = recipe.layout
    fit = load_layout(layout).fit(spec, shape, transposed=transposed)
    if fit.spec is None and is_container_named:
        hint = "layout='dense' holds every matrix"
        raise UsageError(f"layout {layout} does not hold it: {fit.reason}", tensor=name or None, hint=hint)
    spec = fit.spec or spec
    matrix = StoredMatrix(name, shape, spec, decoded_dtype(layout, spec, model_dtype), transposed)
    return LayerJob(
        matrix=matrix,
        module=name,
        lora=lora,
        layout=layout,
        procedure=procedure_of(recipe),
        base_tensors=(),
        adapter_tensors=(),
        note=fit.reason,
    )


def make_plan(tensors: Mapping[str, TensorRef], config: Mapping[str, Any], recipe: Recipe) -> Plan:
    """The plan of `loftq quantize` for a checkpoint of `tensors` and `config`.

    Raises UsageError with the reasons when no tensor is quantized, and when an option does not fit a tensor.

    >>> make_plan({}, {}, model_recipe(None, {}))
    Traceback (most recent call last):
    loftq_cli.errors.UsageError: no linear to quantize among the 0 matrices of the model: ...
    """
    jobs = plan_jobs(tensors, config, recipe, modules_only=True)
    if not any(isinstance(job, LayerJob) for job in jobs):
        matrices = [job for job in jobs if not isinstance(job, LayerJob) and len(job.output.shape) == 2]
        reasons = ", ".join(f"{job.name} ({job.note or job.reason})" for job in matrices[:3])
        message = f"no linear to quantize among the {len(matrices)} matrices of the model: {reasons}"
        raise UsageError(message, hint="include=['...'] takes expressions that find the names of other linears")
    return build_plan(tensors, config, recipe, modules_only=True)


def initialize(job: LayerJob, weight: Rows, weighting: Weighting | None, workers: Workers = SERIAL) -> Initialization:
    """The base and the adapter of a job, bit for bit as `loftq quantize` writes both.

    Raises NumericError for a weight with NaN or infinite values and for a weight beyond the number format, InputError
    for factors beyond the adapter's dtype.

    >>> options = {"method": "qlora", "rank": 4}
    >>> job = layer_job(layer_recipe(options), "", (64, 64), "float32", transposed=False, is_container_named=False)
    >>> initial = initialize(job, TensorRows(torch.ones(64, 64)), None)
    >>> initial.quantized.shape, initial.lora.lora_A.shape
    ((64, 64), torch.Size([4, 64]))
    """
    quantizer = job.quantizer(weighting)
    return _finite(_initialize(job, weight, quantizer, job.procedure.fitting, weighting, workers))


@dataclass(frozen=True, slots=True)
class TrainableStart:
    """Base and adapter before training.

    weight               [out, in], the trainable full-precision matrix
    spec, dtype, scales  number format, decoded dtype and choice of constants in every pass
    lora                 the adapter of the quantization error of the matrix
    """

    weight: torch.Tensor
    spec: QuantSpec
    dtype: str
    scales: str
    lora: LoraPair


def initialize_trainable(
    job: LayerJob, weight: TensorRows, weighting: Weighting | None, workers: Workers = SERIAL
) -> TrainableStart:
    """The last alternation of a job, and the matrix P quantized by the last alternation: P = W − γ·s·B·A by the adapter
    of the alternation before and γ = 1 − keep_base, Q = quantize(P), and the adapter of W − dequant(Q). A single
    alternation and a method without alternations quantize P = W.

    Rounds of refinement happen before the last alternation: refined codes are not the codes of any matrix.
    Raises NumericError and InputError like `initialize`.

    >>> options = {"rank": 4, "iterations": 1}
    >>> job = layer_job(layer_recipe(options), "", (64, 64), "float32", transposed=False, is_container_named=False)
    >>> initialize_trainable(job, TensorRows(torch.ones(64, 64)), None).weight.shape
    torch.Size([64, 64])
    """
    quantizer, fitting = job.quantizer(weighting), job.procedure.fitting
    all_but_last = replace(fitting, iterations=max(fitting.iterations - 1, 1))
    initial = _initialize(job, weight, quantizer, all_but_last, weighting, workers)
    dtype = weight.tensor.dtype
    target = weight.rows(slice(0, weight.shape[0])).clone().to(dtype)
    if fitting.iterations > 1 or not initial.iteration_errors:
        delta = delta_rows(replace(initial.lora, scaling=fitting.adapter_share * initial.lora.scaling))
        for part in slabs_of(weight):
            target[part] = (weight.rows(part).float() - delta(part)).to(dtype)
    quantized = quantizer.quantize(TensorRows(target), workers=workers)
    single = Fitting(iterations=1, svd=fitting.svd, init=fitting.init)
    fitted = _finite(_initialize(job, weight, _AlreadyQuantized(quantizer, quantized), single, weighting, workers))
    return TrainableStart(target, job.matrix.spec, job.matrix.dtype, job.procedure.scales, fitted.lora)


@contextmanager
def computing(work: int, threads: int | None = None) -> Iterator[Workers]:
    """Workers for `work` weights times passes, and compiled kernels when `work` is worth loading the compiler.

    `threads` of None is the number of available processors. The end of the block restores torch's threads and kernels.
    Raises UsageError for `threads` below 1.

    >>> with computing(work=1, threads=2) as workers:
    ...     list(workers.map(abs, [-1, 2]))
    [1, 2]
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads}")
    compiles = is_worth_compiling(work) and not has_kernels("codebook", "cpu")
    try:
        if compiles:
            use_compiled_kernels()
        with started(threads or available_threads()) as workers:
            yield workers
    finally:
        if compiles:
            use_reference_kernels()


def check_solver(svd: str) -> None:
    """Raises UsageError for an unknown low-rank solver.

    >>> check_solver("exact")
    """
    if svd not in SVD_MODES:
        raise UsageError(f"svd {svd!r} does not exist", hint=f"one of {', '.join(SVD_MODES)}")


def count_work(job: LayerJob) -> int:
    """Weights of the matrix times alternations.

    >>> recipe = layer_recipe({"rank": 4, "fit": "loftq", "iterations": 5})
    >>> count_work(layer_job(recipe, "", (64, 64), "float32", transposed=False, is_container_named=False))
    20480
    """
    return job.numel * job.procedure.fitting.iterations


@dataclass(frozen=True, slots=True)
class _AlreadyQuantized:
    """A quantizer with `quantized` as the answer for every matrix; `quantizer` does everything else."""

    quantizer: Quantizer
    quantized: QuantizedTensor

    def quantize(self, weight: Rows, **_: Any) -> QuantizedTensor:
        del weight
        return self.quantized

    def refine(self, weight: Rows, quantized: Any, cost: Cost, **_: Any) -> None:
        del weight, quantized, cost

    def residual(self, weight: Rows, quantized: Any, out: torch.Tensor, *, workers: Workers = SERIAL) -> float:
        return self.quantizer.residual(weight, quantized, out, workers=workers)

    def keep_nearer(self, weight: Rows, minus: Any, previous: Any, new: Any, **_: Any) -> bool:
        del weight, minus, previous, new
        return False

    def decoded(self, quantized: Any, codes: Any = None) -> Rows:
        return self.quantizer.decoded(quantized, codes)

    def dequantize(self, quantized: Any) -> torch.Tensor:
        return self.quantizer.dequantize(quantized)


def _initialize(
    job: LayerJob,
    weight: Rows,
    quantizer: Quantizer,
    fitting: Fitting,
    weighting: Weighting | None,
    workers: Workers,
) -> Initialization:
    return load_method(job.procedure.method)(
        weight,
        quantizer,
        job.lora,
        fitting,
        generator=job.generator(),
        weighting=weighting,
        workers=workers,
    )


def _finite(initial: Initialization) -> Initialization:
    for factor in (initial.lora.lora_A, initial.lora.lora_B):
        if not is_finite(factor):
            dtype = str(factor.dtype).removeprefix("torch.")
            message = f"the adapter would not be finite in {dtype}"
            raise InputError(message, hint="adapter_dtype='float32' holds more")
    return initial


def _check_rank(rank: int, shape: tuple[int, int], name: str) -> None:
    if rank > min(shape):
        message = f"rank {rank} is more than the matrix has ({shape[0]} by {shape[1]})"
        raise UsageError(message, tensor=name or None, hint=f"rank={min(shape)} or less")


def _check_groups(spec: QuantSpec, shape: tuple[int, int], name: str) -> None:
    group_size = spec.group_size_or_none
    if group_size is None or shape[1] % group_size == 0:
        return
    sizes = [size for size in FORMATS[spec.quant_type].group_sizes if shape[1] % size == 0]
    hint = f"group_size={sizes[-1]} divides them" if sizes else "a codebook, as quant_type='nf4', needs no whole groups"
    raise UsageError(f"rows of {shape[1]} are not whole groups of {group_size}", tensor=name or None, hint=hint)


def _override(entry: Any) -> Override:
    if isinstance(entry, Override):
        return entry
    if not isinstance(entry, Mapping) or "match" not in entry:
        raise UsageError("an override has no match", hint="override=[{'match': 'down_proj', 'rank': 32}]")
    return Override(**check_options(entry, Override))
