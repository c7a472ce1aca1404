"""Training modules over what `loftq quantize` writes: linears whose weight stays quantized, with LoftQ, QLoRA and
QA-LoRA adapters. Plain torch; no training loop.

quantized_linear.py   the frozen linear
read_only_weight.py   what it shows as its weight
adapted_linear.py     a frozen linear with an adapter, one class per method
adapted_model.py      loading them into a model
adapter_directory.py  saving trained adapters
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
