"""loftq-cli: quantized base weights plus LoRA tensors from a full-precision checkpoint.

The map, from the ground up; each line imports only from lines above.

errors          errors that a user can fix, and exit statuses
triton_kernels  numeric primitives, which know nothing of the rest
runtime         threads, order, a GPU, compiled kernels
tensors         headers, number formats, matrices, adapters, errors: the records that all packages exchange
checkpoint      reading files, with distrust
quant           number formats
output          writing files, crash-safe
methods         LoftQ, QLoRA and QA-LoRA
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
cli             the command line
"""

from pathlib import Path

__version__ = "0.1.0"

# Installed, `triton_kernels` lies inside this package. In a source tree the folder lies beside the package.
if not (Path(__file__).parent / "triton_kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))
