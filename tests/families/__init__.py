"""Tiny models of every family through the whole way, and the table of what came of them.

inputs.py   what a model of each class reads
ways.py     convert, load, train a step, merge, compare
table.py    the table in README.md
"""
