"""Numeric primitives; installed as `loftq_cli.triton_kernels`. They know tensors and numbers, no files and no methods.

backend.py       which implementation runs on which device
codebook.py      block-wise codebook quantization (NF4): absmax, codes, packing, and back
double_quant.py  8-bit block constants, and back
error_stats.py   squared and largest error of an approximation, in one pass

`<op>.py` is the contract: it validates once and dispatches. `<op>_reference.py` is the definition in plain torch;
every other backend of an operation answers to it, codes equal bit for bit.
"""
