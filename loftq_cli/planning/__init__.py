"""The plan of a conversion: headers and configs decide all bytes but the numbers. Needs no torch.

sizes.py           sizes like 5GB
recipe.py          the options of a conversion, before and after settling
format_options.py  options become a number format
settle.py          requested options become a settled recipe, or an error
recipe_files.py    presets and TOML files
jobs.py            a weight to quantize, a tensor to copy, a shard
settings.py        a recipe applied to one layer
matrices.py        the weights to quantize, in any container
plan.py            all jobs, all output tensors, all sizes
planner.py         headers and a recipe become a plan
"""
