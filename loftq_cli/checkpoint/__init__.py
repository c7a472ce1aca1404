"""Reading files that nobody vouches for. Only this package opens weight files. The package knows no number
format and no method.

record_schema.py     records of JSON values, checked by type hints
patterns.py          regular expressions that come with a file, matched in bounded time
watched_file.py      a file that must not change while it is read
json_files.py        strict JSON
safetensors_file.py  one .safetensors file, its header checked
source.py            a whole checkpoint: its files and its tensors
statistics.py        what `loftq calibrate` wrote
torch_pickle.py      the pickle inside a torch file, read as data
torch_file.py        one torch zip file; no code in the file runs
"""
