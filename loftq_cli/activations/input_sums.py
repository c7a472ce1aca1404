"""Running sums of x·xᵀ over the inputs x of linears, and the groups of weights with a common input. Watches a model
that runs block by block; writes no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import NumericError, UsageError
from loftq_cli.planning.jobs import LayerJob, QuantizableMatrix

if TYPE_CHECKING:
    import torch

    from loftq_cli.activations.streamed_model import StreamedModel

# Tokens per call of a block, by a single thread: few, so that many threads have work, and enough for full speed.
BATCH_TOKENS = 1024
_CHUNK_ROWS = 4096  # rows of an input per product: bounds the float32 and float64 copies of an input


def share_inputs(
    streamed: StreamedModel, jobs: Sequence[QuantizableMatrix], feed: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """Map each reached weight to the first weight that has the same input tensor; both share one statistic.

    jobs   the weights to watch; "first" means first among `jobs`
    feed   keyword arguments of one forward, a few tokens

    Weights that `feed` does not reach are absent. Raises as `StreamedModel.run` does.
    """
    inputs = _SeenInputs()
    groups: dict[str, str] = {}

    def note_input(name: str, x: torch.Tensor) -> None:
        groups.setdefault(name, inputs.find(x) or inputs.add(x, name))

    with _watch_inputs(_find_modules(streamed, jobs), note_input):
        streamed.run([feed], _find_blocks(streamed, jobs), lambda block: inputs.clear())
    first_names: dict[str, str] = {}
    names = [job.name for job in jobs if job.name in groups]
    for name in names:
        first_names.setdefault(groups[name], name)
    return {name: first_names[groups[name]] for name in names}


class MomentSums:
    """Sums of x·xᵀ for the layers of the block in memory. Weights with a common input tensor share a sum. A sum grows
    batch by batch, in the order of the batches, whatever the order in which batches compute.

    jobs       the weights to measure
    diagonal   sum the squares of x in place of x·xᵀ
    path       the model, for errors
    blocks     names of the blocks that hold the weights
    """

    def __init__(
        self, streamed: StreamedModel, jobs: Sequence[QuantizableMatrix | LayerJob], *, diagonal: bool, path: Path
    ) -> None:
        self.blocks = _find_blocks(streamed, jobs)
        self._modules = _find_modules(streamed, jobs)
        self._diagonal, self._path = diagonal, path
        self._batches: dict[int, _BatchSums] = {}
        self._sums, self._leaders = dict[str, InputSum](), dict[str, str]()
        self._taken = set[str]()

    def watch(self) -> Any:
        """A context: add up the inputs of all layers until the block of the `with` statement ends."""
        return _watch_inputs(self._modules, self._add)

    def merge(self, batch: int) -> None:
        """Add the sums of the batch number `batch`, after the batch has run through a block."""
        sums = self._batches.pop(batch, None)
        if sums is None:
            return
        for name, leader in sums.leaders.items():
            self._leaders.setdefault(name, leader)
        for name, batch_sum in sums.sums.items():
            if name in self._sums:
                self._sums[name].merge(batch_sum)
            else:
                self._sums[name] = batch_sum

    def take_means(self) -> dict[str, torch.Tensor]:
        """The means over the inputs since the last call, by weight: float32, symmetric [in, in], or [in] with
        `diagonal`. Weights with a common input get one tensor.

        Raises UsageError for a weight with a mean in an earlier call, NumericError for a mean with NaN or infinite
        values.
        """
        means = {name: input_sum.mean() for name, input_sum in self._sums.items()}
        for name, mean in means.items():
            if not bool(mean.isfinite().all()):
                raise NumericError("its input is not finite on this text").at(file=self._path, tensor=name)
        for name in self._leaders.keys() & self._taken:
            raise UsageError("runs again after other blocks, which is not supported", file=self._path, tensor=name)
        means = {name: means[leader] for name, leader in self._leaders.items()}
        self._taken |= means.keys()
        self._sums.clear()
        self._leaders.clear()
        return means

    def check_complete(self, names: Iterable[str]) -> None:
        """Raises UsageError for a weight in `names` without a mean so far."""
        missing = set(names) - self._taken
        if missing:
            message = "reads the beginning of the text and nothing of the rest"
            raise UsageError(message, file=self._path, tensor=min(missing))

    def _add(self, name: str, x: torch.Tensor) -> None:
        from loftq_cli.activations.paused_forward import current_forward

        batch = current_forward().number
        self._batches.setdefault(batch, _BatchSums(self._diagonal)).add(name, x)


class _SeenInputs:
    """The inputs of a block so far, with the first weight of each. Inputs stay until `clear`: Python gives the address
    of a dropped tensor to a later tensor.
    """

    def __init__(self) -> None:
        self._inputs: list[tuple[torch.Tensor, int, str]] = []

    def find(self, x: torch.Tensor) -> str | None:
        """The first weight with the input tensor `x`; None for a new or changed tensor."""
        return next((name for y, version, name in self._inputs if y is x and version == x._version), None)

    def add(self, x: torch.Tensor, name: str) -> str:
        """Remember `x` as the input of the weight `name`; returns `name`."""
        self._inputs.append((x, x._version, name))
        return name

    def clear(self) -> None:
        """Forget all inputs."""
        self._inputs.clear()


class _BatchSums:
    """The sums of a single batch in a single block.

    sums      name of a weight -> the sum over the inputs of the weight; only for the first weight of each input
    leaders   name of a weight -> the first weight with the same input tensor
    """

    def __init__(self, diagonal: bool) -> None:
        self.sums, self.leaders = dict[str, InputSum](), dict[str, str]()
        self._diagonal, self._inputs = diagonal, _SeenInputs()

    def add(self, name: str, x: torch.Tensor) -> None:
        leader = self._inputs.find(x)
        self.leaders.setdefault(name, leader or name)
        if leader is not None:
            return
        self._inputs.add(x, name)
        if name not in self.sums:
            self.sums[name] = InputSum(x.shape[-1], diagonal=self._diagonal, device=x.device)
        self.sums[name].add(x)


class InputSum:
    """The sum of x·xᵀ over rows x [in], or the sum of the squares of x with `diagonal`.

    Products are added in float32, a product per chunk of rows: few terms, so rounding stays small. Squares are added
    in float64.

    >>> import torch
    >>> rows = InputSum(2, diagonal=True)
    >>> rows.add(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> rows.mean()
    tensor([ 5., 10.])
    """

    def __init__(self, features: int, *, diagonal: bool, device: torch.device | str = "cpu") -> None:
        import torch

        self._diagonal, self._rows = diagonal, 0
        dtype = torch.float64 if diagonal else torch.float32
        self._sum = torch.zeros((features,) if diagonal else (features, features), dtype=dtype, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Add all rows of x [..., in], any float dtype."""
        import torch

        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self._rows += len(rows)
        for chunk in torch.split(rows, _CHUNK_ROWS):
            if self._diagonal:
                self._sum += chunk.double().square().sum(0)
            else:
                self._sum.addmm_(chunk.T, chunk)

    def merge(self, other: InputSum) -> None:
        """Add the rows of another sum."""
        self._rows += other._rows
        self._sum += other._sum

    def mean(self) -> torch.Tensor:
        """The mean over all rows, float32: symmetric [in, in], or [in] with `diagonal`."""
        if self._diagonal:
            return (self._sum / self._rows).float()
        return (self._sum + self._sum.T).mul_(0.5 / self._rows)


def _find_modules(streamed: StreamedModel, jobs: Sequence[QuantizableMatrix | LayerJob]) -> dict[str, tuple[Any, int]]:
    """Name of each weight -> the module with the input of the weight, and in_features. Weights without such a module in
    the loaded model, as the last projections of fused experts, are absent.
    """
    modules = dict(streamed.model.named_modules())
    return {job.name: (modules[job.input_module], job.matrix.shape[1]) for job in jobs if job.input_module in modules}


def _find_blocks(streamed: StreamedModel, jobs: Sequence[QuantizableMatrix | LayerJob]) -> set[str]:
    modules = dict(streamed.model.named_modules())
    blocks = {streamed.block_of(job.input_module) for job in jobs if job.input_module in modules}
    return {block for block in blocks if block is not None}


@contextmanager
def _watch_inputs(modules: Mapping[str, tuple[Any, int]], watch: Callable[[str, Any], None]) -> Iterator[None]:
    """Call `watch(name, x)` with the input x [..., in] at each call of a module, until the context ends. Empty inputs,
    and inputs whose last dimension is not in_features, are skipped.
    """

    def hook(name: str, features: int) -> Callable[..., None]:
        def call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if x.shape[-1] == features and x.numel():
                watch(name, x)

        return call

    handles = [
        module.register_forward_pre_hook(hook(name, features), with_kwargs=True)
        for name, (module, features) in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
