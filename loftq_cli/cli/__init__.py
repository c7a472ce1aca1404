"""The command line: it parses, calls one function and prints. No arithmetic, no torch, no weight files.

main.py       the commands together, and the one place where errors become a line and an exit status
options.py    every option, declared once
console.py    what goes to stdout and what goes to stderr
quantize.py   merge.py   inspect.py   calibrate.py   one file per command
"""
