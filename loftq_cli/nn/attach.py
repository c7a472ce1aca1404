"""All linears of a loaded model become quantized linears with adapters, in place. Planning decides about each linear:
the names, shapes and config of the model are planned like a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from loftq_cli.activations.weight_statistics import measure_weights
from loftq_cli.checkpoint.statistics import InputStatistics, Statistics, open_statistics
from loftq_cli.errors import InputError, MismatchError, UsageError
from loftq_cli.methods.weighting import Weighting, make_weighting
from loftq_cli.model.targets import module_of
from loftq_cli.nn.adapted_linear import AdaptedLinear, Origin
from loftq_cli.nn.adapted_model import adapted_class
from loftq_cli.nn.starts.layer_jobs import computing, make_plan, model_recipe
from loftq_cli.nn.starts.linear_start import check_linear, make_start
from loftq_cli.nn.starts.option_types import python_remedies
from loftq_cli.planning.jobs import LayerJob
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.recipe import WEIGHTS, Recipe
from loftq_cli.runtime.workers import Workers
from loftq_cli.tensors.headers import TensorRef

Model = TypeVar("Model", bound=nn.Module)

_WEIGHTS = Path("the model")  # the file of a TensorRef, for messages


def attach(
    model: Model,
    recipe: str | Path | None = None,
    *,
    freeze_base: bool = True,
    cache: bool = False,
    threads: int | None = None,
    **options: Any,
) -> Model:
    """Make every linear of `model` a LoftQLinear, QLoRALinear or QALoRALinear, if `loftq quantize` would quantize the
    linear, in place and with equal numbers. Returns `model`. A single matrix at a time is in memory beside the model.

    model        a loaded model of transformers in the dtype of the checkpoint, or any nn.Module with full-precision
                 linears: a model without a config of transformers has the linears of numbered blocks and the finds of
                 `include` quantized
    recipe       the name of a preset, or the path of a TOML file
    options      fields of a recipe, named as the command line's options: method, quant_type, rank, alpha, fit, include,
                 exclude, calibration, seed, ...; `override` is a list of mappings with a `match`
    freeze_base  False trains the full-precision weights and the biases of the linears too
    cache        each base keeps the decoded weight
    threads      the number of available processors by default; the numbers do not depend on the threads

    The rest of the model is frozen. A layer keeps device, mode and dtype. Random draws depend on the tensor names of
    the loaded model, and transformers renames tensors of some older checkpoints while loading.

    Raises UsageError for an unknown or unfit option, a model with adapters or without memory, and a planned weight of
    another module than a linear; InputError for NaN or infinite weights and for a quantized model; MismatchError for a
    calibration of another model. The model has not changed when an error of the list comes. NumericError for a weight
    beyond the number format comes between two layers.

    >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    >>> attach(model, method="qlora", rank=4, include=["0", "2"])
    Sequential(
      (0): QLoRALinear(
        rank=4, scaling=1
        (base_layer): QuantizedLinear(in_features=64, out_features=128, bias=True, nf4, block 64)
      )
      (1): ReLU()
      (2): QLoRALinear(
        rank=4, scaling=1
        (base_layer): QuantizedLinear(in_features=128, out_features=32, bias=True, nf4, block 64)
      )
    )
    """
    if cache and not freeze_base:
        message = "cache means nothing with freeze_base=False: weights change with every step"
        raise UsageError(message, hint="leave cache out")
    with python_remedies():
        _attach(model, model_recipe(recipe, options), freeze_base=freeze_base, cache=cache, threads=threads)
    return model


def _attach(model: nn.Module, settled: Recipe, *, freeze_base: bool, cache: bool, threads: int | None) -> None:
    _check_model(model)
    plan = make_plan(_headers(model), _config_of(model), settled)
    targets = list(_targets(model, plan))
    origin = Origin(None, plan.adapter_config(""), None)
    with computing(plan.work, threads) as workers:
        statistics = _statistics(model, settled.calibration, plan, workers)
        model.requires_grad_(False)
        for target in targets:
            weighting = _weighting(statistics, target.job)
            start = make_start(
                target.linear,
                target.job,
                workers,
                freeze_base=freeze_base,
                cache=cache,
                weighting=weighting,
            )
            layer = adapted_class(settled.method, target.job.lora).of_start(start, target.linear, origin)
            target.replace(layer)


@dataclass(slots=True)
class _Target:
    """A linear of the model, the job of the linear, and all parent modules with the attribute name of the linear."""

    job: LayerJob
    linear: nn.Module
    places: list[tuple[nn.Module, str]]

    def replace(self, layer: AdaptedLinear) -> None:
        """Put `layer` into every place, and let the linear and the dense weight go."""
        for parent, name in self.places:
            setattr(parent, name, layer)
        self.linear = layer


def _check_model(model: nn.Module) -> None:
    if isinstance(model, nn.Linear):
        raise UsageError("the model is a single linear", hint="LoftQLinear.from_linear adapts one linear")
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear) or (hasattr(module, "base_layer") and hasattr(module, "lora_A")):
            hint = "merge or unload the adapters, or load the model anew"
            raise UsageError(f"{name or 'the model'} has an adapter already", hint=hint)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            hint = "give the model memory first, as with to_empty and load_state_dict"
            raise UsageError("is on the meta device", tensor=name, hint=hint)


def _headers(model: nn.Module) -> dict[str, TensorRef]:
    """The tensors of the model like the headers of a checkpoint."""
    refs: dict[str, TensorRef] = {}
    owners: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and not nn.parameter.is_lazy(tensor):
            dtype, owner = str(tensor.dtype).removeprefix("torch."), owners.setdefault(id(tensor), name)
            refs[name] = TensorRef(name, dtype, tuple(tensor.shape), _WEIGHTS, None if owner == name else owner)
    return refs


def _config_of(model: nn.Module) -> dict[str, Any]:
    """The config of a model of transformers like config.json, for the class of `model`; empty for a plain nn.Module.

    The config names no dtype: a loaded model computes in the dtype of the weights.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    values = _without_dtype(cast(Any, config).to_dict())
    if isinstance(values.get("text_config"), dict):
        values["text_config"] = _without_dtype(values["text_config"])
    return {**values, "architectures": [type(model).__name__]}


def _without_dtype(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in ("dtype", "torch_dtype")}


def _targets(model: nn.Module, plan: Plan) -> Iterator[_Target]:
    """The linear of each layer of the plan. Raises UsageError for another module than a linear, InputError for NaN."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            places.setdefault(child, []).append((parent, name))
    names: dict[nn.Module, str] = {}
    for job in plan.layers:
        module = model.get_submodule(module_of(job.name))
        reason = _unfit(module, job)
        if reason is not None:
            raise UsageError(reason, tensor=job.name, hint=f"exclude=['^{module_of(job.name)}$']")
        if module in names:
            message = f"and {names[module]} are one module, which cannot have two adapters"
            raise UsageError(message, tensor=job.name, hint=f"exclude=['^{module_of(job.name)}$']")
        names[module] = job.name
        if not bool(torch.isfinite(cast(torch.Tensor, module.weight)).all()):
            raise InputError("holds NaN or infinite values", tensor=job.name, hint="exclude it")
        yield _Target(job, module, places[module])


def _unfit(module: nn.Module, job: LayerJob) -> str | None:
    """The reason why `module` is not the linear of a job; None for the linear of the job."""
    try:
        facts = check_linear(module)
    except UsageError as error:
        return error.message
    if (facts.shape, facts.transposed) != (job.matrix.shape, job.matrix.transposed):
        return f"is planned as {job.matrix.shape}, and {type(module).__name__} of the model is {facts.shape}"
    return None


@dataclass(frozen=True)
class _LoadedWeights:
    """The tensors of a loaded model, like a checkpoint."""

    tensors: Mapping[str, TensorRef]
    state: Mapping[str, torch.Tensor]

    def load(self, name: str) -> torch.Tensor:
        return self.state[name]

    def load_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.load(name)[start:stop]


def _statistics(model: nn.Module, calibration: str | None, plan: Plan, workers: Workers) -> InputStatistics | None:
    if calibration == WEIGHTS:
        return measure_weights(_LoadedWeights(_headers(model), model.state_dict()), plan.family, workers=workers)
    return None if calibration is None else _open_statistics(Path(calibration), plan)


def _open_statistics(path: Path, plan: Plan) -> Statistics:
    """The statistics of the layers' inputs. Raises MismatchError for statistics of another model."""
    statistics = open_statistics(path)
    hint = "loftq calibrate this model"
    for job in plan.layers:
        if job.name in statistics.names and statistics.in_features(job.name) != job.matrix.shape[1]:
            message = f"has {job.matrix.shape[1]} inputs, and statistics of {statistics.in_features(job.name)}"
            raise MismatchError(message, file=path, tensor=job.name, hint=hint)
    if not any(job.name in statistics.names for job in plan.layers):
        raise MismatchError("has no statistics there", file=path, tensor=plan.layers[0].name, hint=hint)
    return statistics


def _weighting(statistics: InputStatistics | None, job: LayerJob) -> Weighting | None:
    if statistics is None or job.name not in statistics.names:
        return None
    return make_weighting(statistics.load(job.name), job.lora.group_size)
