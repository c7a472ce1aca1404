"""From headers alone: which tensors are quantized and why, how they are laid out, what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loftq_cli.errors import InputError, UnreadFormat, UsageError
from loftq_cli.planning.jobs import CopyJob, LayerJob
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.planner import build_plan
from loftq_cli.planning.recipe import Override
from loftq_cli.planning.settle import make_recipe
from loftq_cli.tensors.headers import TensorRef

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}


def tensors(*entries: tuple[str, tuple[int, ...]] | tuple[str, tuple[int, ...], str]) -> dict[str, TensorRef]:
    return {
        entry[0]: TensorRef(entry[0], entry[2] if len(entry) > 2 else "bfloat16", entry[1], Path("model.safetensors"))
        for entry in entries
    }


def plan(*entries, config=LLAMA, **recipe) -> Plan:
    return build_plan(tensors(*entries), config, make_recipe(**recipe))


def quantized(made: Plan) -> list[str]:
    return [job.name for job in made.layers]


def reasons(made: Plan) -> dict[str, str]:
    return {job.name: job.reason for job in made.copies}


BLOCK = (
    ("model.embed_tokens.weight", (256, 64)),
    ("model.layers.0.self_attn.q_proj.weight", (64, 64)),
    ("model.layers.0.self_attn.q_proj.bias", (64,)),
    ("model.layers.0.mlp.gate_proj.weight", (128, 64)),
    ("model.layers.0.mlp.down_proj.weight", (64, 128)),
    ("model.layers.0.input_layernorm.weight", (64,)),
    ("model.norm.weight", (64,)),
    ("lm_head.weight", (256, 64)),
)


def test_linear_weights_of_the_blocks_are_quantized_and_nothing_else():
    made = plan(*BLOCK)
    assert quantized(made) == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ]
    assert reasons(made) == {
        "model.embed_tokens.weight": "embedding",
        "model.layers.0.self_attn.q_proj.bias": "not a matrix",
        "model.layers.0.input_layernorm.weight": "not a matrix",
        "model.norm.weight": "not a matrix",
        "lm_head.weight": "head",
    }


def test_no_tensor_of_the_input_is_missing_from_the_plan():
    made = plan(*BLOCK)
    assert [job.name for job in made.jobs] == [name for name, _ in BLOCK]


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.layers.0.mlp.gate.weight", (64, 64), "router"),
        ("model.layers.0.block_sparse_moe.gate.weight", (32, 64), "router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 64), "router"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 64), "embedding"),
        ("transformer.h.0.attn.rotary_embed.weight", (32, 64), "embedding"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", (64, 64), "expert"),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 64, 128), "expert"),
        ("model.layers.0.self_attn.k_cache.weight", (64, 64, 3), "not a matrix"),
        ("pooler.dense.weight", (64, 64), "head"),
        ("merger.weight", (64, 64), "outside the blocks"),
    ],
)
def test_what_looks_like_a_linear_but_is_none_is_copied(name, shape, reason):
    assert reasons(plan(*BLOCK, (name, shape)))[name] == reason


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "float8_e4m3fn"])
def test_codes_without_known_scales_are_refused_and_other_integers_are_copied(dtype):
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(UnreadFormat, match=f"up_proj.weight: is {dtype}: codes of a quantized weight"):
        plan(*BLOCK, (name, (64, 64), dtype))
    assert reasons(plan(*BLOCK, (name, (64,), dtype)))[name] == "not floating point"
    assert reasons(plan(*BLOCK, ("model.rotation", (64, 64), dtype)))["model.rotation"] == "not floating point"


def test_shared_experts_are_ordinary_linears():
    name = "model.layers.0.mlp.shared_experts.up_proj.weight"
    assert name in quantized(plan(*BLOCK, (name, (64, 64))))


def test_include_replaces_the_choice_and_exclude_wins():
    assert quantized(plan(*BLOCK, include=("self_attn",))) == ["model.layers.0.self_attn.q_proj.weight"]
    made = plan(*BLOCK, include=("layers",), exclude=("down_proj$",))
    assert "model.layers.0.mlp.down_proj.weight" not in quantized(made)
    assert reasons(made)["model.layers.0.mlp.down_proj.weight"] == "excluded"


def test_a_head_is_quantized_only_when_an_include_spells_its_name():
    assert "lm_head.weight" not in quantized(plan(*BLOCK, include=(".*",)))
    made = plan(*BLOCK, include=(r"layers\.", "lm_head"))
    assert "lm_head.weight" in quantized(made)
    assert "lm_head" not in made.model_config(LLAMA)["quantization_config"]["llm_int8_skip_modules"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("embed_tokens", "an embedding"),
        ("layers.0.mlp.gate$", "a router"),
        ("nothing_like_this", "finds no linear weight"),
    ],
)
def test_an_include_that_cannot_be_done_is_refused(pattern, message):
    with pytest.raises(UsageError, match=message):
        plan(*BLOCK, ("model.layers.0.mlp.gate.weight", (64, 64)), include=(pattern,))


def test_a_head_that_shares_the_embeddings_weight_is_never_quantized():
    with pytest.raises(UsageError, match="shares the embedding"):
        plan(*BLOCK, config={**LLAMA, "tie_word_embeddings": True}, include=("lm_head",))


def test_a_tied_alias_of_a_torch_file_is_stored_once():
    refs = tensors(*BLOCK)
    head = refs["lm_head.weight"]
    refs["lm_head.weight"] = TensorRef(head.name, head.dtype, head.shape, head.file, "model.embed_tokens.weight")
    tied = build_plan(refs, {**LLAMA, "tie_word_embeddings": True}, make_recipe())
    assert "lm_head.weight" not in tied.shard_of
    assert any("tied" in note for note in tied.notes)
    untied = build_plan(refs, {**LLAMA, "tie_word_embeddings": False}, make_recipe())
    assert "lm_head.weight" in untied.shard_of


@pytest.mark.parametrize(
    ("shape", "block_size", "what"),
    [
        ((64, 128), 64, 64),
        ((64, 96), 64, 32),  # whole blocks of 32, not of 64
        ((64, 80), 64, None),  # a row is no whole number of blocks: CPU kernels read wrong scales
        ((48, 64), 64, None),  # rows are not a multiple of 32: CPU kernels stop
        ((64, 64), 128, 32),
    ],
)
def test_a_shape_that_a_loader_would_misread_takes_a_fitting_block_size_or_stays(shape, block_size, what):
    name = "model.layers.0.mlp.up_proj.weight"
    made = plan(*BLOCK, (name, shape), block_size=block_size)
    job = next(job for job in made.jobs if job.name == name)
    if what is None:
        assert isinstance(job, CopyJob)
        assert any(note.startswith(f"{name}: kept in full precision") for note in made.notes)
    else:
        assert isinstance(job, LayerJob)
        assert job.matrix.spec.block_size == what
        assert any(note.startswith(name) for note in made.notes) == (what != block_size)


def test_the_dense_layout_takes_any_shape():
    name = "model.layers.0.mlp.up_proj.weight"
    assert name in quantized(plan(*BLOCK, (name, (48, 80)), layout="dense"))


def test_experts_are_said_to_stay_and_their_prefix_is_listed_for_the_loader():
    made = plan(*BLOCK, *((f"model.layers.0.mlp.experts.{i}.up_proj.weight", (64, 64)) for i in range(3)))
    assert any("3 expert tensors" in note for note in made.notes)
    skipped = made.model_config(LLAMA)["quantization_config"]["llm_int8_skip_modules"]
    assert "model.layers.0.mlp.experts" in skipped
    assert not any(".experts.0" in name for name in skipped)


def test_every_unquantized_linear_is_listed_for_the_loader_by_its_full_name():
    made = plan(*BLOCK, ("merger.weight", (64, 64)), exclude=("down_proj",))
    skipped = made.model_config(LLAMA)["quantization_config"]["llm_int8_skip_modules"]
    assert {"lm_head", "merger", "model.layers.0.mlp.down_proj"} <= set(skipped)


def test_a_short_name_that_would_also_skip_a_quantized_module_is_listed_so_that_it_cannot():
    made = plan(*BLOCK, ("proj.weight", (64, 64)), ("model.layers.0.attn.out.proj.weight", (64, 64)))
    skipped = made.model_config(LLAMA)["quantization_config"]["llm_int8_skip_modules"]
    assert "^proj$" in skipped
    assert "proj" not in skipped


def test_rank_beyond_the_matrix_is_refused_with_the_tensor_and_three_remedies():
    with pytest.raises(
        UsageError, match=r"tensor model.layers.0.self_attn.q_proj.weight: rank 65 .*--rank 64.*--exclude"
    ):
        plan(*BLOCK, rank=65)


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(UsageError, match="no weight to quantize"):
        plan(("model.embed_tokens.weight", (256, 64)))


@pytest.mark.parametrize(
    ("module", "options", "files", "named"),
    [
        ("embed{}", (), 1, "model/model.safetensors: no weight to quantize (loftq inspect shows"),
        ("embed{}", (), 2, "model: no weight to quantize (loftq inspect shows"),
        ("layers.{}.proj", ("--quant-type", "int4", "--group-size", "1024"), 1, "model/model.safetensors: no weight"),
    ],
)
def test_nothing_to_quantize_names_the_file_or_the_folder_of_the_files(module, options, files, named, run, tmp_path):
    names = ["model.safetensors"] if files == 1 else ["model-1.safetensors", "model-2.safetensors"]
    (tmp_path / "model").mkdir()
    for number, name in enumerate(names):
        save_file({f"{module.format(number)}.weight": torch.zeros(64, 64)}, tmp_path / "model" / name)
    if files == 2:
        weight_map = {f"{module.format(number)}.weight": name for number, name in enumerate(names)}
        (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    status, _, err = run("quantize", "model", "out", *options)
    assert (status, named in err) == (2, True), err


def test_a_quantized_model_is_refused():
    with pytest.raises(InputError, match=r"quantized already \(gptq\)"):
        plan(*BLOCK, config={**LLAMA, "quantization_config": {"quant_method": "gptq"}})


def test_overrides_change_one_layer_and_keep_the_models_scaling():
    override = Override(match="down_proj", rank=64, block_size=32, double_quant=False)
    made = plan(*BLOCK, rank=16, alpha=32.0, override=(override,))
    down = next(job for job in made.layers if "down_proj" in job.name)
    assert (down.lora.rank, down.lora.alpha, down.matrix.spec.block_size) == (64, 128.0, 32)
    assert not down.matrix.spec.double_quant
    assert {job.lora.scaling for job in made.layers} == {2.0}
    config = made.adapter_config("base")
    assert config["rank_pattern"] == {"model.layers.0.mlp.down_proj": 64}
    assert config["alpha_pattern"] == {"model.layers.0.mlp.down_proj": 128}


def test_overrides_can_set_alpha_and_leave_a_layer_alone():
    made = plan(*BLOCK, override=(Override(match="mlp", alpha=4.0), Override(match="down_proj", quantize=False)))
    assert reasons(made)["model.layers.0.mlp.down_proj.weight"] == "excluded by an override"
    assert next(job for job in made.layers if "gate_proj" in job.name).lora.alpha == 4.0


def test_an_override_that_matches_nothing_is_refused():
    with pytest.raises(UsageError, match="matches no module"):
        plan(*BLOCK, override=(Override(match="never"),))


def test_files_are_filled_in_order_and_a_weights_parts_stay_together():
    many = [(f"model.layers.{i}.mlp.up_proj.weight", (1024, 1024)) for i in range(6)]
    made = plan(*many, max_shard_size="1.2MB")
    assert [shard.file for shard in made.shards] == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    for job in made.layers:
        assert len({made.shard_of[tensor.name] for tensor in job.base_tensors}) == 1


def test_bits_per_weight_count_every_stored_byte():
    job = plan(("model.layers.0.mlp.up_proj.weight", (1024, 1024))).layers[0]
    blocks = 1024 * 1024 // 64
    stored = 1024 * 1024 / 2 + blocks + 4 * blocks / 256 + 16 * 4 + 256 * 4
    state = next(t for t in job.base_tensors if "quant_state" in t.name).nbytes
    assert job.bits_per_weight == 8 * (stored + state) / (1024 * 1024)


def test_float_weights_in_another_dtype_are_stored_in_the_models():
    made = plan(*BLOCK, ("model.layers.0.post_norm.weight", (64,), "float32"), ("model.inv_freq", (8,), "float32"))
    outputs = {job.name: job.output.dtype for job in made.copies}
    assert outputs["model.layers.0.post_norm.weight"] == "bfloat16"
    assert outputs["model.inv_freq"] == "float32"  # a buffer: loaders cast it themselves
    assert any("1 copied weights are converted" in note for note in made.notes)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "float16"),  # nothing said: what most weights are stored in
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"text_config": {"dtype": "float32"}}, "float32"),
        ({"torch_dtype": "auto"}, "float16"),
    ],
)
def test_the_models_dtype_is_the_configs_or_the_most_common_one(config, expected):
    made = plan(("model.layers.0.a.weight", (64, 64), "float16"), config=config)
    assert made.dtype == expected
    assert made.layers[0].matrix.dtype == expected


@pytest.mark.parametrize(
    ("config", "stored", "loaded"),
    [
        (("gpt2", "GPT2LMHeadModel"), "h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        (("gpt2", "GPT2LMHeadModel"), "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        (("gpt2", "GPT2Model"), "h.0.attn.c_attn", "h.0.attn.c_attn"),
        (("gpt2", "GPT2Model"), "transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),
        (("bert", "BertForMaskedLM"), "bert.encoder.layer.0.output.dense", "bert.encoder.layer.0.output.dense"),
        (("bert", "BertModel"), "encoder.layer.0.output.dense", "encoder.layer.0.output.dense"),
        (("unheard-of", "NewForCausalLM"), "layers.0.mlp", "layers.0.mlp"),
    ],
)
def test_the_adapter_names_modules_as_the_loaded_model_does(config, stored, loaded):
    model_type, architecture = config
    made = plan((f"{stored}.weight", (64, 64)), config={"model_type": model_type, "architectures": [architecture]})
    assert made.layers[0].module == loaded


def test_conv1d_weights_are_seen_transposed():
    made = plan(
        ("transformer.h.0.mlp.c_fc.weight", (64, 256)),
        config={"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
    )
    assert made.layers[0].matrix.shape == (256, 64)
    assert made.layers[0].matrix.transposed
    assert made.adapter_config("base")["fan_in_fan_out"] is True


def test_t5s_wo_stays_in_full_precision_because_transformers_insists():
    made = plan(
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", (128, 64)),
        ("encoder.block.0.layer.1.DenseReluDense.wo.weight", (64, 128)),
        config={"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
    )
    assert reasons(made) == {"encoder.block.0.layer.1.DenseReluDense.wo.weight": "kept in float32"}
    assert made.adapter_config("base")["task_type"] == "SEQ_2_SEQ_LM"
