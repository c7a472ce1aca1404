"""A model directory: the family, the tensors to quantize, the stored weights.

builtin.py       the models inside the package
blocks.py        the table of block structures, blocks.toml: the path of the numbers through a block
families.py      the table of families, families.toml: a row for each model_type with special facts
loaded_names.py  the table loaded_names.json: names that transformers gives to tensors while loading
task_heads.py    the head of a task, and the class with the head
foreign.py       quantized weights in a format that is not read
family.py        a config.json, and the loaders of the family
experts.py       the matrices of the experts, and experts.toml: a row for each family with one tensor for all experts
targets.py       the tensors to quantize, and the reason of each decision
skipping.py      layers in full precision that a library cannot tell from quantized layers
stored.py        a dense or quantized model, read back as matrices
"""
