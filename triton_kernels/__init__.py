"""Numeric primitives; installed as `loftq_cli.triton_kernels`. They know tensors and numbers, no files and no methods.

affine.py         group-wise integer quantization: codes, scales, zero points, and back
backend.py        which implementation runs on which device
codebook.py       block-wise codebook quantization (NF4): absmax, codes, packing, and back; what it loses
cpu_kernels.py    the loops of what is compiled for the processor
dequant_matmul.py products with a codebook matrix that is decoded on the way, and with an adapter beside it
double_quant.py   8-bit block constants, and back
error_stats.py    squared and largest error of an approximation, in one pass; of codes and an adapter, fused
factors.py        the factors of an adapter as the fused operations take them
merging.py        a codebook matrix and an adapter made one weight; what survives quantizing again
packing.py        integer codes as a bit stream in 32-bit words, and back
refinement.py     codes and constants of least error, by themselves and under what an adapter absorbs
residual.py       the passes of LoftQ over a stack of matrices

`<op>.py` is the contract: it validates once and dispatches. `<op>_reference.py` is the definition in plain torch;
every other backend of an operation answers to it, codes equal bit for bit. `<op>_cpu.py` is compiled for the processor,
`<op>_triton.py` for GPUs, with what they share in launch_triton.py and tiles_triton.py.
"""
