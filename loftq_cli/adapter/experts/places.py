"""The parameter of the loaded model behind each tensor of experts in the files of a base.

transformers 5 holds the experts of a layer as one parameter, and the files often hold a matrix for each expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from loftq_cli.model.family import Family

# The holder, the number and the last part of the name of one expert's matrix.
EXPERT = re.compile(r"(.+\.experts)\.(\d{1,9})\.(\w+)\.weight")
GATE_UP, DOWN = "gate_up_proj", "down_proj"

# Last part of the name of one expert's matrix -> the parameter, and the part of gate_up_proj: transformers puts the
# gate above up in all its conversions.
ROLES: dict[str, tuple[str, int | None]] = {
    **dict.fromkeys(("gate_proj", "w1", "fc1"), (GATE_UP, 0)),
    **dict.fromkeys(("up_proj", "w3", "fc3"), (GATE_UP, 1)),
    **dict.fromkeys(("down_proj", "w2", "fc2"), (DOWN, None)),
    GATE_UP: (GATE_UP, None),
}

# The same for a tensor of all experts: "fc1" is a gate_up_proj there.
_STACKED_ROLES = {leaf: ROLES[leaf] for leaf in ("gate_proj", "up_proj")}

# Families with experts stored [experts, in, out], by transformers 5.24. Shapes tell the orientation; the table counts
# where a matrix is square, as down_proj of gpt-oss-20b.
STORED_IN_OUT = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text", "llama4", "llama4_text"})
# Those of them that say so to PEFT by the attribute `is_transposed`.
SAYS_IN_OUT = STORED_IN_OUT - {"llama4", "llama4_text"}
# Families whose parameter has the rows or columns of gate and up in turns.
INTERLEAVED = frozenset({"gpt_oss"})


@dataclass(frozen=True, slots=True)
class ExpertPlace:
    """The place of a tensor of the files in a parameter of the loaded model.

    parameter   complete name of the parameter
    expert      the number of the expert; None for a tensor of all experts
    part        0 for the gate and 1 for up, in a gate_up_proj; None for the complete matrix
    """

    parameter: str
    expert: int | None = None
    part: int | None = None


def place_of(name: str, family: Family, names: Iterable[str]) -> ExpertPlace | None:
    """Find the place of the tensor called `name`; None for a tensor that transformers splits while loading.

    family   the config and the facts about the family
    names    the names of all tensors in the files

    A tensor of another kind than experts has the place of a parameter of its own name.

    >>> family = Family({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]})
    >>> name = "model.layers.0.block_sparse_moe.experts.3.w3.weight"
    >>> place_of(name, family, [name])
    ExpertPlace(parameter='model.layers.0.mlp.experts.gate_up_proj', expert=3, part=1)
    """
    match, loader = EXPERT.fullmatch(name), family.loader
    found = loader.find(name) if loader is not None else (family.loaded_name(name, names),)
    if len(found) != 1:
        return None
    leaf = match[3] if match else name.removesuffix(".weight").rpartition(".")[2]
    if match and found[0].endswith(".weight"):  # no conversion known: the names of transformers' own experts
        holder = EXPERT.fullmatch(found[0])
        if leaf not in ROLES or holder is None:
            return None
        module = holder[1].replace(".block_sparse_moe.", ".mlp.") if loader is None else holder[1]
        return ExpertPlace(f"{module}.{ROLES[leaf][0]}", int(match[2]), ROLES[leaf][1])
    known = ROLES if match else _STACKED_ROLES
    part = known.get(leaf, ("", None))[1] if found[0].endswith(f".{GATE_UP}") else None
    return ExpertPlace(found[0], int(match[2]) if match else None, part)


def model_types(family: Family) -> set[str]:
    """The `model_type` of a config and of its text part."""
    nested = family.config.get("text_config")
    inner = nested.get("model_type") if isinstance(nested, dict) else None
    return {family.model_type} | ({inner} if isinstance(inner, str) else set())
