"""The way of a tiny model of one class: convert, load base and adapter with the class, train a step, merge, compare."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from support.conversions import run_conversion, run_merge
from support.loading import keep_trainable
from torch import nn

from families.inputs import inputs_of
from loftq_cli.errors import LoftqError

_TOLERANCE = 1e-5
# Why a matrix inside the model stays as it is.
_KEPT = {
    "converted at load": "split or merged at load",
    "expert": "experts",
    "no adapter": "no adapter of PEFT",
    "shared": "shared by modules",
    "kept in float32": "float32",
}


@dataclass(frozen=True)
class Way:
    """What came of a class.

    name         the class
    outcome      "converted", or "refused: " and the message; the rest is then about the remedy --layout dense
    quantized    number of quantized layers, each with an adapter
    kept         reason -> number of matrices that stay in 16 bits for it
    reached      number of adapters that the input reaches and that get gradients
    problems     what is wrong; empty where all is right
    """

    name: str
    outcome: str
    quantized: int = 0
    kept: tuple[tuple[str, int], ...] = ()
    reached: int = 0
    problems: tuple[str, ...] = ()


def follow(name: str, model: Path, folder: Path, layout: str | None = None) -> Way:
    """Follow the class called `name` from its saved model, in the container `layout` or the default."""
    try:
        outcome = run_conversion(model, folder / "base", rank=4, iterations=1, layout=layout)
    except LoftqError as error:
        text = f"refused: {error.message} ({error.hint})"
        if layout is not None or "--layout dense" not in (error.hint or ""):
            return Way(name, text)
        return replace(follow(name, model, folder, "dense"), outcome=text)
    report = json.loads((folder / "base" / "loftq_report.json").read_text())
    counts = Counter(_KEPT[copy["reason"]] for copy in report["copied"] if copy["reason"] in _KEPT)
    problems: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = _load(name, report, folder / "base", outcome.adapter, problems, in_4_bit=layout is None)
        arguments = inputs_of(name, peft.base_model.model)
        reached = _train(peft, arguments, problems)
        peft.save_pretrained(folder / "trained")
        run_merge(folder / "base", folder / "trained", folder / "merged", dtype="float32")
        _compare(name, peft, folder / "merged", arguments, problems)
    return Way(name, "converted", len(report["layers"]), tuple(sorted(counts.items())), reached, tuple(problems))


def _from_pretrained(name: str, folder: Path, problems: list[str]) -> Any:
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            problems.append(f"{folder.name}: {kind} {sorted(map(str, info[kind]))[:3]}")
    return model


def _load(name: str, report: Any, base: Path, adapter: Path, problems: list[str], *, in_4_bit: bool) -> PeftModel:
    """Base and adapter, counted by the modules of the loaded model."""
    model = keep_trainable(_from_pretrained(name, base, problems))
    stored = {layer["module"] for layer in report["layers"]}
    loaded = {module for module, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    if loaded != (stored if in_4_bit else set()):
        problems.append(f"in 4 bits, stored {sorted(stored - loaded)[:3]}, loaded {sorted(loaded - stored)[:3]}")
    factors = load_file(adapter / "adapter_model.safetensors")
    peft = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    held = {key.replace(".default.", "."): tensor for key, tensor in peft.state_dict().items() if ".lora_" in key}
    if held.keys() != factors.keys() or len(held) != 2 * len(stored):
        problems.append(
            f"dropped {sorted(factors.keys() - held.keys())[:3]}, new {sorted(held.keys() - factors.keys())[:3]}"
        )
    if not all(torch.equal(held[key].cpu(), factors[key].to(held[key].dtype)) for key in held.keys() & factors.keys()):
        problems.append("factors are not those of the file")
    return peft


def _forward(model: nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    """The first output that a user looks at."""
    output = model(**arguments)
    names = ("logits", "logits_per_image", "last_hidden_state")
    found = next((output[key] for key in names if key in output and output[key] is not None), None)
    return (output[0] if found is None else found).float()


def _train(peft: PeftModel, arguments: dict[str, Any], problems: list[str]) -> int:
    """One step; the number of adapters that the input reaches, each of which has to get a gradient."""
    reached: set[str] = set()
    layers = dict(_adapted(peft))
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: reached.add(name))
    output = _forward(peft.train(), arguments)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * weights).sum().backward()
    for name in sorted(reached):
        for factors in (layers[name].lora_A, layers[name].lora_B):
            gradient = factors["default"].weight.grad
            if gradient is None or not bool(gradient.any()) or not bool(gradient.isfinite().all()):
                problems.append(f"no gradient in {name}")
                break
    scale = max(float(p.grad.abs().max()) for p in peft.parameters() if p.grad is not None)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.grad is not None:
                parameter -= 0.02 / scale * parameter.grad
    return len(reached)


def _adapted(peft: PeftModel) -> Iterator[tuple[str, Any]]:
    return (
        (name, layer) for name, layer in peft.named_modules() if hasattr(layer, "lora_A") and "default" in layer.lora_A
    )


def _compare(name: str, peft: PeftModel, merged: Path, arguments: dict[str, Any], problems: list[str]) -> None:
    """Logits of the merge against those of base and adapter, in evaluation."""
    with torch.no_grad():
        expected = _forward(peft.eval(), arguments)
        model = _from_pretrained(name, merged, problems).eval()
        actual = _forward(model, arguments)
    distance = float((actual - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    if not distance <= _TOLERANCE:
        problems.append(f"logits differ by {distance:.1e}")
