"""The GPTQ container (checkpoint_format gptq_v2, plain zero points), the container of PEFT's use_qalora.

The container reads and writes no act-order: groups are neighbouring columns. GPTQ the algorithm plays no part.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import SOURCE_HINT, InputError, UnreadFormat, UsageError
from loftq_cli.layouts.grouped import IntegerLayout, checked_bits, scale_dtype
from loftq_cli.layouts.layout import ModelFacts, StoredMatrix, alternatives_to, either
from loftq_cli.layouts.stored_parts import check_part, file_of, quantization_config, whole_number
from loftq_cli.layouts.stored_tensors import CodeRows, StoredTensors
from loftq_cli.quant.formats import QuantizedTensor, as_affine, as_affine_tensor
from loftq_cli.tensors.headers import OutTensor
from loftq_cli.tensors.matrices import AffineTensor
from loftq_cli.tensors.specs import AffineSpec

if TYPE_CHECKING:
    import torch

# Names of the blocks of a model that optimum (2.3) finds without an entry in the config.
_KNOWN_STACKS = (
    *("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers", "model.language_model.layers"),
    *("h", "decoder.layers", "layers"),
)


class GptqLayout(IntegerLayout):
    """GPTQ's packed integers."""

    name = "gptq"
    label = "GPTQ"
    row_multiple = 32  # zero points are packed along the rows, in whole words at any number of bits

    def planned(self, matrix: StoredMatrix) -> tuple[OutTensor, ...]:
        """Plan qweight int32 [in * bits / 32, out], qzeros int32 [in / group_size, out * bits / 32], scales
        [in / group_size, out], float16 in written bases, and g_idx int32 [in].
        """
        spec, (out_features, in_features) = as_affine(matrix.spec), matrix.shape
        module, groups = matrix.name.removesuffix("weight"), in_features // spec.group_size
        return (
            OutTensor(f"{module}qweight", "int32", (in_features * spec.bits // 32, out_features)),
            OutTensor(f"{module}qzeros", "int32", (groups, out_features * spec.bits // 32)),
            OutTensor(f"{module}scales", spec.scale_dtype, (groups, out_features)),
            OutTensor(f"{module}g_idx", "int32", (in_features,)),
        )

    def pack(self, matrix: StoredMatrix, quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Pack the codes and constants into the tensors of `planned`."""
        import torch

        from loftq_cli.triton_kernels.packing.contract import pack_rows

        affine, module = as_affine_tensor(quantized), matrix.name.removesuffix("weight")
        spec, zero_points = affine.spec, affine.zero_points
        if zero_points is None:
            zero_points = torch.full(affine.scales.shape, 2 ** (spec.bits - 1), dtype=torch.uint8)
        return {
            f"{module}qweight": pack_rows(affine.codes, spec.bits).T.contiguous(),
            f"{module}qzeros": pack_rows(zero_points.T, spec.bits),
            f"{module}scales": affine.scales.T.contiguous(),
            f"{module}g_idx": torch.arange(matrix.shape[1], dtype=torch.int32) // spec.group_size,
        }

    def code_rows(self, matrix: StoredMatrix) -> CodeRows | None:
        """Return None: words hold codes of a single output, column after column."""
        del matrix
        return None

    def quantized_names(self, stored: StoredTensors) -> list[str]:
        """List the packed weights. Raises InputError for act-order."""
        config = quantization_config(stored, self.name)
        if config is None:
            return []
        if config.get("desc_act"):
            message = "act-order (desc_act): its groups are not neighbouring columns, which is not read"
            raise UnreadFormat(message, file=stored.config_file, hint=SOURCE_HINT)
        return [f"{name.removesuffix('qweight')}weight" for name in stored.refs if name.endswith(".qweight")]

    def stored_matrix(self, name: str, stored: StoredTensors, *, transposed: bool) -> StoredMatrix:
        """Read shape and format of the matrix called `name` from headers, g_idx and the config. Raises InputError for
        contradictory parts and for act-order.
        """
        del transposed
        config = quantization_config(stored, self.name) or {}
        bits, module = checked_bits(config, "bits", stored), name.removesuffix("weight")
        words = stored.refs[f"{module}qweight"].shape
        if len(words) != 2 or 0 in words or words[0] * 32 % bits:
            message = f"is {words}, not the codes of a matrix"
            raise InputError(message, file=file_of(f"{module}qweight", stored), tensor=f"{module}qweight")
        shape = (words[1], words[0] * 32 // bits)
        group_size = shape[1] if config.get("group_size") == -1 else whole_number(config, "group_size", stored)
        dtype = scale_dtype(f"{module}scales", stored)
        if shape[1] % group_size or shape[0] * bits % 32:
            message = f"holds {shape}, not whole groups of {group_size} and whole words of zero points"
            raise InputError(message, file=file_of(f"{module}qweight", stored), tensor=f"{module}qweight")
        spec = AffineSpec(bits, group_size, symmetric=config.get("sym") is True, scale_dtype=dtype)
        matrix = StoredMatrix(name, shape, spec, dtype, transposed=False)
        for part in self.planned(matrix):
            check_part(part, stored, file_of(f"{module}qweight", stored), asks="the shape of its qweight")
        index = array("i", (column // group_size for column in range(shape[1])))
        if stored.raw(f"{module}g_idx") != index.tobytes():
            message = "act-order: the groups are not neighbouring columns, which is not read"
            raise InputError(message, file=file_of(f"{module}g_idx", stored), tensor=f"{module}g_idx")
        return matrix

    def parts(self, name: str) -> tuple[str, ...]:
        """List all tensor names of the parts of a weight called `name`."""
        module = name.removesuffix("weight")
        return tuple(module + part for part in ("qweight", "qzeros", "scales", "g_idx"))

    def unpack(self, matrix: StoredMatrix, stored: StoredTensors, *, has_codes: bool = True) -> QuantizedTensor:
        """Unpack a checked `matrix`, the inverse of `pack`; stored zero points of a v1 checkpoint are less by 1.

        Raises InputError for zero points that loaders read differently, and for a symmetric format with zero points
        off the middle.
        """
        import torch

        from loftq_cli.triton_kernels.packing.contract import unpack_rows

        spec, (out_features, in_features) = as_affine(matrix.spec), matrix.shape
        module = matrix.name.removesuffix("weight")
        codes = torch.empty((0, in_features), dtype=torch.uint8)
        if has_codes:
            codes = unpack_rows(stored.load(f"{module}qweight").T, spec.bits, in_features)
        zero_points = unpack_rows(stored.load(f"{module}qzeros"), spec.bits, out_features).T.contiguous()
        config = quantization_config(stored, self.name) or {}
        if config.get("checkpoint_format") != "gptq_v2":
            if bool((zero_points == 2**spec.bits - 1).any()):
                message = "holds a v1 zero point that wraps around, and loaders differ in what it means"
                raise InputError(message, file=file_of(f"{module}qzeros", stored), tensor=f"{module}qzeros")
            zero_points += 1
        if spec.symmetric and not bool((zero_points == 2 ** (spec.bits - 1)).all()):
            message = "holds zero points other than the middle, and the config says sym"
            raise InputError(message, file=file_of(f"{module}qzeros", stored), tensor=f"{module}qzeros")
        scales = stored.load(f"{module}scales").T.contiguous()
        return AffineTensor(codes, scales, None if spec.symmetric else zero_points, None, spec, matrix.dtype)

    def model_config(self, config: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """Add a `quantization_config` for GPTQ loaders to the model's config.

        Raises UsageError for a model of several stacks of blocks, and for a family that the table of families excludes:
        GPTQ loaders do not load the model.
        """
        spec = as_affine(facts.spec)
        stacks = {re.split(r"\.\d+\.", module, maxsplit=1)[0] for module in facts.quantized_modules}
        hint = f"--layout {either(alternatives_to(self.name, facts.specs))}"
        if len(stacks) > 1:
            message = f"GPTQ loaders read models of one stack of blocks, and this one has {', '.join(sorted(stacks))}"
            raise UsageError(message, hint=hint)
        if self.name in facts.refused_by:
            message = f"GPTQ loaders do not read {config['model_type']} models"
            raise UsageError(message, hint=hint)
        quantization: dict[str, Any] = {
            "quant_method": self.name,
            "bits": spec.bits,
            "group_size": spec.group_size,
            "sym": spec.symmetric,
            "desc_act": False,
            "checkpoint_format": "gptq_v2",
            "lm_head": False,
            "pack_dtype": "int32",
            # The default CPU kernel loses gradients after a first forward pass in evaluation mode.
            "backend": "torch",
        }
        stack = "".join(stacks)
        if stack not in _KNOWN_STACKS:
            quantization["block_name_to_quantize"] = stack
        if any(module.startswith(f"{stack}.") for module in facts.full_precision_modules):
            quantization["modules_in_block_to_quantize"] = [list(facts.quantized_modules)]
        return {**config, "quantization_config": quantization}


LAYOUT = GptqLayout()
