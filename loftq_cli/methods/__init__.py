"""How a quantized base and its adapter start: one file per method. They see neither bits nor files; only what stacks
matrices for a GPU knows what they are quantized to.

method.py       the contract and the table
alternation.py  quantize, fit the adapter, repeat
loftq.py        the alternation with a truncated SVD
qalora.py       quantize in groups, adapter over pooled inputs
qlora.py        quantize once, adapter that adds nothing yet
stacked.py      LoftQ and QLoRA of many equal matrices on a GPU
weighting.py    what errors cost, and what an adapter takes of that
"""
