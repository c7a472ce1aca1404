"""Training modules with a quantized base and a LoRA adapter: made of an existing linear or of a loaded model, or loaded
from the output of `loftq quantize`. Plain torch; no training loop.

read_only_weight.py       the weight attribute of a quantized linear
quantized_linear.py       the frozen linear
fake_quantized_linear.py  the linear whose full-precision weight trains
starts/                   base and adapter computed in memory
adapted_linear.py         a linear with an adapter
loftq_linear.py           linear and adapter for LoftQ and QLoRA
qalora_linear.py          linear and adapter for QA-LoRA
adapter_directory.py      saving trained adapters
adapted_model.py          loading base and adapter into a model
attach.py                 all linears of a loaded model
"""

from loftq_cli.nn.adapted_linear import AdaptedLinear
from loftq_cli.nn.adapted_model import load_adapted
from loftq_cli.nn.adapter_directory import save_adapter
from loftq_cli.nn.attach import attach
from loftq_cli.nn.fake_quantized_linear import FakeQuantizedLinear
from loftq_cli.nn.loftq_linear import LoftQLinear, QLoRALinear
from loftq_cli.nn.qalora_linear import QALoRALinear, QuantizationStats
from loftq_cli.nn.quantized_linear import QuantizedLinear
from loftq_cli.nn.starts.lora_weights import replace_lora_weights

__all__ = [
    "AdaptedLinear",
    "FakeQuantizedLinear",
    "LoftQLinear",
    "QALoRALinear",
    "QLoRALinear",
    "QuantizationStats",
    "QuantizedLinear",
    "attach",
    "load_adapted",
    "replace_lora_weights",
    "save_adapter",
]
