"""What each conversion costs a real language model: `builtin:tiny-llama` on held-out text, original beside converted.

`python -m tests.benchmarks.quality` prints the README's tables, or with `--only` one of them; `--json FILE` writes them
and keeps what it has of the others. Needs the `hf` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loftq_cli.nn import load_adapted
from tests.benchmarks.corpus import held_out_text, training_prose
from tests.benchmarks.perplexity import CONTEXT, MAX_TOKENS, load, score

ROOT = Path(__file__).parent.parent.parent
BUILTIN = ROOT / "loftq_cli" / "model" / "builtin_models" / "tiny-llama"
STATISTICS = "STATISTICS"  # in options: where `calibrate` wrote
TOKENS = 131072  # bytes of the training text that the statistics are of
# The joint fit of the table: from the principal part of the weights, where base and adapter together count, and all
# weights count alike. tests/benchmarks/language_model.py measures the default.
EARLIER = ("--start", "principal", "--keep-base", "0", "--calibration", "none")
EARLIER_CALIBRATED = ("--calibration", STATISTICS, "--keep-base", "0", "--rounds", "2")
CONVERSIONS = {
    "QLoRA, NF4": ("--recipe", "qlora-nf4"),
    "LoftQ as in the paper, NF4": ("--recipe", "loftq-paper"),
    "joint, NF4": ("--recipe", "loftq-nf4", *EARLIER),
    "joint, NF4, rank 64": ("--recipe", "loftq-nf4-r64", *EARLIER),
    "QLoRA, INT4": ("--recipe", "loftq-int4", "--method", "qlora"),
    "LoftQ as in the paper, INT4": ("--recipe", "loftq-paper", "--quant-type", "int4"),
    "joint, INT4": ("--recipe", "loftq-int4", *EARLIER),
    "QA-LoRA, INT4, group 32": ("--recipe", "qalora-int4", "--calibration", "none", "--keep-base", "0"),
    "QLoRA, INT3": ("--recipe", "loftq-int4", "--quant-type", "int3", "--method", "qlora"),
    "LoftQ as in the paper, INT3": ("--recipe", "loftq-paper", "--quant-type", "int3"),
    "joint, INT3": ("--recipe", "loftq-int4", "--quant-type", "int3", *EARLIER),
    "QLoRA, INT2": ("--recipe", "loftq-int4", "--quant-type", "int2", "--method", "qlora"),
    "LoftQ as in the paper, INT2": ("--recipe", "loftq-paper", "--quant-type", "int2"),
    "joint, INT2": ("--recipe", "loftq-int4", "--quant-type", "int2", *EARLIER),
    "joint, INT2, rank 64": ("--recipe", "loftq-int2", *EARLIER),
}
_INT3 = ("--recipe", "loftq-int4", "--quant-type", "int3")
_COMPRESSED, _MLX = (*_INT3, "--symmetric"), (*_INT3, "--layout", "mlx", "--asymmetric")
FORMATS = {
    "compressed-tensors, INT3": (*_COMPRESSED, *EARLIER),
    "compressed-tensors, chosen": (*_COMPRESSED, "--target-bpw", "3.25", *EARLIER),
    "compressed-tensors, INT3, calibrated": (*_COMPRESSED, *EARLIER_CALIBRATED),
    "compressed-tensors, chosen, calibrated": (*_COMPRESSED, "--target-bpw", "3.25", *EARLIER_CALIBRATED),
    "MLX, INT3": (*_MLX, *EARLIER),
    "MLX, chosen": (*_MLX, "--target-bpw", "3.5", *EARLIER),
    "MLX, INT3, calibrated": (*_MLX, *EARLIER_CALIBRATED),
    "MLX, chosen, calibrated": (*_MLX, "--target-bpw", "3.5", *EARLIER_CALIBRATED),
}
TABLES = {"rows": CONVERSIONS, "formats": FORMATS}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. `error` is the relative Frobenius error of the quantized weights with their adapter."""

    model: str
    bits_per_weight: float
    error: float
    perplexity: float
    bits_per_byte: float


def run_loftq(command: str, *arguments: object) -> dict[str, Any]:
    """What `loftq COMMAND ... --json` says. Raises RuntimeError with what it said when it fails."""
    quiet = () if command == "inspect" else ("--quiet",)
    line = [sys.executable, "-m", "loftq_cli", command, *map(str, arguments), "--json", *quiet]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(line, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)}\n{done.stderr}")
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def calibrate_builtin(directory: Path) -> Path:
    """Statistics of the built-in model on prose that it was trained on; no line of it is in the held-out text."""
    text, output = directory / "prose.txt", directory / STATISTICS
    text.write_text("\n\n".join(training_prose()), encoding="utf-8")
    run_loftq("calibrate", BUILTIN, "--text", text, "-o", output, "--tokens", TOKENS)
    return output


def measure(conversions: Mapping[str, Sequence[str]]) -> list[Row]:
    """The original and every conversion, scored in float32."""
    rows = [_row("original, bfloat16", {"error": 0.0, "bits_per_weight": 16.0}, BUILTIN, None)]
    with TemporaryDirectory() as directory:
        statistics = calibrate_builtin(Path(directory))
        for place, (name, options) in enumerate(conversions.items()):
            out = Path(directory) / str(place)
            given = [statistics if option == STATISTICS else option for option in options]
            done = run_loftq("quantize", BUILTIN, out, *given)
            rows.append(_row(name, done, out, Path(done["adapter"])))
    return rows


def _row(name: str, done: Mapping[str, Any], directory: Path, adapter: Path | None) -> Row:
    # PEFT pools inputs on GPTQ layers only, takes no MLX container, and several formats only once they are decoded.
    if adapter is not None and (adapter.name == "qalora_init" or name in FORMATS):
        model, tokenizer = load(BUILTIN, None, "float32")
        model = load_adapted(model, directory)
    else:
        model, tokenizer = load(directory, adapter, "float32")
    result = score(model, tokenizer, held_out_text(), CONTEXT, MAX_TOKENS)
    return Row(name, done["bits_per_weight"], done["error"], result.perplexity, result.bits_per_byte)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.quality", description=__doc__)
    parser.add_argument("--only", choices=TABLES)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    values = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.exists() else {}
    for table in [options.only] if options.only else TABLES:
        rows = measure(TABLES[table])
        original = rows[0].perplexity
        has_bits = table == "formats"
        bits = " bits a weight |" * has_bits
        print(f"| model |{bits} error of the weights | perplexity per byte | above the original |")
        print(f"|---|--:|--:|--:|{'--:|' * has_bits}")
        for row in rows:
            above = f"{row.perplexity / original - 1:+.2%}" if row.error else ""
            bits = f" {row.bits_per_weight:.2f} |" * has_bits
            print(f"| {row.model} |{bits} {row.error:.4f} | {row.perplexity:.4f} | {above} |")
        values |= {"python": platform.python_version(), table: [asdict(row) for row in rows]}
    if options.json:
        options.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
