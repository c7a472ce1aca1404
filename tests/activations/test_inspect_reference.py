"""`loftq inspect --reference`: what quantization does to the outputs of layers and of the model, as transformers and
PEFT compute it with weights that bitsandbytes and compressed-tensors decode.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from support import models
from support.adapters import decoded
from support.conversions import run_conversion, run_merge
from torch import nn
from torch.nn import functional

from loftq_cli.cli.main import _run
from loftq_cli.model.builtin import resolve_model

TINY_LLAMA = resolve_model("builtin:tiny-llama")
TEXT = "Return a new list that holds the same items in the order of their keys; see sorted() for the options. " * 12
CONTEXT, WINDOWS = 64, 3
ARGUMENTS = ("--tokens", str(CONTEXT * WINDOWS), "--context", str(CONTEXT), "--threads", "1")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("llama") / "out"
    run_conversion(TINY_LLAMA, output, rank=4, iterations=1)
    return output


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("minilm") / "out"
    run_conversion(models.minilm(), output, quant_type="int4", rank=4, iterations=1)
    return output


def inspected(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    status = _run(["inspect", *map(str, arguments), "--json"])
    said = capsys.readouterr()
    assert status == 0, said.err
    return json.loads(said.out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert _run(["inspect", *map(str, arguments)]) != 0
    return capsys.readouterr().err.splitlines()[-1]


def windows_of(ids: list[int], inside: int) -> list[list[int]]:
    """Where the text is longer: evenly spread, from its beginning to its end."""
    return [ids[number * (len(ids) - inside) // (WINDOWS - 1) :][:inside] for number in range(WINDOWS)]


def original(directory: Path, auto: str) -> Any:
    return getattr(transformers, auto).from_pretrained(directory, dtype=torch.float32).eval()


def with_weights(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name.removesuffix(".weight")).weight.copy_(weight)
    return model


def with_adapter(model: Any, directory: Path) -> Any:
    return PeftModel.from_pretrained(model, directory, subfolder="loftq_init").eval()


def output_errors(model: Any, others: list[dict[str, torch.Tensor]], ids: torch.Tensor) -> dict[str, list[float]]:
    """For each weight, √(Σ‖(W − W')·x‖² / Σ‖W·x‖²) in float64 on what it reads in `model`, for each W' in `others`."""
    inputs: dict[str, torch.Tensor] = {}
    for name in others[0]:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].double()))
    with torch.no_grad():
        model(input_ids=ids)
    errors = {}
    for name, x in inputs.items():
        weight = model.get_submodule(name.removesuffix(".weight")).weight.detach().double()
        norm = (x @ weight.T).norm()
        errors[name] = [float((x @ (weight - other[name].double()).T).norm() / norm) for other in others]
    return errors


def effective(peft: Any, names: Any) -> dict[str, torch.Tensor]:
    """Base and adapter as PEFT adds them."""
    layers = {name: peft.base_model.model.get_submodule(name.removesuffix(".weight")) for name in names}
    return {n: (layer.base_layer.weight + layer.get_delta_weight("default")).detach() for n, layer in layers.items()}


def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)


def perplexity(log: torch.Tensor, ids: torch.Tensor) -> float:
    return math.exp(float(functional.nll_loss(log.flatten(0, 1), ids[:, 1:].flatten())))


def kl(log: torch.Tensor, other: torch.Tensor) -> float:
    return float(functional.kl_div(other, log, log_target=True, reduction="none").sum(-1).mean())


def test_a_language_model_is_scored_as_transformers_and_peft_score_it(llama, text, capsys):
    found = inspected(capsys, llama, "--reference", TINY_LLAMA, "--text", text, *ARGUMENTS)
    ids = torch.tensor(windows_of(list(TEXT.encode()), CONTEXT))  # the vocabulary is bytes
    weights = {name: weight.float() for name, weight in decoded(llama).items()}
    whole = original(TINY_LLAMA, "AutoModelForCausalLM")
    log = log_probabilities(whole, ids)
    base = with_weights(original(TINY_LLAMA, "AutoModelForCausalLM"), weights)
    of_base = log_probabilities(base, ids)
    peft = with_adapter(base, llama)
    of_both = log_probabilities(peft, ids)
    predictions = found["reference"]["predictions"]
    assert predictions["perplexity"] == pytest.approx(perplexity(log, ids), rel=1e-5)
    assert predictions["base_perplexity"] == pytest.approx(perplexity(of_base, ids), rel=1e-5)
    assert predictions["adapted_perplexity"] == pytest.approx(perplexity(of_both, ids), rel=1e-5)
    # A difference of logarithms near each other: fewer digits are left of them.
    assert predictions["base_kl"] == pytest.approx(kl(log, of_base), rel=1e-3)
    assert predictions["adapted_kl"] == pytest.approx(kl(log, of_both), rel=1e-3)
    assert (found["reference"]["tokens"], found["reference"]["windows"]) == (CONTEXT * WINDOWS, WINDOWS)
    expected = output_errors(whole, [weights, effective(peft, weights)], ids)
    assert len(found["layers"]) == len(expected) == 28
    for layer in found["layers"]:
        errors = [layer["base_output_error"], layer["output_error"]]
        assert errors == pytest.approx(expected[layer["name"]], rel=1e-3), layer["name"]


def test_an_encoder_drifts_as_transformers_and_peft_say(minilm, text, capsys):
    found = inspected(capsys, minilm, "--reference", models.minilm(), "--text", text, *ARGUMENTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.minilm())
    plain = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(plain) >= (WINDOWS + 1) * 62  # more text than is asked for
    pieces = windows_of(plain, 62)
    ids = torch.tensor([[tokenizer.cls_token_id, *piece, tokenizer.sep_token_id] for piece in pieces])
    compressed = transformers.AutoModel.from_pretrained(minilm).eval()
    weights = {layer["name"]: seen(compressed.get_submodule(layer["module"])) for layer in found_layers(minilm)}
    whole = original(models.minilm(), "AutoModel")
    base = with_weights(original(models.minilm(), "AutoModel"), weights)
    pooled = {"original": mean_state(whole, ids), "base": mean_state(base, ids)}
    peft = with_adapter(base, minilm)
    pooled["adapted"] = mean_state(peft, ids)
    for which in ("base", "adapted"):
        similar = functional.cosine_similarity(pooled["original"], pooled[which], dim=-1)
        assert found["reference"]["drift"][which] == pytest.approx(float((1 - similar).mean()), rel=1e-2, abs=1e-7)
    expected = output_errors(whole, [weights, effective(peft, weights)], ids)
    for layer in found["layers"]:
        errors = [layer["base_output_error"], layer["output_error"]]
        assert errors == pytest.approx(expected[layer["name"]], rel=1e-3), layer["name"]


def found_layers(directory: Path) -> list[dict[str, Any]]:
    return json.loads((directory / "loftq_report.json").read_text())["layers"]


def seen(layer: nn.Module) -> torch.Tensor:
    """The weight [out, in] that a linear of any kind multiplies by."""
    with torch.no_grad():
        return (layer(torch.eye(layer.in_features)) - layer(torch.zeros(1, layer.in_features))).T


def mean_state(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).last_hidden_state.double().mean(1)


def test_a_pooled_adapter_does_what_its_exact_merge_does(text, tmp_path, capsys):
    output = tmp_path / "out"
    run_conversion(TINY_LLAMA, output, method="qalora", quant_type="int4", rank=4, layout="dense")
    merged = run_merge(output, output / "qalora_init", tmp_path / "merged", dtype="float32", layout="dense")
    found = inspected(capsys, output, "--reference", TINY_LLAMA, "--text", text, *ARGUMENTS)
    ids = torch.tensor(windows_of(list(TEXT.encode()), CONTEXT))
    expected = perplexity(log_probabilities(original(merged, "AutoModelForCausalLM"), ids), ids)
    predictions = found["reference"]["predictions"]
    assert predictions["adapted_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert predictions["adapted_perplexity"] != predictions["base_perplexity"]


def test_gpt2_whose_linears_are_stored_transposed_is_compared(text, tmp_path, capsys):
    model = models.with_tokenizer(models.gpt2_without_prefix(tmp_path / "model"))
    run_conversion(model, tmp_path / "out", rank=4, iterations=1)
    found = inspected(capsys, tmp_path / "out", "--reference", model, "--text", text, *ARGUMENTS)
    whole = original(model, "AutoModelForCausalLM")
    weights = {f"transformer.{name}": weight.float().T for name, weight in decoded(tmp_path / "out").items()}
    ids = torch.tensor(windows_of([ord(character) for character in TEXT], CONTEXT))
    log = log_probabilities(whole, ids)
    expected = kl(log, log_probabilities(with_weights(original(model, "AutoModelForCausalLM"), weights), ids))
    assert found["reference"]["predictions"]["base_kl"] == pytest.approx(expected, rel=1e-2)


def test_each_line_is_a_text_of_its_own(llama, tmp_path, capsys):
    lines, text = ["The first line,", "a much longer second one", "and a third."], tmp_path / "lines.txt"
    text.write_text("\n".join(lines))
    found = inspected(capsys, llama, "--reference", TINY_LLAMA, "--text", text, "--lines", "--threads", "1")
    whole = original(TINY_LLAMA, "AutoModelForCausalLM")
    ids = [torch.tensor([list(line.encode())]) for line in lines]  # the vocabulary is bytes
    nats = [math.log(perplexity(log_probabilities(whole, line), line)) * (line.shape[1] - 1) for line in ids]
    expected = math.exp(sum(nats) / sum(line.shape[1] - 1 for line in ids))
    assert found["reference"]["predictions"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert (found["reference"]["windows"], found["reference"]["tokens"]) == (3, sum(map(len, lines)))


def test_the_table_has_output_errors_and_totals(llama, text, capsys):
    command = ["inspect", str(llama), "--reference", "builtin:tiny-llama", "--text", str(text), *ARGUMENTS]
    capsys.readouterr()
    assert _run([*command, "--sort", "output_error", "--top", "3"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].split()[-3:] == ["base", "output", "output"]
    errors = [float(line.split()[-1]) for line in lines[1:4]]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0
    assert any(line.startswith("on 192 tokens: base output error 0.") for line in lines)
    assert any(line.startswith("perplexity: original ") for line in lines)
    assert any(line.startswith("KL from the original, nats a token: base ") for line in lines)
    assert "both models are in memory, 0.01 GB in float32" in said.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--reference", TINY_LLAMA), "--reference needs a text to run the models on (--text FILE)"),
        (("--text", "TEXT"), "--text is for --reference"),
        (("--context", 64), "--context is for --reference"),
        (("--lines",), "--lines is for --reference"),
        (("--sort", "output_error"), "--sort output_error needs outputs"),
        (("--verify", "--reference", TINY_LLAMA, "--text", "TEXT"), "--verify computes no errors for --reference"),
        (("--try", "nf4", "--reference", TINY_LLAMA, "--text", "TEXT"), "--try is for a full-precision checkpoint"),
        (("--reference", "CONVERTED", "--text", "TEXT"), "is quantized itself"),
        (("--reference", "MINILM", "--text", "TEXT"), "minilm"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_what_has_no_meaning_is_refused(arguments, said, llama, text, capsys):
    places = {"TEXT": text, "CONVERTED": llama, "MINILM": models.minilm()}
    line = refused(capsys, llama, *(places.get(argument, argument) for argument in arguments))
    if said == "minilm":
        assert line.startswith("error: ") and "tensor" in line
    else:
        assert said in line


def test_a_full_precision_checkpoint_has_nothing_to_compare(text, capsys):
    line = refused(capsys, TINY_LLAMA, "--reference", TINY_LLAMA, "--text", text)
    assert "--reference is for a converted directory, and this one is not" in line
