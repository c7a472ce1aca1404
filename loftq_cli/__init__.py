"""loftq-cli: quantized base weights plus LoRA tensors from a full-precision checkpoint.

The map, floor by floor; each imports only from those above it in this list.
errors tensors rows              what everything else speaks in
workers device                   threads that share the work; a GPU
triton_kernels/                  numeric primitives, which know nothing of the rest
checkpoint/                      files on disk: readers, writer, staging directory
quant/ lowrank metrics           number formats, truncated SVD, what an error is
kernels                          when compiled kernels are worth loading
methods/ layouts/                LoftQ, QLoRA and QA-LoRA; on-disk containers
schedule                         in which order jobs run, and side by side
recipe family targets plan       what will be done, decided from headers and configs alone
base_model                       a converted or dense model, read back as matrices
report                           what was measured, and the files that say so
jobs device_jobs convert         one tensor; many on a GPU; the whole conversion
knapsack error_curves candidates allocation   which layer gets which format and rank under a bound
hf text_windows streamed_model   transformers; the user's text; a model of which one block is in memory
calibration reference            statistics of what layers read; outputs beside the original's
device_matrix inspection         one matrix on a GPU; what a directory holds
adapter_source provenance        a PEFT adapter, and whether it belongs to a base
nn/                              modules to train adapters over packed weights
merge_form merge_plan            what a merge will write
merge_report merge               base plus adapter
cli/                             the command line
"""

__version__ = "0.1.0"
