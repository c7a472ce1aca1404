"""A PEFT adapter directory, written and read.

config.py   tensor names and adapter_config.json
targets.py  the modules that a config adapts
expert_factors.py  factors of experts in PEFT's layout of whole parameters
spelling.py  wrappers and names of adapters in the names of tensors
sorting.py  the role of every tensor of an adapter file
source.py   the one reader of adapter directories
extras.py   trained weights in further files of the directory
beside.py   the adapter inside a converted directory
"""
