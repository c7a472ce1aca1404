"""The only package that runs models: statistics of the inputs of layers, and outputs beside those of the original.

weight_statistics.py    statistics of the inputs of layers, from the weights alone
text_windows.py         text files as windows of tokens
transformers_models.py  models and tokenizers as transformers loads them
child_process.py        a function about a stranger's files in a process with a time limit
loader_question.py      what transformers would make of a directory's tensors
paused_forward.py       a forward that waits before each block
foreign_tokenizer.py    a stranger's tokenizer in a process with a time limit
streamed_model.py       a model with one block in memory
self_written.py         text that a model writes
text_sources.py         files, folders, random tokens and a model's own text as windows of tokens
input_sums.py           running sums of x·xᵀ over the inputs of layers
calibration.py          statistics of the inputs of layers, written to files
text_pass.py            a text through a model during a conversion
layer_outputs.py        output errors of quantized layers beside the original
comparison.py           outputs and predictions beside the original
"""
