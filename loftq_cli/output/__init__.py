"""Writing files so that a crash at any moment loses nothing. Knows no number format and no method.

checksums.py   the completeness mark of a result
disk.py        every change that is made to a disk
journal.py     the units that a run has finished, line by line
records.py     the small JSON and text files beside weights
side_files.py  tokenizers and other files that travel with a model
writer.py      one .safetensors file, written header first
copies.py      tensors that are copied, as they are or in another dtype
place.py       where a result is made, and how the result becomes visible
staging.py     the output directory: locked, and hidden until complete
staged_run.py  the one way from a plan to a published result
"""
