"""Training modules over what `loftq quantize` writes: linears whose weight stays quantized, with LoftQ, QLoRA and
QA-LoRA adapters; loading them into a model, and saving the adapters again. Plain torch; no training loop.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map_only

from loftq_cli.adapter_source import AdapterSource, LoraTensors, open_adapter
from loftq_cli.base_model import BaseModel
from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.checkpoint.staging import Staging
from loftq_cli.checkpoint.writer import OutputFiles
from loftq_cli.errors import MismatchError
from loftq_cli.layouts import peft_adapter
from loftq_cli.methods.method import METHODS
from loftq_cli.metrics import adapter_delta, group_delta
from loftq_cli.model_files import write_texts
from loftq_cli.provenance import check_provenance
from loftq_cli.quant.affine import move_offsets
from loftq_cli.quant.formats import QuantizedTensor, QuantSpec, make_quantizer, size_of
from loftq_cli.report import PROVENANCE_NAME, TOOL, dump_json, read_report
from loftq_cli.targets import module_of
from loftq_cli.tensors import AffineSpec, AffineTensor, CodebookTensor, LoraPair, LoraSpec, NestedAbsmax, lora_pair
from loftq_cli.triton_kernels.packing import pack_rows, unpack_rows

_READ_ONLY = (
    "this weight is decoded from quantized codes whenever it is read: a change to it would be lost. To merge an "
    "adapter, save it and run `loftq merge`, or take what merge() of LoftQLinear, QLoRALinear or QALoRALinear returns"
)

Model = TypeVar("Model", bound=nn.Module)


class QuantizedLinear(nn.Linear):
    """A frozen linear whose weight is stored quantized: input @ dequant(Q)ᵀ + bias, in the dtype of the input.

    The weight is decoded as a loader of the stored tensors decodes it: in every pass, and again for the gradient of the
    input, so that nothing dense is kept for backward; with `cache`, once. What it decodes from are buffers, which keep
    their dtypes when the module is cast: codes are packed, int32 [out, ceil(in * bits / 32)] or uint8 in pairs.
    The bias is a Parameter that is not trained.
    """

    def __init__(
        self,
        quantized: QuantizedTensor,
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        cache: bool = False,
    ) -> None:
        """`bias` [out], kept as it is; `dtype` is what `weight` appears in, by default what a loader decodes to."""
        super(nn.Linear, self).__init__()  # nn.Linear's own would allocate a dense weight
        self.spec: QuantSpec = quantized.spec
        self.cache = cache
        self._decoded_dtype = quantized.dtype
        self._dtype = getattr(torch, quantized.dtype) if dtype is None else dtype
        self._cached: torch.Tensor | None = None
        self.out_features, self.in_features = _shape_of(quantized)
        for name, tensor in _buffers_of(quantized).items():
            self.register_buffer(name, tensor)
        self.bias = _frozen(bias)

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight [out, in], for reading: dtype, device and shape cost nothing, anything else decodes.

        Changing it in place or assigning its data raises RuntimeError.
        """
        return _ReadOnlyWeight(lambda: self.dequantized().to(self._dtype), self._shape, self._dtype, self._device)

    @weight.setter
    def weight(self, value: object) -> None:
        raise RuntimeError(_READ_ONLY)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in nn.Module; raises RuntimeError for a weight, which assigning a Parameter to it comes to."""
        if name == "weight":
            raise RuntimeError(_READ_ONLY)
        super().register_parameter(name, param)

    def quantized(self) -> QuantizedTensor:
        """The stored weight; integer codes are unpacked into new memory."""
        buffers = dict(self.named_buffers(recurse=False))
        if isinstance(self.spec, AffineSpec):
            codes = unpack_rows(buffers["codes"], self.spec.bits, self.in_features)
            offsets = (buffers.get("zero_points"), buffers.get("biases"))
            return AffineTensor(codes, buffers["scales"], *offsets, self.spec, self._decoded_dtype)
        absmax: torch.Tensor | NestedAbsmax
        if self.spec.double_quant:
            absmax = NestedAbsmax(*(buffers[f"absmax_{part}"] for part in NestedAbsmax.__slots__))
        else:
            absmax = buffers["absmax"]
        return CodebookTensor(buffers["packed"], absmax, self.spec, self._shape, self._decoded_dtype)

    def dequantized(self) -> torch.Tensor:
        """float32 [out, in], rounded to the dtype that a loader decodes to."""
        quantized = self.quantized()
        return make_quantizer(quantized.spec, quantized.dtype).dequantize(quantized)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., out] of [..., in], in the dtype of `input`."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if self.cache:
            return functional.linear(input, self._weight_as(input.dtype), bias)
        output: torch.Tensor = _DecodedLinear.apply(input, bias, self._weight_as)  # type: ignore[no-untyped-call]
        return output

    def extra_repr(self) -> str:
        """As nn.Linear's, and the number format."""
        return f"{super().extra_repr()}, {self.spec.quant_type}, {size_of(self.spec)}"

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def _device(self) -> torch.device:
        return next(self.buffers(recurse=False)).device

    def _weight_as(self, dtype: torch.dtype) -> torch.Tensor:
        if not self.cache:
            return self.dequantized().to(dtype)
        if self._cached is None or self._cached.dtype != dtype:
            with torch.inference_mode(False):  # a tensor of inference mode could not serve training later
                self._cached = self.dequantized().to(dtype)
        return self._cached

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        # What is decoded would be other numbers after a cast of the constants, so only the weight's own dtype changes.
        stored = dict(self.named_buffers(recurse=False))
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self._device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in stored.items():
            after = self.get_buffer(name)
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        self._cached = None
        return self

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self._cached = None
        super()._load_from_state_dict(*arguments, **keywords)


class _DecodedLinear(torch.autograd.Function):
    """functional.linear with a weight that is decoded for each pass; the gradient goes to input and bias alone."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, bias: torch.Tensor | None, weight_as: Callable[[torch.dtype], torch.Tensor]
    ) -> torch.Tensor:
        ctx.weight_as = weight_as
        return functional.linear(input, weight_as(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (gradient,) = gradients
        for_input = gradient @ ctx.weight_as(gradient.dtype) if ctx.needs_input_grad[0] else None
        return for_input, gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


class _ReadOnlyWeight(torch.Tensor):
    """A weight that is computed when its numbers are asked for, and refuses to be changed: PEFT's merging would add to
    a temporary, and drop what was trained.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _decode: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(
        cls, decode: Callable[[], torch.Tensor], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> _ReadOnlyWeight:
        weight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight._decode = decode
        return weight

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed = args[place] if place < len(args) else kwargs.get(argument.name)
                if any(isinstance(leaf, cls) for leaf in tree_leaves(changed)):
                    raise RuntimeError(_READ_ONLY)
        if func is torch.ops.aten.detach.default:
            return cls(args[0]._decode, args[0].shape, args[0].dtype, args[0].device)
        args, kwargs = tree_map_only(cls, lambda weight: weight._decode(), (args, kwargs))
        return func(*args, **kwargs)

    @property
    def data(self) -> torch.Tensor:
        """The weight itself, still for reading only."""
        return self

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise RuntimeError(_READ_ONLY)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise RuntimeError(_READ_ONLY)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self._decode())


class _AdaptedLinear(nn.Module):
    """A frozen linear and a trainable adapter: y = base(x) + s·B·A·x, where A reads x, or its sums over groups.

    base_layer       QuantizedLinear, or an nn.Linear where the weight is stored dense
    lora_A, lora_B   Parameters as in LoraPair, computed with in their own dtype
    lora             rank, alpha and pooling, as they are saved
    scaling          s, the pooling's factor included
    source           the adapter directory that it was loaded from, if any
    """

    _is_pooled = False

    def __init__(
        self,
        base_layer: nn.Linear,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        lora: LoraSpec,
        *,
        source: Path | None = None,
    ) -> None:
        """Raises ValueError where the factors do not fit the base or `lora`."""
        super().__init__()
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        inputs = self.in_features // lora.group_size
        if (lora.pooling is not None) != self._is_pooled:
            what = "a pooled adapter" if self._is_pooled else "an adapter that is not pooled"
            raise ValueError(f"{type(self).__name__} is for {what}")
        if lora_A.shape != (lora.rank, inputs) or inputs * lora.group_size != self.in_features:
            raise ValueError(f"lora_A {tuple(lora_A.shape)} does not read {self.in_features} inputs")
        if lora_B.shape != (self.out_features, lora.rank):
            raise ValueError(f"lora_B {tuple(lora_B.shape)} does not give {self.out_features} outputs")
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(lora_A.clone()), nn.Parameter(lora_B.clone())
        self.lora, self.source = lora, source
        self.scaling = lora_pair(lora_A, lora_B, lora.scaling, lora.pooling).scaling
        self._start = (lora_A.detach().clone(), lora_B.detach().clone())

    @property
    def weight(self) -> torch.Tensor:
        """base + s·B·A [out, in] as it is now, for reading as `QuantizedLinear.weight`; no gradient goes through it."""
        like = self.base_layer.weight
        shape = (self.out_features, self.in_features)
        return _ReadOnlyWeight(lambda: self._merged_weight().to(like.dtype), shape, like.dtype, like.device)

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's."""
        return self.base_layer.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., out] of [..., in]."""
        output: torch.Tensor = self.base_layer(input)
        return output + self._added(input.to(self.lora_A.dtype)).to(output.dtype)

    def reset(self) -> None:
        """Back to the adapter that was loaded: that of LoftQ and of residual QA-LoRA, which holds the quantization
        error of this base; of the other methods, the one that adds nothing, or what had been trained before.
        """
        with torch.no_grad():
            for parameter, start in zip((self.lora_A, self.lora_B), self._start, strict=True):
                parameter.copy_(start)

    def merge(self) -> nn.Linear:
        """A frozen dense linear with dequant(Q) + s·B·A, added in float32 and rounded to the dtype of `weight`."""
        dtype = self.base_layer.weight.dtype
        return _dense_linear(self._merged_weight().to(dtype), _copied(self.bias)).train(self.training)

    def extra_repr(self) -> str:
        """The adapter's rank and scaling."""
        return f"rank={self.lora.rank}, scaling={self.scaling:g}"

    def _added(self, input: torch.Tensor) -> torch.Tensor:
        """s·B·A·x [..., out] of [..., in] in the adapter's dtype."""
        read = _group_sums(input, self.lora.group_size)
        return functional.linear(functional.linear(read, self.lora_A), self.lora_B) * self.scaling

    def _pair(self) -> LoraPair:
        return LoraPair(self.lora_A.detach(), self.lora_B.detach(), self.scaling, self.lora.group_size)

    def _merged_weight(self) -> torch.Tensor:
        base = self.base_layer
        weight = base.dequantized() if isinstance(base, QuantizedLinear) else base.weight.detach().float()
        return adapter_delta(self._pair()).add_(weight)


class LoftQLinear(_AdaptedLinear):
    """LoftQ (arXiv 2310.08659): the adapter starts as the best approximation of what quantization lost."""


class QLoRALinear(_AdaptedLinear):
    """QLoRA (arXiv 2305.14314): the adapter starts by adding nothing."""


@dataclass(frozen=True, slots=True)
class QuantizationStats:
    """What rounding the zero points does to the effective weight: mean and largest absolute difference over all
    weights, and the number of groups that have a zero point.
    """

    mean_error: float
    max_error: float
    groups: int


class QALoRALinear(_AdaptedLinear):
    """QA-LoRA (arXiv 2309.14717): the adapter reads sums over groups of inputs, so that the offsets of a quantized base
    can hold what it adds, U [out, groups] = s·B·A.
    """

    _is_pooled = True
    _quantization_enabled = False

    @property
    def quantization_enabled(self) -> bool:
        """Whether training sees rounded zero points, as `loftq merge --round-zeros` writes them: zero' =
        round(zero − U / scale) in the range of the codes. The gradient of the adapter is that of U unrounded
        (straight-through); that of the input sees the rounded weight.

        Off by default, also for a warm-up: float offsets hold U exactly, so merging into them leaves nothing to
        simulate. Turning it on raises ValueError for a base without integer zero points.
        """
        return self._quantization_enabled

    @quantization_enabled.setter
    def quantization_enabled(self, enabled: bool) -> None:
        if enabled:
            self._zero_points()
        self._quantization_enabled = bool(enabled)

    def quantization_stats(self) -> QuantizationStats:
        """How far rounded zero points are from the effective weight now, whether or not training sees them.

        Raises ValueError for a base without integer zero points.
        """
        update = self._update().detach()
        # Groups are of one size, and base and codes are in both weights: differences of U are those of the weights.
        difference = (self._rounded(update) - update.double()).abs()
        return QuantizationStats(float(difference.mean()), float(difference.max()), difference.numel())

    def merge(self) -> nn.Linear:
        """A QuantizedLinear with the codes of the base, and float32 offsets that hold the adapter exactly, whatever
        `quantization_enabled`. A dense linear where the base has no integer codes.

        Raises ValueError where the adapter's groups are not whole groups of the base.
        """
        base = self.base_layer
        if not isinstance(base, QuantizedLinear) or not isinstance(base.spec, AffineSpec):
            return super().merge()
        spec = replace(base.spec, symmetric=False, zero_point="float", scale_dtype="float32")
        delta = group_delta(self._pair()).repeat_interleave(self._groups_read_as_one(base.spec), dim=1)
        moved = move_offsets(cast(AffineTensor, base.quantized()), delta, spec, "float32")
        merged = QuantizedLinear(moved, _copied(self.bias), dtype=base.weight.dtype, cache=base.cache)
        return merged.train(self.training)

    def _added(self, input: torch.Tensor) -> torch.Tensor:
        if not self.quantization_enabled:
            return super()._added(input)
        update = self._update()
        spec = cast(AffineSpec, cast(QuantizedLinear, self.base_layer).spec)
        # The difference is 0, and has the gradient of U.
        through = self._rounded(update.detach()).to(update.dtype) + (update - update.detach())
        return functional.linear(_group_sums(input, spec.group_size), through)

    def _update(self) -> torch.Tensor:
        """U for every group of the base, [out, in / group_size] in the adapter's dtype."""
        base = self.base_layer
        spec = base.spec if isinstance(base, QuantizedLinear) and isinstance(base.spec, AffineSpec) else None
        update = (self.lora_B @ self.lora_A) * self.scaling
        return update if spec is None else update.repeat_interleave(self._groups_read_as_one(spec), dim=1)

    def _rounded(self, update: torch.Tensor) -> torch.Tensor:
        """What rounded zero points add in place of `update`, float64; they are those of `move_offsets`."""
        scales, zero_points, highest = self._zero_points()
        moved = ((scales * zero_points - update.double()) / scales).round().clamp(0, highest)
        return scales * (zero_points - moved)

    def _zero_points(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Scales and zero points of the base in float64, and the highest code. Raises ValueError without them."""
        spec = self.base_layer.spec if isinstance(self.base_layer, QuantizedLinear) else None
        if not isinstance(spec, AffineSpec):
            raise ValueError("the base holds no integer codes: it has no zero points to round")
        if spec.zero_point == "float":
            raise ValueError("the base has float offsets, which hold the update exactly: there is nothing to round")
        if spec.symmetric:
            raise ValueError("the base is symmetric: it has no zero points to round")
        self._groups_read_as_one(spec)
        scales, zero_points = (self.base_layer.get_buffer(name).double() for name in ("scales", "zero_points"))
        return scales, zero_points, 2**spec.bits - 1

    def _groups_read_as_one(self, spec: AffineSpec) -> int:
        pooled = self.lora.group_size
        if pooled % spec.group_size:
            raise ValueError(f"pooled groups of {pooled} are not whole groups of {spec.group_size} of the base")
        return pooled // spec.group_size


def load_adapted(
    model: Model, directory: str | Path, *, adapter: str | Path | None = None, cache: bool = False
) -> Model:
    """`model` with the numbers of a converted directory, in place, ready to train the adapter and nothing else.

    model      any module whose parts are called as transformers calls those of the loaded model
    directory  what `loftq quantize` or `loftq merge` wrote, in any layout
    adapter    the adapter directory; by default the one inside `directory`, or none where there is none
    cache      whether QuantizedLinear keeps its decoded weight

    Quantized weights become QuantizedLinear, adapted ones LoftQLinear, QLoRALinear or QALoRALinear over it, or over a
    frozen nn.Linear where the directory is dense. Everything else is copied into the model, whose dtypes and devices
    are kept. Nothing is changed unless all of it fits.
    Raises MismatchError where a tensor has no place, a module is not a linear of the weight's shape, the model has
    tensors that the directory does not give, or adapter and base do not belong together; InputError for damaged files;
    ValueError for a model on the meta device.
    """
    with BaseModel.open(Path(directory)) as base:
        source = _adapter_for(base, None if adapter is None else Path(adapter))
        plan = _Plan.of(model, base, source)
        method = None if source is None else _method_of(base, source)
        for slot in plan.slots:
            slot.check(base)
        built = {linear.module: linear.build(base, source, method, cache=cache) for linear in plan.linears}
        for slot in plan.slots:
            slot.fill(base)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in built:
                setattr(parent, name, built[child])
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, _AdaptedLinear):
            module.lora_A.requires_grad_(True)
            module.lora_B.requires_grad_(True)
    return model


def save_adapter(
    model: nn.Module, directory: str | Path, source_adapter: str | Path | None = None, *, overwrite: bool = False
) -> None:
    """Write the adapters of `model` as `loftq merge`, `load_adapted` and PEFT read them; complete, or not at all.

    source_adapter   the adapter that training started from, by default the one that was loaded: its base's name, task
                     and provenance are written down again, so that merging can tell whether a base is the right one
    overwrite        replace what an earlier call wrote there

    Raises ValueError for a model without adapters, UsageError or StorageError where `directory` cannot be written.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _AdaptedLinear)}
    if not layers:
        raise ValueError("the model has no adapter to save")
    sources = [module.source for module in layers.values() if module.source is not None]
    source = Path(source_adapter) if source_adapter is not None else next(iter(sources), None)
    adapted = [_adapted_module(name, module) for name, module in layers.items()]
    # The config says how inputs are pooled by what is said of its first module.
    adapted.sort(key=lambda module: module.lora.pooling is None)
    if len({(module.lora.pooling or adapted[0].lora.pooling, module.lora.rslora) for module in adapted}) > 1:
        raise ValueError("one adapter directory holds one pooling and one kind of scaling")
    texts = _adapter_texts(adapted, source)
    fingerprint = hashlib.sha256("".join(texts.values()).encode()).hexdigest()
    staging = Staging(Path(directory), fingerprint=fingerprint, overwrite=overwrite, restart=True)
    published = False
    try:
        _write_factors(layers, adapted, staging.path)
        write_texts(staging.path, texts)
        staging.publish(TOOL)
        published = True
    finally:
        if not published:
            staging.discard()
        staging.close()


@dataclass(frozen=True)
class _Slot:
    """A tensor of the model, and the name of the stored one that it takes its numbers from; `shared_with` names an
    earlier one for the same tensor of the model.
    """

    tensor: torch.Tensor
    name: str
    shared_with: str | None

    def check(self, base: BaseModel) -> None:
        """Raises MismatchError where the model shares one tensor for two stored ones that are not equal."""
        if self.shared_with is not None and not torch.equal(base.load(self.name), base.load(self.shared_with)):
            what = f"differs from {self.shared_with}, and the model shares one weight for both"
            raise MismatchError(what, file=base.path, tensor=self.name)

    def fill(self, base: BaseModel) -> None:
        """Copy, in the dtype and on the device of the model's tensor."""
        if self.shared_with is None:
            with torch.no_grad():
                self.tensor.copy_(base.load(self.name))


@dataclass(frozen=True)
class _Linear:
    """A linear of the model to replace: the weight that it gets, and its adapter."""

    module: nn.Module
    name: str
    lora: LoraTensors | None
    spec: LoraSpec | None

    def build(self, base: BaseModel, source: AdapterSource | None, method: str | None, *, cache: bool) -> nn.Module:
        weight, bias = cast(torch.Tensor, self.module.weight), cast(torch.Tensor | None, self.module.bias)
        layer: nn.Linear
        if self.name in base.quantized:
            layer = QuantizedLinear(base.quantized_tensor(self.name), bias, dtype=weight.dtype, cache=cache)
        else:
            layer = _dense_linear(base.matrix(self.name).to(weight.dtype), bias)
        built: nn.Module = layer
        if self.lora is not None and self.spec is not None and source is not None:
            kind = QALoRALinear if self.spec.pooling else _CLASSES.get(str(method), LoftQLinear)
            lora_A, lora_B = source.weights.load(self.lora.lora_A), source.weights.load(self.lora.lora_B)
            built = kind(layer, lora_A, lora_B, self.spec, source=source.path)
        return built.to(weight.device).train(self.module.training)


_CLASSES: dict[str, type[_AdaptedLinear]] = {"loftq": LoftQLinear, "qlora": QLoRALinear}


@dataclass(frozen=True)
class _Plan:
    """Where every stored tensor goes; nothing of the model is left without one."""

    slots: list[_Slot]
    linears: list[_Linear]

    @classmethod
    def of(cls, model: nn.Module, base: BaseModel, source: AdapterSource | None) -> _Plan:
        """From headers alone. Raises MismatchError where model, base and adapter do not fit."""
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        tensors = dict(named)
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
                what = f"is {base.tensors[name].shape}, and {loaded[name]} of the model is {tuple(tensor.shape)}"
                raise MismatchError(what, file=base.path, tensor=name)
            plan.slots.append(_Slot(tensor, name, owners.get(id(tensor))))
            owners.setdefault(id(tensor), name)
        plan._check_complete(model, base, owners)
        return plan

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
    """The linear of the model that the weight called `name` belongs to. Raises MismatchError where there is none."""
    try:
        module = model.get_submodule(module_of(loaded))
    except AttributeError:
        raise MismatchError("has no place in the model", file=base.path, tensor=name) from None
    shape = base.matrix_shape(name)
    # MultiheadAttention computes with the weight of this class of linear, past its forward.
    is_linear = isinstance(module, nn.Linear) and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )
    is_conv1d = hasattr(module, "nf")  # transformers' linear of GPT-2, stored [in, out]
    if not (is_linear or is_conv1d) or isinstance(module, QuantizedLinear):
        what = f"is for a linear, and {module_of(loaded)} of the model is {type(module).__name__}"
        raise MismatchError(what, file=base.path, tensor=name)
    found = tuple(cast(torch.Tensor, module.weight).shape)
    found = found[::-1] if is_conv1d else found
    if found != shape:
        what = f"is {shape}, and {module_of(loaded)} of the model is {found}"
        raise MismatchError(what, file=base.path, tensor=name)
    spec = None if source is None or lora is None else _lora_spec(source, lora, found)
    return _Linear(module, name, lora, spec)


def _adapter_for(base: BaseModel, path: Path | None) -> AdapterSource | None:
    """The adapter to load. Raises MismatchError for one of another base, or with parts that are not trained here."""
    if path is None:
        places = (base.folder / entry.adapter_dir for entry in METHODS.values())
        path = next((place for place in places if peft_adapter.is_adapter_directory(place)), None)
        if path is None:
            return None
    source = open_adapter(path)
    check_provenance(base, source.path, source.config, force=False)
    odd = [*source.whole.values()]
    odd += [lora.lora_A for lora in source.lora.values() if lora.is_embedding]
    odd += [lora.lora_bias for lora in source.lora.values() if lora.lora_bias is not None]
    if odd:
        what = "is neither lora_A nor lora_B of a linear, and nothing else is trained here"
        raise MismatchError(what, file=source.weights.path, tensor=odd[0], hint="loftq merge merges it")
    return source


def _method_of(base: BaseModel, source: AdapterSource) -> str | None:
    """The method that the adapter started with, as its own records or the base's report have it."""
    provenance = source.path / PROVENANCE_NAME
    if provenance.is_file():
        return str(read_json_object(provenance).get("method"))
    report = read_report(base.folder)
    return None if report is None else str(report[0]["recipe"]["method"])


def _lora_of(base: BaseModel, source: AdapterSource) -> dict[str, LoraTensors]:
    """The adapter of each base weight. Raises MismatchError for one whose weight is not in the base."""
    called = source.names_in(base)
    weights = [name for name in base.tensors if name.endswith(".weight")]
    found = {name: source.lora[module_of(called[name])] for name in weights if module_of(called[name]) in source.lora}
    taken = {lora.module for lora in found.values()}
    for lora in source.lora.values():
        if lora.module not in taken:
            raise MismatchError("its module is not in the base", file=source.weights.path, tensor=lora.lora_A)
    return found


def _lora_spec(source: AdapterSource, lora: LoraTensors, shape: tuple[int, ...]) -> LoraSpec:
    """The adapter's own account of itself. Raises MismatchError where it does not fit a weight of `shape`."""
    ref, out_features = source.weights.tensors[lora.lora_A], source.weights.tensors[lora.lora_B].shape[0]
    rank, inputs = ref.shape
    # PEFT pools only on GPTQ layers, and trains an ordinary adapter on every other one.
    pooling = None if inputs == shape[1] else lora.pooling
    if (out_features, inputs * (pooling.group_size if pooling else 1)) != shape:
        raise MismatchError(f"does not fit a layer of {shape}", file=source.weights.path, tensor=lora.lora_A)
    config = source.config
    alpha = peft_adapter.pattern_value(config.get("alpha_pattern") or {}, lora.module, config.get("lora_alpha", 8))
    return LoraSpec(rank, alpha, bool(config.get("use_rslora")), ref.dtype, pooling)


def _is_ignored(model: nn.Module, name: str) -> bool:
    """Whether transformers drops a stored tensor of this name: causal masks, frequencies of rotary embeddings."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _adapted_module(name: str, module: _AdaptedLinear) -> peft_adapter.AdaptedModule:
    lora = replace(module.lora, dtype=str(module.lora_A.dtype).removeprefix("torch."))
    return peft_adapter.AdaptedModule(name, (module.out_features, module.in_features), lora)


def _adapter_texts(adapted: list[peft_adapter.AdaptedModule], source: Path | None) -> dict[str, str]:
    """The small files of the adapter, by name."""
    values = {} if source is None else read_json_object(source / peft_adapter.CONFIG_NAME)
    config = peft_adapter.adapter_config(
        adapted,
        base_model=values.get("base_model_name_or_path") or "",
        task_type=values.get("task_type"),
        fan_in_fan_out=values.get("fan_in_fan_out") is True,
    )
    texts = {peft_adapter.CONFIG_NAME: dump_json(config)}
    if source is not None and (source / PROVENANCE_NAME).is_file():
        texts[PROVENANCE_NAME] = dump_json(read_json_object(source / PROVENANCE_NAME))
    return texts


def _write_factors(
    layers: dict[str, _AdaptedLinear], adapted: list[peft_adapter.AdaptedModule], directory: Path
) -> None:
    planned = [tensor for module in adapted for tensor in peft_adapter.planned(module)]
    files = OutputFiles(directory, {peft_adapter.WEIGHTS_NAME: planned})
    try:
        for name, module in layers.items():
            for key, tensor in peft_adapter.pack(name, module._pair()).items():
                files[key].write(key, tensor.cpu())
        files.close(sync=True)
    finally:
        files.close(sync=False)


def _group_sums(input: torch.Tensor, group_size: int) -> torch.Tensor:
    """[..., in / group_size]: sums over neighbouring inputs."""
    return input if group_size == 1 else input.reshape(*input.shape[:-1], -1, group_size).sum(-1)


def _shape_of(quantized: QuantizedTensor) -> tuple[int, int]:
    if isinstance(quantized, CodebookTensor):
        return quantized.shape
    return quantized.codes.shape[0], quantized.codes.shape[1]


def _buffers_of(quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors to keep, by the name of their buffer; the inverse is `QuantizedLinear.quantized`."""
    if isinstance(quantized, AffineTensor):
        constants = {"scales": quantized.scales, "zero_points": quantized.zero_points, "biases": quantized.biases}
        kept = {name: tensor for name, tensor in constants.items() if tensor is not None}
        return {"codes": pack_rows(quantized.codes, quantized.spec.bits), **kept}
    if isinstance(quantized.absmax, NestedAbsmax):
        parts = NestedAbsmax.__slots__
        return {"packed": quantized.packed, **{f"absmax_{part}": getattr(quantized.absmax, part) for part in parts}}
    return {"packed": quantized.packed, "absmax": quantized.absmax}


def _dense_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A frozen linear with this weight and this bias."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = _frozen(bias)
    return linear


def _frozen(bias: torch.Tensor | None) -> Any:
    """A parameter that is not trained; one that is a parameter already stays the same object."""
    if isinstance(bias, nn.Parameter):
        return bias.requires_grad_(False)
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)


def _copied(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach().clone()
