"""The only package that runs models: statistics of the inputs of layers, and outputs beside those of the original.

text_windows.py         text files as windows of tokens
transformers_models.py  models and tokenizers as transformers loads them
foreign_tokenizer.py    a stranger's tokenizer in a process with a time limit
streamed_model.py       a model with one block in memory
input_sums.py           running sums of x·xᵀ over the inputs of layers
calibration.py          statistics of the inputs of layers, written to files
layer_outputs.py        output errors of quantized layers beside the original
comparison.py           outputs and predictions beside the original
"""
