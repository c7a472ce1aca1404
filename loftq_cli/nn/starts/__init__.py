"""Base and adapter computed in memory, with the numbers of `loftq quantize`.

option_types.py      options by keyword, checked; errors that name keywords
layer_jobs.py        options become jobs, and jobs become numbers: the only file of nn that asks planning
linear_start.py      a linear becomes a base and an adapter
original_weights.py  full-precision weights of a model, by module name
peft_layers.py       LoRA layers of PEFT over a quantized linear
lora_weights.py      the fitted start for a model that PEFT wrapped
"""
