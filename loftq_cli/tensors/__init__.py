"""The records that all packages exchange: tensors in headers, number formats, quantized matrices, adapters, errors.

headers.py   a tensor as a header describes it; dtypes
rows.py      a matrix that is read a few rows at a time
specs.py     number formats, pooling, and the shape of an adapter
matrices.py  quantized matrices and adapter pairs in memory
metrics.py   the error of a matrix beside its approximation
"""
