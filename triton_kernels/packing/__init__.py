"""Integer codes as a bit stream in 32-bit words, and back.

contract.py   checks arguments once, then calls the backend of the device
reference.py  the definition, in plain torch
triton.py     compiled for a GPU by Triton
"""
