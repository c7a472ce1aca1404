"""On-disk containers: they name, pack and lay out; they know no method and run no algorithm.

layout.py         the contract and the table
bitsandbytes.py   4-bit codebook tensors as bitsandbytes and transformers load them
dequantized.py    the decoded values as an ordinary checkpoint
peft_adapter.py   LoRA tensors and adapter_config.json as PEFT loads them
"""
