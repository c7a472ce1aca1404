"""Plain rounding: a matrix in a number format with the constants of the largest weights, without a search, statistics
or an adapter. Every base is held against plain rounding of the same format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from loftq_cli.quant.formats import QuantSpec, make_quantizer
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.rows import Rows, TensorRows
from loftq_cli.tensors.specs import CodebookSpec


def round_plainly(
    weight: Rows, spec: QuantSpec, dtype: str, *, holds_codes: bool = True, workers: Workers = SERIAL
) -> Rows:
    """The values of a loader for `weight` [out, in] after plain rounding: the base of QLoRA with `--scales absmax`.

    spec          the number format
    dtype         a loader's dtype for decoded values
    holds_codes   whether all codes are in memory at once; otherwise the codes of some rows are computed again whenever
                  the rows are read, so a matrix outside memory stays outside memory
    Raises NumericError for a weight without a form in the format; reading rows raises NumericError too.

    >>> from loftq_cli.tensors.rows import TensorRows
    >>> rounded = round_plainly(TensorRows(torch.tensor([[1.0, 0.99]])), CodebookSpec("nf4", 64, False), "float32")
    >>> rounded.rows(slice(0, 1))
    tensor([[1., 1.]])
    """
    quantizer = make_quantizer(spec, dtype)
    if holds_codes:
        return quantizer.decoded(quantizer.quantize(weight, workers=workers))
    constants = quantizer.quantize(weight, sink=lambda part, codes: None, workers=workers)
    return quantizer.decoded(constants, _make_coder(weight, spec, dtype))


def _make_coder(weight: Rows, spec: QuantSpec, dtype: str) -> Callable[[slice], torch.Tensor]:
    """The function from a slice of rows to the codes of the rows, in the form of the argument of a sink.

    Double quantization rounds the constants of all blocks together, after the codes are chosen: the coder does without.
    """
    spec = replace(spec, double_quant=False) if isinstance(spec, CodebookSpec) else spec
    coder = make_quantizer(spec, dtype)

    def code(part: slice) -> torch.Tensor:
        coded: list[torch.Tensor] = []
        coder.quantize(TensorRows(weight.rows(part)), sink=lambda _, codes: coded.append(codes))
        return torch.cat(coded)

    return code
