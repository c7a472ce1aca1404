"""Products with a codebook matrix that is decoded on the way.

contract.py   checks arguments once, then calls the backend of the device
reference.py  the definition, in plain torch
triton.py     compiled for a GPU by Triton
"""
