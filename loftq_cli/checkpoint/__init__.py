"""Reading files of strangers, with distrust. No file outside of the package opens weight files. The package knows no
number format and no method.

record_schema.py     records of JSON values, checked by type hints
patterns.py          regular expressions from a file, matched in bounded time
watched_file.py      a file under watch for changes while reading
json_files.py        strict JSON
safetensors_file.py  a .safetensors file, with a check of the header
quantized_source.py  float8 weights with scales, and descriptions of a quantization
source.py            a whole checkpoint: weight files and tensors
statistics.py        the statistics of `loftq calibrate`
torch_pickle.py      the pickle inside a torch file, read as data
torch_file.py        a torch zip file; no code in the file runs
"""
