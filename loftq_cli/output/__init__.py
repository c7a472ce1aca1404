"""Writing files so that a crash at any moment loses nothing. Knows no number format and no method.

checksums.py   the completeness mark of a result
disk.py        every change to a disk
journal.py     the finished units of a run, line by line
records.py     the small JSON and text files beside weights
side_files.py  tokenizers and further small files of a model
writer.py      a .safetensors file, written header first
copies.py      copies of tensors, unchanged or cast to a dtype
place.py       the folder of a result in the making, and the publication of the result
staging.py     the output directory: locked, and hidden until complete
staged_run.py  the only way from a plan to a published result
"""
