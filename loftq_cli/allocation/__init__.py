"""The choice of a number format and a rank for each layer, under an exact bound on bytes.

integer_program.py  a proven minimum, from scipy
choice.py           the best choice under a bound
error_curves.py     the error of each layer in each format, with an adapter of each rank
candidates.py       the formats and ranks open to a layer
allocation.py       the choice for a whole model
"""
