"""Progress: what a caller can hear of a call that runs. The progress bar of the command line is one observer."""

from __future__ import annotations

from pathlib import Path

from loftq_cli.api.results import MergePlan, QuantizePlan
from loftq_cli.conversion.report import LayerResult
from loftq_cli.inspecting.findings import Problem
from loftq_cli.merging.report import MergedLayer


class Observer:
    """Every method does nothing: a subclass overrides the ones that it needs.

    All methods are called in the thread that called the API, and the work waits meanwhile. An exception that a method
    raises ends the call in order, as an interrupt would: the same call continues the work later.

    >>> class Counter(Observer):
    ...     layers = 0
    ...
    ...     def layer_converted(self, layer, *, resumed):
    ...         self.layers += 1
    """

    def started(self, plan: QuantizePlan | MergePlan) -> None:
        """Everything that headers decide is decided, and the work on `plan` begins."""

    def phase(self, text: str) -> None:
        """The work comes to another part, which `text` names."""

    def note(self, text: str) -> None:
        """`text` says something that a user may not expect."""

    def layer_measured(self, name: str, done: int, total: int) -> None:
        """quantize, under a target: the errors of `done` of `total` layers are measured, the last of them `name`."""

    def layer_started(self, name: str) -> None:
        """quantize: the work on the weight `name` begins."""

    def layer_converted(self, layer: LayerResult, *, resumed: bool) -> None:
        """quantize: a layer is done. `resumed` says whether an interrupted run had done it before."""

    def layer_merged(self, layer: MergedLayer) -> None:
        """merge: a layer is done."""

    def calibration_started(self, inputs: int, windows: int, context: int, *, lines: bool) -> None:
        """calibrate: `windows` windows of up to `context` tokens will be read, or as many lines where `lines` is true,
        for the statistics of `inputs` inputs.
        """

    def block_calibrated(self, block: str, inputs: int) -> None:
        """calibrate: the text has passed the module `block`, which gave `inputs` statistics."""

    def problem_found(self, problem: Problem, path: Path) -> None:
        """inspect, with verify: the directory or weight file `path` has a problem."""
