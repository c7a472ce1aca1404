"""Kernels that multiply by codes themselves, and weights that they cannot multiply."""

from __future__ import annotations

import pytest
import torch
from support.adapted_modules import IN, OUT, assert_close, decoded, quantize, quantized, random
from support.interpreter import kernel_device, triton_kernels

from loftq_cli.nn import QuantizedLinear
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.tensors.specs import CodebookSpec


@pytest.fixture
def on_triton():
    """Triton's kernels; the weight must not be decoded as a whole."""
    with triton_kernels(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantizedLinear, "dequantized", lambda self: pytest.fail("decoded"))
        yield


@pytest.mark.interpreter
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_kernels_that_multiply_codes_give_the_output_and_the_gradients(double_quant, dtype, bias, on_triton):
    tensor = quantize(random(OUT, IN, seed=1) * 0.1, CodebookSpec(double_quant=double_quant))
    offset = random(OUT, seed=4) if bias else None
    layer = QuantizedLinear(tensor, offset).to(kernel_device())
    weight = make_quantizer(tensor.spec, "float32").dequantize(tensor).to(dtype).double()
    inputs, upstream = random(2, 5, IN, dtype=dtype), random(2, 5, OUT, seed=5, dtype=dtype)
    x = inputs.to(kernel_device()).requires_grad_()

    output = layer(x)
    output.backward(upstream.to(kernel_device()))

    tolerance = 1e-6 + torch.finfo(dtype).eps  # the product is rounded, and with the bias again
    exact = inputs.double() @ weight.T + (0.0 if offset is None else offset.to(dtype).double())
    assert output.dtype == x.grad.dtype == dtype
    assert_close(output.cpu(), exact, tolerance)
    assert_close(x.grad.cpu(), upstream.double() @ weight, tolerance)


@pytest.mark.interpreter
def test_kernels_that_multiply_codes_take_any_number_of_inputs(on_triton):
    layer, x = QuantizedLinear(quantized("nf4")).to(kernel_device()), random(100, IN)
    exact = x.double() @ decoded(quantized("nf4")).T

    x = x.to(kernel_device())
    assert_close(layer(x).cpu(), exact, 1e-5)
    assert_close(layer(x[0]).cpu(), exact[0], 1e-5)
    assert layer(x[:0]).shape == (0, OUT)


@pytest.mark.interpreter
def test_what_kernels_cannot_multiply_is_decoded():
    """Other formats, other dtypes, rows that share a byte, autocast, and a weight that is kept."""
    device = kernel_device()
    odd = QuantizedLinear(quantize(random(OUT, 33) * 0.1, CodebookSpec(double_quant=False))).to(device)
    nf4, exact = QuantizedLinear(quantized("nf4")).to(device), decoded(quantized("nf4")).T
    x, x_odd = random(3, IN).to(device), random(3, 33).to(device)
    with triton_kernels():
        assert_close(nf4(x.double()).cpu(), x.double().cpu() @ exact, 1e-6)
        assert_close(odd(x_odd).cpu(), x_odd.cpu() @ odd.dequantized().T.cpu(), 1e-6)
        for layer in (QuantizedLinear(quantized("int4")), QuantizedLinear(quantized("nf4"), cache=True)):
            layer = layer.to(device)
            assert_close(layer(x).cpu(), x.cpu() @ layer.dequantized().T.cpu(), 1e-6)
        with torch.autocast(device.type, torch.bfloat16):
            assert nf4(x).dtype == torch.bfloat16
