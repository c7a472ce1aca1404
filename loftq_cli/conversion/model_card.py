"""README.md of a converted model: method, formats, errors, and lines of Python that load the model; and README.md of
the adapter: facts for training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loftq_cli.conversion.report import LayerResult, ModelErrors, base_note, bits_per_weight, plain_name
from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.methods.method import METHODS
from loftq_cli.output.records import RECIPE_NAME, REPORT_NAME
from loftq_cli.planning.plan import Plan
from loftq_cli.runtime.version import VERSION
from loftq_cli.tensors.libraries import DEFAULT_LIBRARY


def render_model_card(plan: Plan, layers: Sequence[LayerResult], *, source: str) -> str:
    """Return README.md of the result, in Markdown. The card of a base that needs the adapter begins with the fact.

    plan     the plan of the conversion
    layers   results of all quantized layers, at least one
    source   name of the original
    """
    recipe, specs = plan.recipe, [layer.spec for layer in layers]
    formats, sizes = (
        _join_names(spec.quant_type.upper() for spec in specs),
        _join_names(spec.size_text for spec in specs),
    )
    summary = METHODS[recipe.method].summary
    return f"""---
library_name: peft
tags: [{recipe.method}, {recipe.quant_type}, lora, loftq-cli]
---

{_render_base_note(plan, layers)}# {source}, {formats} base with a {recipe.method} adapter

{summary[0].upper()}{summary[1:]}. {len(layers)} linear layers in {formats}, one scale per
{sizes}, rank {_join_ranks(layers)}: {bits_per_weight(plan):.2f} bits a weight. The whole model:
{_describe_model(plan)}

{_render_errors(layers)}

```python
folder = "."  # the folder of this file, by its path
{_render_loading_lines(plan, trains=False)}
```

The adapter belongs to this base and to no other; `{plan.adapter_dir}/README.md` says how to train the adapter. Made by
loftq-cli {VERSION}; `{REPORT_NAME}` has every layer, `{RECIPE_NAME}` every option.
"""


def render_adapter_card(plan: Plan, layers: Sequence[LayerResult]) -> str:
    """Return README.md of the adapter, in Markdown: the base, loading lines, and facts for training.

    plan     the plan of the conversion
    layers   results of all quantized layers, at least one
    """
    facts = "\n".join(f"- {fact}" for fact in _training_facts(plan, layers))
    saving, is_peft = _render_saving(plan), _is_loaded_by_peft(plan)
    loaded = "`is_trainable=True` makes PEFT train the adapter; the adapter is frozen without.\n\n" if is_peft else ""
    return f"""---
library_name: peft
tags: [{plan.recipe.method}, lora, loftq-cli]
---

{_render_base_note(plan, layers)}# {plan.recipe.method} adapter of the base in the folder above

The adapter belongs to this base and to no other, not to the original in 16 bits either.

```python
folder = ".."  # the folder of the base, by its path
{_render_loading_lines(plan, trains=True)}
```

{loaded}{facts}

After training:

```python
{saving}
```

```sh
loftq merge .. trained merged
```

`..` is the folder of the base. `merge` checks that the adapter is of this base. Made by loftq-cli {VERSION}.
"""


def _training_facts(plan: Plan, layers: Sequence[LayerResult]) -> list[str]:
    """The facts for training, each a sentence or a few in Markdown."""
    recipe = plan.recipe
    scalings = _join_names(f"{layer.scaling:g}" for layer in layers)
    alphas = _join_names(f"{layer.alpha:g}" for layer in layers)
    facts = [
        f"**Scaling.** Rank {_join_ranks(layers)}, alpha {alphas}: loaders multiply B·A by {scalings}. "
        "The config has the numbers; other numbers change the model before the first step."
    ]
    if METHODS[recipe.method].is_fitted(recipe.init):
        facts.append(
            "**No new start.** The adapter holds a part of the weights that the base lacks. A fresh `LoraConfig`, "
            "`get_peft_model` and `init_lora_weights` throw the part away."
        )
    else:
        facts.append("**Start.** The adapter adds nothing before the first step: B is zero, A is random.")
    return [*facts, _dropout_fact(plan, layers), _precision_fact(plan), *_trainer_facts(plan), *_pooling_facts(plan)]


def _trainer_facts(plan: Plan) -> list[str]:
    """The traps of PEFT and TRL, as tests/loaders/test_trainers.py shows the traps."""
    if not _is_loaded_by_peft(plan):
        return []
    if plan.family.library is not DEFAULT_LIBRARY:
        file, name = plan.family.library.adapter_weights, plan.family.library.name
        return [
            f"**The other file.** `{file}` holds the same adapter for {name}'s own loaders, `load_lora_adapter` and "
            "`load_lora_weights`. `merge` takes a trained adapter in either form."
        ]
    return [
        "**Trainers.** TRL takes the loaded PeftModel alone: with a `peft_config` beside, TRL trains another adapter. "
        "`prepare_model_for_kbit_training` goes before `PeftModel.from_pretrained`: after, the adapter is frozen too. "
        "TRL casts A and B of a 4-bit base to bfloat16; `parameter.data = parameter.data.float()` for every trained "
        "parameter, before `train()`, undoes the cast.",
        "**Other values of the config.** `config = LoraConfig.from_pretrained(adapter)`, then `config.lora_dropout = "
        "0.05`, then `PeftModel.from_pretrained(model, adapter, config=config, is_trainable=True)`. Keywords of "
        "`LoraConfig.from_pretrained` are ignored.",
    ]


def _dropout_fact(plan: Plan, layers: Sequence[LayerResult]) -> str:
    if base_note(plan.recipe, layers) is not None:
        return (
            "**`lora_dropout` 0.** Dropout takes parts of the adapter away, and this base is no model without the "
            "adapter. A reference model made by `disable_adapter()` (DPO and GRPO without `ref_model`) is no model "
            "either: pass a reference."
        )
    if METHODS[plan.recipe.method].is_fitted(plan.recipe.init):
        return (
            "**`lora_dropout`.** 0 is written. Dropout takes parts of the adapter away in training, and the base alone "
            "is what remains: small values cost little. A reference model made by `disable_adapter()` (DPO and GRPO "
            "without `ref_model`) is the base alone, not this start."
        )
    return "**`lora_dropout`.** 0 is written; other values do not change the start, since the adapter adds nothing."


def _precision_fact(plan: Plan) -> str:
    dtype = plan.recipe.adapter_dtype
    if plan.recipe.is_principal:
        return (
            f"**Precision.** The factors, in {dtype}, are large: the adapter starts as the principal part of the "
            "weights. In bfloat16, rounding swallows a step of 2e-4 in more than half of the entries (one step of "
            "AdamW, language model of 135 million weights). Train A and B in float32, and look for the learning rate "
            "anew: a rate for adapters that start at zero may be too high."
        )
    return (
        f"**Precision.** The factors are in {dtype}. Trainers that cast A and B to bfloat16 round small steps: float32 "
        "loses none."
    )


def _pooling_facts(plan: Plan) -> list[str]:
    pooling = plan.recipe.pooling
    if pooling is None:
        return []
    trainers = "`loftq_cli.nn`" + (", and PEFT (`use_qalora`) on GPTQ layers" if _is_loaded_by_peft(plan) else "")
    return [
        f"**Pooled inputs.** A reads a single number for each group of {pooling.group_size} inputs (convention "
        f"`{pooling.convention}`), so `merge` keeps the base quantized. Trained by {trainers}; an ordinary LoRA layer "
        "does not pool."
    ]


def _render_saving(plan: Plan) -> str:
    """Return lines of Python that save the trained adapter in the directory `trained`."""
    if _is_loaded_by_peft(plan):
        return 'model.save_pretrained("trained")'
    return 'from loftq_cli.nn import save_adapter\nsave_adapter(model, "trained")'


def _render_base_note(plan: Plan, layers: Sequence[LayerResult]) -> str:
    """Return the paragraph about a base that needs the adapter; nothing for a base that is a model by itself."""
    note = base_note(plan.recipe, layers)
    if note is None:
        return ""
    fact, _, uses = note.partition(": ")
    return f"**{fact[0].upper()}{fact[1:]}**: {uses}.\n\n"


def _render_errors(layers: Sequence[LayerResult]) -> str:
    """Return a table of the errors: of plain rounding, of the base alone, and of base and adapter."""
    errors = ModelErrors.of(layers)
    rows: list[tuple[str, Sequence[float | None]]] = [
        ("weights", (errors.plain_error, errors.error.base_error, errors.error.error))
    ]
    if errors.output_error is not None:
        outputs = (errors.plain_output_error, errors.base_output_error, errors.output_error)
        rows.append(("outputs, on the text's inputs", outputs))
    lines = [
        f"| relative error of the | {plain_name(layer.spec for layer in layers)} | this base alone | base + adapter |",
        "|---|--:|--:|--:|",
    ]
    for name, numbers in rows:
        lines.append(f"| {name} | {' | '.join('-' if n is None else f'{n:.4f}' for n in numbers)} |")
    return "\n".join(lines)


def _describe_model(plan: Plan) -> str:
    """Return the size of the whole model, and paragraphs about experts in full precision and adapters of experts."""
    nbytes = plan.base_nbytes + plan.adapter_nbytes
    notes = [f"{plan.shares.describe(plan.dtype)}; base and adapter {nbytes / 1e6:.1f} MB."]
    notes += [f"\n\n{note[0].upper()}{note[1:]}." for note in plan.notes if " expert tensors " in note]
    if any(job.is_parameter for job in plan.layers):
        notes.append(
            "\n\nThe adapter lists experts under `target_parameters`: load it with peft 0.19 or newer. PEFT takes no "
            "dropout on such adapters, and each step holds a copy of a layer's experts."
        )
    return "".join(notes)


def _join_ranks(layers: Sequence[LayerResult]) -> str:
    return _join_names(str(layer.rank) for layer in sorted(layers, key=lambda layer: layer.rank))


def _join_names(names: Iterable[str]) -> str:
    """Join the distinct names: "a", or "a, b and c"."""
    *firsts, last = dict.fromkeys(names)
    return f"{', '.join(firsts)} and {last}" if firsts else last


def _is_loaded_by_peft(plan: Plan) -> bool:
    """Whether the model's library and PEFT load base and adapter; otherwise the modules of `loftq_cli.nn` do."""
    row, pooling = LAYOUTS[plan.layout], plan.recipe.pooling
    pools = pooling is None or (row.peft_pools and pooling.convention == "peft")
    return plan.family.library.name in row.libraries and pools


def _render_loading_lines(plan: Plan, *, trains: bool) -> str:
    """Return lines of Python that load base and adapter from `folder` for training, with PEFT or with the modules of
    `loftq_cli.nn`.

    PEFT pools inputs in some containers only, and by PEFT's own convention; transformers does not read every container.
    diffusers has lines of its own for inference, unless `trains`.
    """
    if plan.family.library is not DEFAULT_LIBRARY:
        return _render_diffusers_lines(plan, trains=trains)
    architectures = plan.family.architectures
    auto = architectures[0] if architectures else "AutoModel"
    if plan.adapter_config("")["task_type"] == "CAUSAL_LM":
        auto = "AutoModelForCausalLM"
    row = LAYOUTS[plan.layout]
    if not _is_loaded_by_peft(plan):
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


def _render_diffusers_lines(plan: Plan, *, trains: bool) -> str:
    """Return lines of Python that load base and adapter with diffusers, for training with PEFT or for inference.
    diffusers takes float16 without a dtype.
    """
    library, name, dtype = plan.family.library, plan.family.model_type, f"torch_dtype=torch.{plan.dtype}"
    part = f', subfolder="{plan.part[:-1]}"' if plan.part else ""
    if not _is_loaded_by_peft(plan):
        return f"""from diffusers import {name}
from loftq_cli.nn import load_adapted
model = {name}.from_config({name}.load_config(folder{part}))
model = load_adapted(model, folder)"""
    if trains:
        return f"""import torch
from diffusers import {name}
from peft import PeftModel
model = {name}.from_pretrained(folder{part}, {dtype})
model = PeftModel.from_pretrained(model, folder, subfolder="{plan.adapter_dir}", is_trainable=True)"""
    if plan.part:
        return f"""import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(folder, {dtype})
pipeline.load_lora_weights(folder + "/{plan.adapter_dir}")"""
    prefix, weights = library.adapter_prefix(plan.family.config)[:-1], f'weight_name="{library.adapter_weights}"'
    return f"""import torch
from diffusers import {name}
model = {name}.from_pretrained(folder, {dtype})
model.load_lora_adapter(folder + "/{plan.adapter_dir}", prefix="{prefix}", {weights})"""
