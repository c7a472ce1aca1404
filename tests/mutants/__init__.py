"""Mutation testing: one small change at a time in `output`, `checkpoint` and `merging`, and the tests must notice.

making.py      mutants of a file, and those that mypy refuses
trying.py      the tests that run the changed line, in a fork for each mutant
survivors.py   the list of survivors with a reason each
__main__.py    the command

README.md says how to run the command and what the numbers mean.
"""
