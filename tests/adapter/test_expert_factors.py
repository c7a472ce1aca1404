"""The layout of adapters on whole parameters is the one PEFT computes with, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loftq_cli.adapter.config import values_of
from loftq_cli.adapter.expert_factors import (
    AdaptedParameter,
    Factors,
    cut_gate_up,
    expert_of,
    fuse_gate_up,
    join_experts,
    parameter_config,
    parameter_tensor_names,
    split_experts,
    targeted_parameters,
    turned,
)

E, H, N, R = 4, 10, 6, 3  # experts, width, inner width, rank
GATE_UP, DOWN = "layer.experts.gate_up_proj", "layer.experts.down_proj"


class Experts(nn.Module):
    """Parameters as transformers holds experts; `is_transposed` is the attribute that PEFT asks for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], is_transposed: bool | None):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(*shape, dtype=torch.float64)))
        if is_transposed is not None:
            self.is_transposed = is_transposed


class Model(nn.Module):
    def __init__(self, experts: Experts):
        super().__init__()
        self.layer = nn.ModuleDict({"experts": experts, "gate": Experts({"weight": (E, H)}, None)})


def wrapped(shapes, is_transposed, **config):
    """A model under PEFT with random factors: (wrapper by parameter, tensors of the file)."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        Model(Experts(shapes, is_transposed)),
        peft.LoraConfig(**{"r": R, "lora_alpha": 6, "target_modules": []} | config),
    )
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter)
    wrappers = {x.parameter_name: x for x in model.modules() if type(x).__name__ == "ParamWrapper"}
    return wrappers, peft.get_peft_model_state_dict(model)


def shapes_of(is_transposed):
    gate_up, down = (2 * N, H), (H, N)
    turn = -1 if is_transposed else 1
    return {"gate_up_proj": (E, *gate_up[::turn]), "down_proj": (E, *down[::turn])}


@pytest.mark.parametrize("is_transposed", [False, True, None])
def test_each_expert_of_peft_s_delta_is_the_product_of_the_expert_s_factors(is_transposed):
    shapes = shapes_of(is_transposed)
    wrappers, tensors = wrapped(shapes, is_transposed, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    names = parameter_tensor_names([GATE_UP, DOWN])
    assert sorted(tensors) == sorted(name for pair in names.values() for name in pair)
    for parameter in (GATE_UP, DOWN):
        leaf = parameter.rpartition(".")[2]
        adapted = AdaptedParameter(parameter, shapes[leaf], bool(is_transposed))
        joined = Factors(*(tensors[name] for name in names[parameter]))
        assert adapted.factor_shapes(R) == (tuple(joined.lora_A.shape), tuple(joined.lora_B.shape))
        delta = wrappers[leaf].get_delta_weight("default")
        for expert, pair in enumerate(split_experts(joined, E)):
            mine = 2.0 * pair.lora_B @ pair.lora_A  # alpha / r = 2
            assert mine.shape == adapted.matrix_shape
            torch.testing.assert_close(mine.T if is_transposed else mine, delta[expert], rtol=1e-14, atol=1e-14)


def test_joined_factors_of_experts_are_what_peft_reads():
    shapes = shapes_of(is_transposed=False)
    wrappers, _ = wrapped(shapes, False, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    pairs = [Factors(torch.randn(R, N).double(), torch.randn(H, R).double()) for _ in range(E)]
    joined = join_experts(pairs)
    wrapper = wrappers["down_proj"]
    wrapper.lora_A["default"].weight.data, wrapper.lora_B["default"].weight.data = joined
    delta = wrapper.get_delta_weight("default")
    torch.testing.assert_close(delta, torch.stack([2.0 * pair.lora_B @ pair.lora_A for pair in pairs]))
    assert all(map(torch.equal, expert_of(joined, E, 2), pairs[2]))
    assert joined.lora_A.is_contiguous() and joined.lora_B.is_contiguous()


def test_a_matrix_stored_in_out_that_peft_takes_for_out_in_has_turned_factors():
    """Llama 4: no attribute `is_transposed`, and the experts compute x @ weight[e]."""
    wrappers, tensors = wrapped({"down_proj": (E, N, H)}, None, target_parameters=["experts.down_proj"])
    joined = Factors(*(tensors[name] for name in parameter_tensor_names([DOWN])[DOWN]))
    x = torch.randn(5, N).double()
    lora_A, lora_B = turned(expert_of(joined, E, 1))
    expected = x @ wrappers["down_proj"].get_delta_weight("default")[1]
    torch.testing.assert_close(2.0 * x @ lora_A.T @ lora_B.T, expected)


def test_a_router_is_one_matrix_without_experts():
    wrappers, tensors = wrapped(shapes_of(False), False, target_parameters=["gate.weight"])
    names = parameter_tensor_names(["layer.gate.weight"])["layer.gate.weight"]
    assert sorted(tensors) == sorted(names)
    router = AdaptedParameter("layer.gate.weight", (E, H))
    joined = Factors(*(tensors[name] for name in names))
    assert router.factor_shapes(R) == (tuple(joined.lora_A.shape), tuple(joined.lora_B.shape))
    (pair,) = split_experts(joined, router.n_experts)
    torch.testing.assert_close(2.0 * pair.lora_B @ pair.lora_A, wrappers["weight"].get_delta_weight("default"))


@pytest.mark.parametrize("targets", [["experts.down_proj"], ["experts.gate_up_proj"], ["gate_up_proj", "down_proj"]])
@pytest.mark.parametrize("order", [("gate_up_proj", "down_proj"), ("down_proj", "gate_up_proj")])
def test_the_first_adapted_parameter_of_the_class_is_the_innermost_of_the_names(targets, order):
    shapes = {name: shapes_of(False)[name] for name in order}
    wrappers, tensors = wrapped(shapes, False, target_parameters=targets)
    adapted = targeted_parameters({"target_parameters": targets}, [f"layer.experts.{name}" for name in order])
    names = parameter_tensor_names(adapted)
    assert sorted(tensors) == sorted(name for pair in names.values() for name in pair)
    for parameter, (name_A, _) in names.items():
        wrapper = wrappers[parameter.rpartition(".")[2]]
        assert torch.equal(tensors[name_A], wrapper.lora_A["default"].weight)


# PEFT compares the patterns with modules alone before saying so; the ranks below are those of the patterns.
@pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module")
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_parameter_s_own_rank_and_alpha_reach_peft_through_the_patterns(use_rslora):
    entries = parameter_config({GATE_UP: (2 * R, 5.0), DOWN: (R, 6.0)}, rank=R, alpha=6)
    wrappers, _ = wrapped(shapes_of(False), False, use_rslora=use_rslora, **entries)
    assert {name: wrapper.r["default"] for name, wrapper in wrappers.items()} == {"gate_up_proj": 6, "down_proj": 3}
    assert wrappers["gate_up_proj"].lora_alpha["default"] == 5
    config = {"r": R, "lora_alpha": 6, **entries}
    assert values_of(config, "r", [GATE_UP, DOWN]) == {GATE_UP: 6, DOWN: 3}
    assert values_of(config, "lora_alpha", [GATE_UP, DOWN]) == {GATE_UP: 5, DOWN: 6}


@pytest.mark.parametrize("interleaved", [False, True])
def test_gate_and_up_fuse_to_one_product_and_are_cut_again(interleaved):
    gate, up = (Factors(torch.randn(r, H).double(), torch.randn(N, r).double()) for r in (R, 2))
    fused = fuse_gate_up(gate, up, interleaved=interleaved)
    both = torch.stack([gate.lora_B @ gate.lora_A, up.lora_B @ up.lora_A], dim=1 if interleaved else 0).flatten(0, 1)
    torch.testing.assert_close(fused.lora_B @ fused.lora_A, both)
    for cut, whole in zip(cut_gate_up(fused, interleaved=interleaved), (gate, up), strict=True):
        torch.testing.assert_close(cut.lora_B @ cut.lora_A, whole.lora_B @ whole.lora_A)


def test_tensors_that_are_no_factors_of_the_experts_are_refused():
    with pytest.raises(ValueError, match="no factors of 4 experts"):
        expert_of(Factors(torch.ones(6, 5), torch.ones(7, 6)), 4, 0)
    with pytest.raises(ValueError, match="of one shape"):
        join_experts([Factors(torch.ones(2, 5), torch.ones(7, 2)), Factors(torch.ones(3, 5), torch.ones(7, 3))])
    with pytest.raises(ValueError, match="of two or three dimensions"):
        AdaptedParameter("bias", (5,))
    with pytest.raises(ValueError, match="not a list of names"):
        targeted_parameters({"target_parameters": "down_proj"}, [])
