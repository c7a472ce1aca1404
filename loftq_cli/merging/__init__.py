"""Base and trained adapter become a deployment checkpoint.

form.py        the container and number format of the result
provenance.py  whether an adapter belongs to a base
adapters/      the place of each tensor of each adapter in the base
vocabulary.py  a vocabulary that grew in training
planner.py     a job for every tensor of base and adapter
restacked.py   experts of a container, in one tensor again
tokenizer.py   the tokenizer of base or adapter
plan.py        jobs, files and config of a merge
report.py      what merging did, as records and files
inputs.py      the sha256 of what jobs read
jobs.py        one tensor
run.py         all jobs in order, then publication
"""
