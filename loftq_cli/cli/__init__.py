"""The command line: parses, calls one function of the API and prints. No arithmetic, no torch, no weight files.

console.py              results on stdout, everything else on stderr
render_quantize.py      the plan and the result of `loftq quantize`
render_merge.py         the plan and the result of `loftq merge`
render_inspect.py       the tables and the JSON of `loftq inspect`
render_verification.py  the problems and the summary of `loftq inspect --verify`
progress.py             a bar or lines on stderr while a command runs
options.py              options of merge, and options of several commands
options_quantize.py     options of quantize alone
options_inspect.py      options of inspect and calibrate
calibrate.py            the command `loftq calibrate`
merge.py                the command `loftq merge`
quantize.py             the command `loftq quantize`
inspect.py              the command `loftq inspect`
main.py                 all commands together; an error becomes a line on stderr and an exit status here only
"""
