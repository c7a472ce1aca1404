"""Which layer gets which format and rank, under an exact bound on bytes.

integer_program.py  a proven minimum, from scipy
choice.py           the best choice under a bound
error_curves.py     the error of each layer at each format and rank
candidates.py       the formats and ranks that a layer may get
allocation.py       the choice for a whole model
"""
