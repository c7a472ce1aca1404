"""Trained adapters of a model become a directory, in the form of the adapters of `loftq quantize`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from loftq_cli.adapter import config as adapter_config
from loftq_cli.adapter.base_record import read_base_record, with_record
from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.errors import NumericError, UsageError
from loftq_cli.nn.adapted_linear import AdaptedLinear, Origin
from loftq_cli.nn.fake_quantized_linear import FakeQuantizedLinear
from loftq_cli.output.records import PROVENANCE_NAME, TOOL, dump_json, write_texts
from loftq_cli.output.staging import Staging, check_apart, check_output
from loftq_cli.output.writer import OutputFiles

_COMPILED = re.compile(r"(?:^|(?<=\.))_orig_mod\.")  # torch.compile puts the words into the names of modules


def origin_of(adapter: Path, base: Path | None) -> Origin:
    """The config and the provenance of the directory `adapter`, an adapter of the directory `base`.

    Raises InputError for a damaged JSON file, MismatchError where two records name two bases, StorageError when reading
    fails.
    """
    config = read_json_object(adapter / adapter_config.CONFIG_NAME)
    found = read_base_record(adapter, config)
    return Origin(None if base is None else base.resolve(), config, None if found is None else found[0])


def save_adapter(
    model: nn.Module, directory: str | Path, source_adapter: str | Path | None = None, *, overwrite: bool = False
) -> None:
    """Write the adapters of `model` for `loftq merge`, `load_adapted` and PEFT; a failure leaves no partial directory.

    model            a model with LoftQLinear, QLoRALinear or QALoRALinear modules
    directory        a new directory, with adapter_config.json and adapter_model.safetensors after the call
    source_adapter   the adapter before training, the loaded adapter by default: the name of the base, the task and the
                     provenance are copied, so `loftq merge` can recognize the right base
    overwrite        replace the result of an earlier call

    Raises ValueError for a model without adapters, UsageError for a trainable base, UsageError or StorageError where
    `directory` cannot be written, or is the base or a part of the base, NumericError for a factor with NaN or infinite
    values.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    layers = {_COMPILED.sub("", name): m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    if not layers:
        raise ValueError("the model has no adapter to save")
    for name, layer in layers.items():
        if isinstance(layer.base_layer, FakeQuantizedLinear):
            message = "the base trains too, and an adapter directory holds no base"
            hint = "freeze_base() keeps the codes of the trained weight; save the whole with model.state_dict()"
            raise UsageError(message, tensor=name, hint=hint)
    output, origins = Path(directory), [layer.origin for layer in layers.values() if layer.origin is not None]
    check_apart(output, [origin.base for origin in origins[:1] if origin.base is not None])
    check_output(output, overwrite=overwrite)
    origin = next(iter(origins), None) if source_adapter is None else origin_of(Path(source_adapter), None)
    adapted = [_adapted_module(name, layer) for name, layer in layers.items()]
    # The first module's entry in the config says how inputs are pooled.
    adapted.sort(key=lambda module: module.lora.pooling is None)
    if len({(module.lora.pooling or adapted[0].lora.pooling, module.lora.rslora) for module in adapted}) > 1:
        raise ValueError("one adapter directory holds one pooling and one kind of scaling")
    tensors = {key: t for name, layer in layers.items() for key, t in adapter_config.pack(name, layer.pair()).items()}
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericError("holds NaN or infinite values").at(file=output, tensor=key)
    texts = _texts(adapted, origin)
    fingerprint = hashlib.sha256("".join(texts.values()).encode()).hexdigest()
    staging = Staging(output, fingerprint=fingerprint, overwrite=overwrite, restart=True)
    with staging.whole(TOOL) as path:
        _write(tensors, adapted, path)
        write_texts(path, texts)


def _adapted_module(name: str, layer: AdaptedLinear) -> adapter_config.AdaptedModule:
    lora = replace(layer.lora, dtype=str(layer.lora_A.dtype).removeprefix("torch."))
    return adapter_config.AdaptedModule(name, (layer.out_features, layer.in_features), lora)


def _texts(adapted: Sequence[adapter_config.AdaptedModule], origin: Origin | None) -> dict[str, str]:
    """The texts of the small files of the adapter, by file name."""
    values = {} if origin is None else origin.config
    config = adapter_config.adapter_config(
        adapted,
        base_model=values.get("base_model_name_or_path") or "",
        task_type=values.get("task_type"),
        fan_in_fan_out=values.get("fan_in_fan_out") is True,
    )
    record = None if origin is None else origin.provenance
    texts = {adapter_config.CONFIG_NAME: dump_json(with_record(config, record))}
    return texts if record is None else {**texts, PROVENANCE_NAME: dump_json(record)}


def _write(
    tensors: Mapping[str, torch.Tensor], adapted: Sequence[adapter_config.AdaptedModule], directory: Path
) -> None:
    planned = [tensor for module in adapted for tensor in adapter_config.planned(module)]
    with OutputFiles(directory, {adapter_config.WEIGHTS_NAME: planned}) as files:
        for key, tensor in tensors.items():
            files[key].write(key, tensor.cpu())
