"""What a conversion measured, as records and as the files that ship with it: loftq_report.json, the provenance of the
adapter, the model card. The same conversion gives the same bytes, so there are no times in them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli import __version__
from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.errors import InputError, NumericError
from loftq_cli.methods.method import METHODS
from loftq_cli.metrics import LayerError, total_error
from loftq_cli.plan import LayerJob, Plan
from loftq_cli.quant.formats import QuantSpec, size_of, spec_from_json, spec_json
from loftq_cli.recipe import recipe_json

REPORT_NAME = "loftq_report.json"
RECIPE_NAME = "loftq_recipe.toml"
PROVENANCE_NAME = "loftq_provenance.json"
TOOL = {"tool": "loftq-cli", "version": __version__}


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One quantized layer. `quantization_error` is that of quantizing W alone; `error` is of what was written, and
    `output_error` of its outputs, relative, on the inputs of a calibration; None without one.
    """

    name: str
    module: str
    shape: tuple[int, int]
    transposed: bool
    spec: QuantSpec
    bits_per_weight: float
    rank: int
    alpha: float
    scaling: float
    quantization_error: float
    iteration_errors: tuple[float, ...]
    best_iteration: int
    error: LayerError
    output_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values; the derived errors stand beside the sums they come from."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["spec"]
        if self.output_error is None:
            del values["output_error"]
        return {**values, **spec_json(self.spec), "error": error_json(self.error)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LayerResult:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError for values of another shape."""
        _check_layer(values)
        sums = {field.name: float(values["error"][field.name]) for field in dataclasses.fields(LayerError)}
        found: dict[str, Any] = {field.name: values.get(field.name) for field in dataclasses.fields(cls)}
        found |= {
            "spec": spec_from_json(values),
            "shape": tuple(values["shape"]),
            "iteration_errors": tuple(values["iteration_errors"]),
            "error": LayerError(**sums),
        }
        return cls(**found)


def layer_result(
    job: LayerJob,
    error: LayerError,
    quantization_error: float,
    iteration_errors: Sequence[float],
    best_iteration: int,
    output_error: float | None = None,
) -> LayerResult:
    """The result of one job of the plan. Raises NumericError for an error that is not finite: no report holds one."""
    measured = [*dataclasses.astuple(error), quantization_error, *iteration_errors, output_error or 0.0]
    if not all(math.isfinite(value) for value in measured):
        raise NumericError("its values with the adapter are too large for float32", hint="--method qlora")
    return LayerResult(
        name=job.name,
        module=job.module,
        shape=job.matrix.shape,
        transposed=job.matrix.transposed,
        spec=job.matrix.spec,
        bits_per_weight=round(job.bits_per_weight, 4),
        rank=job.lora.rank,
        alpha=job.lora.alpha,
        scaling=job.lora.scaling,
        quantization_error=quantization_error,
        iteration_errors=tuple(iteration_errors),
        best_iteration=best_iteration,
        error=error,
        output_error=output_error,
    )


def error_json(error: LayerError) -> dict[str, float | None]:
    """The sums of an error and what follows from them; an infinite ratio is null, since JSON has no infinity."""
    derived = {
        "base_error": error.base_error,
        "error": error.error,
        "sqnr_db": error.sqnr_db,
        "delta_norm": error.delta_norm,
    }
    finite = {name: value if value < float("inf") else None for name, value in derived.items()}
    return {**dataclasses.asdict(error), **finite}


def report_json(
    plan: Plan,
    layers: Sequence[LayerResult],
    notes: Sequence[str] = (),
    *,
    source: str,
    base_model: str,
    base_fingerprint: str,
    allocation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """loftq_report.json. `notes` come after the plan's; `allocation` says how formats and ranks were chosen."""
    return {
        "format_version": 1,
        **TOOL,
        "source": source,
        "base_model": base_model,
        "base_fingerprint": base_fingerprint,
        "adapter_dir": plan.adapter_dir,
        "recipe": recipe_json(plan.recipe),
        "dtype": plan.dtype,
        "totals": {
            "layers": len(layers),
            "weights": sum(job.numel for job in plan.layers),
            "bits_per_weight": round(bits_per_weight(plan), 4),
            "base_nbytes": plan.base_nbytes,
            "adapter_nbytes": plan.adapter_nbytes,
            **error_json(total_error(layer.error for layer in layers)),
            **({} if (lost := mean_output_error(layers)) is None else {"output_error": lost}),
        },
        **({} if allocation is None else {"allocation": allocation}),
        "layers": [layer.to_json() for layer in layers],
        "copied": [{"name": job.name, "reason": job.reason} for job in plan.copies],
        "notes": [*plan.notes, *notes],
    }


def mean_output_error(layers: Sequence[LayerResult]) -> float | None:
    """The root of the mean square of the layers' output errors; None without a calibration."""
    errors = [layer.output_error for layer in layers if layer.output_error is not None]
    return math.sqrt(math.fsum(error**2 for error in errors) / len(errors)) if errors else None


def bits_per_weight(plan: Plan) -> float:
    """True bits of all quantized weights, constants included."""
    stored = sum(t.nbytes for job in plan.layers for t in job.base_tensors)
    return 8 * stored / sum(job.numel for job in plan.layers)


def read_report(directory: Path) -> tuple[dict[str, Any], list[LayerResult]] | None:
    """The report in a converted directory and its layers; None where there is none.

    Raises InputError for a report that is not one of ours.
    """
    path = directory / REPORT_NAME
    if not path.is_file():
        return None
    values = read_json_object(path)
    try:
        texts = [values[key] for key in ("base_fingerprint", "base_model", "adapter_dir")]
        if not all(isinstance(text, str) for text in (*texts, values["recipe"]["method"])):
            raise ValueError
        return values, [LayerResult.from_json(layer) for layer in values["layers"]]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError("is not a report of this tool", file=path, hint="convert again") from None


def _check_layer(values: Mapping[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError unless `values` has the types that `to_json` gives."""
    numbers = [values[key] for key in ("bits_per_weight", "alpha", "scaling", "quantization_error", "best_iteration")]
    numbers += [*values["iteration_errors"], *(values["error"][f.name] for f in dataclasses.fields(LayerError))]
    numbers += [values["output_error"]] if values.get("output_error") is not None else []
    shape = values["shape"]
    is_ours = (
        all(isinstance(values[key], str) for key in ("name", "module", "quant_type"))
        and isinstance(shape, (list, tuple))
        and len(shape) == 2
        and all(type(size) is int and size > 0 for size in (*shape, values["rank"]))
        and isinstance(values["transposed"], bool)
        and all(type(number) in (int, float) and number >= 0 for number in numbers)
    )
    if not is_ours:
        raise ValueError


def fingerprint_of(sums: Mapping[str, str]) -> str:
    """One hash for a set of tensors, from the sha256 of each by name."""
    return hashlib.sha256("".join(f"{sums[name]} {name}\n" for name in sorted(sums)).encode()).hexdigest()


def provenance_json(plan: Plan, *, base_model: str, base_fingerprint: str) -> dict[str, Any]:
    """The side file of an adapter: which base it was fitted to."""
    init = {} if plan.recipe.init is None else {"init": plan.recipe.init}
    return {
        **TOOL,
        "method": plan.recipe.method,
        **init,
        "base_model": base_model,
        "base_fingerprint": base_fingerprint,
    }


def is_fitted(values: Mapping[str, Any]) -> bool:
    """Whether an adapter of this method and init, from a recipe or a provenance, holds its own base's error."""
    return bool(values["method"] == "loftq" or values.get("init") == "residual")


def dump_json(values: Mapping[str, Any]) -> str:
    """How every JSON file of ours is written."""
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def model_card(plan: Plan, layers: Sequence[LayerResult], *, source: str, base_model: str) -> str:
    """README.md of the output: what it is, how good it is, and the lines of Python that load it."""
    recipe, total, specs = plan.recipe, total_error(layer.error for layer in layers), [layer.spec for layer in layers]
    formats, sizes = _listed(spec.quant_type.upper() for spec in specs), _listed(map(size_of, specs))
    ranks = _listed(str(layer.rank) for layer in sorted(layers, key=lambda layer: layer.rank))
    summary = METHODS[recipe.method].summary
    return f"""---
library_name: peft
tags: [{recipe.method}, {recipe.quant_type}, lora, loftq-cli]
---

# {source}, {formats} base with a {recipe.method} adapter

{summary[0].upper()}{summary[1:]}. {len(layers)} linear layers in {formats}, one scale per
{sizes}, rank {ranks}: {bits_per_weight(plan):.2f} bits a weight.
Relative error of the weights: {total.base_error:.4f} without the adapter, {total.error:.4f} with it.

```python
{_loading_lines(plan, base_model)}
```

The adapter belongs to this base and to no other. Made by loftq-cli {__version__}; `{REPORT_NAME}` has every layer,
`{RECIPE_NAME}` every option.
"""


def _listed(names: Iterable[str]) -> str:
    """ "a", or "a, b and c", each once."""
    *firsts, last = dict.fromkeys(names)
    return f"{', '.join(firsts)} and {last}" if firsts else last


def _loading_lines(plan: Plan, base_model: str) -> str:
    """The lines that load base and adapter for training: with PEFT, or with our modules where it cannot read them.

    PEFT pools inputs on GPTQ layers only, and by its own convention; transformers reads no MLX.
    """
    architectures = plan.family.architectures
    base = json.dumps(base_model, ensure_ascii=False)  # which is how Python writes it too
    auto = architectures[0] if architectures else "AutoModel"
    if plan.adapter_config("")["task_type"] == "CAUSAL_LM":
        auto = "AutoModelForCausalLM"
    peft_pools = plan.layout == "gptq" and plan.recipe.pooling == "peft"
    if plan.layout == "mlx" or (plan.recipe.pooling is not None and not peft_pools):
        make = "from_config" if auto.startswith("Auto") else "_from_config"
        return f"""from transformers import AutoConfig, {auto}
from loftq_cli.nn import load_adapted
model = {auto}.{make}(AutoConfig.from_pretrained({base}))
model = load_adapted(model, {base})"""
    device = ', device_map="cpu"' if plan.layout == "metal" else ""
    is_mixed = plan.layout == "compressed-tensors" and len({job.matrix.spec for job in plan.layers}) > 1
    # PEFT asks for the weights, which transformers decodes in the first forward pass where there are several schemes.
    decoding = "\nmodel.hf_quantizer.compressor.decompress_model(model)" if is_mixed else ""
    return f"""from transformers import {auto}
from peft import PeftModel
model = {auto}.from_pretrained({base}{device}){decoding}
model = PeftModel.from_pretrained(model, {base}, subfolder="{plan.adapter_dir}", is_trainable=True)"""
