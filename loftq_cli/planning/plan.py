"""The plan of a conversion: every job, every output tensor with a shard, every size, the small JSON files. Needs no
torch: `--dry-run` prints a plan.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loftq_cli.adapter import config as adapter_config
from loftq_cli.layouts.layout import ModelFacts, load_layout
from loftq_cli.methods.method import METHODS
from loftq_cli.model.family import Family
from loftq_cli.model.targets import module_of
from loftq_cli.model.task_heads import TaskHead
from loftq_cli.planning.jobs import CopyJob, LayerJob, ModelShares, Shard
from loftq_cli.planning.recipe import SELF, WEIGHTS, Recipe
from loftq_cli.planning.recipe_files import recipe_json
from loftq_cli.planning.settings import spec_of
from loftq_cli.quant.formats import QuantSpec, common_spec
from loftq_cli.runtime.kernel_choice import COMPILER_NBYTES, is_worth_compiling
from loftq_cli.runtime.version import VERSION
from loftq_cli.tensors.headers import OutTensor, TensorRef

_TORCH_NBYTES = 280_000_000  # importing torch and the first operations, measured on Linux
_LIBRARIES_NBYTES = 320_000_000  # importing transformers and building a model, measured on Linux
_WEIGHTED_NBYTES = 20  # measured, for each entry of a layer's input statistics: the entry, a root, products
# Cost of a search for constants, and of a round of refinement, in passes of plain quantizing over the weights.
_SEARCH_PASSES, _ROUND_PASSES = 4, 256


@dataclass(frozen=True)
class Plan:
    """The complete plan of a conversion.

    recipe   the settled options
    family   the config and the facts about the family
    dtype    dtype of the stored model
    jobs     a job for each tensor of the original, in order; tied tensors share a job
    shards   the files of the base
    notes    sentences for the user, before the work starts
    head     the head of the task that the user names; None for the task of the model's class
    sources  tensor of the head -> the original's tensor with the same numbers; no entry for a new tensor
    part     the folder of the model inside a pipeline, with a slash at the end; empty for a model folder
    """

    recipe: Recipe
    family: Family
    dtype: str
    jobs: tuple[LayerJob | CopyJob, ...]
    shards: tuple[Shard, ...]
    notes: tuple[str, ...]
    head: TaskHead | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    part: str = ""

    @cached_property
    def layers(self) -> tuple[LayerJob, ...]:
        """The weights to quantize."""
        return tuple(job for job in self.jobs if isinstance(job, LayerJob))

    @cached_property
    def copies(self) -> tuple[CopyJob, ...]:
        """The tensors to copy."""
        return tuple(job for job in self.jobs if isinstance(job, CopyJob))

    @property
    def layout(self) -> str:
        """The container of the base, a key of LAYOUTS."""
        return self.recipe.layout

    @property
    def adapter_dir(self) -> str:
        """The adapter's folder inside the output."""
        return METHODS[self.recipe.method].adapter_dir

    @property
    def adapter_tensors(self) -> tuple[OutTensor, ...]:
        """All tensors of the adapter file."""
        return (*(t for job in self.layers for t in job.adapter_tensors), *self.head_tensors.values())

    @property
    def head_tensors(self) -> dict[str, OutTensor]:
        """Tensor of the task's head -> the tensor in the adapter file, which trains in full."""
        shapes = {} if self.head is None else self.head.tensors
        dtype, prefix = self.recipe.adapter_dtype, adapter_config.PREFIX
        return {name: OutTensor(prefix + name, dtype, shape) for name, shape in shapes.items()}

    @property
    def library_tensors(self) -> tuple[OutTensor, ...]:
        """All tensors of the adapter in the library's own file; none where the library reads PEFT's file."""
        return tuple(t for job in self.layers for t in job.library_tensors)

    @property
    def base_nbytes(self) -> int:
        """Bytes of all tensors of the base."""
        return sum(t.nbytes for shard in self.shards for t in shard.tensors)

    @property
    def adapter_nbytes(self) -> int:
        """Bytes of all tensors of the adapter."""
        return sum(t.nbytes for t in self.adapter_tensors)

    @property
    def shares(self) -> ModelShares:
        """How much of the model is quantized, and the bits over all parameters."""
        return ModelShares.of(self.jobs)

    @property
    def peak_nbytes(self) -> int:
        """Approximate peak memory of the conversion in bytes: the largest matrix decides, not the matrix count."""
        method = METHODS[self.recipe.method]
        per_weight, per_gram = method.exact_nbytes if self.recipe.fitting.svd == "exact" else (0, 0)
        per_weight += method.nbytes_per_weight
        is_full = self.recipe.is_weighted and self.recipe.calibration != WEIGHTS
        per_input = _WEIGHTED_NBYTES if is_full else 0
        compiler = COMPILER_NBYTES if is_worth_compiling(self.work) else 0
        return (
            _TORCH_NBYTES
            + compiler
            + self._text_nbytes
            + max(
                per_weight * job.matrix.shape[0] * job.matrix.shape[1]
                + per_gram * min(job.matrix.shape) ** 2
                + per_input * job.matrix.shape[1] ** 2
                + (sum(t.nbytes for t in job.adapter_tensors) if job.experts else 0)
                for job in self.layers
            )
        )

    @property
    def _text_nbytes(self) -> int:
        """Memory of a text on the way through the model: the libraries, the largest block in float32, and three copies
        of the states between two blocks. Text by the model itself needs the whole model once.
        """
        text = self.recipe.text
        if text is None:
            return 0
        blocks = Counter[str]()
        for job in self.jobs:
            match = re.match(r".*?\.\d+(?=\.)", job.name)
            blocks[match[0] if match else ""] += job.numel
        widest = max(job.matrix.shape[1] for job in self.layers)
        most = sum(blocks.values()) if text.names == (SELF,) else max(blocks.values())
        return _LIBRARIES_NBYTES + 4 * max(most, 3 * text.tokens * widest)

    @property
    def work(self) -> int:
        """Weights of all layers, times the passes over every weight: a measure of the run time."""
        recipe = self.recipe
        passes = recipe.fitting.iterations
        passes *= _SEARCH_PASSES if recipe.scales == "search" else 1
        passes += _ROUND_PASSES * recipe.fitting.rounds
        return passes * sum(job.numel for job in self.layers)

    @property
    def shard_of(self) -> dict[str, str]:
        """Tensor name -> file name for each tensor of the base: the weight map of a safetensors index."""
        return {tensor.name: Path(shard.file).name for shard in self.shards for tensor in shard.tensors}

    def model_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Build config.json of the base; `config` is the content of the original's config.json.

        Raises UsageError for a model that the container's loaders do not read.
        """
        config = dict(config) if self.head is None else self.head.change(config)
        names = [module_of(job.name) for job in self.jobs]
        unquantized = list(dict.fromkeys(self._loaded_names_of_kept(names)))
        has_experts = any(
            job.reason == "expert" and job.name.endswith(".weight") and len(job.output.shape) == 2
            for job in self.copies
        )
        spec, uncommon = spec_of(self.recipe.quant, self.layout, self.dtype), dict[str, QuantSpec]()
        if spec.is_affine:  # codebooks need no entry: each weight has a table of values on disk
            spec, uncommon = common_spec(
                {name: job.matrix.spec for job in self.layers for name in _loaded_modules(job)}
            )
        refused_by = self.family.row.refused_by
        modules = [name for job in self.layers for name in _loaded_modules(job)]
        facts = ModelFacts(
            self.dtype, spec, modules, unquantized, has_experts, self.family.library, uncommon, refused_by
        )
        layout = load_layout(self.layout)
        # Loaders of quantized weights decode to the dtype in the config: no tensor names the dtype.
        config_with_dtype = {**{k: v for k, v in config.items() if k != "torch_dtype"}, "dtype": self.dtype}
        lacks_dtype = (layout.row.stores_codes or config) and not ("dtype" in config or "torch_dtype" in config)
        states_dtype = self.family.library.states_dtype and (lacks_dtype or layout.row.one_dtype)
        return layout.model_config(config_with_dtype if states_dtype else config, facts)

    def _loaded_names_of_kept(self, names: Sequence[str]) -> Iterator[str]:
        """Yield the names of linears in full precision for every loader; `names` are all modules in the files."""
        heads = {} if self.head is None else self.head.tensors
        yield from (module_of(name) for name, shape in heads.items() if len(shape) == 2)
        for name in _list_unquantized_linears(self.copies):
            yield self.family.lasting_name(name, names)
            yield from self.family.loaded_parts(name, names)

    def adapter_config(self, base_model: str) -> dict[str, Any]:
        """Build adapter_config.json of the adapter; `base_model` is the name of the base in the config."""
        return adapter_config.adapter_config(
            [
                adapter_config.AdaptedModule(name, job.matrix.shape, lora, is_parameter)
                for job in self.layers
                for name, lora, is_parameter in job.adapted
            ],
            base_model=base_model,
            task_type=self.recipe.task
            or adapter_config.task_type_of(
                self.family.architectures, is_encoder_decoder=self.family.config.get("is_encoder_decoder") is True
            ),
            modules_to_save=None if self.head is None or not self.head.tensors else self.head.modules,
            fan_in_fan_out=any(job.matrix.transposed and not job.experts for job in self.layers),
        )

    def fingerprint(self, tensors: Mapping[str, TensorRef], base_model: str, statistics: str | None = None) -> str:
        """Hash every fact behind the bytes of the result, but for the numbers in the input: sha256 in hex digits.

        tensors      headers of the original
        base_model   name of the base in the adapter's config
        statistics   sha256 of a calibration or a text, None for a recipe without statistics; no path counts
        """
        recipe = {
            name: value for name, value in recipe_json(self.recipe).items() if name not in ("calibration", "text")
        }
        return hashlib.sha256(
            json.dumps(
                [
                    [VERSION, version("torch"), recipe, dict(self.family.config), base_model, statistics],
                    sorted([ref.name, ref.dtype, ref.shape] for ref in tensors.values()),
                ],
                sort_keys=True,
            ).encode()
        ).hexdigest()


def _loaded_modules(job: LayerJob) -> tuple[str, ...]:
    """The modules of a job as loaders of quantized weights name modules; experts have a module each."""
    return tuple(map(module_of, job.stored_names)) if job.experts else (job.module,)


def _list_unquantized_linears(copies: Sequence[CopyJob]) -> Iterator[str]:
    """Yield names of copies that a loader might take for quantized linears: matrices and prefixes of experts."""
    listed_modules = set()
    for job in copies:
        module = module_of(job.name)
        if job.reason == "expert" and re.search(r"experts(?:\.|$)", module):
            module = re.split(r"(?<=experts)(?:\.|$)", module, maxsplit=1)[0]
        elif len(job.output.shape) != 2 or not job.name.endswith(".weight"):
            continue
        if module not in listed_modules:
            listed_modules.add(module)
            yield module
