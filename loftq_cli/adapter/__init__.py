"""A PEFT adapter directory, written and read.

config.py           tensor names and adapter_config.json
targets.py          the modules that a config adapts
spelling.py         wrappers and names of adapters in the names of tensors
joined_weights.py   weight files under other names, or several as one
library_adapter.py  the adapter in the own file of a library
sorting.py          the role of every tensor of an adapter file
source.py           the one reader of adapter directories
extras.py           trained weights in further files of the directory
beside.py           the adapter inside a converted directory
"""
