"""Reads results and checkpoints, and reports errors and damage.

devices.py       the device of an inspection
findings.py      problems and notes of a verification
consistency.py   checks of the files of a result against each other
loader_check.py  checks of the files against the model that transformers would load
converted.py     the layers of a converted directory
dense.py         the tensors of a full-precision checkpoint
verification.py  checks of every byte of a directory
"""
