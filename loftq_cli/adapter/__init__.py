"""A PEFT adapter directory, written and read.

config.py   tensor names and adapter_config.json
targets.py  the modules that a config names
beside.py   the adapter inside a converted directory
source.py   any adapter directory, read with distrust
"""
