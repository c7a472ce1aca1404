"""A frozen linear whose weight stays quantized, and is decoded for each pass. No adapter here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loftq_cli.nn.read_only_weight import READ_ONLY, ReadOnlyWeight
from loftq_cli.quant.formats import QuantizedTensor, QuantSpec, tensor_from_buffers
from loftq_cli.tensors.matrices import CodebookOperand
from loftq_cli.triton_kernels.backend import has_kernels
from loftq_cli.triton_kernels.dequant_matmul.contract import dequant_matmul, dequant_matmul_input_gradient


class QuantizedLinear(nn.Linear):
    """A frozen linear whose weight is stored quantized: input @ dequant(Q)ᵀ + bias, in the dtype of the input.

    The weight is decoded as a loader of the stored tensors decodes it: in every pass, and again for the gradient of the
    input, so that nothing dense is kept for backward; with `cache`, once. On a GPU, what multiplies by NF4 codes
    decodes them: see dequant_matmul.py. What it decodes from are buffers, which keep their dtypes when the module is
    cast: codes are packed, int32 [out, ceil(in * bits / 32)] or uint8 in pairs.
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
        self.out_features, self.in_features = quantized.shape
        for name, tensor in quantized.to_buffers().items():
            self.register_buffer(name, tensor)
        self.bias = frozen(bias)

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight [out, in], for reading: dtype, device and shape cost nothing, anything else decodes.

        Changing it in place or assigning its data raises RuntimeError.
        """
        return ReadOnlyWeight(lambda: self.dequantized().to(self._dtype), self._shape, self._dtype, self._device)

    @weight.setter
    def weight(self, value: object) -> None:
        raise RuntimeError(READ_ONLY)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in nn.Module; raises RuntimeError for a weight, which assigning a Parameter to it comes to."""
        if name == "weight":
            raise RuntimeError(READ_ONLY)
        super().register_parameter(name, param)

    def quantized(self) -> QuantizedTensor:
        """The stored weight; integer codes are unpacked into new memory."""
        buffers = dict(self.named_buffers(recurse=False))
        return tensor_from_buffers(buffers, self.spec, self._shape, self._decoded_dtype)

    def dequantized(self) -> torch.Tensor:
        """float32 [out, in], rounded to the dtype that a loader decodes to."""
        return self.quantized().dequantize()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., out] of [..., in], in the dtype of `input`."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if self.cache:
            return functional.linear(input, self._weight_as(input.dtype), bias)
        output: torch.Tensor = _DecodedLinear.apply(input, bias, self)  # type: ignore[no-untyped-call]
        return output

    def output(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`forward` with a weight that is decoded for it; nothing is differentiated."""
        codes = self._codes_for(input)
        if codes is None:
            return functional.linear(input, self._weight_as(input.dtype), bias)
        output = self._multiplied(dequant_matmul, input, codes)
        return output if bias is None else output.add_(bias)

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """[..., in] of the gradient of `output` [..., out], in its dtype."""
        codes = self._codes_for(gradient)
        if codes is None:
            return gradient @ self._weight_as(gradient.dtype)
        return self._multiplied(dequant_matmul_input_gradient, gradient, codes)

    def extra_repr(self) -> str:
        """As nn.Linear's, and the number format."""
        return f"{super().extra_repr()}, {self.spec.quant_type}, {self.spec.size_text}"

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def _device(self) -> torch.device:
        return next(self.buffers(recurse=False)).device

    def _codes_for(self, tokens: torch.Tensor) -> CodebookOperand | None:
        """The stored codes for a kernel that multiplies `tokens` by codes; None where no kernel does. Under autocast no
        kernel does: autocast chooses the dtype of dense operands.
        """
        has_kernel = (
            self.spec.has_code_kernels
            and self.in_features % 2 == 0
            and tokens.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and not torch.is_autocast_enabled(tokens.device.type)
            and has_kernels("dequant_matmul", tokens.device.type)
        )
        return self.quantized().operand() if has_kernel else None

    def _multiplied(
        self, operation: Callable[..., torch.Tensor], tokens: torch.Tensor, codes: CodebookOperand
    ) -> torch.Tensor:
        """The product of tokens [..., features] and stored codes, by an operation of dequant_matmul."""
        matrix = (codes.codebook, codes.block_size, self._shape, getattr(torch, self._decoded_dtype))
        product = operation(tokens.reshape(-1, tokens.shape[-1]), codes.packed, codes.absmax, *matrix)
        return product.view(*tokens.shape[:-1], product.shape[-1])

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
    """A linear whose weight is decoded for each pass; the gradient goes to input and bias alone."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, bias: torch.Tensor | None, linear: QuantizedLinear) -> torch.Tensor:
        ctx.linear = linear
        return linear.output(input, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (gradient,) = gradients
        for_input = ctx.linear.input_gradient(gradient) if ctx.needs_input_grad[0] else None
        return for_input, gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


def dense_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A frozen linear with this weight and this bias."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = frozen(bias)
    return linear


def frozen(bias: torch.Tensor | None) -> Any:
    """A parameter that is not trained; one that is a parameter already stays the same object."""
    if isinstance(bias, nn.Parameter):
        return bias.requires_grad_(False)
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
