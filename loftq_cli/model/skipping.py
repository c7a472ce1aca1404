"""Layers in full precision that a library cannot tell from quantized layers.

diffusers compares the list of layers in full precision with the last part of a layer's name: for a list with "proj_out"
each block's `proj_out` stays in full precision too. diffusers' own conversion to 4 bits quantizes both; so does a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loftq_cli.model.family import Family
from loftq_cli.model.targets import Target, module_of
from loftq_cli.tensors.headers import TensorRef

_REASON = "quantized too: {library} cannot tell it from {other}, by the last part of the name"


def join_skipped(
    targets: Mapping[str, Target], tensors: Mapping[str, TensorRef], family: Family
) -> tuple[dict[str, Target], list[str]]:
    """Quantize the layers in full precision that the library would not tell from quantized layers.

    targets   the decision about each tensor, from `choose_targets`
    tensors   the headers of the checkpoint
    family    the config and the facts about the family

    Returns the decisions, and a note about each changed decision. An excluded layer stays as it is, and so does a layer
    of a kind without a 4-bit form: the container's config refuses the model then.

    >>> from pathlib import Path
    >>> refs = {n: TensorRef(n, "float32", (64, 64), Path("f")) for n in ("out.weight", "h.0.out.weight")}
    >>> targets = {name: Target(name != "out.weight", "linear", "") for name in refs}
    >>> join_skipped(targets, refs, Family({"_class_name": "MyTransformer"}))[0]["out.weight"].quantize
    True
    """
    library = family.library
    if not library.skips_by_part:
        return dict(targets), []
    joined, notes = dict(targets), list[str]()
    quantized = [module_of(name) for name, target in targets.items() if target.quantize]
    for name, target in targets.items():
        module = module_of(name)
        is_listed = not target.quantize and name.endswith(".weight") and len(tensors[name].shape) == 2
        other = next((other for other in quantized if is_listed and library.skips(module, other)), None)
        if other is None or target.kind != "linear" or target.reason == "excluded":
            continue
        joined[name] = replace(target, quantize=True, reason="included")
        notes.append(f"{module} is {_REASON.format(library=library.name, other=other)}")
    return joined, notes
