"""The command line: parses, calls one function and prints. No arithmetic, no torch, no weight files.

console.py    results on stdout, everything else on stderr
options.py    every option, declared once
calibrate.py  the command `loftq calibrate`
merge.py      the command `loftq merge`
outputs.py    what `inspect --reference` shows
quantize.py   the command `loftq quantize`
verify.py     what `inspect --verify` shows
inspect.py    the command `loftq inspect`
main.py       all commands together, and the one place where errors become a line and an exit status
"""
