"""The libraries that load models, a row each: names of files, keys of config.json, and rules about layers. Needs no
torch, and imports none of the libraries.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Library:
    """The facts about a library that loads models.

    name             the name of the package
    class_key        key of config.json with the name of a model's class; no other library writes the key
    weights          stem of the names of weight files and of their index
    torch_weights    the same stem for weights in torch's format
    states_dtype     whether config.json names the dtype; else a key `dtype` stops the class
    task_heads       heads that a class may add to a checkpoint's model, in full precision
    skips_by_part    whether a layer is skipped when the list of layers in full precision holds the last part of the
                     layer's name; else entries are patterns
    modulation       expression for modules that scale and shift whole blocks, in full precision by default; None for no
                     such modules
    pipeline_file    file in the root of a pipeline: a folder of models; None for a library without pipelines
    denoisers        folders of the model to convert in a pipeline, in the order of the search
    adapter_weights  name of the library's own adapter file, beside PEFT's; None where the library reads PEFT's
    """

    name: str
    class_key: str
    weights: str
    torch_weights: str
    states_dtype: bool = True
    task_heads: tuple[str, ...] = ()
    skips_by_part: bool = False
    modulation: str | None = None
    pipeline_file: str | None = None
    denoisers: tuple[str, ...] = ()
    adapter_weights: str | None = None

    @property
    def model_files(self) -> tuple[str, ...]:
        """Names of weight files and of indices in a model's folder, in the order of the search.

        >>> LIBRARIES["diffusers"].model_files[1]
        'diffusion_pytorch_model.safetensors'
        """
        files = (f"{self.weights}.safetensors", f"{self.torch_weights}.bin")
        return tuple(name for file in files for name in (f"{file}.index.json", file))

    def is_modulation(self, module: str) -> bool:
        """Whether `module` scales and shifts a whole block.

        >>> LIBRARIES["diffusers"].is_modulation("transformer_blocks.0.norm1.linear")
        True
        """
        return self.modulation is not None and re.search(self.modulation, module) is not None

    def skips(self, entry: str, module: str) -> bool:
        """Whether the library leaves `module` in full precision for an `entry` of the list of such layers, under
        `skips_by_part`.

        >>> LIBRARIES["diffusers"].skips("proj_out", "single_transformer_blocks.0.proj_out")
        True
        """
        return entry in (module, module.rpartition(".")[2]) or f"{entry}." in module

    def adapter_prefix(self, config: Mapping[str, Any]) -> str:
        """The part before the names of modules in `adapter_weights`: the model's folder in a pipeline, and a dot.

        >>> LIBRARIES["diffusers"].adapter_prefix({"_class_name": "UNet2DConditionModel"})
        'unet.'
        """
        folders = {folder: folder.lower() in str(config.get(self.class_key, "")).lower() for folder in self.denoisers}
        return next((f"{folder}." for folder, is_named in folders.items() if is_named), f"{self.denoisers[0]}.")


# Adaptive norms, modulations and time embeddings of residual blocks, by the names in diffusers' classes (0.42). The
# tools around SVDQuant (deepcompressor) keep the layers in full precision too: the numbers scale all of a block.
_MODULATION = (
    r"(?:^|\.)(?:norm\w*|\w*_norm|\w*(?<![a-z])mod|\w*modulation\w*|\w*ada_?(?:ln|LN)\w*|\w*scale_shift\w*"
    r"|time_emb_proj)(?:\.|$)"
)

# Heads, often absent from checkpoints: tied to the embedding, or added by a task class. Loaders must not expect
# quantized heads. The names come from transformers' classes.
_TASK_HEADS = (
    *("lm_head", "embed_out", "proj_out", "output_projection", "generator_lm_head", "cls.predictions.decoder"),
    *("predictions.decoder", "pred_layer.proj", "mlm_score.decoder", "vocab_projector", "lm_loss", "^decoder$", "cls"),
    *("classifier", "pre_classifier", "classification_head", "score", "qa_outputs", "pooler.dense", "pooler"),
)

LIBRARIES: dict[str, Library] = {
    "transformers": Library("transformers", "architectures", "model", "pytorch_model", task_heads=_TASK_HEADS),
    "diffusers": Library(
        "diffusers",
        "_class_name",
        "diffusion_pytorch_model",
        "diffusion_pytorch_model",
        states_dtype=False,
        skips_by_part=True,
        modulation=_MODULATION,
        pipeline_file="model_index.json",
        denoisers=("transformer", "unet"),
        adapter_weights="pytorch_lora_weights.safetensors",
    ),
}
DEFAULT_LIBRARY = next(iter(LIBRARIES.values()))
PIPELINE_FILES = frozenset(row.pipeline_file for row in LIBRARIES.values() if row.pipeline_file is not None)
ADAPTER_FILES = frozenset(row.adapter_weights for row in LIBRARIES.values() if row.adapter_weights is not None)


def library_of(config: Mapping[str, Any]) -> Library:
    """The library that loads the model of a config.json; transformers for a config without a class.

    >>> library_of({"_class_name": "FluxTransformer2DModel"}).name, library_of({}).name
    ('diffusers', 'transformers')
    """
    return next((row for row in LIBRARIES.values() if row.class_key in config), DEFAULT_LIBRARY)


def pipeline_in(names: Collection[str]) -> Library | None:
    """The library of the pipeline in a folder with the files `names`; None for no pipeline. A model beside the pipeline
    file is the model of the folder.

    >>> pipeline_in(["model_index.json", "unet"]).name, pipeline_in(["model.safetensors"])
    ('diffusers', None)
    """
    if any(file in names for row in LIBRARIES.values() for file in row.model_files):
        return None
    return next((row for row in LIBRARIES.values() if row.pipeline_file in names), None)
