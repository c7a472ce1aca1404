"""Targets: what conversions leave behind (reports, provenance, checksums), and recipes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any

from loftq_cli.conversion.report import read_report
from loftq_cli.errors import InputError
from loftq_cli.merging.provenance import check_provenance
from loftq_cli.model.stored import BaseModel
from loftq_cli.output.checksums import read_checksums
from loftq_cli.output.journal import parse_journal
from loftq_cli.planning.recipe import Override
from loftq_cli.planning.recipe_files import recipe_toml, resolve_recipe
from loftq_cli.planning.settle import make_recipe
from tests.fuzzing.engine import Session
from tests.fuzzing.models import LAYER, quantized_model
from tests.fuzzing.mutations import HOSTILE, edited, json_bytes, pick

_ERROR = {
    "squared_weight": 4.0,
    "squared_base_error": 0.5,
    "squared_error": 0.25,
    "max_error": 0.1,
    "squared_delta": 0.125,
}
_LAYER: dict[str, Any] = {
    "name": f"{LAYER}.weight",
    "module": LAYER,
    "shape": [32, 64],
    "transposed": False,
    "quant_type": "nf4",
    "block_size": 64,
    "double_quant": True,
    "bits_per_weight": 4.127,
    "rank": 4,
    "alpha": 4.0,
    "scaling": 1.0,
    "plain_error": 0.09,
    "iteration_errors": [0.08, 0.07],
    "best_iteration": 2,
    "error": _ERROR,
}
REPORT: dict[str, Any] = {
    "base_fingerprint": "0" * 64,
    "adapter_dir": "loftq_init",
    "recipe": {"method": "loftq", "rank": 4},
    "layers": [_LAYER],
}
_PROVENANCE = {"tool": "loftq-cli", "method": "loftq", "source": "model", "base_fingerprint": "0" * 64}
_CHECKSUMS = {
    "tool": "loftq-cli",
    "fingerprint": "f" * 64,
    "input_sha256": "1" * 64,
    "files": {"model.safetensors": "2" * 64, "loftq_init/adapter_config.json": "3" * 64},
    "tensors": {"model.safetensors": {"w": "4" * 64}},
}
_TOML_VALUES = (
    *('""', "'a'", "0", "-1", "1.5", "1e999", "nan", "inf", "true", "[]", "[1]", "['a', 'b']", "{}", "{a = 1}", "0x1F"),
    *("0x" + "F" * 4000, "9" * 30, "9" * 5000, "1979-05-27", "07:32:00", "25:61:00", "'''", '"\\uD800"', '"\\u0000"'),
    *("[" * 500 + "]" * 500, "[" * 20000, "'(a+'", "'a{99999999999}'", "'[[a]'", "'5GB'", f"'{'9' * 400}GB'", "'1e5B'"),
    *("'nf4'", "'int4'", "'loftq'", "'qalora'", "'mlx'", "'metal'", "'exact'", "64", "16", "'[bold]'", "'../x'"),
)


def report(directory: Path) -> Session:
    """loftq_report.json."""

    def read(data: bytes) -> None:
        (directory / "loftq_report.json").write_bytes(data)
        found = read_report(directory)
        assert found is not None and all(layer.to_json() for layer in found[1])

    return Session(lambda random: json_bytes(REPORT, random), read)


def provenance(directory: Path) -> Session:
    """The records of both sides: the adapter's and the base's."""
    base_directory, adapter = directory / "base", directory / "adapter"
    for path in (base_directory, adapter):
        path.mkdir()
    base = BaseModel.open(quantized_model(base_directory))
    texts = json.dumps(REPORT).encode(), json.dumps(_PROVENANCE).encode()
    hostile = (*HOSTILE, str(base_directory), str(adapter), "out")

    def make(random: Random) -> tuple[bytes, bytes, Any]:
        kind = random.random()
        if kind < 0.4:
            return json_bytes(REPORT, random), texts[1], "out"
        if kind < 0.8:
            return texts[0], json_bytes(_PROVENANCE, random), "out"
        return texts[0], b"", pick(random, hostile)

    def read(item: tuple[bytes, bytes, Any]) -> None:
        (base_directory / "loftq_report.json").write_bytes(item[0])
        side_file, config = adapter / "loftq_provenance.json", {"base_model_name_or_path": item[2]}
        if len(item[1]) % 2:  # in the config instead
            side_file.unlink(missing_ok=True)
            config["megatron_core"] = item[1].decode(errors="replace")
        else:
            side_file.write_bytes(item[1]) if item[1] else side_file.unlink(missing_ok=True)
        check_provenance(base, adapter, config, force=False)

    return Session(make, read)


def checksums(directory: Path) -> Session:
    """checksums.json; what it names stays inside the directory."""
    hostile = (*HOSTILE, "a" * 64, "A" * 64, "a" * 63, "a/../b", "a//b", "./a")

    def read(data: bytes) -> None:
        (directory / "checksums.json").write_bytes(data)
        found = read_checksums(directory)
        assert found is not None
        assert all((directory / name).resolve().is_relative_to(directory.resolve()) for name in found.files)
        assert found.to_json()

    return Session(lambda random: json_bytes(_CHECKSUMS, random, hostile), read)


def journal(directory: Path) -> Session:
    """The lines of a journal, some of another form under a right checksum, some damaged. What ends its reading counts
    as refused.
    """
    values = ["options", *(["w.weight", "1" * 64, {"w.weight": "2" * 64}, {"error": 0.1}] for _ in range(3))]
    texts = [json.dumps(value).encode() for value in values]

    def make(random: Random) -> bytes:
        lines = [
            json_bytes(value, random) if random.random() < 0.3 else text
            for value, text in zip(values, texts, strict=True)
        ]
        whole = b"".join(hashlib.sha256(line).hexdigest()[:16].encode() + b" " + line + b"\n" for line in lines)
        return edited(whole, random) if random.random() < 0.3 else whole

    def read(data: bytes) -> None:
        found = parse_journal(data)
        assert found.nbytes <= len(data)
        if len(found.entries) < len(values) - 1:
            raise InputError("does not hold every unit")

    return Session(make, read)


def recipe(directory: Path) -> Session:
    """A recipe of any content, in TOML."""
    path = directory / "recipe.toml"
    texts = [
        recipe_toml(make_recipe(include=("q_proj",), override=(Override(match="k_proj", rank=8, alpha=2.0),))),
        recipe_toml(make_recipe(method="qalora", quant_type="int4", override=(Override(match="v", quantize=False),))),
    ]
    originals = [text.splitlines() for text in texts]

    def make(random: Random) -> bytes:
        lines = list(pick(random, originals))
        for _ in range(int(random.random() * 4)):
            kind, at = random.random(), int(random.random() * len(lines))
            if kind < 0.7:
                lines[at] = f"{lines[at].partition(' =')[0] or 'rank'} = {pick(random, _TOML_VALUES)}"
            elif kind < 0.8:
                del lines[at]
            elif kind < 0.85:
                lines.insert(at, lines[at])
            else:
                lines.insert(
                    at, pick(random, ("[override]", "[[override]]", "x = 1", "[a.b]", "a.b = 1", "rank.x = 1"))
                )
        data = "\n".join(lines).encode()
        return edited(data, random) if random.random() < 0.2 else data

    def read(data: bytes) -> None:
        path.write_bytes(data)
        recipe_toml(resolve_recipe(str(path), {})).encode()

    return Session(make, read)
