"""Containers: names, packing and order of tensors on disk. Containers know no method and run no algorithm.

stored_tensors.py      the input of reading a container
layout.py              the contract of a container, and the table of all facts about containers
fused.py               modules that servers fuse into a matrix
foreign_names.py       names of formats and containers in other tools, for hints
dequantized.py         decoded values as an ordinary checkpoint
stored_parts.py        checks of the stored parts of a matrix
bitsandbytes.py        4-bit codebooks as bitsandbytes and transformers load them
grouped.py             the base classes of integer containers
compressed_tensors.py  integers as transformers and vLLM load them
gptq.py                integers as GPTQ loaders read them
metal.py               integers with float offsets, for transformers
mlx.py                 integers with float offsets, for MLX
"""
