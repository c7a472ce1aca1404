"""Looking at results and checkpoints: errors, damage.

devices.py       where an inspection computes
findings.py      damage that was found
consistency.py   whether the files of a result agree
converted.py     the layers of a converted directory
dense.py         the tensors of a full-precision checkpoint
verification.py  every byte of a directory, checked
"""
