"""Every family is right, or refused by name: the table in README.md against the whole way of each class."""

from __future__ import annotations

import pytest

from families.table import PAGE, ROWS, line_of, lines_in, run_row

# Plain names, renamed modules, split matrices, experts, a head over labels, two towers, and a refusal with its remedy.
QUICK = {
    "LlamaForCausalLM",
    "Qwen3MoeForCausalLM",
    "NomicBertModel",
    "GteModel",
    "ViTForImageClassification",
    "Dinov2ForImageClassification",
    "Dinov2Model",
    "SwinForImageClassification",
    "FalconForCausalLM",
    "RwkvForCausalLM",
    "T5ForConditionalGeneration",
    "Gemma3ForConditionalGeneration (names of the hub)",
    "MllamaForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2ForSequenceClassification",
}


@pytest.mark.parametrize("row", [row if row in QUICK else pytest.param(row, marks=pytest.mark.slow) for row in ROWS])
def test_a_class_goes_the_whole_way_as_the_table_says(row, tmp_path):
    way = run_row(row, tmp_path)

    assert way.problems == ()
    assert line_of(row, way) == lines_in(PAGE.read_text(encoding="utf-8")).get(row)


def test_the_table_has_every_class_once_and_no_other():
    assert sorted(lines_in(PAGE.read_text(encoding="utf-8"))) == sorted(ROWS)
