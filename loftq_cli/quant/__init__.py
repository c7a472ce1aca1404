"""Number formats: what `--quant-type` may name. One file per family; they know no methods and no files.

codebook.py   block-wise codebook formats (NF4)
"""
