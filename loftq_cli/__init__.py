"""loftq-cli: quantized base weights plus LoRA tensors from a full-precision checkpoint.

Floors, each importing only from those above it in this list:
errors, tensors            what everything else speaks in
checkpoint/                files on disk: readers, writer, staging directory
quant/ lowrank metrics     numbers: formats, truncated SVD, what an error is
methods/ layouts/          LoftQ and QLoRA; on-disk containers
recipe targets plan        what will be done, decided from headers alone
convert merge inspection report   doing it
cli/                       the command line
"""

__version__ = "0.1.0"
