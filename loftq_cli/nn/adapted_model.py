"""Loads a converted directory into a model, ready to train adapters.

No module is found by guessing: module names are the names of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import nn

from loftq_cli.adapter.beside import find_adapter
from loftq_cli.adapter.experts.factors import FactorReader
from loftq_cli.adapter.experts.planned import lora_with_experts, plan_expert_loras
from loftq_cli.adapter.sorting import LoraTensors
from loftq_cli.adapter.source import AdapterSource, open_adapter
from loftq_cli.conversion.report import read_report
from loftq_cli.errors import InputError, MismatchError
from loftq_cli.merging.provenance import check_provenance
from loftq_cli.methods.method import METHODS
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import module_of
from loftq_cli.nn.adapted_linear import AdaptedLinear, Origin
from loftq_cli.nn.adapter_directory import origin_of
from loftq_cli.nn.loftq_linear import LoftQLinear, QLoRALinear
from loftq_cli.nn.qalora_linear import QALoRALinear
from loftq_cli.nn.quantized_linear import QuantizedLinear, dense_linear
from loftq_cli.tensors.specs import LoraSpec

Model = TypeVar("Model", bound=nn.Module)


def load_adapted(
    model: Model,
    directory: str | Path,
    *,
    adapter: str | Path | None = None,
    cache: bool = False,
    force: bool = False,
) -> Model:
    """`model` with the numbers of a converted directory, in place, ready to train the adapter and nothing else.

    model      any module with the part names of transformers' loaded model
    directory  the output of `loftq quantize` or `loftq merge`, in any container
    adapter    the adapter directory; by default the adapter inside `directory`, or no adapter
    cache      True lets QuantizedLinear keep the decoded weight
    force      True takes an adapter whose records do not tell the base, or tell another base

    Quantized weights become QuantizedLinear. Adapted weights become LoftQLinear, QLoRALinear or QALoRALinear over a
    QuantizedLinear, or over a frozen nn.Linear where the directory is dense. All further tensors are copied into the
    model, and the model keeps dtypes and devices. Nothing changes unless everything fits.
    Raises MismatchError where a tensor has no place, a module is not a linear of the weight's shape, the model has
    tensors outside of the directory, or adapter and base do not belong together; InputError for damaged files;
    ValueError for a model on the meta device.
    """
    with BaseModel.open(Path(directory)) as base:
        source = _adapter_for(base, None if adapter is None else Path(adapter), force=force)
        plan = _Plan.of(model, base, source)
        origin = None if source is None else origin_of(source.path, base.folder)
        method = None if origin is None else _method_of(base, origin)
        for slot in plan.slots:
            slot.check(base)
        built = {linear.module: linear.build(base, source, origin, method, cache=cache) for linear in plan.linears}
        for slot in plan.slots:
            slot.fill(base)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in built:
                setattr(parent, name, built[child])
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.lora_A.requires_grad_(True)
            module.lora_B.requires_grad_(True)
    return model


@dataclass(frozen=True)
class _Slot:
    """A tensor of the model, and the `name` of the stored tensor with the numbers. `shared_with` is the name of an
    earlier stored tensor for the `tensor`, or None.
    """

    tensor: torch.Tensor
    name: str
    shared_with: str | None

    def check(self, base: BaseModel) -> None:
        """Raises MismatchError where the model shares a tensor for two unequal stored tensors."""
        if self.shared_with is not None and not torch.equal(base.load(self.name), base.load(self.shared_with)):
            message = f"differs from {self.shared_with}, and the model shares one weight for both"
            raise MismatchError(message, file=base.path, tensor=self.name)

    def fill(self, base: BaseModel) -> None:
        """Copy, in the dtype and on the device of the model's tensor."""
        if self.shared_with is None:
            with torch.no_grad():
                self.tensor.copy_(base.load(self.name))


@dataclass(frozen=True)
class _Linear:
    """A linear of the model to replace, the name of the new weight, and the adapter."""

    module: nn.Module
    name: str
    lora: LoraTensors | None
    spec: LoraSpec | None

    def build(
        self, base: BaseModel, source: AdapterSource | None, origin: Origin | None, method: str | None, *, cache: bool
    ) -> nn.Module:
        """The replacement. Raises InputError for NaN and infinite values."""
        weight, bias = cast(torch.Tensor, self.module.weight), cast(torch.Tensor | None, self.module.bias)
        layer: nn.Linear
        if self.name in base.quantized:
            layer = QuantizedLinear(base.quantized_tensor(self.name), bias, dtype=weight.dtype, cache=cache)
        else:
            layer = dense_linear(base.matrix(self.name).to(weight.dtype), bias)
        _check_finite(base.path, self.name, layer.state_dict().values())
        built: nn.Module = layer
        if self.lora is not None and self.spec is not None and source is not None:
            kind = adapted_class(method, self.spec)
            lora_A, lora_B = _factors(source, self.lora)
            _check_finite(source.weights.path, self.lora.lora_A, (lora_A, lora_B))
            built = kind(layer, lora_A, lora_B, self.spec, origin=origin)
        return built.to(weight.device).train(self.module.training)


_CLASSES: dict[str, type[AdaptedLinear]] = {kind.__name__: kind for kind in (LoftQLinear, QLoRALinear, QALoRALinear)}


def adapted_class(method: str | None, lora: LoraSpec) -> type[AdaptedLinear]:
    """The class for training adapters of a method, by `linear_class` in the row of the method.

    The first method with the pooling of the adapter decides when the method is unknown, or pools inputs unlike the
    adapter.

    >>> adapted_class("qlora", LoraSpec(rank=4, alpha=4)).__name__
    'QLoRALinear'
    """
    rows = [entry for entry in METHODS.values() if entry.is_pooled == (lora.pooling is not None)]
    entry = METHODS.get(str(method))
    row = entry if entry in rows else rows[0]
    return _CLASSES[row.linear_class]


@dataclass(frozen=True)
class _Plan:
    """The places of all stored tensors. The stored tensors fill the model completely."""

    slots: list[_Slot]
    linears: list[_Linear]

    @classmethod
    def of(cls, model: nn.Module, base: BaseModel, source: AdapterSource | None) -> _Plan:
        """A plan from headers alone. Raises MismatchError where model, base and adapter do not fit."""
        tensors_by_name = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        tensors = dict(tensors_by_name)
        if any(tensor.is_meta for tensor in tensors.values()):
            raise ValueError("the model is on the meta device: give it memory first, as with to_empty")
        loaded, lora_of = base.loaded_names(), {} if source is None else _lora_of(base, source)
        plan, owners = cls([], []), dict[int, str]()
        for name in base.tensors:
            if name in base.quantized or name in lora_of:
                plan.linears.append(_linear(model, base, name, loaded[name], source, lora_of.get(name)))
                continue
            tensor = tensors.get(loaded[name])
            if tensor is None:
                if not _is_ignored(model, loaded[name]):
                    raise MismatchError("has no place in the model", file=base.path, tensor=name)
                continue
            if tuple(tensor.shape) != base.tensors[name].shape:
                message = f"is {base.tensors[name].shape}, and {loaded[name]} of the model is {tuple(tensor.shape)}"
                raise MismatchError(message, file=base.path, tensor=name)
            plan.slots.append(_Slot(tensor, name, owners.get(id(tensor))))
            owners.setdefault(id(tensor), name)
        plan._check_complete(model, base, owners)
        plan._check_places(base)
        return plan

    def _check_places(self, base: BaseModel) -> None:
        places: dict[nn.Module, str] = {}
        for linear in self.linears:
            first_name = places.setdefault(linear.module, linear.name)
            if first_name != linear.name:
                message = f"and {first_name} belong to one module of the model, which cannot have two weights"
                raise MismatchError(message, file=base.path, tensor=linear.name)

    def _check_complete(self, model: nn.Module, base: BaseModel, owners: dict[int, str]) -> None:
        replaced = {linear.module for linear in self.linears}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, torch.Tensor) or id(tensor) in owners:
                continue
            parent, _, leaf = name.rpartition(".")
            if leaf != "weight" or model.get_submodule(parent) not in replaced:
                raise MismatchError(f"does not give {name} of the model", file=base.path)


def _linear(
    model: nn.Module, base: BaseModel, name: str, loaded: str, source: AdapterSource | None, lora: LoraTensors | None
) -> _Linear:
    """The linear of the model for the weight called `name`. Raises MismatchError where the model has no fit."""
    try:
        module = model.get_submodule(module_of(loaded))
    except AttributeError:
        raise MismatchError("has no place in the model", file=base.path, tensor=name) from None
    shape = base.matrix_shape(name)
    # MultiheadAttention computes with the weight of a NonDynamicallyQuantizableLinear, past the forward.
    is_linear = isinstance(module, nn.Linear) and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )
    is_conv1d = hasattr(module, "nf")  # transformers' linear of GPT-2, stored [in, out]
    if not (is_linear or is_conv1d) or isinstance(module, QuantizedLinear):
        message = f"is for a linear, and {module_of(loaded)} of the model is {type(module).__name__}"
        raise MismatchError(message, file=base.path, tensor=name)
    shape_of_module = tuple(cast(torch.Tensor, module.weight).shape)
    shape_of_module = shape_of_module[::-1] if is_conv1d else shape_of_module
    if shape_of_module != shape:
        message = f"is {shape}, and {module_of(loaded)} of the model is {shape_of_module}"
        raise MismatchError(message, file=base.path, tensor=name)
    spec = None if source is None or lora is None else _lora_spec(source, lora, shape_of_module)
    return _Linear(module, name, lora, spec)


def _adapter_for(base: BaseModel, path: Path | None, *, force: bool) -> AdapterSource | None:
    """The adapter to load; None without one.

    Raises MismatchError for an adapter of another base, or with tensors beside lora_A and lora_B of linears.
    """
    if path is None:
        report = read_report(base.folder)
        path = find_adapter(base.folder, None if report is None else report[0]["adapter_dir"])
        if path is None:
            return None
    source = open_adapter(path)
    check_provenance(base, source.path, source.config, force=force)
    odd = [*source.whole.values()]
    odd += [lora.lora_A for lora in source.lora.values() if lora.is_embedding]
    odd += [name for lora in source.lora.values() for name in (lora.lora_bias, lora.magnitude) if name is not None]
    odd += [tokens.tensor for tokens in source.tokens.values()]
    odd += [item.lora_A for stack in plan_expert_loras(base, source).stacks.values() for item in stack[0]]
    if odd:
        message = "is neither lora_A nor lora_B of a linear, and nothing else is trained here"
        raise MismatchError(message, file=source.weights.path, tensor=odd[0], hint="loftq merge merges it")
    return source


def _method_of(base: BaseModel, origin: Origin) -> str | None:
    """The method of the adapter's start, from the adapter's records or the base's report."""
    if origin.provenance is not None:
        return str(origin.provenance.get("method"))
    report = read_report(base.folder)
    return None if report is None else str(report[0]["recipe"]["method"])


def _check_finite(file: Path, name: str, tensors: Iterable[torch.Tensor]) -> None:
    for tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError("holds NaN or infinite values", file=file, tensor=name)


def _factors(source: AdapterSource, lora: LoraTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A and lora_B as the file has them, or the part of one expert in the tensors of all."""
    if lora.part is None:
        return source.weights.load(lora.lora_A), source.weights.load(lora.lora_B)
    pair = FactorReader(source.weights).pair(lora)
    return pair.lora_A, pair.lora_B


def _lora_of(base: BaseModel, source: AdapterSource) -> dict[str, LoraTensors]:
    """The adapter of each base weight. Raises MismatchError for an adapter with a module outside of the base."""
    lora_by_name = lora_with_experts(base, source)
    adapted = {lora.module for lora in lora_by_name.values()}
    for lora in source.lora.values():
        if lora.module not in adapted:
            raise MismatchError("its module is not in the base", file=source.weights.path, tensor=lora.lora_A)
    return lora_by_name


def _lora_spec(source: AdapterSource, lora: LoraTensors, shape: tuple[int, ...]) -> LoraSpec:
    """The files' specification of a layer's adapter. Raises MismatchError for a misfit with `shape` [out, in]."""
    out_features, in_features = shape
    if lora.part is not None:  # of one expert: fitted to the base's matrix, which has the shape
        dtype = source.weights.tensors[lora.lora_A].dtype
        return LoraSpec(lora.rank, lora.alpha, bool(source.config.get("use_rslora")), dtype, lora.pooling)
    for error in source.fit(lora, (out_features, in_features)):
        raise error
    lora_A = source.weights.tensors[lora.lora_A]
    pooling = lora.pooling_for(in_features, lora_A.shape[1])
    return LoraSpec(lora.rank, lora.alpha, bool(source.config.get("use_rslora")), lora_A.dtype, pooling)


def _is_ignored(model: nn.Module, name: str) -> bool:
    """True if transformers drops a stored tensor of the name: causal masks, frequencies of rotary embeddings."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)
