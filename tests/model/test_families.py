"""The table of model families: names that transformers has, keys that the reader knows, facts that reach a Family."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from loftq_cli.model import families as table
from loftq_cli.model.families import FamilyRow, families, family_row, parse_families
from loftq_cli.model.family import Family

ROOT = Path(__file__).parents[2]
FRAME = 'fused_expert_projections = ["up_proj"]\n[renamings]\nolder = [["^a", "b"]]\n[families]\n'


def test_every_row_names_a_model_type_of_transformers():
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    assert families()
    assert not families().keys() - set(auto.CONFIG_MAPPING.keys())


def test_every_row_says_something():
    assert [name for name, row in families().items() if row == FamilyRow()] == []


def test_the_table_is_read_once():
    assert families() is families()


def test_every_table_is_part_of_the_installed_package():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = Path(table.__file__).parent
    tables = {*folder.glob("*.toml"), *folder.glob("*.json")}
    assert len(tables) >= 4
    assert tables <= {path for glob in data["loftq_cli.model"] for path in folder.glob(glob)}


def test_a_family_without_a_row_has_no_facts():
    assert family_row("no such family") == FamilyRow()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('x = { transpose = ["c_fc"] }', "family x has unknown keys: transpose"),
        ('x = { experts = "stacked" }', "family x has experts 'stacked', not one of fused"),
        ('x = { renamings = "newer" }', "family x has renamings 'newer', which are not listed"),
        ('x = { refused_by = ["ggml"] }', "family x is refused by ggml, and there is no such container"),
        ('x = { transposed = "c_fc" }', "transposed of family x is no list of names"),
        ("x = { no_adapter = [1] }", "no_adapter of family x is no list of names"),
        ("x = { prefix = 1 }", "family x has a prefix that is no text"),
        ('x = { loads_in_4_bit = "no" }', "loads_in_4_bit other than true and false"),
        ('[experts]\nx = "fused"', "the table of families has or lacks experts"),
    ],
)
def test_a_row_that_the_reader_does_not_know_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        parse_families(FRAME + row)


def test_a_table_without_its_families_is_refused():
    with pytest.raises(ValueError, match="the table of families has or lacks families"):
        parse_families(FRAME.replace("[families]\n", ""))


def test_fused_experts_take_the_adapters_of_their_projections_beside_those_of_the_row():
    row = parse_families(FRAME + 'x = { experts = "fused", no_adapter = ["out_proj"] }')["x"]
    assert (row.no_adapter, row.moved) == (("out_proj",), ("up_proj",))


def test_a_row_names_its_renamings():
    assert parse_families(FRAME + 'x = { renamings = "older" }')["x"].renamings == (("^a", "b"),)


def test_a_family_is_known_by_its_own_row_alone():
    gpt2, llama = Family({"model_type": "gpt2"}), Family({"model_type": "llama"})
    assert (gpt2.is_transposed("h.0.attn.c_attn"), gpt2.is_transposed("lm_head")) == (True, False)
    assert not llama.is_transposed("h.0.attn.c_attn")


def test_a_family_reads_last_parts_and_endings_of_module_names():
    t5, glm, olmoe = (Family({"model_type": name}) for name in ("t5", "glm_moe_dsa", "olmoe"))
    assert (t5.is_kept_in_float32("block.0.wo"), t5.is_kept_in_float32("block.0.wi")) == (True, False)
    assert glm.is_kept_in_float32("layers.0.indexer.weights_proj")
    assert not glm.is_kept_in_float32("layers.0.other.weights_proj")
    assert (olmoe.takes_adapter("mlp.up_proj"), olmoe.takes_adapter("mlp.up_proj_2")) == (False, True)
    assert (olmoe.moves_adapter("mlp.up_proj"), olmoe.moves_adapter("mlp.up_proj_2")) == (True, False)


def test_a_shared_module_is_kept_in_every_block():
    family = Family({"model_type": "zamba2", "architectures": ["Zamba2ForCausalLM"], "num_hidden_layers": 3})
    module = "model.layers.1.shared_transformer.self_attn.q_proj"
    assert family.is_shared(module) and not family.is_shared("model.layers.1.linear")
    assert family.loaded_parts(module, [module]) == tuple(module.replace("1", str(block)) for block in range(3))


def test_a_family_without_an_adapter_on_some_linears_names_the_last_parts_of_their_names():
    family = Family({"model_type": "rwkv"})
    taken = {name: family.takes_adapter(f"rwkv.blocks.0.{name}") for name in ("attention.output", "feed_forward.value")}
    assert taken == {"attention.output": False, "feed_forward.value": False}
    assert family.takes_adapter("rwkv.blocks.0.attention.value")
