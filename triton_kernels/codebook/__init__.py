"""Block-wise codebooks (NF4, FP4): absmax and packed codes from a matrix, and back.

contract.py   checks arguments once, then calls the backend of the device
reference.py  the definition, in plain torch
cpu.py        compiled for a processor by numba
triton.py     compiled for a GPU by Triton
"""
