"""Targets: config.json through all that consumes it: families, plans, and each container of quantized weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save, save_file

from loftq_cli.checkpoint.json_files import parse_json_object
from loftq_cli.layouts.layout import LAYOUTS, ModelFacts, StoredMatrix, load_layout
from loftq_cli.model.family import Family
from loftq_cli.model.stored import BaseModel
from loftq_cli.output.records import dump_json
from loftq_cli.planning.planner import build_plan
from loftq_cli.planning.settings import affine_spec
from loftq_cli.planning.settle import make_recipe
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.tensors.headers import TensorRef
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import CodebookSpec
from tests.fuzzing.engine import Session
from tests.fuzzing.mutations import HOSTILE, json_bytes, pick

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "vocab_size": 40,
    "hidden_size": 64,
    "is_encoder_decoder": False,
    "text_config": {"dtype": "float16", "tie_word_embeddings": False, "vocab_size": 40},
}
LAYER = "model.layers.0.self_attn.q_proj"
_SHAPE = (32, 64)
_FAMILIES = ("gpt2", "t5", "falcon", "qwen2_vl", "bert", "mamba", "deepseek_v3", "llava", "LlamaModel")
_VALUES = (*HOSTILE, *_FAMILIES, ["BertModel"], {"quant_method": "gptq"}, {"bits": 4, "group_size": 32})
_RECIPES = (
    make_recipe(rank=4),
    make_recipe(rank=4, quant_type="int4", group_size=32),
    make_recipe(rank=4, quant_type="int4", group_size=32, layout="gptq", method="qlora"),
    make_recipe(rank=4, quant_type="int4", group_size=32, layout="metal", method="qalora"),
    make_recipe(rank=4, quant_type="int4", group_size=32, layout="mlx", method="qlora"),
    make_recipe(rank=4, layout="dense"),
)


def families(directory: Path) -> Session:
    """A config through everything that a family tells of it."""
    refs = _refs(directory)
    modules = [name.removesuffix(".weight") for name in refs]

    def read(data: bytes) -> None:
        family = Family(parse_json_object(data, file=directory / "config.json"), directory / "config.json")
        assert family.dtype(refs.values()) in ("float32", "bfloat16", "float16")
        assert isinstance(family.ties_embeddings(), bool) and isinstance(family.loads_in_4_bit(), bool)
        for module in modules[:2]:
            family.is_transposed(module), family.is_kept_in_float32(module), family.takes_adapter(module)
            assert family.loaded_name(module, modules)

    return Session(lambda random: json_bytes(CONFIG, random, _VALUES), read)


def plans(directory: Path) -> Session:
    """A config through a plan, and through every text that the plan writes of it."""
    refs = _refs(directory)

    def make(random: Random) -> tuple[bytes, int]:
        return json_bytes(CONFIG, random, _VALUES), int(random.random() * len(_RECIPES))

    def read(item: tuple[bytes, int]) -> None:
        config = parse_json_object(item[0], file=directory / "config.json")
        plan = build_plan(refs, config, _RECIPES[item[1]])
        dump_json(plan.model_config(config)).encode()
        dump_json(plan.adapter_config("base")).encode()

    return Session(make, read)


def container(layout: str) -> Callable[[Path], Session]:
    """A model in the container called `layout`: its config, its header or its small tensors changed."""

    def start(directory: Path) -> Session:
        tensors, config = _quantized(layout)
        return _container_session(directory, tensors, config)

    return start


def quantized_model(directory: Path, layout: str = "bitsandbytes") -> Path:
    """A small model of one quantized layer, as a conversion writes it."""
    tensors, config = _quantized(layout)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _container_session(directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Session:
    whole, plain = save(tensors), json.dumps(config).encode()
    header_nbytes = int.from_bytes(whole[:8], "little")
    header, numbers = json.loads(whole[8 : 8 + header_nbytes]), whole[8 + header_nbytes :]
    config_file, weights = directory / "config.json", directory / "model.safetensors"
    places = _small_tensors(header, 8 + header_nbytes)

    def make(random: Random) -> tuple[bytes, bytes]:
        kind = random.random()
        if kind < 0.6:
            return json_bytes(config, random, _VALUES), whole
        if kind < 0.8:
            return plain, edited_in_place(whole, random, places)
        text = json_bytes(header, random)
        return plain, len(text).to_bytes(8, "little") + text + numbers

    def read(item: tuple[bytes, bytes]) -> None:
        config_file.write_bytes(item[0])
        weights.write_bytes(item[1])
        base = BaseModel.open(directory)
        base.loaded_names()
        for name in base.quantized:
            assert tuple(base.matrix(name).shape) == base.matrix_shape(name)

    return Session(make, read)


def edited_in_place(data: bytes, random: Random, places: list[int]) -> bytes:
    """`data` with one to three bytes at `places` replaced."""
    result = bytearray(data)
    for _ in range(1 + int(random.random() * 3)):
        result[pick(random, places)] = pick(random, b'\0\xff{}[]",:0129-nft ')
    return bytes(result)


def _small_tensors(header: dict[str, Any], begin: int) -> list[int]:
    """Positions of the bytes of tensors that say something, rather than hold weights."""
    spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    return [begin + at for first, last in spans if last - first <= 256 for at in range(first, last)]


def _quantized(layout: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    row = LAYOUTS[layout]
    spec: Any = CodebookSpec("nf4", 64, double_quant=True)
    if "nf4" not in row.quant_types:
        symmetric = layout in ("compressed-tensors", "gptq")
        spec = affine_spec(layout, "int4", 32, symmetric=symmetric, dtype="float32", scale_dtype=None)
    matrix = StoredMatrix(f"{LAYER}.weight", _SHAPE, spec, "float32", transposed=False)
    weight = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02
    quantized = make_quantizer(spec, "float32").quantize(TensorRows(weight, transposed=False))
    facts = ModelFacts("float32", spec, [LAYER], ["lm_head"])
    config = load_layout(layout).model_config({k: v for k, v in CONFIG.items() if k != "text_config"}, facts)
    tensors = load_layout(layout).pack(matrix, quantized) | {"model.norm.weight": torch.ones(4)}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, config


def _refs(directory: Path) -> dict[str, TensorRef]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (40, 64),
        f"{LAYER}.weight": (64, 64),
        "model.layers.0.mlp.down_proj.weight": (64, 128),
        "model.norm.weight": (64,),
        "lm_head.weight": (40, 64),
    }
    file = directory / "model.safetensors"
    return {name: TensorRef(name, "float32", shape, file) for name, shape in shapes.items()}
