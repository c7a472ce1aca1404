"""A frozen linear with a quantized weight. Every pass decodes the weight. No adapter here."""

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
    """A frozen linear with a quantized weight Q [out, in]: input @ dequant(Q)ᵀ + bias, in the dtype of the input.

    Every pass decodes Q to the numbers of a loader, and the gradient of the input decodes Q again, so no dense weight
    waits for backward; `cache` decodes once. GPU kernels multiply by NF4 codes directly, see dequant_matmul.
    Codes and constants are buffers, and keep the dtypes when the module is cast: codes are packed, int32
    [out, ceil(in * bits / 32)] for integers, or uint8 [ceil(out * in / 2)] for a codebook.
    The bias [out] is a frozen Parameter.

    >>> from loftq_cli.quant.formats import make_quantizer
    >>> from loftq_cli.tensors.rows import TensorRows
    >>> from loftq_cli.tensors.specs import CodebookSpec
    >>> quantizer = make_quantizer(CodebookSpec(), "float32")
    >>> linear = QuantizedLinear(quantizer.quantize(TensorRows(torch.randn(32, 64))))
    >>> linear(torch.randn(2, 64)).shape, linear.packed.shape
    (torch.Size([2, 32]), torch.Size([1024]))
    """

    def __init__(
        self,
        quantized: QuantizedTensor,
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        cache: bool = False,
    ) -> None:
        """`bias` [out] becomes a frozen Parameter; `dtype` is the dtype of `weight`, the decoded dtype by default."""
        super(nn.Linear, self).__init__()  # nn.Linear's own would allocate a dense weight
        self.spec: QuantSpec = quantized.spec
        self.cache = cache
        self._decoded_dtype = quantized.dtype
        self._dtype = getattr(torch, quantized.dtype) if dtype is None else dtype
        self._cached: torch.Tensor | None = None
        self.out_features, self.in_features = quantized.shape
        for name, tensor in quantized.to_buffers().items():
            self.register_buffer(name, tensor)
        self.bias = freeze_bias(bias)

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight [out, in], for reading. Reading dtype, device and shape costs nothing; reading numbers
        decodes. Raises RuntimeError for a change in place and for assigned data.
        """
        return ReadOnlyWeight(lambda: self.dequantized().to(self._dtype), self._shape, self._dtype, self._device)

    @weight.setter
    def weight(self, value: object) -> None:
        raise RuntimeError(READ_ONLY)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """nn.Module's, but raises RuntimeError for a Parameter called "weight"."""
        if name == "weight":
            raise RuntimeError(READ_ONLY)
        super().register_parameter(name, param)

    def quantized(self) -> QuantizedTensor:
        """The quantized weight; integer codes are unpacked into new memory, uint8 [out, in]."""
        buffers = dict(self.named_buffers(recurse=False))
        return tensor_from_buffers(buffers, self.spec, self._shape, self._decoded_dtype)

    def dequantized(self) -> torch.Tensor:
        """float32 [out, in], rounded to the dtype of a loader."""
        return self.quantized().dequantize()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., out] of [..., in], in the dtype of `input`."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if self.cache:
            return functional.linear(input, self._weight_as(input.dtype), bias)
        output: torch.Tensor = _DecodedLinear.apply(input, bias, self)  # type: ignore[no-untyped-call]
        return output

    def output(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`forward` without autograd: decodes the weight, or multiplies by codes."""
        codes = self._codes_for(input)
        if codes is None:
            return functional.linear(input, self._weight_as(input.dtype), bias)
        output = self._multiply(dequant_matmul, input, codes)
        return output if bias is None else output.add_(bias)

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """[..., in]: the gradient of the input, in the dtype of `gradient` [..., out] of the output."""
        codes = self._codes_for(gradient)
        if codes is None:
            return gradient @ self._weight_as(gradient.dtype)
        return self._multiply(dequant_matmul_input_gradient, gradient, codes)

    def extra_repr(self) -> str:
        """The text of nn.Linear, and the number format."""
        return f"{super().extra_repr()}, {self.spec.quant_type}, {self.spec.size_text}"

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def _device(self) -> torch.device:
        return next(self.buffers(recurse=False)).device

    def _codes_for(self, tokens: torch.Tensor) -> CodebookOperand | None:
        """The stored codes for a kernel with products of `tokens` and codes; None where no kernel fits. No kernel fits
        under autocast: autocast chooses the dtype of dense operands.
        """
        has_kernel = (
            self.spec.has_code_kernels
            and self.in_features % 2 == 0
            and tokens.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and not torch.is_autocast_enabled(tokens.device.type)
            and has_kernels("dequant_matmul", tokens.device.type)
        )
        return self.quantized().operand() if has_kernel else None

    def _multiply(
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
        # Cast constants decode to different numbers, so a cast changes only the dtype of `weight`.
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
    """A linear with decoding in each pass. Only input and bias have gradients."""

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
    """A frozen nn.Linear with `weight` [out, in] and `bias` [out].

    >>> [parameter.requires_grad for parameter in dense_linear(torch.ones(3, 2), torch.ones(3)).parameters()]
    [False, False]
    """
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = freeze_bias(bias)
    return linear


def freeze_bias(bias: torch.Tensor | None) -> Any:
    """`bias` [out] as a frozen Parameter, or None; a Parameter stays the object of the caller.

    >>> freeze_bias(torch.ones(3)).requires_grad, freeze_bias(None)
    (False, None)
    """
    if isinstance(bias, nn.Parameter):
        return bias.requires_grad_(False)
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
