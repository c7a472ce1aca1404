"""The Python API: a function for each command of the command line; the options of a command are keywords.

A function plans, runs and returns a typed result. Nothing is printed, and the process does not change. Import the names
from `loftq_cli`: a name is loaded at the first use.

arguments.py  paths, sizes and numbers as callers give them, and the frame of every call
results.py    the records that the functions return
observer.py   progress of a running call
quantize.py   a checkpoint becomes a quantized base and an adapter
merge.py      an adapter is merged into a base
inspect.py    errors of a model, or damage of files
calibrate.py  statistics of the inputs of a model's layers
recipes.py    the presets side by side
"""
