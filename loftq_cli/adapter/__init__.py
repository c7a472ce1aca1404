"""A PEFT adapter directory, written and read.

config.py           tensor names and adapter_config.json
base_record.py      the base of an adapter, at a place that PEFT keeps
targets.py          the modules that a config adapts
expert_factors.py   factors of experts in PEFT's layout of whole parameters
parameters.py       the parameters that a config adapts as a whole
spelling.py         wrappers and names of adapters in the names of tensors
fused.py            matrices that hold the rows of several modules
naming.py           names of a base as an adapter spells the names
joined_weights.py   weight files under other names, or several as one
library_adapter.py  the adapter in the own file of a library
sorting.py          the role of every tensor of an adapter file
source.py           the one reader of adapter directories
experts/            adapters on experts, and the files of a base
extras.py           trained weights in further files of the directory
beside.py           the adapter inside a converted directory
"""
