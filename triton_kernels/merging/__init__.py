"""A codebook matrix and an adapter become one weight; the part of an adapter that survives quantizing again.

contract.py   checks arguments once, then calls the backend of the device
reference.py  the definition, in plain torch
triton.py     compiled for a GPU by Triton
"""
