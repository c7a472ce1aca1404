"""Training modules over what `loftq quantize` writes: linears whose weight stays quantized, with LoftQ, QLoRA and
QA-LoRA adapters. Plain torch; no training loop.

read_only_weight.py   the weight attribute of a quantized linear
quantized_linear.py   the frozen linear
adapted_linear.py     a frozen linear with an adapter, one class per method
adapter_directory.py  saving trained adapters
adapted_model.py      loading base and adapter into a model
"""

from loftq_cli.nn.adapted_linear import LoftQLinear, QALoRALinear, QLoRALinear, QuantizationStats
from loftq_cli.nn.adapted_model import load_adapted
from loftq_cli.nn.adapter_directory import save_adapter
from loftq_cli.nn.quantized_linear import QuantizedLinear

__all__ = [
    "LoftQLinear",
    "QALoRALinear",
    "QLoRALinear",
    "QuantizationStats",
    "QuantizedLinear",
    "load_adapted",
    "save_adapter",
]
