"""Group-wise integers: codes, scales and zero points from a matrix, and back.

contract.py   checks arguments once, then calls the backend of the device
reference.py  the definition, in plain torch
cpu.py        compiled for a processor by numba
triton.py     compiled for a GPU by Triton
"""
