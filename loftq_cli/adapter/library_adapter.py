"""The adapter in the own file of a library: `pytorch_lora_weights.safetensors` of diffusers, written and read.

The tensors are PEFT's under other names: the model's folder in a pipeline stands before the module. The config is JSON
in the metadata of the file; without, diffusers takes each rank from the shapes, and a scaling of 1.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loftq_cli.adapter import config as adapter_config
from loftq_cli.adapter.config import PREFIX, AdaptedModule
from loftq_cli.adapter.joined_weights import JoinedWeights
from loftq_cli.checkpoint.json_files import parse_json_object
from loftq_cli.checkpoint.safetensors_file import SafetensorsFile
from loftq_cli.checkpoint.source import WeightsFile
from loftq_cli.errors import MismatchError, printable
from loftq_cli.model.family import Family
from loftq_cli.tensors.headers import OutTensor
from loftq_cli.tensors.libraries import ADAPTER_FILES, LIBRARIES

METADATA_KEY = "lora_adapter_metadata"

# The keys of adapter_config.json with a meaning for the arithmetic; diffusers gives all of them to PEFT's LoraConfig.
_KEYS = ("r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern", "lora_dropout", "bias")
_A = ".lora_A.weight"
_MAX_NAMES = 5  # more names hide the sentence around the names


def planned(adapted: AdaptedModule, family: Family) -> tuple[OutTensor, OutTensor]:
    """Plan the two tensors of a module as `config.planned` does, under the library's names.

    >>> from loftq_cli.tensors.specs import LoraSpec
    >>> adapted = AdaptedModule("blocks.0.fc", (64, 32), LoraSpec(rank=8, alpha=8))
    >>> planned(adapted, Family({"_class_name": "WanTransformer3DModel"}))[0].name
    'transformer.blocks.0.fc.lora_A.weight'
    """
    prefix = family.library.adapter_prefix(family.config)
    lora_A, lora_B = adapter_config.planned(adapted)
    name_A, name_B = (prefix + tensor.name.removeprefix(PREFIX) for tensor in (lora_A, lora_B))
    return replace(lora_A, name=name_A), replace(lora_B, name=name_B)


def metadata_of(config: Mapping[str, Any], family: Family) -> dict[str, str]:
    """The metadata of the file: the config of the adapter as JSON, with the prefix of the tensors before each key.

    config   the content of adapter_config.json

    >>> metadata_of({"r": 8, "peft_type": "LORA"}, Family({"_class_name": "UNet2DModel"}))
    {'lora_adapter_metadata': '{"unet.r": 8}'}
    """
    prefix = family.library.adapter_prefix(family.config)
    return {METADATA_KEY: json.dumps({f"{prefix}{key}": config[key] for key in _KEYS if key in config})}


def library_file_in(path: Path) -> Path | None:
    """The library's own adapter file in the directory `path`; None without one.

    >>> library_file_in(Path("no such folder")) is None
    True
    """
    return next((path / name for name in sorted(ADAPTER_FILES) if (path / name).is_file()), None)


def open_library_file(file: Path) -> tuple[dict[str, Any], WeightsFile]:
    """Open the library's own adapter file: the config in the form of adapter_config.json, and the weights under PEFT's
    names.

    Raises InputError for a damaged file, MismatchError for adapters of several models of a pipeline.
    """
    weights = SafetensorsFile(file)
    folders = list(dict.fromkeys(name.partition(".")[0] for name in weights.tensors))
    denoisers = [folder for folder in folders if any(folder in row.denoisers for row in LIBRARIES.values())]
    if denoisers and len(folders) > 1:
        named = ", ".join(printable(folder, 80) for folder in folders[:_MAX_NAMES])
        hint = f"keep the tensors of {denoisers[0]} only"
        raise MismatchError(f"holds adapters of several models of a pipeline: {named}", file=file, hint=hint)
    prefix = f"{denoisers[0]}." if denoisers else ""
    sources: dict[str, tuple[WeightsFile, str]] = {
        f"{PREFIX}{name.removeprefix(prefix)}": (weights, name) for name in weights.tensors
    }
    tensors = {name: replace(weights.tensors[inner], name=name) for name, (_, inner) in sources.items()}
    text = weights.metadata.get(METADATA_KEY)
    if text is None:
        return _config_of_shapes(weights, prefix), JoinedWeights(file, tensors, sources)
    values = parse_json_object(text.encode(), file=file, what=METADATA_KEY)
    config = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    return {"peft_type": "LORA", **config}, JoinedWeights(file, tensors, sources)


def _config_of_shapes(weights: WeightsFile, prefix: str) -> dict[str, Any]:
    """The config of a file without one: the scaling of each module is 1."""
    ranks = {
        name.removeprefix(prefix).removesuffix(_A): ref.shape[0]
        for name, ref in weights.tensors.items()
        if name.endswith(_A) and len(ref.shape) == 2
    }
    common = Counter(ranks.values()).most_common(1)
    rank = common[0][0] if common else 1
    uncommon = {module: other for module, other in ranks.items() if other != rank}
    shared = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(ranks)}
    return {**shared, "rank_pattern": uncommon, "alpha_pattern": dict(uncommon)}
