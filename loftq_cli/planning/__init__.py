"""What a conversion will do, decided from headers and configs alone. Needs no torch.

sizes.py           sizes like 5GB
recipe.py          the options of a conversion: asked, and settled
format_options.py  the number format that options ask for
settle.py          what was asked becomes a settled recipe, or is refused
recipe_files.py    presets and TOML files
jobs.py            a weight to quantize, a tensor to copy, a shard
settings.py        a recipe applied to one layer
matrices.py        what would be quantized, in any container
plan.py            all jobs, all output tensors, all sizes
planner.py         headers and a recipe become a plan
"""
