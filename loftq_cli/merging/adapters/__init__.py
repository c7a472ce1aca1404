"""The adapters of a merge: each tensor of an adapter gets a place in the base.

weighted.py  the adapters of one merge, each with a weight
placed.py    the tensors of adapters by the names of the base
placing.py   places in the base, by name
tied.py      a head and an embedding with one weight
tasks.py     the class of the merged model, where an adapter brings a new head
"""
