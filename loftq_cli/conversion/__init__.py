"""The conversion: a plan runs, is read back, is reported.

report.py      measured errors, as records and as loftq_report.json
jobs.py        one tensor, on a processor
model_card.py  README.md of the result
prepare.py     the source opened and planned
gpu_jobs.py    many tensors, on a GPU
readback.py    proof that the files hold what was computed
run.py         all jobs in order, then publication
"""
