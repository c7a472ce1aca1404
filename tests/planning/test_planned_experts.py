"""Experts in a plan, from headers alone: which experts become quantized, how base and adapter are laid out, and what is
refused before any work.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from loftq_cli.errors import UsageError
from loftq_cli.model.experts import find_experts
from loftq_cli.model.family import Family
from loftq_cli.planning.jobs import LayerJob, ModelShares
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.planner import build_plan
from loftq_cli.planning.recipe import AffineOptions, Override
from loftq_cli.planning.recipe_files import resolve_recipe
from loftq_cli.planning.settle import make_recipe
from loftq_cli.tensors.headers import TensorRef

QWEN = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16"}
GPT_OSS = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
DEEPSEEK = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "dtype": "bfloat16"}
INT4 = {"quant_type": "int4", "symmetric": True, "group_size": 32, "rank": 4}
HIDDEN, INNER, EXPERTS = 128, 64, 3
MOE = "model.layers.0.mlp"


def headers(*entries: tuple[str, tuple[int, ...]]) -> dict[str, TensorRef]:
    return {name: TensorRef(name, "bfloat16", shape, Path("model.safetensors")) for name, shape in entries}


def expert(number: int, inner: int = INNER) -> list[tuple[str, tuple[int, ...]]]:
    prefix = f"{MOE}.experts.{number}"
    return [
        (f"{prefix}.down_proj.weight", (HIDDEN, inner)),
        (f"{prefix}.gate_proj.weight", (inner, HIDDEN)),
        (f"{prefix}.up_proj.weight", (inner, HIDDEN)),
    ]


SEPARATE = [
    ("model.embed_tokens.weight", (160, HIDDEN)),
    *(tensor for number in range(EXPERTS) for tensor in expert(number)),
    (f"{MOE}.gate.weight", (EXPERTS, HIDDEN)),
    ("model.layers.0.self_attn.q_proj.weight", (HIDDEN, HIDDEN)),
]
STACKED = [
    (f"{MOE}.experts.gate_up_proj", (EXPERTS, HIDDEN, 2 * INNER)),
    (f"{MOE}.experts.gate_up_proj_bias", (EXPERTS, 2 * INNER)),
    (f"{MOE}.experts.down_proj", (EXPERTS, INNER, HIDDEN)),
    ("model.layers.0.self_attn.q_proj.weight", (HIDDEN, HIDDEN)),
]


def plan(entries, config=QWEN, **recipe) -> Plan:
    return build_plan(headers(*entries), config, make_recipe(**recipe))


def experts_of(made: Plan) -> dict[str, LayerJob]:
    return {job.name: job for job in made.layers if job.experts}


def test_gate_and_up_of_all_experts_are_one_job_with_a_matrix_for_each_expert():
    jobs = experts_of(plan(SEPARATE, **INT4))
    gate_up, down = jobs[f"{MOE}.experts.gate_up_proj"], jobs[f"{MOE}.experts.down_proj"]
    assert (len(gate_up.experts), gate_up.matrix.shape) == (EXPERTS, (2 * INNER, HIDDEN))
    assert (len(down.experts), down.matrix.shape) == (EXPERTS, (HIDDEN, INNER))
    assert [part.tensor for part in gate_up.experts[1].parts] == [
        f"{MOE}.experts.1.gate_proj.weight",
        f"{MOE}.experts.1.up_proj.weight",
    ]


def test_the_base_has_packed_tensors_for_every_expert_as_kimi_k2_has():
    names = {t.name: t.shape for job in plan(SEPARATE, **INT4).layers for t in job.base_tensors}
    for number in range(EXPERTS):
        module = f"{MOE}.experts.{number}.up_proj"
        assert names[f"{module}.weight_packed"] == (INNER, HIDDEN // 8)
        assert names[f"{module}.weight_scale"] == (INNER, HIDDEN // 32)
        assert names[f"{module}.weight_shape"] == (2,)


def test_the_adapter_has_two_tensors_for_each_parameter_nested_as_peft_nests():
    tensors = {t.name: t.shape for t in plan(SEPARATE, **INT4).adapter_tensors}
    root = f"base_model.model.{MOE}.experts"
    assert tensors[f"{root}.base_layer.lora_A.weight"] == (EXPERTS * 4, HIDDEN)
    assert tensors[f"{root}.base_layer.lora_B.weight"] == (2 * INNER, 4 * EXPERTS)
    assert tensors[f"{root}.lora_A.weight"] == (EXPERTS * 4, INNER)
    assert tensors[f"{root}.lora_B.weight"] == (HIDDEN, 4 * EXPERTS)


def test_the_config_lists_parameters_apart_from_modules_and_a_rank_of_their_own():
    override = (Override(match=r"experts\.\d+\.(gate|up)_proj", rank=8),)
    config = plan(SEPARATE, override=override, **INT4).adapter_config("base")
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert sorted(config["target_parameters"]) == [f"{MOE}.experts.down_proj", f"{MOE}.experts.gate_up_proj"]
    assert config["rank_pattern"] == {f"{MOE}.experts.gate_up_proj": 8}
    assert config["alpha_pattern"] == {f"{MOE}.experts.gate_up_proj": 8}


def test_routers_are_ignored_by_the_loader_and_experts_are_not():
    config = plan(SEPARATE, **INT4).model_config(QWEN)["quantization_config"]
    assert f"{MOE}.gate" in config["ignore"]
    assert not any("experts" in name for name in config["ignore"])
    assert config["dequantize"] is True


def test_a_tensor_of_all_experts_is_cut_into_linear_maps():
    groups = {g.name: g for g in find_experts(headers(*STACKED), Family(GPT_OSS), packed=False)}
    assert groups[f"{MOE}.experts.gate_up_proj"].shape == (2 * INNER, HIDDEN)
    assert groups[f"{MOE}.experts.down_proj"].shape == (HIDDEN, INNER)
    (part,) = groups[f"{MOE}.experts.down_proj"].experts[2]
    assert (part.tensor, part.index, part.transposed) == (f"{MOE}.experts.down_proj", 2, True)


def test_decoded_values_keep_the_tensor_of_all_experts_and_copy_the_biases():
    made = plan(STACKED, GPT_OSS, layout="dense", block_size=32, rank=4)
    tensors = {t.name: t.shape for shard in made.shards for t in shard.tensors}
    assert tensors == dict(STACKED)
    assert [job.name for job in made.copies] == [f"{MOE}.experts.gate_up_proj_bias"]


@pytest.mark.parametrize("layout", ["bitsandbytes", "compressed-tensors"])
def test_experts_without_a_loader_stay_with_the_reason(layout):
    recipe = INT4 if layout == "compressed-tensors" else {"rank": 4}
    made = plan(STACKED, GPT_OSS, **recipe)
    assert not experts_of(made)
    (note,) = [note for note in made.notes if "expert tensors" in note]
    assert f"no loader of {layout} reads quantized experts" in note


def test_bitsandbytes_keeps_experts_in_16_bits():
    made = plan(SEPARATE, rank=4)
    assert not experts_of(made)
    assert sum(job.reason == "expert" for job in made.copies) == 3 * EXPERTS


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"symmetric": False},
            r"experts\.0\..*decodes experts of compressed-tensors without zero points \(--symmetric\)",
        ),
        (
            {"symmetric": False, "method": "qalora"},
            r"experts: an adapter of method qalora pools the inputs of modules.*--method loftq",
        ),
        ({"exclude": (r"experts\.1\.",)}, "loads no experts in full precision from compressed-tensors"),
        ({"override": (Override(match="q_proj", quant_type="int8"),)}, "decode the experts of a model by one format"),
        (
            {"override": (Override(match=r"experts\.1\.", group_size=64),)},
            "the experts of a layer become one parameter of one format",
        ),
        ({"group_size": 128}, r"loads no experts in full precision"),
        ({"override": (Override(match=r"experts\.1\.", rank=8),)}, "adapters of one rank"),
        ({"rank": 65}, r"rank 65 is more than the matrix has \(128 by 64\)"),
    ],
)
def test_what_loaders_of_packed_experts_do_not_read_is_refused(change, says):
    with pytest.raises(UsageError, match=says):
        plan(SEPARATE, **{**INT4, **change})


def test_incomplete_experts_are_no_experts_of_a_layer():
    without_up = [entry for entry in SEPARATE if entry[0] != f"{MOE}.experts.1.up_proj.weight"]
    without_first = [entry for entry in SEPARATE if ".experts.0." not in entry[0]]
    uneven = [*SEPARATE[:1], *expert(0), *expert(1, inner=32)]
    for entries, left in ((without_up, ["down_proj"]), (without_first, []), (uneven, [])):
        groups = find_experts(headers(*entries), Family(QWEN), packed=True)
        assert [group.name for group in groups] == [f"{MOE}.experts.{name}" for name in left]


def test_experts_of_a_class_that_nobody_knows_are_left_alone():
    config = {**QWEN, "architectures": ["MyMoeForCausalLM"]}
    assert find_experts(headers(*SEPARATE), Family(config), packed=True) == []


def test_where_peft_moves_adapters_to_the_experts_shared_experts_are_adapted_by_their_weight():
    shared = (f"{MOE}.shared_experts.up_proj.weight", (INNER, HIDDEN))
    made = plan([*SEPARATE, shared], DEEPSEEK, **INT4)
    assert f"{MOE}.shared_experts.up_proj.weight" in made.adapter_config("base")["target_parameters"]
    kept = plan([*SEPARATE, shared], DEEPSEEK, rank=4)  # PEFT adapts no packed weight in memory
    assert shared[0] in [job.name for job in kept.copies]


class TestDefaults:
    def resolve(self, rows, **flags):
        return resolve_recipe(None, flags, expert_rows=lambda: rows)

    def test_a_mixture_becomes_packed_integers_without_zero_points(self):
        recipe = self.resolve({128, 64})
        assert (recipe.layout, recipe.quant) == ("compressed-tensors", AffineOptions("int4", 64, True, None))

    @pytest.mark.parametrize(("rows", "size"), [({128, 64}, 64), ({128, 96}, 32), ({1408}, 64), ({48}, 16)])
    def test_groups_divide_the_rows_of_experts(self, rows, size):
        assert self.resolve(rows).quant.group_size == size

    def test_a_model_without_such_experts_keeps_the_default(self):
        assert self.resolve(set()) == make_recipe()

    @pytest.mark.parametrize(
        "flags",
        [{"quant_type": "nf4"}, {"layout": "dense"}, {"block_size": 64}, {"double_quant": False}],
        ids=lambda flags: next(iter(flags)),
    )
    def test_a_wish_for_a_format_or_a_container_counts(self, flags):
        assert self.resolve({64}, **flags) == make_recipe(**flags)

    def test_integers_of_a_mixture_have_no_zero_points_unless_asked_for(self):
        assert self.resolve({64}, quant_type="int3").quant.symmetric
        assert not self.resolve({64}, quant_type="int3", symmetric=False).quant.symmetric
        assert not self.resolve(set(), quant_type="int3").quant.symmetric


def test_the_shares_count_all_parameters_and_experts_apart():
    experts, attention = EXPERTS * 3 * INNER * HIDDEN, HIDDEN * HIDDEN
    kept = 160 * HIDDEN + EXPERTS * HIDDEN
    made = plan(SEPARATE, **INT4)
    shares = made.shares
    assert (shares.parameters, shares.quantized) == (experts + attention + kept, experts + attention)
    assert (shares.experts, shares.quantized_experts) == (experts, experts)
    assert shares.bits == 8 * made.base_nbytes / (experts + attention + kept)
    assert "(experts 100 %)" in shares.describe("bfloat16")
    in_nf4 = plan(SEPARATE, rank=4).shares
    assert (in_nf4.quantized, in_nf4.experts, in_nf4.quantized_experts) == (attention, experts, 0)


def test_a_model_without_experts_says_nothing_of_experts():
    assert "expert" not in ModelShares(10, 5, 0, 0, 8.0).describe("float32")
