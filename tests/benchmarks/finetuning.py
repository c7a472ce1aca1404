"""What a better start is worth after training: adapters of 2-bit models of `builtin:tiny-llama`, trained for the same
steps on the same batches of another kind of text, C headers, beside a fresh LoRA on the full-precision model.

`python -m tests.benchmarks.finetuning` prints a table; `--svg FILE` draws it and `--json FILE` writes it. Converts with
the commands that users type and trains with transformers and PEFT. Needs the `hf` extra and Python's C headers.
"""

from __future__ import annotations

import argparse
import json
import platform
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.benchmarks.measuring import package_version
from tests.benchmarks.perplexity import load
from tests.benchmarks.quality import (
    BUILTIN,
    EARLIER,
    EARLIER_CALIBRATED,
    STATISTICS,
    calibrate_builtin,
    run_loftq,
)

STEPS, EVERY, BATCH, CONTEXT, RANK = 200, 10, 4, 128, 16
RATE = 1e-3  # that of the training check
_HELD_OUT_FILES = 8  # every eighth header is for scoring
_SCORED = 128  # windows
FULL = "full precision, new LoRA"
STARTS = {
    "QLoRA": ("--method", "qlora"),
    "LoftQ": ("--recipe", "loftq-paper"),
    "joint": EARLIER,
    "joint, calibrated": EARLIER_CALIBRATED,
}

# Of middle lightness, so that they show on white and on black.
_COLOURS = {
    FULL: "#8a8a8a",
    "QLoRA": "#c98500",
    "LoftQ": "#2f86d1",
    "joint": "#1f9e6e",
    "joint, calibrated": "#c2528b",
}
_GREY = 'fill="#8a8a8a"'


@dataclass(frozen=True, slots=True)
class Curve:
    """One run: held-out losses in nats per byte, before the first step and after every `EVERY` of them."""

    start: str
    losses: tuple[float, ...]


def headers() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the running Python's C headers to train on, int64 [n], and windows of others, [windows, CONTEXT].

    Raises RuntimeError where they are not installed.
    """
    folder = Path(sysconfig.get_path("include"))
    files = [path.read_bytes() for path in sorted(folder.rglob("*.h"))]
    if len(files) < 2 * _HELD_OUT_FILES:
        raise RuntimeError(f"{folder}: no C headers of Python; install its development package")
    kept = b"".join(data for place, data in enumerate(files) if place % _HELD_OUT_FILES)
    scored = torch.tensor(list(b"".join(files[::_HELD_OUT_FILES])))
    windows = scored[: len(scored) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return torch.tensor(list(kept)), windows[:: max(1, len(windows) // _SCORED)][:_SCORED]


def measure(quant_type: str = "int2", rate: float = RATE) -> list[Curve]:
    """Every start, trained alike."""
    from peft import LoraConfig, PeftModel, get_peft_model

    kept, scored = headers()
    found = []
    with TemporaryDirectory() as name:
        directory = Path(name)
        statistics = calibrate_builtin(directory)
        targets: list[str] = []
        for place, (start, options) in enumerate(STARTS.items()):
            out = directory / str(place)
            given = [statistics if option == STATISTICS else option for option in options]
            done = run_loftq("quantize", BUILTIN, out, "--quant-type", quant_type, "--rank", RANK, *given)
            base, _ = load(out, None, "float32")
            model = PeftModel.from_pretrained(base, done["adapter"], is_trainable=True)
            targets = list(model.peft_config["default"].target_modules)
            found.append(Curve(start, _train(model, kept, scored, rate)))
        base, _ = load(BUILTIN, None, "float32")
        torch.manual_seed(0)
        fresh = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
        found.append(Curve(FULL, _train(fresh, kept, scored, rate)))
    return found


def _train(model: Any, kept: torch.Tensor, scored: torch.Tensor, rate: float) -> tuple[float, ...]:
    """Held-out losses; which batches are drawn depends on nothing but the text."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = [_loss(model, scored)]
    for step in range(1, STEPS + 1):
        begins = torch.randint(len(kept) - CONTEXT, (BATCH,), generator=generator)
        batch = torch.stack([kept[begin : begin + CONTEXT] for begin in begins.tolist()])
        model.train()
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            losses.append(_loss(model, scored))
    return tuple(losses)


@torch.inference_mode()
def _loss(model: Any, scored: torch.Tensor) -> float:
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in scored.split(32)]
    return sum(losses) / len(scored)


def drawing(curves: Sequence[Curve]) -> str:
    """The curves as an SVG: nats per byte over steps, each line with its name and last value at its end."""
    width, height, left, right, top, bottom = 760, 430, 52, 222, 58, 52
    lowest = min(min(curve.losses) for curve in curves)
    highest = max(max(curve.losses) for curve in curves)
    unit = 0.1 if highest - lowest < 0.8 else 0.2
    first, last = int(lowest / unit), -int(-highest // unit)
    ticks = [unit * place for place in range(first, last + 1)]

    def across(step: float) -> float:
        return left + (width - left - right) * step / STEPS

    def down(loss: float) -> float:
        return top + (height - top - bottom) * (ticks[-1] - loss) / (ticks[-1] - ticks[0])

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" font-family="system-ui, sans-serif" font-size="12">',
        "<title>Held-out loss while adapters of 2-bit models are trained</title>",
        "<style>.page{fill:#ffffff}.ink{fill:#1f2328}.grid{stroke:#d8dee4}"
        "@media(prefers-color-scheme:dark){.page{fill:#0d1117}.ink{fill:#e6edf3}.grid{stroke:#30363d}}</style>",
        f'<rect class="page" width="{width}" height="{height}" rx="6"/>',
        _text(16, 25, "Fine-tuning 2-bit models from four starts", 'class="ink" font-size="15" font-weight="600"'),
        _text(16, 44, f"held-out loss, nats per byte (builtin:tiny-llama on C headers, INT2, rank {RANK})"),
    ]
    for tick in ticks:
        y = f"{down(tick):.1f}"
        lines.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
        lines.append(_text(left - 8, down(tick) + 4, f"{tick:.1f}", _GREY + ' text-anchor="end"'))
    for step in range(0, STEPS + 1, 50):
        lines.append(_text(across(step), height - bottom + 20, str(step), _GREY + ' text-anchor="middle"'))
    lines.append(_text(across(STEPS / 2), height - 12, "step", _GREY + ' text-anchor="middle"'))
    labels = _apart([down(curve.losses[-1]) for curve in curves], 17.0)
    for curve, label in zip(curves, labels, strict=True):
        colour, ending = _COLOURS[curve.start], f"{curve.start} {curve.losses[-1]:.3f}"
        points = " ".join(f"{across(EVERY * n):.1f},{down(loss):.1f}" for n, loss in enumerate(curve.losses))
        dashes = ' stroke-dasharray="5 4"' if curve.start == FULL else ""
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        lines.append(_text(across(STEPS) + 8, label + 4, ending, f'fill="{colour}" font-size="13"'))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _text(x: float, y: float, content: str, looks: str = _GREY) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {looks}>{escape(content)}</text>'


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """The same heights, in the same order, moved until neighbours are `least` apart."""
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    moved = list(heights)
    for _ in range(100):
        for above, below in pairwise(order):
            missing = least - (moved[below] - moved[above])
            if missing > 0:
                moved[above] -= missing / 2
                moved[below] += missing / 2
    return moved


def main() -> None:
    """Print the table, draw it."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.finetuning", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--svg", type=Path, metavar="FILE")
    parser.add_argument("--rate", type=float, default=RATE, help="of AdamW")
    options = parser.parse_args()
    curves = measure(rate=options.rate)
    shown = [0, 50, 100, 150, 200]
    print("| held-out nats per byte | " + " | ".join(f"step {step}" for step in shown) + " |")
    print("|---|" + "--:|" * len(shown))
    for curve in curves:
        print(f"| {curve.start} | " + " | ".join(f"{curve.losses[step // EVERY]:.4f}" for step in shown) + " |")
    if options.svg:
        options.svg.write_text(drawing(curves), encoding="utf-8")
    if options.json:
        about = {name: package_version(name) for name in ("torch", "transformers", "peft", "compressed-tensors")}
        about |= {"python": platform.python_version()}
        training = {"steps": STEPS, "every": EVERY, "batch": BATCH, "context": CONTEXT, "rank": RANK}
        values = about | training | {"rate": options.rate, "curves": [asdict(curve) for curve in curves]}
        options.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
