"""A trainable linear: the full-precision weight is a Parameter, and each pass computes with the quantized form of the
weight. No adapter here.

Fake quantization (Jacob et al., arXiv 1712.05877) with the straight-through estimator (Bengio et al., arXiv 1308.3432).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from loftq_cli.nn.quantized_linear import QuantizedLinear
from loftq_cli.quant.formats import QuantizedTensor, QuantSpec, make_quantizer
from loftq_cli.runtime.workers import started
from loftq_cli.tensors.rows import TensorRows


class FakeQuantizedLinear(nn.Linear):
    """A linear with a trainable full-precision weight W: input @ dequant(quantize(W))ᵀ + bias.

    Every pass quantizes W again, so a training step changes codes and constants. The gradient of W is the gradient
    of the quantized weight (straight-through); the gradient of the input sees the quantized weight.

    weight   Parameter [out, in], floating point
    bias     Parameter [out], or None; the bias trains too
    spec     the number format

    >>> from loftq_cli.tensors.specs import CodebookSpec
    >>> linear = FakeQuantizedLinear(torch.randn(32, 64), None, CodebookSpec(), "float32")
    >>> linear(torch.randn(2, 64)).sum().backward()
    >>> linear.weight.grad.shape
    torch.Size([32, 64])
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, spec: QuantSpec, dtype: str, scales: str = "absmax"
    ) -> None:
        """`weight` [out, in] and `bias` [out] become the Parameters; `dtype` ("bfloat16", ...) is the dtype of decoded
        codes; `scales` is the choice of the constants of blocks or groups, a name in SCALES.
        """
        super(nn.Linear, self).__init__()  # nn.Linear's own would allocate another weight
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.spec, self._decoded_dtype, self._scales = spec, dtype, scales

    def quantized(self) -> QuantizedTensor:
        """The quantized form of the present weight.

        Raises NumericError for a weight with NaN or infinite values.
        """
        with torch.no_grad():
            quantizer = make_quantizer(self.spec, self._decoded_dtype, self._scales)
            quantized: QuantizedTensor = quantizer.quantize(TensorRows(self.weight.detach()))
        return quantized

    def dequantized(self) -> torch.Tensor:
        """float32 [out, in], without a gradient: every pass multiplies by the returned numbers."""
        quantized = self.quantized()
        with torch.no_grad():
            return make_quantizer(quantized.spec, quantized.dtype).dequantize(quantized)

    def frozen(self, *, cache: bool = False) -> QuantizedLinear:
        """A QuantizedLinear with the codes of the trained weight and a copy of the bias; device and mode stay. `cache`
        makes the QuantizedLinear keep the decoded weight. Torch's threads do not change the codes.

        Raises NumericError for a weight with NaN or infinite values.
        """
        with started(1):
            quantized = self.quantized()
        bias = None if self.bias is None else self.bias.detach().clone()
        linear = QuantizedLinear(quantized, bias, dtype=self.weight.dtype, cache=cache)
        return linear.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., out] of [..., in], in the dtype of `input`."""
        # The difference is 0, and carries the gradient of the weight.
        weight = self.dequantized().to(self.weight.dtype) + (self.weight - self.weight.detach())
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, weight.to(input.dtype), bias)

    def extra_repr(self) -> str:
        """The text of nn.Linear, and the number format."""
        return f"{super().extra_repr()}, {self.spec.quant_type}, {self.spec.size_text}"
