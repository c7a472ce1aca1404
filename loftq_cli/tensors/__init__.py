"""The common records of all packages: tensors in headers, libraries, number formats, matrices, adapters, errors.

headers.py    the header's description of a tensor; dtypes
libraries.py  the libraries that load models: names of files, keys of configs, rules about layers
rows.py       a matrix by rows, a few rows at a time
specs.py      number formats, pooling, and the shape of an adapter
matrices.py   quantized matrices and adapter pairs in memory
metrics.py    the error of an approximation of a matrix
updates.py    the change of a weight by trained adapters
"""
