"""Files on disk. The only place that opens weight files; knows no number format and no method.

watched_file.py       a file that must not change while it is read
json_files.py         strict JSON
safetensors_file.py   header-checked reading of one .safetensors file
torch_file.py         reading of one torch zip file, with no code of it ever run
torch_pickle.py       the pickle inside it, as data
source.py             a checkpoint as a whole: which files it consists of, and its tensors
disk.py               every change that is made to a disk
writer.py             header-first writing of one .safetensors file
journal.py            what a run has finished, line by line
checksums.py          the completeness mark of a result
place.py              where a result is made, and how it becomes visible
staging.py            the output directory: locked, and hidden until it is complete
side_files.py         the small files that travel with a model
"""
