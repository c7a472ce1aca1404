"""Base and trained adapter become a deployment checkpoint.

form.py        the container and number format of the result
provenance.py  whether an adapter belongs to a base
plan.py        a job for every tensor of base and adapter
report.py      what merging did, as records and files
jobs.py        one tensor
run.py         all jobs in order, then publication
"""
