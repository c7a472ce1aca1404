"""On-disk containers: they name, pack and lay out; they know no method and run no algorithm.

layout.py               the contract and the table
bitsandbytes.py         4-bit codebook tensors as bitsandbytes and transformers load them
compressed_tensors.py   integers as transformers and vLLM load them
gptq.py                 integers as GPTQ's loaders read them
metal.py, mlx.py        integers with float offsets, into which a QA-LoRA adapter merges exactly
grouped.py              what the integer containers have in common
stored_parts.py         checks of what is read
dequantized.py          the decoded values as an ordinary checkpoint
peft_adapter.py         LoRA tensors and adapter_config.json as PEFT loads them
peft_targets.py         which modules such a config adapts
module_patterns.py      the regular expressions in it, in bounded time
"""
