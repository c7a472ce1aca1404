"""Benchmarks: what conversions cost beside other programs, and the built-in model's training and scores.

Not collected by the test run, nothing here ships. `python -m tests.benchmarks` runs the first group.

measuring.py        turns, medians, tables
weights.py          what is quantized
contenders.py       LoftQ, ours and the peers'
probe.py            one measurement in a process of its own
ceiling.py          what threads can give on this machine
matrix.py           LoftQ of one matrix, and of a real model's
joint.py            the joint fit beside LoftQ
nf4.py              encode and decode
commands.py         what the command line does
conversion.py       a whole checkpoint: quantize, merge, inspect
scratch.py          memory
growth.py           what more layers and larger ones cost

gpu.py              on a GPU, kernels and whole conversions
gpu_card.py         what the card can do, and how calls are timed on it
gpu_cases.py        each kernel: its work, its peers
gpu_peers.py        bitsandbytes' kernels
gpu_kernels.py      kernels, timed
gpu_checkpoint.py   a checkpoint of any size
gpu_conversion.py   conversions of it, timed
gpu_timeline.py     what they do when

corpus.py           text for the built-in model
train_tiny_llama.py its training
perplexity.py       its score
quality.py          what conversions do to it
language_model.py   what conversions do to SmolLM2-135M, and to the base alone
finetuning.py       what a better start is worth after training
drift.py            what conversions do to a sentence encoder
figures/            what quality.py, language_model.py, finetuning.py, drift.py and joint.py wrote
"""
