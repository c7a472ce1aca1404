"""loftq-cli: quantized base weights plus LoRA tensors from a full-precision checkpoint.

The map, from the ground up; each line imports only from lines above.

errors          errors that a user can fix, and exit statuses
triton_kernels  numeric primitives, which know nothing of the rest
runtime         threads, order, a GPU, compiled kernels
tensors         headers, number formats, matrices, adapters, errors: the records that all packages exchange
checkpoint      reading files, with distrust
quant           number formats
output          writing files, crash-safe
methods         LoftQ, QLoRA, QA-LoRA and QPiSSA
layouts         containers on disk
model           a model directory
adapter         an adapter directory
planning        what will be done
allocation      which layer gets which format and rank under a bound
activations     models that run: calibration, comparison
conversion      a plan runs
merging         base and adapter become one
inspecting      errors and damage of what exists
nn              modules that train adapters over packed weights
api             quantize, merge, inspect, calibrate and recipes as functions
cli             the command line

The names of the Python API are loaded when they are first used:

>>> import loftq_cli as loftq
>>> plan = loftq.quantize("builtin:tiny-llama", "base", rank=8, dry_run=True)
>>> len(plan.layers)
28
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli.runtime.version import VERSION as __version__

# Installed, `triton_kernels` lies inside this package. In a source tree the folder lies beside the package.
if not (Path(__file__).parent / "triton_kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

# Name -> the module that defines it. Nothing is imported before it is used: torch takes seconds, and a plan needs none.
_EXPORTS = {
    "quantize": "api.quantize",
    "merge": "api.merge",
    "inspect": "api.inspect",
    "calibrate": "api.calibrate",
    "recipes": "api.recipes",
    "Observer": "api.observer",
    "QuantizePlan": "api.results",
    "QuantizeResult": "api.results",
    "MergePlan": "api.results",
    "MergeResult": "api.results",
    "ConvertedInspection": "api.results",
    "CheckpointInspection": "api.results",
    "Verification": "inspecting.findings",
    "Preset": "api.recipes",
    "CalibrationResult": "activations.calibration",
    "LoftqError": "errors",
    "UsageError": "errors",
    "InputError": "errors",
    "NumericError": "errors",
    "StorageError": "errors",
    "MismatchError": "errors",
    "QualityError": "errors",
    "MemoryShortage": "errors",
    "LoftQLinear": "nn",
    "QLoRALinear": "nn",
    "QALoRALinear": "nn",
    "attach": "nn",
    "load_adapted": "nn",
    "replace_lora_weights": "nn",
    "save_adapter": "nn",
}

__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from loftq_cli.activations.calibration import CalibrationResult as CalibrationResult
    from loftq_cli.api.calibrate import calibrate as calibrate
    from loftq_cli.api.inspect import inspect as inspect
    from loftq_cli.api.merge import merge as merge
    from loftq_cli.api.observer import Observer as Observer
    from loftq_cli.api.quantize import quantize as quantize
    from loftq_cli.api.recipes import Preset as Preset
    from loftq_cli.api.recipes import recipes as recipes
    from loftq_cli.api.results import CheckpointInspection as CheckpointInspection
    from loftq_cli.api.results import ConvertedInspection as ConvertedInspection
    from loftq_cli.api.results import MergePlan as MergePlan
    from loftq_cli.api.results import MergeResult as MergeResult
    from loftq_cli.api.results import QuantizePlan as QuantizePlan
    from loftq_cli.api.results import QuantizeResult as QuantizeResult
    from loftq_cli.errors import InputError as InputError
    from loftq_cli.errors import LoftqError as LoftqError
    from loftq_cli.errors import MemoryShortage as MemoryShortage
    from loftq_cli.errors import MismatchError as MismatchError
    from loftq_cli.errors import NumericError as NumericError
    from loftq_cli.errors import QualityError as QualityError
    from loftq_cli.errors import StorageError as StorageError
    from loftq_cli.errors import UsageError as UsageError
    from loftq_cli.inspecting.findings import Verification as Verification
    from loftq_cli.nn import LoftQLinear as LoftQLinear
    from loftq_cli.nn import QALoRALinear as QALoRALinear
    from loftq_cli.nn import QLoRALinear as QLoRALinear
    from loftq_cli.nn import load_adapted as load_adapted
    from loftq_cli.nn import replace_lora_weights as replace_lora_weights
    from loftq_cli.nn import save_adapter as save_adapter
    from loftq_cli.nn.attach import attach as attach
else:

    def __getattr__(name: str) -> object:
        if name not in _EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
