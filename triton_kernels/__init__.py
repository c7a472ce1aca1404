"""Numeric primitives; installed as `loftq_cli.triton_kernels`. They know tensors and numbers, no files and no methods.

backend.py        which implementation of an operation runs on which device
kernel_cache.py   the files in which numba keeps compiled loops, under a seal
cpu_kernels.py    the loops that numba compiles for a processor
launch_triton.py  how every Triton kernel is launched
codebook/         block-wise codebooks (NF4, FP4)
affine/           group-wise integers
packing/          integer codes as a bit stream
double_quant/     8-bit block constants
factors.py        the factors of an adapter as fused operations take them
tiles_triton.py   tiles that several Triton kernels decode and multiply
error_stats/      squared and largest error of an approximation
merging/          a codebook matrix and an adapter become one weight
dequant_matmul/   products with a codebook matrix
residual/         the passes of LoftQ over a stack of matrices
refinement/       codes and constants of least error

Each folder holds one operation. `contract.py` validates once and dispatches. `reference.py` is the definition in plain
torch; codes of every other backend are equal to it bit for bit. `cpu.py` is compiled for a processor, `triton.py` for a
GPU.
"""
