"""Number formats: the names that `--quant-type` takes. Each family has a file; the files know no methods and no disk.

formats.py         the table of formats, and the protocol of a quantizer
blocks.py          the search and the refinement of constants, for all families
affine.py          integers in groups: 2, 3, 4 and 8 bits
codebook.py        codebooks in blocks: NF4 and FP4
codebook_stack.py  codebooks of many equal matrices on a GPU
plain.py           plain rounding, the measure of every base
gpu_matrix.py      one matrix on a GPU: merge, quantize again, measure
"""
