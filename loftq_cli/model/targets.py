"""The choice of tensors to quantize by names, shapes and the config. Each decision has a reason."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from loftq_cli.checkpoint.patterns import finds
from loftq_cli.errors import UsageError
from loftq_cli.model.family import Family
from loftq_cli.tensors.headers import WEIGHT_DTYPES, TensorRef

_EMBEDDINGS = re.compile(r"(?:^|\.)(?:\w*embed\w*|wte|wpe|shared|\w*relative_attention_bias)(?:\.|$)")
_ROUTERS = re.compile(r"(?:^|\.)(?:gate|router|shared_expert_gate|shared_gate)(?:\.|$)")
_EXPERTS = re.compile(r"(?:^|\.)experts(?:\.|$)")
_HEADS = re.compile(r"(?:^|\.)(?:lm_head|embed_out|classifier|score|qa_outputs|pooler|cls)(?:\.|$)")
_IN_A_BLOCK = re.compile(r"\.\d+\.")

# Kinds that --include cannot choose: loaders have no 4-bit form of the layer.
_NEVER = {
    "embedding": "an embedding, and only linear layers can be quantized",
    "router": "a router, which loaders hold in full precision",
    "expert": "an expert, and no loader of this container reads quantized experts of the model",
    "kept in float32": "a layer that transformers keeps in float32",
    "no adapter": "a layer of this family on which PEFT takes no adapter",
    "shared": "a matrix that several modules share, and an adapter belongs to one of them",
    "converted at load": "a matrix that transformers splits or merges while loading, and packed codes cannot be",
}


# Kinds that --include chooses only by an expression with the last part of the name: 4 bits save little here, and harm.
_SPELLED = ("head", "modulation")


@dataclass(frozen=True, slots=True)
class Target:
    """The decision about a tensor.

    quantize   whether to quantize the tensor
    kind       a word for the tensor, see `kind_of`: "linear", "embedding", ...
    reason     the reason for the decision, in words
    """

    quantize: bool
    kind: str
    reason: str


def choose_targets(
    tensors: Mapping[str, TensorRef],
    family: Family,
    include: Sequence[str],
    exclude: Sequence[str],
    experts: Collection[str] = (),
    *,
    moves_adapters: bool = False,
) -> dict[str, Target]:
    """Decide for every tensor, by name, whether to quantize the tensor.

    tensors   the headers of the checkpoint
    family    the config and the facts about the family
    include   regular expressions; a match anywhere in the module name chooses a matrix. Empty for the default choice:
              all "linear" matrices (see `kind_of`) inside numbered blocks. A head needs an expression that spells the
              last part of the head's name.
    exclude   regular expressions; a match anywhere in the module name wins over `include`
    experts   names of the tensors of experts that the container holds quantized; other experts are left alone
    moves_adapters   whether a linear whose adapter PEFT moves to the experts may have an adapter on its weight: PEFT
                     adapts no packed weight

    Raises UsageError when an expression takes too long to match, when an `include` matches no weight to quantize, or
    spells the name of a tied head or of a kind without a 4-bit form (a key of `_NEVER`).

    >>> from pathlib import Path
    >>> ref = TensorRef("h.0.fc.weight", "float32", (64, 64), Path("model.safetensors"))
    >>> choose_targets({ref.name: ref}, Family({}), include=[], exclude=["fc"])
    {'h.0.fc.weight': Target(quantize=False, kind='linear', reason='excluded')}
    """
    targets = {}
    for name, ref in tensors.items():
        kind = "expert" if name in experts else kind_of(ref, family)
        if kind == "no adapter" and moves_adapters and family.moves_adapter(module_of(name)):
            kind = "linear"
        never = None if name in experts else _NEVER.get(kind)
        targets[name] = _decide(name, kind, never, family, include, exclude)
    for pattern in include:
        if not any(t.quantize and finds(pattern, module_of(name)) for name, t in targets.items()):
            raise UsageError(f"--include {pattern!r} finds no linear weight", hint="loftq inspect lists the names")
    return targets


def module_of(name: str) -> str:
    """The module of a weight: the tensor name without ".weight".

    >>> module_of("h.0.attn.weight")
    'h.0.attn'
    """
    return name.removesuffix(".weight")


def kind_of(ref: TensorRef, family: Family) -> str:
    """A word for a tensor, by name, dtype and shape.

    The words: "linear", "head", "embedding", "router", "expert", "not a matrix", "not floating point",
    "kept in float32", "no adapter", "shared", "converted at load" and "modulation".

    >>> from pathlib import Path
    >>> kind_of(TensorRef("lm_head.weight", "float32", (64, 64), Path("model.safetensors")), Family({}))
    'head'
    """
    module = module_of(ref.name)
    if ref.dtype not in WEIGHT_DTYPES:
        return "not floating point"
    if _EXPERTS.search(module) and len(ref.shape) >= 2:
        return "expert"
    if len(ref.shape) != 2 or not ref.name.endswith(".weight") or 0 in ref.shape:
        return "not a matrix"
    if _EMBEDDINGS.search(module):
        return "embedding"
    if _ROUTERS.search(module):
        return "router"
    if family.is_kept_in_float32(module):
        return "kept in float32"
    if not family.takes_adapter(module):
        return "no adapter"
    if family.is_shared(module):
        return "shared"
    if family.is_converted(module):
        return "converted at load"
    if family.library.is_modulation(module):
        return "modulation"
    return "head" if _HEADS.search(module) else "linear"


def _decide(
    name: str, kind: str, never: str | None, family: Family, include: Sequence[str], exclude: Sequence[str]
) -> Target:
    """Decide about a tensor of a kind; `never` says in words why --include cannot choose the tensor."""
    module = module_of(name)
    matching = [pattern for pattern in include if finds(pattern, module)]
    spelled = any(_spells(pattern, module) for pattern in matching)
    if kind in ("not floating point", "not a matrix"):
        return Target(False, kind, kind)
    if any(finds(pattern, module) for pattern in exclude):
        return Target(False, kind, "excluded")
    if never is not None:
        if spelled:
            raise UsageError(f"--include asks for {never}", tensor=name)
        return Target(False, kind, kind)
    if kind in _SPELLED:
        if spelled and family.ties_embeddings() and "lm_head" in module:
            raise UsageError("--include asks for a head that shares the embedding's weight", tensor=name)
        return Target(spelled, kind, "included" if spelled else kind)
    if include:
        return Target(bool(matching), kind, "included" if matching else "not included")
    in_block = bool(_IN_A_BLOCK.search(module))
    return Target(in_block, kind, kind if in_block else "outside the blocks")


def _spells(pattern: str, module: str) -> bool:
    """Whether an expression spells the last part of a module's name. Any match without the part may be an accident."""
    return module.rpartition(".")[2] in pattern.replace("\\", "")
