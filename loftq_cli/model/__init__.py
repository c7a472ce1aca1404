"""A model directory: its family, its targets, its stored weights.

builtin.py   the models that come with the package
families.py  the table of families, families.toml: one row for each model_type that needs one
family.py    a config.json, and what loaders of its family do
targets.py   which tensors are quantized, each with its reason
stored.py    a dense or quantized model, read back as matrices
"""
