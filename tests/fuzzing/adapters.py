"""Targets: adapter directories, opened alone, merged into a base, and inspected inside a converted directory."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save, save_file

from loftq_cli.adapter.source import open_adapter
from loftq_cli.checkpoint import patterns
from loftq_cli.inspecting.converted import inspect_converted
from loftq_cli.merging.form import MergeOptions
from loftq_cli.merging.plan import prepare_merge
from loftq_cli.model.stored import BaseModel
from tests.fuzzing.engine import Session
from tests.fuzzing.models import CONFIG, LAYER, quantized_model
from tests.fuzzing.mutations import HOSTILE, changed, json_bytes, pick
from tests.fuzzing.results import REPORT

_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
    "r": 4,
    "lora_alpha": 8,
    "use_rslora": False,
    "target_modules": ["q_proj", LAYER],
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {"q_proj": 4, "never": 2},
    "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 6.5},
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "use_qalora": False,
    "qalora_group_size": 16,
}
_PREFIX = f"base_model.model.{LAYER}"
_TENSORS = {f"{_PREFIX}.lora_A.weight": torch.zeros(4, 64), f"{_PREFIX}.lora_B.weight": torch.zeros(32, 4)}
_VALUES = (*HOSTILE, "repo", "loftq", "pissa", "IA3", {"(.+)+x": 4}, {"q_proj|k": 4}, [0], [1], ["layers"], "layers")
_BOMBS = ("(.|..)*[!?]", "(([a-z_.0-9]+)+)+!", "(.+)+.+.+.+x", "(?i)[\0-\U0010ffff]" * 50)
_HEADER_VALUES = (*HOSTILE, [4, 64], [32, 4], [64, 4], "F16", "I8", "BF16")


def adapter(directory: Path) -> Session:
    """An adapter_config.json of any content, or a header of any content beside a good one."""
    open_quickly()
    weights, config_file = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    whole, plain = save(_TENSORS), json.dumps(_CONFIG).encode()
    header_nbytes = int.from_bytes(whole[:8], "little")
    header, numbers = json.loads(whole[8 : 8 + header_nbytes]), whole[8 + header_nbytes :]

    def make(random: Random) -> tuple[bytes, bytes]:
        if random.random() < 0.75:
            return _config_text(random), whole
        text = json_bytes(_renamed(header, random), random, _HEADER_VALUES)
        return plain, len(text).to_bytes(8, "little") + text + numbers

    def read(item: tuple[bytes, bytes]) -> None:
        config_file.write_bytes(item[0])
        weights.write_bytes(item[1])
        source = open_adapter(directory)
        for name in source.weights.tensors:
            source.weights.load(name)

    return Session(make, read)


def merge(directory: Path) -> Session:
    """The plan of a merge of such an adapter with a base whose config has any content."""
    open_quickly()
    base, adapter_directory, output = directory / "base", directory / "adapter", directory / "out"
    for path in (base, adapter_directory):
        path.mkdir()
    shapes = {f"{LAYER}.weight": (32, 64), "model.embed_tokens.weight": (40, 64), "lm_head.weight": (40, 64)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, base / "model.safetensors")
    save_file(_TENSORS, adapter_directory / "adapter_model.safetensors")
    texts = json.dumps(CONFIG).encode(), json.dumps(_CONFIG).encode()

    def make(random: Random) -> tuple[bytes, bytes]:
        if random.random() < 0.5:
            return json_bytes(CONFIG, random), texts[1]
        return texts[0], _config_text(random)

    def read(item: tuple[bytes, bytes]) -> None:
        (base / "config.json").write_bytes(item[0])
        (adapter_directory / "adapter_config.json").write_bytes(item[1])
        plan = prepare_merge(base, adapter_directory, output, MergeOptions())
        assert plan.fingerprint and plan.model_config()

    return Session(make, read)


def inspection(directory: Path) -> Session:
    """A converted directory whose report or adapter config has any content."""
    open_quickly()
    base = BaseModel.open(quantized_model(directory))
    inside = directory / "loftq_init"
    inside.mkdir()
    save_file(_TENSORS, inside / "adapter_model.safetensors")
    texts = json.dumps(REPORT).encode(), json.dumps(_CONFIG).encode()

    def make(random: Random) -> tuple[bytes, bytes]:
        if random.random() < 0.5:
            return json_bytes(changed(REPORT, random), random), texts[1]
        return texts[0], _config_text(random)

    def read(item: tuple[bytes, bytes]) -> None:
        (directory / "loftq_report.json").write_bytes(item[0])
        (inside / "adapter_config.json").write_bytes(item[1])
        assert inspect_converted(base, None).rows

    return Session(make, read)


def open_quickly() -> None:
    """Let hostile expressions run for a fiftieth of a second, so that many of them can be tried."""
    patterns._SECONDS = 0.02


def _config_text(random: Random) -> bytes:
    if random.random() > 0.002:
        return json_bytes(_CONFIG, random, _VALUES)
    bomb = pick(random, _BOMBS)
    where = pick(random, ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"))
    return json.dumps({**_CONFIG, where: {bomb: 4} if where.endswith("pattern") else bomb}).encode()


def _renamed(header: dict[str, Any], random: Random) -> dict[str, Any]:
    """The header with a part of one name exchanged."""
    if random.random() < 0.5:
        return header
    old = pick(random, ("lora_A.weight", "lora_B.weight", "base_model.model.", "model.layers.0"))
    new = pick(random, ("lora_embedding_A", "lora_B.bias", "modules_to_save.weight", "original_module.", "lora_x", ""))
    return {name.replace(old, new): entry for name, entry in header.items()}
