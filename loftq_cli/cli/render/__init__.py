"""Typed results as tables and JSON on stdout; progress on stderr. No arithmetic.

console.py       results on stdout, everything else on stderr
conversion.py    a plan and a conversion
merging.py       a plan of a merge and a merge
inspection.py    errors of layers and tensors
verification.py  damage
progress.py      the progress of a command, as an observer
"""
