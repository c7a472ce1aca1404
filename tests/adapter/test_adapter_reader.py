"""One reader of adapter directories: inspect, comparison, verify, merge, nn and readback get one answer, one error."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import write_adapter
from support.conversions import run_conversion
from support.models import llama

from loftq_cli.adapter.beside import adapter_folders, find_adapter, load_adapter_pairs
from loftq_cli.adapter.config import PREFIX, AdaptedModule
from loftq_cli.adapter.source import open_adapter, open_planned_adapter
from loftq_cli.errors import InputError, LoftqError, MismatchError
from loftq_cli.inspecting.converted import inspect_converted
from loftq_cli.inspecting.verification import verify
from loftq_cli.merging.form import MergeOptions
from loftq_cli.merging.plan import prepare_merge
from loftq_cli.methods.method import METHODS
from loftq_cli.model.stored import BaseModel
from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.specs import LoraSpec

OUT, IN, RANK = 6, 16, 4
Q0 = "model.layers.0.self_attn.q_proj"
ADAPTER = "adapter_model.safetensors"


def factors(inputs: int = IN, out_features: int = OUT, rank: int = RANK) -> dict[str, torch.Tensor]:
    """Factors of a linear called "proj", of designed numbers: each entry is another small whole number."""
    lora_A = torch.arange(rank * inputs).reshape(rank, inputs).float()
    lora_B = torch.arange(out_features * rank).reshape(out_features, rank).float() % 5 - 2
    return {"proj.lora_A.weight": lora_A, "proj.lora_B.weight": lora_B}


def delta(pair: LoraPair) -> torch.Tensor:
    """What a pair adds to the weight [out, in], by the definition of LoraPair."""
    product = pair.scaling * pair.lora_B.double() @ pair.lora_A.double()
    return product.repeat_interleave(pair.group_size, dim=1)


# Each convention as a matrix [groups, in] that pools an input, for groups of 4: sum, mean, and mean times the number of
# groups.
POOLED = {"paper": 1.0, "repo": 1 / 4, "peft": (IN // 4) / 4}


@pytest.mark.parametrize(
    ("config", "scaling"),
    [({}, 6 / RANK), ({"use_rslora": True}, 6 / math.sqrt(RANK)), ({"alpha_pattern": {"proj": 10}}, 10 / RANK)],
    ids=["alpha / rank", "alpha / sqrt(rank)", "alpha of a pattern"],
)
def test_a_pair_is_the_scaled_product_of_the_stored_factors(tmp_path: Path, config: Any, scaling: float) -> None:
    tensors = factors()
    adapter = write_adapter(tmp_path / "adapter", tensors, lora_alpha=6, **config)

    pair = open_adapter(adapter).pair("proj", (OUT, IN))

    assert pair is not None
    expected = scaling * tensors["proj.lora_B.weight"].double() @ tensors["proj.lora_A.weight"].double()
    torch.testing.assert_close(delta(pair), expected)


@pytest.mark.parametrize("convention", POOLED)
def test_a_pooled_pair_holds_the_factor_of_its_convention(tmp_path: Path, convention: str) -> None:
    tensors = factors(inputs=IN // 4)
    config = {"use_qalora": True} if convention == "peft" else {"qalora_pooling": convention}
    adapter = write_adapter(tmp_path / "adapter", tensors, qalora_group_size=4, **config)

    pair = open_adapter(adapter).pair("proj", (OUT, IN))

    assert pair is not None and pair.group_size == 4
    pool = torch.block_diag(*[torch.ones(1, 4)] * (IN // 4)).double() * POOLED[convention]
    product = tensors["proj.lora_B.weight"].double() @ tensors["proj.lora_A.weight"].double()
    torch.testing.assert_close(delta(pair), product @ pool)


def test_a_full_width_factor_under_a_pooled_config_is_an_ordinary_adapter(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(), use_qalora=True, qalora_group_size=4)

    pair = open_adapter(adapter).pair("proj", (OUT, IN))

    assert pair is not None and (pair.group_size, pair.scaling) == (1, 1.0)


def test_a_module_without_an_adapter_has_no_pair(tmp_path: Path) -> None:
    source = open_adapter(write_adapter(tmp_path / "adapter", factors()))
    assert source.pair("other", (OUT, IN)) is None


@pytest.mark.parametrize(
    ("shape", "tensor", "message"),
    [
        ((OUT, IN - 1), "lora_A", f"is ({RANK}, {IN}), and its layer asks for ({RANK}, {IN - 1})"),
        ((OUT, IN + 1), "lora_A", f"is ({RANK}, {IN}), and its layer asks for ({RANK}, {IN + 1})"),
        ((OUT - 1, IN), "lora_B", f"is ({OUT}, {RANK}), and its layer asks for ({OUT - 1}, {RANK})"),
        ((OUT + 1, IN), "lora_B", f"is ({OUT}, {RANK}), and its layer asks for ({OUT + 1}, {RANK})"),
    ],
)
def test_a_factor_that_does_not_fit_is_named(tmp_path: Path, shape: Any, tensor: str, message: str) -> None:
    source = open_adapter(write_adapter(tmp_path / "adapter", factors()))

    with pytest.raises(MismatchError) as caught:
        source.pair("proj", shape)

    assert (caught.value.tensor, caught.value.message) == (f"{PREFIX}proj.{tensor}.weight", message)


def test_groups_that_do_not_divide_the_inputs_are_refused(tmp_path: Path) -> None:
    tensors = factors(inputs=IN // 4)
    source = open_adapter(write_adapter(tmp_path / "adapter", tensors, use_qalora=True, qalora_group_size=4))

    with pytest.raises(MismatchError, match=rf"lora_A\.weight: pools groups of 4, and its layer has {IN + 1} inputs"):
        source.pair("proj", (OUT, IN + 1))


def test_the_plan_takes_the_place_of_a_config_that_is_not_written_yet(tmp_path: Path) -> None:
    tensors = {f"{PREFIX}{name}": value for name, value in factors().items()}
    save_file(tensors, tmp_path / ADAPTER)

    source = open_planned_adapter(tmp_path, [AdaptedModule("proj", (OUT, IN), LoraSpec(RANK, 6.0, rslora=True))])

    pair = source.pair("proj", (OUT, IN))
    assert pair is not None and pair.scaling == 6 / math.sqrt(RANK)
    assert torch.equal(pair.lora_A, tensors[f"{PREFIX}proj.lora_A.weight"])


# Where the adapter of a converted directory is.


def test_folders_of_methods_come_before_the_one_of_the_report() -> None:
    methods = [entry.adapter_dir for entry in METHODS.values()]
    assert list(adapter_folders("mine")) == [*methods, "mine"]
    assert list(adapter_folders("qlora_init")) == methods


@pytest.mark.parametrize("reported", ["", ".", "..", "/", "../.."])
def test_a_report_cannot_point_out_of_the_directory(tmp_path: Path, reported: str) -> None:
    inside = tmp_path / "model" / "converted"
    inside.mkdir(parents=True)
    for folder in (inside, tmp_path / "model", tmp_path):
        (folder / "adapter_config.json").write_text("{}")
    assert find_adapter(inside, reported) is None


def test_only_the_last_part_of_a_reported_path_counts(tmp_path: Path) -> None:
    write_adapter(tmp_path / "mine", factors())
    assert find_adapter(tmp_path, "/elsewhere/mine") == tmp_path / "mine"


def test_a_changed_report_cannot_hide_an_adapter(tmp_path: Path) -> None:
    for name in ("loftq_init", "mine"):
        write_adapter(tmp_path / name, factors())
    assert find_adapter(tmp_path, "mine") == tmp_path / "loftq_init"
    shutil.rmtree(tmp_path / "loftq_init")
    assert find_adapter(tmp_path, "mine") == tmp_path / "mine"


# All that read the adapter inside a converted directory.


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("original") / "llama")


@pytest.fixture(scope="module")
def converted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "base"
    run_conversion(original, output, rank=RANK, iterations=1)
    return output


def edit_config(adapter: Path, **values: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edit_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(adapter / ADAPTER)
    change(tensors)
    save_file(tensors, adapter / ADAPTER)


def inspect(base: Path, original: Path) -> None:
    with BaseModel.open(base) as model:
        inspect_converted(model, None)


def inspect_against(base: Path, original: Path) -> None:
    with BaseModel.open(base) as model:
        inspect_converted(model, original)


def compare(base: Path, original: Path) -> None:
    with BaseModel.open(base) as model:
        load_adapter_pairs(model, model.quantized, "loftq_init")


def merge(base: Path, original: Path) -> None:
    prepare_merge(base, base / "loftq_init", base.parent / "out", MergeOptions())


def train(base: Path, original: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from loftq_cli.nn import load_adapted

    load_adapted(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)), base)


READERS = [inspect, inspect_against, compare, merge, train]
FAULTS: dict[str, tuple[Callable[[Path], None], type[LoftqError], str]] = {
    "kind": (lambda d: edit_config(d, kasa_config={"beta": 1}), MismatchError, "kasa_config: KaSA truncates"),
    "alpha": (lambda d: edit_config(d, lora_alpha="many"), InputError, "lora_alpha is 'many', not a positive number"),
    "pooling": (
        lambda d: edit_config(d, qalora_pooling="median"),
        InputError,
        "the pooling convention is one of peft, paper, repo",
    ),
    "rank": (lambda d: edit_config(d, r=8), MismatchError, "has rank 4, and adapter_config.json says 8"),
    "targets": (
        lambda d: edit_config(d, exclude_modules=[Q0]),
        MismatchError,
        "its module is none of those that adapter_config.json adapts",
    ),
    "lonely": (
        lambda d: edit_tensors(d, lambda t: t.pop(f"{PREFIX}{Q0}.lora_B.weight")),
        MismatchError,
        f"tensor {PREFIX}{Q0}.lora_A.weight: has no lora_B beside it",
    ),
    "unknown": (
        lambda d: edit_tensors(d, lambda t: t.update({f"{PREFIX}{Q0}.lora_C.weight": torch.zeros(4, 4)})),
        MismatchError,
        f"tensor {PREFIX}{Q0}.lora_C.weight: is of a kind that merging does not know",
    ),
    "file": (lambda d: (d / ADAPTER).unlink(), InputError, f"holds no {ADAPTER}"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_reader_refuses_a_fault_with_the_same_words(
    fault: str, original: Path, converted: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(converted, base)
    change, kind, message = FAULTS[fault]
    change(base / "loftq_init")

    errors = []
    for read in READERS:
        with pytest.raises(kind) as caught:
            read(base, original)
        errors.append(str(caught.value))

    assert message in errors[0]
    assert errors == [errors[0]] * len(READERS)
    assert any(problem.what in errors[0] for problem in verify(base).problems)


def test_names_with_a_part_less_are_found_by_every_reader(original: Path, converted: Path, tmp_path: Path) -> None:
    """As PEFT writes an adapter that was trained through LlamaModel, not LlamaForCausalLM."""
    base = tmp_path / "base"
    shutil.copytree(converted, base)

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(f"{PREFIX}model.", PREFIX)] = tensors.pop(name)

    edit_tensors(base / "loftq_init", shorten)
    targets = json.loads((base / "loftq_init" / "adapter_config.json").read_text())["target_modules"]
    edit_config(base / "loftq_init", target_modules=[name.removeprefix("model.") for name in targets])

    with BaseModel.open(converted) as whole, BaseModel.open(base) as shortened:
        assert inspect_converted(shortened, original) == inspect_converted(whole, original)
        pairs = load_adapter_pairs(shortened, shortened.quantized, None)
        expected = load_adapter_pairs(whole, whole.quantized, None)
    assert pairs.keys() == expected.keys() and len(pairs) == len(targets)
    assert all(torch.equal(delta(pairs[name]), delta(expected[name])) for name in pairs)
    assert all(
        job.lora
        for job in prepare_merge(base, base / "loftq_init", tmp_path / "out", MergeOptions()).jobs
        if job.name in pairs
    )
    train(base, original)
