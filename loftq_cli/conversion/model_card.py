"""README.md of a converted model: method, formats, errors, and lines of Python that load the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loftq_cli.conversion.report import LayerResult, bits_per_weight
from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.methods.method import METHODS
from loftq_cli.output.records import RECIPE_NAME, REPORT_NAME
from loftq_cli.planning.plan import Plan
from loftq_cli.runtime.version import VERSION
from loftq_cli.tensors.metrics import total_error


def render_model_card(plan: Plan, layers: Sequence[LayerResult], *, source: str) -> str:
    """Return README.md of the result, in Markdown.

    plan     the plan of the conversion
    layers   results of all quantized layers, at least one
    source   name of the original
    """
    recipe, total, specs = plan.recipe, total_error(layer.error for layer in layers), [layer.spec for layer in layers]
    formats, sizes = (
        _join_names(spec.quant_type.upper() for spec in specs),
        _join_names(spec.size_text for spec in specs),
    )
    ranks = _join_names(str(layer.rank) for layer in sorted(layers, key=lambda layer: layer.rank))
    summary = METHODS[recipe.method].summary
    return f"""---
library_name: peft
tags: [{recipe.method}, {recipe.quant_type}, lora, loftq-cli]
---

# {source}, {formats} base with a {recipe.method} adapter

{summary[0].upper()}{summary[1:]}. {len(layers)} linear layers in {formats}, one scale per
{sizes}, rank {ranks}: {bits_per_weight(plan):.2f} bits a weight.
Relative error of the weights: {total.base_error:.4f} without the adapter, {total.error:.4f} with it.

```python
folder = "."  # the folder of this file, by its path
{_render_loading_lines(plan)}
```

The adapter belongs to this base and to no other. Made by loftq-cli {VERSION}; `{REPORT_NAME}` has every layer,
`{RECIPE_NAME}` every option.
"""


def _join_names(names: Iterable[str]) -> str:
    """Join the distinct names: "a", or "a, b and c"."""
    *firsts, last = dict.fromkeys(names)
    return f"{', '.join(firsts)} and {last}" if firsts else last


def _render_loading_lines(plan: Plan) -> str:
    """Return lines of Python that load base and adapter from `folder` for training, with PEFT or with the modules of
    `loftq_cli.nn`.

    PEFT pools inputs in some containers only, and by PEFT's own convention; transformers does not read every container.
    """
    architectures = plan.family.architectures
    auto = architectures[0] if architectures else "AutoModel"
    if plan.adapter_config("")["task_type"] == "CAUSAL_LM":
        auto = "AutoModelForCausalLM"
    row = LAYOUTS[plan.layout]
    pooling = plan.recipe.pooling
    peft_pools = row.peft_pools and pooling is not None and pooling.convention == "peft"
    if not row.in_transformers or (pooling is not None and not peft_pools):
        make = "from_config" if auto.startswith("Auto") else "_from_config"
        return f"""from transformers import AutoConfig, {auto}
from loftq_cli.nn import load_adapted
model = {auto}.{make}(AutoConfig.from_pretrained(folder))
model = load_adapted(model, folder)"""
    arguments = f", {row.load_arguments}" if row.load_arguments else ""
    is_mixed = len({job.matrix.spec for job in plan.layers}) > 1
    decoding = f"\n{row.mixed_decoding}" if is_mixed and row.mixed_decoding else ""
    return f"""from transformers import {auto}
from peft import PeftModel
model = {auto}.from_pretrained(folder{arguments}){decoding}
model = PeftModel.from_pretrained(model, folder, subfolder="{plan.adapter_dir}", is_trainable=True)"""
