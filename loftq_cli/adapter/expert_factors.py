"""PEFT's layout of adapters on whole parameters (`target_parameters`), joined from factors of experts and split again.

transformers holds the experts of a layer as one parameter, [experts, out, in] or [experts, in, out]. PEFT's two tensors
for the parameter hold the factors of all experts, in two different orders (ParamWrapper of PEFT 0.19 to 0.21; PEFT 0.18
exchanges `in` and `out`):

    lora_A  [experts * rank, in]    expert-major: rows e * rank to (e + 1) * rank - 1 belong to expert e
    lora_B  [out, rank * experts]   rank-major: columns e, e + experts, e + 2 * experts, ... belong to expert e

Expert e gets scaling * lora_B[:, e::experts] @ lora_A[e * rank : (e + 1) * rank], [out, in]. All functions take and
return tensors and names; the module knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from loftq_cli.adapter.config import PREFIX

if TYPE_CHECKING:
    import torch

GATE_UP = "gate_up_proj"
DOWN = "down_proj"


class Factors(NamedTuple):
    """lora_A [rank, in] and lora_B [out, rank] of one linear map; the adapter adds scaling * lora_B @ lora_A."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor


@dataclass(frozen=True, slots=True)
class AdaptedParameter:
    """A parameter that PEFT adapts as a whole, and how PEFT reads the dimensions.

    name            complete name in the loaded model: "model.layers.0.mlp.experts.gate_up_proj"
    shape           [experts, out, in]; [experts, in, out] where `is_transposed`; [out, in] of a single matrix, a router
    is_transposed   the attribute `is_transposed` of the module that holds the parameter; False for a module without
                    one. transformers stores Llama 4 as [experts, in, out] without the attribute: say False, and turn
                    the factors with `turned`

    Raises ValueError for a shape of neither two nor three dimensions.
    """

    name: str
    shape: tuple[int, ...]
    is_transposed: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3):
            raise ValueError(f"PEFT adapts parameters of two or three dimensions, and {self.name} is {self.shape}")

    @property
    def module(self) -> str:
        """The module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def n_experts(self) -> int:
        """The number of experts; 1 for a single matrix."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """[out, in] of one expert, as PEFT reads the shape.

        >>> AdaptedParameter("experts.gate_up_proj", (4, 64, 192), is_transposed=True).matrix_shape
        (192, 64)
        """
        first, second = self.shape[-2:]
        return (second, first) if self.is_transposed and len(self.shape) == 3 else (first, second)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of PEFT's lora_A [experts * rank, in] and lora_B [out, rank * experts].

        >>> AdaptedParameter("experts.gate_up_proj", (4, 192, 64)).factor_shapes(8)
        ((32, 64), (192, 32))
        """
        (out_features, in_features), width = self.matrix_shape, rank * self.n_experts
        return (width, in_features), (out_features, width)


def join_experts(factors: Sequence[Factors]) -> Factors:
    """Join the factors of all experts, in order, into PEFT's two tensors.

    factors   for each expert lora_A [rank, in] and lora_B [out, rank], all of equal shapes and dtypes

    Returns contiguous lora_A [experts * rank, in] and lora_B [out, rank * experts]. Raises ValueError for no expert and
    for experts of different shapes.

    >>> import torch
    >>> lora_A, lora_B = join_experts([Factors(torch.ones(2, 8), torch.ones(6, 2))] * 4)
    >>> tuple(lora_A.shape), tuple(lora_B.shape)
    ((8, 8), (6, 8))
    """
    import torch

    if not factors or len({(pair.lora_A.shape, pair.lora_B.shape) for pair in factors}) > 1:
        raise ValueError("the experts of a parameter have factors of one shape")
    lora_B = torch.stack([pair.lora_B for pair in factors], dim=-1)  # [out, rank, experts]
    return Factors(torch.cat([pair.lora_A for pair in factors]), lora_B.flatten(1))


def expert_of(joined: Factors, n_experts: int, expert: int) -> Factors:
    """The factors of one expert in PEFT's two tensors, without a copy.

    joined      lora_A [experts * rank, in] and lora_B [out, rank * experts]
    n_experts   the number of experts
    expert      the number of the expert, from 0

    Returns views lora_A [rank, in] and lora_B [out, rank]. Raises ValueError for tensors that do not divide into
    `n_experts` of equal rank.

    >>> import torch
    >>> joined = Factors(torch.arange(4.0).reshape(4, 1), torch.arange(4.0).reshape(1, 4))  # 2 experts of rank 2
    >>> expert_of(joined, 2, 1).lora_A.flatten().tolist(), expert_of(joined, 2, 1).lora_B.flatten().tolist()
    ([2.0, 3.0], [1.0, 3.0])
    """
    rank = expert_rank(tuple(joined.lora_A.shape), tuple(joined.lora_B.shape), n_experts)
    return Factors(joined.lora_A[expert * rank : (expert + 1) * rank], joined.lora_B[:, expert::n_experts])


def split_experts(joined: Factors, n_experts: int) -> list[Factors]:
    """The factors of all experts in PEFT's two tensors, without copies: the inverse of `join_experts`.

    >>> import torch
    >>> [tuple(pair.lora_B.shape) for pair in split_experts(Factors(torch.ones(6, 5), torch.ones(7, 6)), 2)]
    [(7, 3), (7, 3)]
    """
    return [expert_of(joined, n_experts, expert) for expert in range(n_experts)]


def expert_rank(shape_A: tuple[int, ...], shape_B: tuple[int, ...], n_experts: int) -> int:
    """The rank of one expert by the shapes of PEFT's two tensors.

    shape_A   [experts * rank, in]
    shape_B   [out, rank * experts]

    Raises ValueError for shapes that do not divide into `n_experts` of equal rank.

    >>> expert_rank((32, 64), (192, 32), 4)
    8
    """
    if len(shape_A) != 2 or len(shape_B) != 2 or shape_A[0] != shape_B[1] or shape_A[0] % n_experts:
        raise ValueError(f"lora_A {shape_A} and lora_B {shape_B} are no factors of {n_experts} experts")
    return shape_A[0] // n_experts


def turned(factors: Factors) -> Factors:
    """The factors of the transposed matrix, without a copy: lora_A [rank, out] and lora_B [in, rank].

    For a parameter that lies as [experts, in, out] although PEFT reads [experts, out, in], as in Llama 4.

    >>> import torch
    >>> lora_A, lora_B = turned(Factors(torch.ones(2, 8), torch.ones(6, 2)))
    >>> tuple(lora_A.shape), tuple(lora_B.shape)
    ((2, 6), (8, 2))
    """
    return Factors(factors.lora_B.T, factors.lora_A.T)


def gate_rows(out_features: int, *, interleaved: bool = False) -> tuple[slice, slice]:
    """The rows of gate and of up in a matrix of both, [out, in].

    interleaved   gate and up take turns, as in gpt-oss; else gate lies above up

    >>> gate_rows(6), gate_rows(6, interleaved=True)
    ((slice(0, 3, None), slice(3, 6, None)), (slice(0, None, 2), slice(1, None, 2)))
    """
    if interleaved:
        return slice(0, None, 2), slice(1, None, 2)
    half = out_features // 2
    return slice(0, half), slice(half, out_features)


def fuse_gate_up(gate: Factors, up: Factors, *, interleaved: bool = False) -> Factors:
    """Factors of the matrix of gate and up [2 * inner, in], from factors of each: the ranks add up.

    gate, up   lora_A [rank, in] and lora_B [inner, rank]; the ranks may differ

    Returns lora_A [rank of gate + rank of up, in], and a lora_B that is zero where the other's rank is. alpha doubles
    with the rank, so the scaling stays. A pair of the same rank fitted to both matrices together is never worse.

    >>> import torch
    >>> fuse_gate_up(Factors(torch.ones(1, 2), torch.ones(1, 1)), Factors(torch.ones(1, 2), torch.ones(1, 1))).lora_B
    tensor([[1., 0.],
            [0., 1.]])
    """
    import torch

    inner, rank = gate.lora_B.shape
    lora_B = gate.lora_B.new_zeros(2 * inner, rank + up.lora_B.shape[1])
    rows_gate, rows_up = gate_rows(2 * inner, interleaved=interleaved)
    lora_B[rows_gate, :rank], lora_B[rows_up, rank:] = gate.lora_B, up.lora_B
    return Factors(torch.cat([gate.lora_A, up.lora_A]), lora_B)


def cut_gate_up(fused: Factors, *, interleaved: bool = False) -> tuple[Factors, Factors]:
    """Factors of gate and of up, from factors of the matrix of both, without copies: lora_A is common to both.

    >>> import torch
    >>> gate, up = cut_gate_up(Factors(torch.ones(2, 8), torch.arange(12.0).reshape(6, 2)))
    >>> gate.lora_B[0].tolist(), up.lora_B[0].tolist()
    ([0.0, 1.0], [6.0, 7.0])
    """
    rows_gate, rows_up = gate_rows(fused.lora_B.shape[0], interleaved=interleaved)
    return Factors(fused.lora_A, fused.lora_B[rows_gate]), Factors(fused.lora_A, fused.lora_B[rows_up])


def parameter_tensor_names(parameters: Iterable[str]) -> dict[str, tuple[str, str]]:
    """PEFT's names of lora_A and lora_B for each adapted parameter.

    parameters   complete names of all adapted parameters, those of a module in the order of the class: in transformers
                 gate_up_proj stands before down_proj

    PEFT wraps a module once for each adapted parameter. The first parameter has the innermost wrapper, and each wrapper
    around adds one ".base_layer" to the name.

    >>> names = parameter_tensor_names(["h.0.experts.gate_up_proj", "h.0.experts.down_proj"])
    >>> names["h.0.experts.gate_up_proj"][0], names["h.0.experts.down_proj"][0]
    ('base_model.model.h.0.experts.base_layer.lora_A.weight', 'base_model.model.h.0.experts.lora_A.weight')
    """
    by_module: dict[str, list[str]] = {}
    for parameter in parameters:
        by_module.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    names = {}
    for module, adapted in by_module.items():
        for outer, parameter in enumerate(reversed(adapted)):
            wrapper = f"{PREFIX}{module}{'.base_layer' * outer}"
            names[parameter] = (f"{wrapper}.lora_A.weight", f"{wrapper}.lora_B.weight")
    return {parameter: names[parameter] for adapted in by_module.values() for parameter in adapted}


def parameter_config(
    values: Mapping[str, tuple[int, float]], *, rank: int, alpha: float
) -> dict[str, list[str] | dict[str, int] | dict[str, float]]:
    """The entries of adapter_config.json for adapted parameters: target_parameters, rank_pattern and alpha_pattern.

    values        complete name of the parameter -> rank and alpha of one expert
    rank, alpha   the defaults of the config, "r" and "lora_alpha"

    A pattern lists what differs from the defaults. Add the two patterns to those of the adapted modules.

    >>> parameter_config({"h.0.experts.gate_up_proj": (16, 16.0)}, rank=8, alpha=16)["rank_pattern"]
    {'h.0.experts.gate_up_proj': 16}
    """
    ranks = {name: own for name, (own, _) in values.items() if own != rank}
    alphas = {name: int(own) if own == math.floor(own) else own for name, (_, own) in values.items() if own != alpha}
    return {"target_parameters": list(values), "rank_pattern": ranks, "alpha_pattern": alphas}


def targeted_parameters(config: Mapping[str, Any], parameters: Collection[str]) -> list[str]:
    """Choose the parameters that PEFT adapts under a config, among `parameters`, in order.

    config       the content of adapter_config.json
    parameters   complete names in the loaded model

    PEFT compares the complete name and its ends at a dot; exclude_modules and layers_to_transform are for modules only.
    Raises ValueError for a target_parameters that is no list of names.

    >>> targeted_parameters({"target_parameters": ["down_proj"]}, ["h.0.mlp.down_proj", "h.0.mlp.down_proj.weight"])
    ['h.0.mlp.down_proj']
    """
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError("target_parameters is not a list of names")
    ends, complete = tuple(f".{target}" for target in targets), set(targets)
    return [name for name in parameters if name in complete or (ends and name.endswith(ends))]
