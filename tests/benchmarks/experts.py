"""What experts cost beside one large matrix: CPU time per weight of whole conversions in one thread, and peak memory.

    python -m tests.benchmarks experts                              one layer of 16 experts of Qwen3-30B-A3B's sizes
    python -m tests.benchmarks.experts --gigabytes 2 --json FILE    a mixture of 2 GB, and a dense model beside

Each conversion runs in a process of its own, after a small conversion has compiled the kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from loftq_cli.output.writer import OutputFiles
from loftq_cli.tensors.headers import OutTensor
from tests.benchmarks.measuring import Settings, Table, machine, rendered

HIDDEN, INNER = 2048, 768  # of Qwen3-30B-A3B
EXPERTS = 128
DENSE = 4096  # the side of the large matrix
RECIPES: dict[str, dict[str, Any]] = {
    "qlora": {"method": "qlora"},
    "loftq, joint, by weights alone": {"method": "loftq", "calibration": "none"},
    "loftq, the default": {"method": "loftq"},
}
_FORMAT = {"quant_type": "int4", "symmetric": True, "rank": 16}


def write_mixture(directory: Path, layers: int, experts: int = EXPERTS) -> Path:
    """A Qwen3-MoE of `layers` layers with nothing but experts, norms and an embedding; normal weights, bfloat16."""
    names = {}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for expert in range(experts):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                shape = (HIDDEN, INNER) if projection == "down_proj" else (INNER, HIDDEN)
                names[f"{block}.mlp.experts.{expert}.{projection}.weight"] = shape
    return _write(directory, names, {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]})


def write_dense(directory: Path, layers: int, side: int = DENSE) -> Path:
    """A llama of `layers` linears of [side, side], normal, bfloat16."""
    names = {f"model.layers.{layer}.mlp.up_proj.weight": (side, side) for layer in range(layers)}
    return _write(directory, names, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})


def _write(directory: Path, shapes: dict[str, tuple[int, int]], config: dict[str, Any]) -> Path:
    """A checkpoint, written a tensor at a time."""
    directory.mkdir()
    tensors = [OutTensor(name, "bfloat16", shape) for name, shape in shapes.items()]
    with OutputFiles(directory, {"model.safetensors": tensors}) as files:
        for seed, tensor in enumerate(tensors):
            generator = torch.Generator().manual_seed(seed)
            values = torch.randn(tensor.shape, generator=generator) * 0.02
            files[tensor.name].write(tensor.name, values.bfloat16())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), encoding="utf-8")
    return directory


def run(settings: Settings) -> Iterator[Table]:
    """A layer of experts, and as many weights in large matrices."""
    experts = 4 if settings.quick else 16
    with TemporaryDirectory(dir=settings.directory) as folder:
        yield _compare(Path(folder), 1, experts, 1 if settings.quick else 4, RECIPES)


def _compare(folder: Path, layers: int, experts: int, matrices: int, recipes: dict[str, dict[str, Any]]) -> Table:
    mixture = write_mixture(folder / "mixture", layers, experts)
    dense = write_dense(folder / "dense", matrices)
    rows = []
    for name, options in recipes.items():
        found = {kind: _measure(source, folder / "out", options) for kind, source in (("m", mixture), ("d", dense))}
        per_weight = {kind: 1e9 * values["cpu"] / values["weights"] for kind, values in found.items()}
        rows.append(
            {
                "recipe": name,
                "experts' weights": found["m"]["weights"],
                "weights in large matrices": found["d"]["weights"],
                "CPU ns a weight, experts": per_weight["m"],
                "CPU ns a weight, large": per_weight["d"],
                "experts / large": per_weight["m"] / per_weight["d"],
                "peak MB, experts": found["m"]["peak"] / 1e6,
                "peak MB, large": found["d"]["peak"] / 1e6,
            }
        )
    title = f"experts: {layers} layers of {experts} experts [{2 * INNER}, {HIDDEN}] and [{HIDDEN}, {INNER}]"
    return Table(
        f"{title} beside {matrices} matrices [{DENSE}, {DENSE}]", rows, ("INT4 without zero points, rank 16.",)
    )


def _measure(source: Path, output: Path, options: dict[str, Any]) -> dict[str, float]:
    """CPU seconds, weights and peak memory of a conversion in a process of its own."""
    subprocess.run(["rm", "-rf", str(output)], check=True)
    command = [sys.executable, "-m", "tests.benchmarks.experts", "--convert", str(source), str(output)]
    done = subprocess.run([*command, json.dumps(options)], check=True, capture_output=True, text=True)
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


def _convert(source: str, output: str, options: dict[str, Any]) -> None:
    """Convert in this process, and print CPU seconds, weights and peak memory as JSON."""
    import loftq_cli as loftq

    with TemporaryDirectory() as folder:
        warm = write_mixture(Path(folder) / "warm", 1, 2)
        loftq.quantize(warm, Path(folder) / "out", threads=1, **_FORMAT, **options)
    start = time.process_time()
    result = loftq.quantize(source, output, threads=1, **_FORMAT, **options)
    cpu = time.process_time() - start
    weights = sum(job.numel for job in result.plan.layers)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"cpu": cpu, "weights": weights, "peak": peak}))


def main() -> None:
    """The documented run: a mixture of some gigabytes, with the machine and its load in a JSON file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--recipe", choices=RECIPES, action="append")
    parser.add_argument("--convert", nargs=3)
    arguments = parser.parse_args()
    if arguments.convert:
        source, output, options = arguments.convert
        _convert(source, output, json.loads(options))
        return
    per_layer = 2 * EXPERTS * 3 * INNER * HIDDEN
    layers = max(1, round(arguments.gigabytes * 1e9 / per_layer))
    recipes = {name: RECIPES[name] for name in arguments.recipe or RECIPES}
    before = machine()
    with TemporaryDirectory() as folder:
        table = _compare(Path(folder), layers, EXPERTS, 4, recipes)
    print(rendered(table))
    if arguments.json:
        values = {
            "machine": {**before, "load after": os.getloadavg()[0]},
            "title": table.title,
            "rows": list(table.rows),
        }
        arguments.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
