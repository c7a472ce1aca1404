"""The passes of LoftQ over a stack of matrices.

contract.py   checks arguments once, then calls the backend of the device
reference.py  the definition, in plain torch
triton.py     compiled for a GPU by Triton
"""
