"""Progress of a running call. The progress bar of the command line is an observer."""

from __future__ import annotations

from pathlib import Path

from loftq_cli.api.results import MergePlan, QuantizePlan
from loftq_cli.conversion.report import LayerResult
from loftq_cli.inspecting.findings import Problem
from loftq_cli.merging.report import MergedLayer


class Observer:
    """Hears how a call goes on. Every method does nothing: a subclass overrides some of the methods.

    The calling thread of the API calls the methods, and the work waits meanwhile. An exception in a method ends the
    call in order, as an interrupt does: repeating the call continues the work.

    >>> class Counter(Observer):
    ...     layers = 0
    ...
    ...     def layer_converted(self, layer, *, resumed):
    ...         self.layers += 1
    """

    def started(self, plan: QuantizePlan | MergePlan) -> None:
        """All decisions from headers are final, and the work on `plan` begins."""

    def phase(self, text: str) -> None:
        """The next part of the work begins: `text` names the part."""

    def note(self, text: str) -> None:
        """`text` tells the user something unexpected."""

    def warning(self, text: str) -> None:
        """`text` tells the user about wrong numbers in a result, such as NaN in a copied tensor. The command line
        prints a warning under --quiet too. The default passes `text` on to `note`.
        """
        self.note(text)

    def layer_measured(self, name: str, done: int, total: int) -> None:
        """quantize, under a target: the layer `name` is measured, as are `done` of `total` layers by now."""

    def layer_started(self, name: str) -> None:
        """quantize: the work on the weight `name` begins."""

    def layer_converted(self, layer: LayerResult, *, resumed: bool) -> None:
        """quantize: a layer is done. `resumed` says whether an interrupted run had finished the layer."""

    def layer_merged(self, layer: MergedLayer) -> None:
        """merge: a layer is done."""

    def calibration_started(self, inputs: int, windows: int, context: int, *, lines: bool, nbytes: int) -> None:
        """calibrate: `windows` windows of up to `context` tokens will be read, or as many lines where `lines` is true,
        and give the statistics of `inputs` inputs, `nbytes` bytes in all.
        """

    def block_calibrated(self, block: str, inputs: int) -> None:
        """calibrate: the text has passed the module `block`, and `inputs` more statistics are written."""

    def problem_found(self, problem: Problem, path: Path) -> None:
        """inspect, with verify: the directory or weight file `path` has a problem."""
