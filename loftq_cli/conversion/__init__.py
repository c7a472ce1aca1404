"""The conversion: a plan runs, and the result is read back and reported.

measuring.py       errors of a layer: plain rounding, the base alone, base and adapter
report.py          measured errors, as records and as loftq_report.json; provenance of the adapter
experts.py         the experts of a layer
jobs.py            a tensor, on a processor
model_card.py      README.md of the result, and README.md of the adapter
head_tensors.py    the head of a task, in the adapter
prepare.py         the original opened and planned
gpu_jobs.py        many tensors, on a GPU
block_by_block.py  layers, while a text runs through the model
readback.py        proof that the files hold the computed numbers
run.py             all jobs in order, then publication
"""
