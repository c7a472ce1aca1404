"""The command line: parses, calls one function of the API and prints. No arithmetic, no torch, no weight files.

render/                 results as tables and JSON, progress on stderr
options.py              options of merge, and options of several commands
options_quantize.py     options of quantize alone
options_inspect.py      options of inspect and calibrate
calibrate.py            the command `loftq calibrate`
merge.py                the command `loftq merge`
quantize.py             the command `loftq quantize`
inspect.py              the command `loftq inspect`
recipes.py              the command `loftq recipes`
guidance.py             examples of the help, and hints for mistyped options
main.py                 all commands together; an error becomes a line on stderr and an exit status here only
start.py                catches signals, and runs the command line
"""
