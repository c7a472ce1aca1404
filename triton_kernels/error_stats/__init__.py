"""Squared and largest error of an approximation, in one pass.

contract.py   checks arguments once, then calls the backend of the device
reference.py  the definition, in plain torch
cpu.py        compiled for a processor by numba
triton.py     compiled for a GPU by Triton
"""
