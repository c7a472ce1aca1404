"""Adapters on experts merge into the files of any family: the merged model computes what PEFT computes.

PEFT adapts the parameter of all experts; the files hold a matrix for each expert, or a tensor of all in either
orientation. Where PEFT cannot say the right numbers, float64 does.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.adapters import edit_tensors, lora_tensors, write_adapter
from support.mixtures import (
    BOTH,
    MIXTURES,
    load,
    logits,
    mixture,
    tensors_of,
    trained,
    with_packed_experts,
)

import loftq_cli as loftq
from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.cli.main import _run
from loftq_cli.model.stored import BaseModel

pytest.importorskip("peft")
REPORT = "loftq_merge_report.json"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(name, **values):
        key = (name, *values.items())
        if key not in made:
            made[key] = mixture(name, tmp_path_factory.mktemp("bases") / name, **values)
        return made[key]

    return base


def merged(base, adapter, out, *flags):
    assert _run(["merge", str(base), str(adapter), str(out), "--dtype", "float32", "--quiet", *flags]) == 0
    return out


def refused(base, adapter, out, capsys):
    status = _run(["merge", str(base), str(adapter), str(out), "--quiet"])
    return status, capsys.readouterr().err.strip()


@pytest.mark.parametrize("name", MIXTURES)
def test_a_merged_mixture_computes_what_peft_computes(name, bases, tmp_path):
    base = bases(name)
    adapter = trained(base, tmp_path / "adapter", target_parameters=BOTH, rank_pattern={r".*\.gate_up_proj": 5})
    out = merged(base, adapter.path, tmp_path / "out")
    assert adapter.wrappers in (2, 4)
    assert (logits(load(out)) - adapter.logits).abs().max() < 1e-5
    before, after = tensors_of(base), tensors_of(out)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and all(".experts." in n or "put_linear" in n for n in changed)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_all_linear_of_a_mixture_merges_with_the_router(name, bases, tmp_path):
    base = bases(name)
    adapter = trained(base, tmp_path / "adapter", target_modules="all-linear")
    assert set(adapter.config["target_parameters"]) == {"gate_up_proj", "down_proj", "gate.weight"}
    assert adapter.config["rank_pattern"] == {r".*\.gate_up_proj": 6}
    out = merged(base, adapter.path, tmp_path / "out")
    assert (logits(load(out)) - adapter.logits).abs().max() < 1e-5


BIASES = ["experts.gate_up_proj_bias", "experts.down_proj_bias"]
SQUARE = {"intermediate_size": 32}  # down_proj, as in gpt-oss-20b
HALF = {"intermediate_size": 16}  # gate_up_proj
CASES = {
    "square down, stored [in, out]": ("GptOssForCausalLM", SQUARE, {"target_parameters": BOTH}),
    "square gate and up, stored [in, out]": ("GptOssForCausalLM", HALF, {"target_parameters": BOTH}),
    "square down that PEFT turns": ("Llama4ForCausalLM", SQUARE, {"target_parameters": BOTH}),
    "square gate and up that PEFT turns": ("Llama4ForCausalLM", HALF, {"target_parameters": BOTH}),
    "square gate and up in two matrices": ("MixtralForCausalLM", HALF, {"target_parameters": BOTH}),
    "square down, stored [out, in]": ("GraniteMoeForCausalLM", SQUARE, {"target_parameters": BOTH}),
    "biases of experts": ("GptOssForCausalLM", {}, {"target_parameters": [*BOTH, *BIASES]}),
    "one parameter, by its last name": ("GptOssForCausalLM", {}, {"target_parameters": ["down_proj"]}),
    "rank-stabilized": ("MixtralForCausalLM", {}, {"target_parameters": ["gate_up_proj"], "use_rslora": True}),
    "a router of its own rank": (
        "MixtralForCausalLM",
        {},
        {"target_parameters": ["gate.weight"], "rank_pattern": {"gate.weight": 2}, "alpha_pattern": {"gate.weight": 9}},
    ),
    "complete names beside a linear": (
        "Qwen3MoeForCausalLM",
        {},
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["model.layers.1.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"],
        },
    ),
    "a linear's weight as a parameter": (
        "MixtralForCausalLM",
        {},
        {"target_parameters": ["q_proj.weight", "experts.down_proj"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_any_choice_of_parameters_merges(case, bases, tmp_path):
    name, values, config = CASES[case]
    base = bases(name, num_hidden_layers=2 if "complete" in case else 1, **values)
    adapter = trained(base, tmp_path / "adapter", **config)
    assert (logits(load(base)) - adapter.logits).abs().max() > 0.02
    out = merged(base, adapter.path, tmp_path / "out")
    assert (logits(load(out)) - adapter.logits).abs().max() < 1e-5


def test_an_adapter_of_the_model_without_its_head_merges_into_the_model_with_a_head(bases, tmp_path):
    base = bases("OlmoeForCausalLM")
    adapter = trained(base, tmp_path / "adapter", target_parameters=BOTH)
    tensors = load_file(adapter.path / "adapter_model.safetensors")
    renamed = {n.removeprefix("base_model.model.").removeprefix("model."): t for n, t in tensors.items()}
    headless = write_adapter(tmp_path / "headless", renamed, **{**adapter.config, "r": 3})
    out = merged(base, headless, tmp_path / "out")
    assert (logits(load(out)) - adapter.logits).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_several_adapters_of_experts_add_up_by_their_weights(name, bases, tmp_path):
    base = bases(name)
    one = trained(base, tmp_path / "one", target_parameters=BOTH)
    other = trained(base, tmp_path / "other", target_parameters=BOTH, r=2)
    alone = [
        tensors_of(merged(base, adapter.path, tmp_path / f"alone-{adapter.path.name}")) for adapter in (one, other)
    ]
    joined = tensors_of(merged(base, one.path, tmp_path / "joined", "--adapter", f"{other.path}:0.5"))
    before = tensors_of(base)
    for file, weight in before.items():
        expected = alone[0][file].double() + (alone[1][file].double() - weight.double()) / 2
        torch.testing.assert_close(joined[file].double(), expected, rtol=0, atol=1e-6)


def test_factors_of_single_experts_merge_as_peft_joins_them(bases, tmp_path):
    """The layout of PEFT over transformers 4, which PEFT joins for the parameters of transformers 5 while loading."""
    import peft

    base = bases("Qwen3MoeForCausalLM")
    shapes = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
    places = [(layer, expert, leaf) for layer in (0, 1) for expert in range(4) for leaf in shapes]
    modules = {f"model.layers.{place[0]}.mlp.experts.{place[1]}.{place[2]}": shapes[place[2]] for place in places}
    factors = {n: t for i, m in enumerate(modules) for n, t in lora_tensors(m, modules[m], seed=i).items()}
    adapter = write_adapter(tmp_path / "adapter", factors, target_modules=[*shapes], lora_alpha=8)
    model = peft.PeftModel.from_pretrained(load(base), adapter).eval()
    assert (logits(load(base)) - logits(model)).abs().max() > 0.02
    assert (logits(load(merged(base, adapter, tmp_path / "out"))) - logits(model)).abs().max() < 1e-5


# The rows of one expert's matrices in a parameter [2 * inner, hidden], and the orientation in the files.
STACKS = {
    "GptOssForCausalLM": ("mlp.experts", "mlp.experts.{}", slice(0, None, 2), slice(1, None, 2), True),
    "Llama4ForCausalLM": ("feed_forward.experts", "feed_forward.experts.{}", slice(0, 24), slice(24, 48), True),
    "GraniteMoeForCausalLM": (
        "block_sparse_moe.experts",
        {"gate_up_proj": "block_sparse_moe.input_linear.weight", "down_proj": "block_sparse_moe.output_linear.weight"},
        *(slice(0, 24), slice(24, 48), False),
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_factors_of_single_experts_merge_into_a_tensor_of_all(name, bases, tmp_path):
    holder, stored, gate, up, is_transposed = STACKS[name]
    base = bases(name)
    shapes = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
    modules = {f"model.layers.1.{holder}.{e}.{leaf}": shapes[leaf] for e in (0, 3) for leaf in shapes}
    factors = {n: t for i, m in enumerate(modules) for n, t in lora_tensors(m, modules[m], seed=i).items()}
    adapter = write_adapter(tmp_path / "adapter", factors, target_modules=[*modules], lora_alpha=8)
    before = tensors_of(base)
    after = tensors_of(merged(base, adapter, tmp_path / "out"))
    for leaf, rows in {"gate_proj": gate, "up_proj": up, "down_proj": slice(None)}.items():
        parameter = "down_proj" if leaf == "down_proj" else "gate_up_proj"
        file = stored[parameter] if isinstance(stored, dict) else stored.format(parameter)
        changes = after[f"model.layers.1.{file}"].double() - before[f"model.layers.1.{file}"].double()
        for expert, change in enumerate(changes):
            change_of_part = (change.T if is_transposed else change)[rows]
            module = f"model.layers.1.{holder}.{expert}.{leaf}"
            expected = torch.zeros(shapes[leaf]).double()
            if module in modules:
                expected = 2 * factors[f"{module}.lora_B.weight"].double() @ factors[f"{module}.lora_A.weight"].double()
            torch.testing.assert_close(change_of_part, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("inner", [24, 32])
def test_the_layout_of_peft_0_18_merges_as_it_was_trained(inner, bases, tmp_path):
    """PEFT 0.18 took `in` from the second dimension of the parameter, whatever the module said of its orientation."""
    base = bases("MixtralForCausalLM", intermediate_size=inner)
    holder = "model.layers.0.mlp.experts"
    lora_A, lora_B = torch.randn(4 * 3, 32), torch.randn(inner, 3 * 4) * 0.01  # down_proj [4, 32, inner]
    adapter = write_adapter(
        *(tmp_path / "adapter", {f"{holder}.lora_A.weight": lora_A, f"{holder}.lora_B.weight": lora_B}),
        r=3,
        lora_alpha=6,
        target_modules=[],
        target_parameters=["experts.down_proj"],
        peft_version="0.18.1",
    )
    before, after = tensors_of(base), tensors_of(merged(base, adapter, tmp_path / "out"))
    delta = torch.einsum("ore,eri->eio", lora_B.double().view(inner, 3, 4), lora_A.double().view(4, 3, 32)) * 2
    for expert in range(4):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"
        change = after[name].double() - before[name].double()
        torch.testing.assert_close(change, delta[expert], rtol=0, atol=1e-6)


# Packed experts


@pytest.fixture(scope="module")
def packed(bases, tmp_path_factory):
    """A base with experts in 4 bits, an adapter of all experts, and the exact sum for each expert's matrix."""
    base = bases("Qwen3MoeForCausalLM", hidden_size=64, moe_intermediate_size=32)
    path = tmp_path_factory.mktemp("packed")
    adapter = trained(base, path / "adapter", target_parameters=BOTH, rank_pattern={r".*\.gate_up_proj": 5})
    directory, exact = with_packed_experts(base, path / "int4"), {}
    factors = load_file(adapter.path / "adapter_model.safetensors")
    with BaseModel.open(directory) as opened:
        for name in opened.quantized:
            layer, expert, leaf = name.split(".")[2], int(name.split(".")[5]), name.split(".")[6]
            inner, rank = (".base_layer", 5) if leaf != "down_proj" else ("", 3)
            prefix = f"base_model.model.model.layers.{layer}.mlp.experts{inner}.lora_"
            lora_A, lora_B = (factors[f"{prefix}{x}.weight"].double() for x in "AB")
            delta = 6 / rank * lora_B[:, expert::4] @ lora_A[expert * rank : (expert + 1) * rank]
            rows = {"gate_proj": slice(0, 32), "up_proj": slice(32, 64), "down_proj": slice(None)}[leaf]
            exact[name] = opened.matrix(name).double() + delta[rows]
    return directory, adapter.path, exact


def test_packed_experts_merge_dense_under_their_own_names(packed, tmp_path):
    directory, adapter, exact = packed
    after = tensors_of(merged(directory, adapter, tmp_path / "out", "--force"))
    assert len(exact) == 2 * 4 * 3
    for name, expected in exact.items():
        torch.testing.assert_close(after[name].double(), expected, rtol=0, atol=1e-6)


def test_packed_experts_are_quantized_again_and_each_says_what_is_retained(packed, tmp_path):
    directory, adapter, exact = packed
    flags = ["--requantize", "int4", "--symmetric", "--group-size", "32", "--layout", "compressed-tensors", "--force"]
    out = merged(directory, adapter, tmp_path / "out", *flags)
    layers = {layer["name"]: layer for layer in json.loads((out / REPORT).read_text())["layers"]}
    with BaseModel.open(out) as opened:
        assert set(opened.quantized) == set(exact) == set(layers)
        for name, expected in exact.items():
            assert (opened.matrix(name).double() - expected).norm() / expected.norm() < 0.12  # 4 bits
            assert 0.9 < layers[name]["retention"] < 1.1


def test_inspect_measures_base_and_adapter_of_every_expert(packed, bases, tmp_path):
    directory, adapter, exact = packed
    beside = shutil.copytree(directory, tmp_path / "int4")
    shutil.copytree(adapter, beside / "loftq_init")
    original = bases("Qwen3MoeForCausalLM", hidden_size=64, moe_intermediate_size=32)
    weights = tensors_of(original)
    rows = {row.name: row for row in loftq.inspect(beside, against=original).layers}
    assert rows.keys() == exact.keys()
    for name, sum_of_both in exact.items():
        weight = weights[name].double()
        expected = float((weight - sum_of_both).norm() / weight.norm())
        assert rows[name].error.error == pytest.approx(expected, rel=1e-5)


class Experts(torch.nn.ModuleList):
    """Experts as linears, each with what it adds to `inputs`."""

    def __init__(self, count, hidden, inner):
        shapes = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
        super().__init__(
            torch.nn.ModuleDict({leaf: torch.nn.Linear(*shape, bias=False) for leaf, shape in shapes.items()})
            for _ in range(count)
        )


def test_training_reads_the_factors_of_all_experts_for_experts_as_linears(packed):
    directory, adapter, exact = packed
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
    for layer in model.model.layers:
        layer.mlp.experts = Experts(4, 64, 32)
    loftq.load_adapted(model, directory, adapter=adapter)
    for name, expected in exact.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert layer.lora_A.requires_grad
        torch.testing.assert_close(layer._merge_weight().double(), expected, rtol=0, atol=1e-6)


def test_training_refuses_the_factors_of_a_tensor_of_all_experts_by_name(bases, tmp_path):
    base = bases("GptOssForCausalLM")
    adapter = trained(base, tmp_path / "adapter", target_parameters=BOTH)
    with pytest.raises(loftq.MismatchError, match=r"experts\.(base_layer\.)?lora_A\.weight: is neither"):
        loftq.load_adapted(load(base), base, adapter=adapter.path)


def test_memory_holds_one_expert_of_a_tensor_of_all(bases, tmp_path, monkeypatch):
    base = bases("GptOssForCausalLM")
    adapter = trained(base, tmp_path / "adapter", target_parameters=BOTH)
    read, load, load_rows = set[tuple[str, int]](), Checkpoint.load, Checkpoint.load_rows

    def whole(self, name, **options):
        assert not name.endswith(("gate_up_proj", "down_proj")), name
        return load(self, name, **options)

    def rows(self, name, start, stop):
        if ".experts." in name:
            assert stop - start == 1
            read.add((name, start))
        return load_rows(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "load", whole)
    monkeypatch.setattr(Checkpoint, "load_rows", rows)
    merged(base, adapter.path, tmp_path / "out")
    assert len(read) == 2 * 2 * 4  # layers, parameters, experts


def test_packed_experts_of_one_tensor_merge_into_the_tensor_again(bases, tmp_path):
    """gpt-oss: gate and up in turns, the factors of all experts in two tensors."""
    base = bases("GptOssForCausalLM", hidden_size=64, intermediate_size=32)
    adapter = trained(base, tmp_path / "adapter", target_parameters=BOTH)
    directory = with_packed_experts(base, tmp_path / "int4")
    out = merged(directory, adapter.path, tmp_path / "out", "--force")
    after, before = tensors_of(out), tensors_of(base)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    factors = load_file(adapter.path / "adapter_model.safetensors")
    holder = "model.layers.1.mlp.experts"
    with BaseModel.open(directory) as opened:
        for leaf, wrapper in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
            lora_A, lora_B = (factors[f"base_model.model.{holder}{wrapper}.lora_{x}.weight"].double() for x in "AB")
            for expert in range(4):
                delta = 2 * lora_B[:, expert::4] @ lora_A[3 * expert : 3 * expert + 3]
                exact = opened.matrix(f"{holder}.{expert}.{leaf}.weight").double() + delta
                torch.testing.assert_close(after[f"{holder}.{leaf}"][expert].T.double(), exact, rtol=0, atol=1e-6)
    layers = {layer["name"]: layer for layer in json.loads((out / REPORT).read_text())["layers"]}
    assert layers[f"{holder}.down_proj"]["experts"] == pytest.approx([1, 1, 1, 1], rel=1e-3)
    assert json.loads((out / REPORT).read_text())["added"] == []


def test_packed_modules_of_experts_merge_into_one_tensor_again(bases, tmp_path):
    """Llama 4: loaded from packed weights, experts are modules, and each has factors of its own."""
    base = bases("Llama4ForCausalLM", hidden_size=64, intermediate_size=32)
    directory = with_packed_experts(base, tmp_path / "int4")
    holder = "model.layers.0.feed_forward.experts"
    modules = {f"{holder}.2.gate_proj": (32, 64), f"{holder}.2.up_proj": (32, 64), f"{holder}.1.down_proj": (64, 32)}
    factors = {n: t for i, m in enumerate(modules) for n, t in lora_tensors(m, modules[m], seed=i).items()}
    adapter = write_adapter(tmp_path / "adapter", factors, target_modules=[*modules], lora_alpha=8)
    after, before = tensors_of(merged(directory, adapter, tmp_path / "out", "--force")), tensors_of(base)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}

    def exact(opened, expert, leaf):
        module = f"{holder}.{expert}.{leaf}"
        weight = opened.matrix(f"{module}.weight").double()
        if module in modules:
            weight += 2 * factors[f"{module}.lora_B.weight"].double() @ factors[f"{module}.lora_A.weight"].double()
        return weight

    with BaseModel.open(directory) as opened:
        for expert in range(4):
            gate_up = torch.cat([exact(opened, expert, "gate_proj"), exact(opened, expert, "up_proj")])
            for leaf, expected in (("gate_up_proj", gate_up), ("down_proj", exact(opened, expert, "down_proj"))):
                torch.testing.assert_close(after[f"{holder}.{leaf}"][expert].T.double(), expected, rtol=0, atol=1e-6)


# What is said


def test_a_tensor_of_all_experts_says_what_each_expert_retains(bases, tmp_path, capsys):
    base = bases("GptOssForCausalLM")
    adapter = trained(base, tmp_path / "adapter", target_parameters=BOTH)

    def forget(tensors):  # expert 2 of every down_proj
        for name, tensor in tensors.items():
            if name.endswith("experts.lora_B.weight"):
                tensor[:, 2::4] = 0

    edit_tensors(adapter.path / "adapter_model.safetensors", forget)
    assert _run(["merge", str(base), str(adapter.path), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    layers = {layer["name"]: layer for layer in json.loads((tmp_path / "out" / REPORT).read_text())["layers"]}
    retained = layers["model.layers.0.mlp.experts.down_proj"]["experts"]
    assert retained.pop(2) is None
    assert retained == pytest.approx([1, 1, 1], rel=1e-3)
    assert layers["model.layers.0.mlp.experts.gate_up_proj"]["experts"] == pytest.approx([1, 1, 1, 1], rel=1e-3)
    assert "4 layers to merge" in capsys.readouterr().err


def test_requantizing_says_that_a_tensor_of_all_experts_stays_in_full_precision(bases, tmp_path, capsys):
    base = bases("GptOssForCausalLM", hidden_size=64)
    adapter = trained(base, tmp_path / "adapter", target_parameters=BOTH, target_modules=["q_proj"])
    flags = ["--requantize", "int4", "--group-size", "32", "--symmetric", "--layout", "compressed-tensors", "--force"]
    assert _run(["merge", str(base), str(adapter.path), str(tmp_path / "out"), *flags]) == 0
    assert "4 tensors of experts stay in full precision" in capsys.readouterr().err
    assert BaseModel.open(tmp_path / "out").quantized.keys() == {
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)
    }


# What is refused


def joined(out_features, in_features, *, rank=3, experts=4, holder="model.layers.0.mlp.experts"):
    """The two tensors of all experts of a layer, as PEFT has them for the only adapted parameter."""
    return {
        f"{holder}.lora_A.weight": torch.ones(experts * rank, in_features),
        f"{holder}.lora_B.weight": torch.ones(out_features, rank * experts),
    }


DOWN = {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": ["experts.down_proj"]}
REFUSED = {
    "another width": (joined(32, 25), DOWN, "is for (32, 25), and an expert of"),
    "fewer experts": (joined(32, 24, experts=2), DOWN, "holds 2 experts of rank 3, and the base has 4"),
    "another rank": (joined(32, 24, rank=2), DOWN, "has rank 8, and adapter_config.json says 3"),
    "another layer": (joined(32, 24, holder="model.layers.9.mlp.experts"), DOWN, "its parameter model.layers.9.mlp"),
    "no such parameter": (joined(32, 24), {**DOWN, "target_parameters": ["experts.up_proj"]}, "is not in the base"),
    "two names and one wrapper": (
        joined(32, 24),
        {**DOWN, "target_parameters": BOTH},
        "names down_proj, gate_up_proj for model.layers.0.mlp.experts, and the file holds 1 adapters",
    ),
    "a parameter of another module": (
        joined(32, 24),
        {**DOWN, "target_parameters": ["other.down_proj"]},
        "PEFT would drop it",
    ),
    "numbers that are none": (
        {n: t * torch.nan for n, t in joined(32, 24).items()},
        DOWN,
        "holds NaN or infinite values",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_of_experts_that_does_not_fit_is_refused_by_name(case, bases, tmp_path, capsys):
    tensors, config, says = REFUSED[case]
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)
    status, line = refused(bases("MixtralForCausalLM"), adapter, tmp_path / "out", capsys)
    assert status in (2, 4) and says in line, line
    assert not (tmp_path / "out").exists()


def test_an_expert_missing_in_the_base_is_refused(bases, tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    source = bases("MixtralForCausalLM")
    lacking = {n: t for n, t in tensors_of(source).items() if ".0.block_sparse_moe.experts.2.w3." not in n}
    save_file(lacking, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text((source / "config.json").read_text())
    tensors = joined(48, 32)
    adapter = write_adapter(tmp_path / "adapter", tensors, **{**DOWN, "target_parameters": ["experts.gate_up_proj"]})
    status, line = refused(base, adapter, tmp_path / "out", capsys)
    assert (status, "adapts expert 2, which is not complete in the base" in line) == (4, True), line
