"""The only package that runs models: statistics of what layers read, and outputs beside those of the original.

text_windows.py         text files as windows of tokens
transformers_models.py  models and tokenizers as transformers loads them
streamed_model.py       a model with one block in memory
calibration.py          statistics of the inputs of layers
comparison.py           outputs and predictions beside the original
"""
