"""Number formats: what `--quant-type` may name. One file per family; they know no methods and no files.

affine.py          group-wise integers (2, 3, 4 and 8 bits)
blocks.py          searching and refining constants, for both
codebook.py        block-wise codebook formats (NF4)
codebook_stack.py  the same of many equal matrices on a GPU
formats.py         the table, and what every format can do
"""
