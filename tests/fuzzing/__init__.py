"""Every parser under mutated input: `python -m tests.fuzzing`. Only our own errors may come out.

mutations.py      hostile bytes and JSON values, made from good ones
engine.py         runs a target on numbered inputs, each made from the seed and its number alone
targets.py        the table of targets
weight_files.py   safetensors, torch files, JSON and model folders
models.py         config.json: families, plans and the containers of quantized weights
adapters.py       adapter directories, alone and beside a base
results.py        what conversions leave behind, and recipes
"""
