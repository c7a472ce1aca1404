"""compressed-tensors' pack-quantized container, for transformers and vLLM: integers of 2, 3, 4 or 8 bits.

`"dequantize": true` makes transformers decode at load, so PEFT can adapt, train and merge; servers ignore the key.
transformers decodes at load by a single scheme: a model of several number formats is decoded in the first forward pass,
and zero points have no place before the first pass (transformers 5.23, compressed-tensors 0.20).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from loftq_cli.checkpoint.patterns import first_matches
from loftq_cli.errors import SOURCE_HINT, InputError, UnreadFormat, UsageError, printable
from loftq_cli.layouts.grouped import IntegerLayout, checked_bits, kept_names, scale_dtype, word_rows
from loftq_cli.layouts.layout import ModelFacts, StoredMatrix, alternatives_to
from loftq_cli.layouts.stored_parts import check_part, file_of, quantization_config, whole_number
from loftq_cli.layouts.stored_tensors import CodeRows, StoredTensors
from loftq_cli.quant.formats import QuantizedTensor, QuantSpec, as_affine, as_affine_tensor
from loftq_cli.tensors.headers import OutTensor
from loftq_cli.tensors.matrices import AffineTensor
from loftq_cli.tensors.specs import AffineSpec

if TYPE_CHECKING:
    import torch

NAME = "compressed-tensors"
_CLASSES = ("Linear", "Module")  # classes of torch's linears: a scheme may target modules by class


class CompressedTensorsLayout(IntegerLayout):
    """compressed-tensors' packed integers."""

    name = NAME
    label = NAME
    needs_whole_words = False

    def planned(self, matrix: StoredMatrix) -> tuple[OutTensor, ...]:
        """Plan weight_packed int32 [out, ceil(in * bits / 32)], weight_scale [out, in / group_size] and weight_shape
        int64 [2]; asymmetric formats add weight_zero_point int32 [ceil(out * bits / 32), in / group_size], packed down
        the rows.
        """
        spec, (out_features, in_features) = as_affine(matrix.spec), matrix.shape
        name, groups = matrix.name, in_features // spec.group_size
        tensors = [
            OutTensor(f"{name}_packed", "int32", (out_features, -(-in_features * spec.bits // 32))),
            OutTensor(f"{name}_scale", spec.scale_dtype, (out_features, groups)),
            OutTensor(f"{name}_shape", "int64", (2,)),
        ]
        if not spec.symmetric:
            tensors.append(OutTensor(f"{name}_zero_point", "int32", (-(-out_features * spec.bits // 32), groups)))
        return tuple(tensors)

    def pack(self, matrix: StoredMatrix, quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Pack the codes and constants into the tensors of `planned`."""
        import torch

        from loftq_cli.triton_kernels.packing.contract import pack_rows

        affine, name = as_affine_tensor(quantized), matrix.name
        tensors = {
            f"{name}_scale": affine.scales,
            f"{name}_shape": torch.tensor(matrix.shape, dtype=torch.int64),
        }
        if len(affine.codes):
            tensors[f"{name}_packed"] = self.code_rows(matrix).pack(affine.codes)
        if affine.zero_points is not None:
            tensors[f"{name}_zero_point"] = pack_rows(affine.zero_points.T, affine.spec.bits).T.contiguous()
        return tensors

    def code_rows(self, matrix: StoredMatrix) -> CodeRows:
        """Locate the codes: a row of words for each row of the matrix."""
        return word_rows(f"{matrix.name}_packed", matrix)

    def quantized_names(self, stored: StoredTensors) -> list[str]:
        """List the packed weights. Raises InputError for a format of compressed-tensors that the tool does not read."""
        config = quantization_config(stored, NAME)
        if config is None:
            return []
        if config.get("format") != "pack-quantized":
            message = f"its compressed-tensors format is {config.get('format')!r}, of which we read pack-quantized"
            raise UnreadFormat(message, file=stored.config_file, hint=SOURCE_HINT)
        return [name.removesuffix("_packed") for name in stored.refs if name.endswith(".weight_packed")]

    def stored_matrix(self, name: str, stored: StoredTensors, *, transposed: bool) -> StoredMatrix:
        """Read shape and format of the matrix called `name` from headers, weight_shape and the scheme in the config.

        Raises InputError for a part with a dtype or a shape that contradicts the scheme.
        """
        del transposed
        scheme = _find_scheme(name.removesuffix(".weight"), stored)
        shape_ref = stored.refs.get(f"{name}_shape")
        if shape_ref is None or shape_ref.dtype not in ("int64", "int32") or shape_ref.numel != 2:
            problem = "is missing" if shape_ref is None else f"is {shape_ref.dtype} {shape_ref.shape}"
            message = f"{problem}, and its codes are there"
            raise InputError(message, file=file_of(f"{name}_packed", stored), tensor=f"{name}_shape")
        kind = "<2q" if shape_ref.dtype == "int64" else "<2i"
        shape = cast(tuple[int, int], struct.unpack(kind, stored.raw(f"{name}_shape")))
        if not all(0 < side < 2**40 for side in shape):
            raise InputError(f"is {shape}, not a shape", file=shape_ref.file, tensor=f"{name}_shape")
        bits = checked_bits(scheme, "num_bits", stored)
        group_size = shape[1] if scheme.get("strategy") == "channel" else whole_number(scheme, "group_size", stored)
        if shape[1] % group_size:
            message = f"has rows of {shape[1]}, not whole groups of {group_size}"
            raise InputError(message, file=shape_ref.file, tensor=f"{name}_shape")
        dtype = scale_dtype(f"{name}_scale", stored)
        spec = AffineSpec(bits, group_size, symmetric=scheme.get("symmetric") is not False, scale_dtype=dtype)
        matrix = StoredMatrix(name, shape, spec, stored.dtype, transposed=False)
        for part in self.planned(matrix):
            if not part.name.endswith("_shape"):
                check_part(part, stored, shape_ref.file, asks="its weight_shape and the config's scheme")
        return matrix

    def parts(self, name: str) -> tuple[str, ...]:
        """List all tensor names of the parts of a weight called `name`."""
        return tuple(f"{name}_{part}" for part in ("packed", "scale", "shape", "zero_point", "g_idx"))

    def unpack(self, matrix: StoredMatrix, stored: StoredTensors, *, has_codes: bool = True) -> QuantizedTensor:
        """Unpack a checked `matrix`, the inverse of `pack`."""
        import torch

        from loftq_cli.triton_kernels.packing.contract import unpack_rows

        spec, name = as_affine(matrix.spec), matrix.name
        packed = stored.load(f"{name}_packed") if has_codes else torch.empty((0, 0), dtype=torch.int32)
        codes = self.code_rows(matrix).unpack(packed)
        zero_points = None
        if not spec.symmetric:
            zero_points = unpack_rows(stored.load(f"{name}_zero_point").T, spec.bits, matrix.shape[0]).T.contiguous()
        return AffineTensor(codes, stored.load(f"{name}_scale"), zero_points, None, spec, matrix.dtype)

    def model_config(self, config: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """Add a `quantization_config` to the model's config.

        A model of a single number format has a scheme for all linears, and a list of linears to ignore. A model of
        several number formats has a scheme for each format, with the names of the modules.
        Raises UsageError for a model with experts in full precision: transformers 5 does not find the experts beside
        packed weights.
        """
        if facts.has_experts:
            message = "transformers loads no experts in full precision from compressed-tensors"
            *firsts, last = alternatives_to(NAME, facts.specs)
            raise UsageError(message, hint=f"--layout {', '.join([*firsts, f'or {last}']) if firsts else last}")
        modules: dict[QuantSpec, list[str]] = {facts.spec: []}
        for module in facts.quantized_modules:
            modules.setdefault(facts.other_specs.get(module, facts.spec), []).append(module)
        is_mixed = len(modules) > 1
        groups = {
            f"group_{i}": {"targets": names if is_mixed else ["Linear"], "weights": _describe_scheme(as_affine(spec))}
            for i, (spec, names) in enumerate(modules.items())
        }
        quantization = {
            "quant_method": self.name,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": kept_names(facts),
            # transformers 5.23 would decode every linear by the first scheme.
            **({} if is_mixed else {"dequantize": True}),
        }
        return {**config, "quantization_config": quantization}


LAYOUT = CompressedTensorsLayout()


def _describe_scheme(spec: AffineSpec) -> dict[str, Any]:
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "group",
        "group_size": spec.group_size,
        "dynamic": False,
    }


def _find_scheme(module: str, stored: StoredTensors) -> Mapping[str, Any]:
    """Find the scheme for the weights of a module. Raises InputError for no scheme, and for a scheme that the container
    does not read.
    """
    config = quantization_config(stored, NAME) or {}
    groups = config.get("config_groups")
    candidates = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    group = candidates[0] if len(candidates) == 1 else _choose_group(module, candidates, stored)
    scheme = group.get("weights")
    if not isinstance(scheme, dict):
        message = f"its config has no scheme of the weights of {printable(module)}"
        raise InputError(message, file=stored.config_file)
    if group.get("format") not in (None, "pack-quantized"):
        message = (
            f"a scheme of its config has the format {printable(repr(group['format']), 80)}; we read pack-quantized"
        )
        raise UnreadFormat(message, file=stored.config_file, hint=SOURCE_HINT)
    if scheme.get("type", "int") != "int" or scheme.get("strategy") not in ("group", "channel"):
        message = f"its weights are {scheme.get('type')} by {scheme.get('strategy')}; we read int by group or channel"
        raise UnreadFormat(message, file=stored.config_file, hint=SOURCE_HINT)
    if scheme.get("actorder") not in (None, False, "static", "weight"):
        message = "act-order: its groups are not neighbouring columns, which is not read"
        raise UnreadFormat(message, file=stored.config_file, hint=SOURCE_HINT)
    return scheme


def _choose_group(module: str, groups: list[dict[str, Any]], stored: StoredTensors) -> Mapping[str, Any]:
    """Choose a scheme among several for a module, like compressed-tensors: the scheme of the target with the module's
    name; else of the first expression, in alphabetical order, matching the beginning of the name; else of the target
    with the class.
    """
    by_target: dict[str, dict[str, Any]] = {}
    for group in groups:
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise InputError("the targets of a scheme of its config are no list of names", file=stored.config_file)
        for target in targets:
            if by_target.setdefault(target, group) is not group:
                message = f"its config has 2 schemes of weights for {printable(target)}"
                raise InputError(message, file=stored.config_file)
    name = stored.loaded(module)
    expressions = {target: target.removeprefix("re:") for target in sorted(by_target) if target.startswith("re:")}
    if name not in by_target and expressions:
        try:
            name = first_matches(expressions, [name]).get(name, name)
        except ValueError as error:
            raise InputError(f"among the targets of its config is {error}", file=stored.config_file) from None
    target = next((key for key in (name, *_CLASSES) if key in by_target), None)
    return by_target[target] if target is not None else {}
