"""The Python API: one function for each command of the command line, with the names of its options as keywords.

A function plans, runs and gives one typed result. Nothing is printed, and the process is left as it was. Import the
names from `loftq_cli`, which loads them when they are first used.

arguments.py  paths, sizes and numbers as callers give them, and the frame of every call
results.py    what the functions give back
observer.py   progress: what a caller can hear of a call that runs
quantize.py   a checkpoint becomes a quantized base and an adapter
merge.py      base and adapter become one checkpoint
inspect.py    errors of a model, or damage of files
calibrate.py  statistics of what the layers of a model read
"""
