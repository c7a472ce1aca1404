"""Adapters on experts and the files of a base: PEFT's joined factors, and factors of single experts.

places.py   the parameter of the loaded model behind each tensor of experts in the files
planned.py  the factors for each tensor of the files
factors.py  reading the factors of one matrix
stacked.py  merging into a tensor of all experts, one expert at a time
"""
