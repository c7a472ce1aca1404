"""Headers become matrices for a container, and tensors to copy. Knows no method and no adapter: a look at a checkpoint
lists the weights to quantize without either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loftq_cli.adapter.config import tensor_names
from loftq_cli.errors import UsageError
from loftq_cli.layouts.layout import LAYOUTS, Fit, StoredMatrix, default_layout, either, load_layout, mixing_layouts
from loftq_cli.model.experts import ExpertGroup, ExpertPart, find_experts
from loftq_cli.model.family import Family
from loftq_cli.model.targets import Target, choose_targets, module_of
from loftq_cli.planning.format_options import settle_format
from loftq_cli.planning.jobs import CopyJob, ExpertMatrix, QuantizableMatrix
from loftq_cli.planning.recipe import AffineOptions, Recipe, RecipeFields
from loftq_cli.planning.settings import decoded_dtype, spec_of
from loftq_cli.quant.formats import QuantSpec
from loftq_cli.tensors.headers import MODEL_DTYPES, OutTensor, TensorRef, config_file_beside


def quantizable_matrices(
    tensors: Mapping[str, TensorRef], config: Mapping[str, Any], *, quant_type: str = "nf4", layout: str | None = None
) -> list[QuantizableMatrix | CopyJob]:
    """List the default choice of `quantize` for a look at a checkpoint: weights to quantize, and copies with reasons.

    tensors      the headers of the checkpoint
    config       the content of config.json; empty for a checkpoint without a config
    quant_type   the number format, with the default block size or group size
    layout       the container; None for the default container of the format. "dense" holds every shape.

    A checkpoint without weights to quantize is no error. Raises InputError for a config with a value of the wrong
    type.

    >>> from loftq_cli.checkpoint.source import open_checkpoint
    >>> from loftq_cli.model.builtin import resolve_model
    >>> checkpoint = open_checkpoint(resolve_model("builtin:tiny-llama"))
    >>> units = quantizable_matrices(checkpoint.tensors, checkpoint.config())
    >>> sum(isinstance(unit, QuantizableMatrix) for unit in units)
    28
    """
    layout = layout or default_layout(quant_type)
    family = Family(config, config_file_beside(tensors.values()))
    targets = choose_targets(tensors, family, (), ())
    dtype = model_dtype(tensors, targets, family)
    spec = spec_of(settle_format(RecipeFields(), quant_type, layout), layout, dtype)
    planner = MatrixPlanner(family, layout, dtype, tensors, spec)
    units = (planner.plan(ref, targets[name]) for name, ref in tensors.items())
    return [unit for unit in units if unit is not None]


def model_dtype(tensors: Mapping[str, TensorRef], targets: Mapping[str, Target], family: Family) -> str:
    """The dtype of the model's computations: the config's dtype, or the most common dtype among the linears.

    tensors   the headers of the checkpoint
    targets   the decision about each tensor, from `choose_targets`
    family    the config and the facts about the family

    >>> model_dtype({}, {}, Family({"dtype": "bfloat16"}))
    'bfloat16'
    """
    return family.dtype(tensors[name] for name, target in targets.items() if target.kind == "linear")


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """The experts of a model, for a container.

    groups   the experts of each layer that loaders read quantized
    others   names of the tensors of other experts in full precision; experts of unknown classes are not among them
    reason   the reason for the others, as half a sentence
    """

    groups: tuple[ExpertGroup, ...] = ()
    others: frozenset[str] = frozenset()
    reason: str = ""

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the tensors of the groups."""
        return frozenset(name for group in self.groups for name in group.tensors)


def choose_experts(tensors: Mapping[str, TensorRef], family: Family, recipe: Recipe) -> ExpertChoice:
    """Choose the experts that loaders of the recipe's container read quantized.

    Raises UsageError for a format or a method that loaders of the container do not read for experts, where no loader
    reads the experts in full precision either.

    >>> from loftq_cli.planning.settle import make_recipe
    >>> choose_experts({}, Family({}), make_recipe()).reason
    'no loader of bitsandbytes reads quantized experts'
    """
    row, layout = LAYOUTS[recipe.layout], recipe.layout
    groups = find_experts(tensors, family, packed=row.stores_codes)
    names = frozenset(name for group in groups for name in group.tensors)
    if not row.experts:
        return ExpertChoice((), names, f"no loader of {layout} reads quantized experts")
    if row.stores_codes:
        groups = [group for group in groups if all(p.stored for parts in group.experts for p in parts)]
    if recipe.pooling is not None:
        reason = f"an adapter of method {recipe.method} pools the inputs of modules, and PEFT adapts experts otherwise"
        if groups and row.stores_codes:
            raise UsageError(f"experts: {reason}", tensor=groups[0].tensors[0], hint="--method loftq --symmetric")
        return ExpertChoice((), names, reason)
    if groups and row.experts == "symmetric" and isinstance(recipe.quant, AffineOptions) and not recipe.quant.symmetric:
        message = f"transformers decodes experts of {layout} without zero points"
        raise UsageError(message, tensor=groups[0].tensors[0], hint="--symmetric")
    others = names.difference(name for group in groups for name in group.tensors)
    return ExpertChoice(tuple(groups), others, f"no loader of {layout} reads quantized experts of this family")


class MatrixPlanner:
    """Turns tensor after tensor into a matrix or a copy, and collects notes for the user.

    layout          the container
    family          the config and the facts about the family
    tensors         the headers of the original
    notes           sentences about tied tensors, stored once for two names
    recast          number of copies with a dtype other than the stored dtype
    expert_reason   the reason for experts in full precision, as half a sentence
    unfit           the reason against the first matrix without a place in the container; None while every matrix has
                    a place
    """

    def __init__(
        self,
        family: Family,
        layout: str,
        dtype: str,
        tensors: Mapping[str, TensorRef],
        spec: QuantSpec,
        spec_for: Callable[[str], QuantSpec | None] | None = None,
    ) -> None:
        """Arguments:

        family     the config and the facts about the family
        layout     the container, a key of LAYOUTS
        dtype      dtype of the stored model
        tensors    the headers of the original
        spec       the number format of the model
        spec_for   returns the format of a module, or None for a module left in full precision by an override; by
                   default every module has the format of the model
        """
        self.family, self._layout_name, self._dtype, self.tensors = family, layout, dtype, tensors
        self._modules = [module_of(name) for name in tensors]
        self._spec, self._spec_for = spec, spec_for or (lambda module: spec)
        self.layout = load_layout(layout)
        self.notes: list[str] = []
        self.expert_reason = ""
        self.recast = 0
        self.unfit: Fit | None = None

    def plan(self, ref: TensorRef, target: Target) -> QuantizableMatrix | CopyJob | None:
        """Plan a tensor as a matrix or as a copy; None for the second name of a tied tensor.

        ref      the header of the tensor
        target   the decision about the tensor, from `choose_targets`

        Raises UsageError for an override with integers that the container does not hold.
        """
        if ref.alias_of is not None and self.family.ties_embeddings():
            self.notes.append(f"{ref.name} is {ref.alias_of} (tied): stored once")
            return None
        if not target.quantize:
            return self.copy(ref, target.reason)
        module = module_of(ref.name)
        spec = self._spec_for(module)
        if spec is None:
            return self.copy(ref, "excluded by an override")
        transposed = self.family.is_transposed(module)
        shape = (ref.shape[1], ref.shape[0]) if transposed else (ref.shape[0], ref.shape[1])
        fit = self.layout.fit(spec, shape, transposed=transposed)
        self._check_own_format(ref.name, spec, fit, shape, transposed=transposed)
        if fit.spec is None:
            self.unfit = self.unfit or fit
            reason = fit.reason or "does not fit the container"
            return self.copy(ref, reason, note=f"kept in full precision: {reason}")
        dtype = decoded_dtype(self._layout_name, fit.spec, self._dtype)
        matrix = StoredMatrix(ref.name, shape, fit.spec, dtype, transposed)
        return QuantizableMatrix(matrix, self.family.loaded_name(module, self._modules), fit.reason)

    def plan_experts(self, group: ExpertGroup) -> tuple[ExpertMatrix, ...] | str:
        """Plan the matrices of the experts of a layer, or say why the experts stay as they are.

        Raises UsageError for experts of different formats.
        """
        parts = [part for expert in group.experts for part in expert]
        specs = dict.fromkeys(self._spec_for(module_of(part.stored or part.tensor)) for part in parts)
        if len(specs) > 1:
            message = "the experts of a layer become one parameter of one format, and an override has another"
            raise UsageError(message, tensor=parts[0].tensor, hint="match all experts of the layer")
        (spec,) = specs
        if spec is None:
            return "excluded by an override"
        for rows in dict.fromkeys(_rows_of(group, part) for part in group.experts[0]):
            fit = self.layout.fit(spec, (rows, group.shape[1]), transposed=False)
            self._check_own_format(group.name, spec, fit, (rows, group.shape[1]), transposed=False)
            if fit.spec is None or fit.spec != spec:
                self.unfit = self.unfit or fit
                return fit.reason or "does not fit the container"
        dtype = decoded_dtype(self._layout_name, spec, self._dtype)
        modules = group.modules or (None,) * len(group.experts)
        return tuple(
            ExpertMatrix(
                expert,
                tuple(
                    StoredMatrix(part.stored, (_rows_of(group, part), group.shape[1]), spec, dtype, transposed=False)
                    for part in expert
                    if part.stored is not None
                ),
                None if module is None else tensor_names(module),
            )
            for expert, module in zip(group.experts, modules, strict=True)
        )

    def _check_own_format(
        self, name: str, spec: QuantSpec, fit: Fit, shape: tuple[int, int], *, transposed: bool
    ) -> None:
        """Raises UsageError for an override with integers that the container does not hold: a copy in full precision
        would be silent disobedience.
        """
        common, layout = self._spec, self._layout_name
        if spec == common or not spec.is_affine:
            return
        mixed = self.layout.row.mixed
        if mixed == "none":
            message = f"layout {layout} has one quant_type and group size for all layers, and an override has another"
            mixing = either(mixing_layouts(spec.quant_type, with_offsets=False))
            raise UsageError(message, tensor=name, hint=f"--layout {mixing}")
        if mixed == "symmetric" and spec.zero_point_kind != "none":
            message = f"an override has another format, and loaders of {layout} mix formats without zero points only"
            mixing = either(mixing_layouts(spec.quant_type, with_offsets=True))
            raise UsageError(message, tensor=name, hint=f"--symmetric, or --layout {mixing}")
        if fit.spec is None and self.layout.fit(common, shape, transposed=transposed).spec is not None:
            raise UsageError(f"an override does not fit it: {fit.reason}", tensor=name, hint=fit.hint)

    def copy(self, ref: TensorRef, reason: str, *, note: str | None = None) -> CopyJob:
        """Plan a copy of a tensor, for a reason."""
        dtype = ref.dtype
        # transformers loads a "weight" of a quantized checkpoint in the stored dtype, and a model with two float dtypes
        # does not compute: every weight gets the dtype of the model.
        row = self.layout.row
        parameter = (".weight", ".bias") if row.one_dtype else ".weight"
        if row.stores_codes and ref.name.endswith(parameter) and dtype in MODEL_DTYPES:
            dtype = self._dtype
        self.recast += dtype != ref.dtype
        return CopyJob(ref.name, OutTensor(ref.name, dtype, ref.shape), reason, note)


def _rows_of(group: ExpertGroup, part: ExpertPart) -> int:
    """The number of rows of a part of an expert's matrix; parts without a range of rows are equal."""
    if part.rows is not None:
        return part.rows[1] - part.rows[0]
    return group.shape[0] // len(group.experts[0])
