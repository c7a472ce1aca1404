"""Methods: how base and adapter of a layer start, a file per method. Methods see neither bits nor files; a single
file, stacked.py, knows a number format.

lowrank.py      truncated SVD, exact or by subspace iteration
weighting.py    the cost of an error by statistics of the inputs
method.py       the contract of a method, and the table
alternation.py  quantize, fit the adapter, repeat
loftq.py        LoftQ: the adapter holds the quantization error
pissa.py        QPiSSA: the adapter holds the principal part of the weights
qalora.py       QA-LoRA: the adapter reads pooled inputs
qlora.py        QLoRA: the adapter starts at zero
stacked.py      LoftQ and QLoRA of many equal matrices on a GPU
"""
