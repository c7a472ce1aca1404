"""A model directory: its family, its targets, its stored weights.

builtin.py  the models that come with the package
family.py   a config.json, and what loaders of its family do
targets.py  which tensors are quantized, each with its reason
stored.py   a dense or quantized model, read back as matrices
"""
