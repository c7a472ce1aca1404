"""What each conversion costs a real language model: `builtin:tiny-llama` on held-out text, original beside converted.

`python -m tests.benchmarks.quality` prints the README's table; `--json FILE` writes it too. Needs the `hf` extra.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from loftq_cli.nn import load_adapted
from tests.benchmarks.corpus import held_out_text
from tests.benchmarks.perplexity import CONTEXT, MAX_TOKENS, load, score

BUILTIN = Path(__file__).parent.parent.parent / "loftq_cli" / "builtin" / "tiny-llama"
CONVERSIONS = {
    "QLoRA, NF4": ("--recipe", "qlora-nf4"),
    "LoftQ, NF4, rank 16": ("--recipe", "loftq-nf4"),
    "LoftQ, NF4, rank 64": ("--recipe", "loftq-nf4-r64"),
    "LoftQ, INT4, rank 16": ("--recipe", "loftq-int4"),
    "QA-LoRA, INT4, group 32": ("--recipe", "qalora-int4"),
    "QLoRA, INT2": ("--recipe", "loftq-int4", "--quant-type", "int2", "--method", "qlora"),
    "LoftQ, INT2, rank 16": ("--recipe", "loftq-int4", "--quant-type", "int2"),
    "LoftQ, INT2, rank 64, searched ranges": ("--recipe", "loftq-int2"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `error` is the relative Frobenius error of the quantized weights with their adapter."""

    model: str
    error: float
    perplexity: float
    bits_per_byte: float


def measure() -> list[Row]:
    """The original and every conversion, scored in float32."""
    rows = [_row("original, bfloat16", 0.0, BUILTIN, None)]
    with TemporaryDirectory() as directory:
        for place, (name, options) in enumerate(CONVERSIONS.items()):
            out = Path(directory) / str(place)
            command = [sys.executable, "-m", "loftq_cli", "quantize", str(BUILTIN), str(out), *options, "--json", "-q"]
            done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append(_row(name, done["error"], out, Path(done["adapter"])))
    return rows


def _row(name: str, error: float, directory: Path, adapter: Path | None) -> Row:
    if adapter is not None and adapter.name == "qalora_init":
        # PEFT pools inputs on GPTQ layers only.
        model, tokenizer = load(BUILTIN, None, "float32")
        model = load_adapted(model, directory)
    else:
        model, tokenizer = load(directory, adapter, "float32")
    result = score(model, tokenizer, held_out_text(), CONTEXT, MAX_TOKENS)
    return Row(name, error, result.perplexity, result.bits_per_byte)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.quality", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = measure()
    original = rows[0].perplexity
    print("| model | error of the weights | perplexity per byte | above the original |")
    print("|---|--:|--:|--:|")
    for row in rows:
        above = f"{row.perplexity / original - 1:+.2%}" if row.error else ""
        print(f"| {row.model} | {row.error:.4f} | {row.perplexity:.4f} | {above} |")
    if options.json:
        values = {"python": platform.python_version(), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
