"""What a conversion will do, decided from headers and configs alone. Needs no torch.

sizes.py         sizes like 5GB
recipe.py        the options of a conversion, checked
jobs.py          a weight to quantize, a tensor to copy, a shard
recipe_files.py  presets and TOML files
settings.py      a recipe applied to one layer
plan.py          all jobs, all output tensors, all sizes
planner.py       headers and a recipe become a plan
"""
