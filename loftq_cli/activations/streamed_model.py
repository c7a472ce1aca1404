"""A model that runs with the weights of one block in memory: batches go through it side by side, all through one block
before any enters the next, and a block's weights are read when the first comes and dropped when the last has left.
Knows nothing of what is measured on the way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loftq_cli.errors import InputError, UsageError
from loftq_cli.runtime.workers import use_torch_threads

if TYPE_CHECKING:
    from loftq_cli.activations.transformers_models import LoadedWeight


class StreamedModel:
    """`model`, whose parameters are on the meta device, and the checkpoint that they are read from in float32.

    path      the checkpoint's, for errors
    load      what gives a tensor of the checkpoint by its name
    weights   what of the checkpoint makes each tensor of the model: see `loaded_weights`
    """

    def __init__(
        self, model: Any, path: Path, load: Callable[[str], torch.Tensor], weights: Mapping[str, LoadedWeight]
    ) -> None:
        """Buffers that the checkpoint gives are read here."""
        self.model, self._path, self._load_tensor, self._weights = model, path, load, weights
        self._modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self._same = _same_names(model)
        owners = [self.block_of(name.rpartition(".")[0]) for name, _ in model.named_parameters()]
        self._blocks = {block for block in owners if block is not None}
        self._ahead = set[str]()
        self._loose: list[_Place] = []  # read by the module that needs them, and dropped after the step
        for name, buffer in model.named_buffers():
            if name in weights:
                buffer.copy_(self._read(name)[name])

    def block_of(self, module: str) -> str | None:
        """The outermost numbered part of the model that the module called `module` lies in and that is called as a
        whole; None outside of those.
        """
        parts = module.split(".")
        for count, part in enumerate(parts, 1):
            path = ".".join(parts[:count])
            if part.isdecimal() and not isinstance(self._modules[path], (nn.ModuleList, nn.ModuleDict)):
                return path
        return None

    def load_all(self) -> Any:
        """The model with all its weights, for whoever has the memory. Raises InputError for one that is missing."""
        for name, _ in self.model.named_parameters():
            source = self._source(name)
            if source is None:
                raise InputError("the checkpoint does not have it", file=self._path, tensor=name)
            if _Place.of(self._modules, name).is_empty:
                self._load(name, [])
            loaded = self._modules[name.rpartition(".")[0]]._parameters[name.rpartition(".")[2]]
            for other in self._same.get(name, ()):
                path, _, leaf = other.rpartition(".")
                self._modules[path]._parameters[leaf] = loaded
        return self.model

    def run(
        self,
        feeds: Sequence[Mapping[str, torch.Tensor]],
        blocks: Iterable[str],
        left: Callable[[str], None],
        *,
        threads: int = 1,
    ) -> None:
        """Call the model with each of `feeds`, without gradients and up to its output head; `left(block)` is called
        when all of them have left a block. The model's own hooks see every call. After all of `blocks`, the run may
        end where a weight is missing: loaders make up a pooler.

        Raises InputError for a weight that is needed and not in the checkpoint, UsageError for a model that takes a
        different way with each input.
        """
        handles = list(self._hooks())
        runners = [_Runner(self.model, feed, threads) for feed in feeds]
        block, places = None, list[_Place]()
        self._ahead = set(blocks)
        try:
            while (at := self._step(runners)) is not None:
                if at != block:
                    if block is not None:
                        _drop(places)
                        left(block)
                    block, places = at, []
                    self._ahead.discard(at)
                    self._load_block(at, places)
            if block is not None:
                left(block)
        finally:
            for runner in runners:
                runner.stop()
            for handle in handles:
                handle.remove()
            _drop(places)
            self._drop_loose(to_nothing=True)

    def _step(self, runners: Sequence[_Runner]) -> str | None:
        """Let every batch run up to the next block; its name, or None at the end."""
        try:
            at = [runner.resume() for runner in runners]
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error):
                raise
            what = "the model uses weights past the modules that hold them, and cannot be run block by block"
            raise UsageError(what, file=self._path) from error
        self._drop_loose()
        if len(set(at)) > 1:
            what = "the model takes a different way with each input, and cannot be run block by block"
            raise UsageError(what, file=self._path)
        return at[0]

    def _hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        def enter(name: str) -> Callable[..., None]:
            return lambda module, args: _current().pause(name)

        def need(name: str) -> Callable[..., None]:
            return lambda module, args: self._load_own(name, module)

        for name, module in self.model.named_modules():
            if name in self._blocks:
                yield module.register_forward_pre_hook(enter(name))
            if module._parameters:
                yield module.register_forward_pre_hook(need(name))
        head = _head(self.model)
        if head is not None:
            yield head.register_forward_pre_hook(_end, prepend=True)

    def _load_block(self, block: str, places: list[_Place]) -> None:
        for name, parameter in self._modules[block].named_parameters(f"{block}", remove_duplicate=False):
            if parameter.is_meta and self._source(name) is not None:
                self._load(name, places)

    def _load_own(self, name: str, module: nn.Module) -> None:
        """The parameters that lie directly in a module which is about to run, where no block has them."""
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                whole = f"{name}.{leaf}" if name else leaf
                if self._source(whole) is None:
                    if not self._ahead and self.block_of(name) is None:
                        raise _End
                    what = "is needed, and the checkpoint does not have it"
                    raise InputError(what, file=self._path, tensor=whole)
                self._load(whole, self._loose)

    def _load(self, name: str, places: list[_Place]) -> None:
        source = str(self._source(name))
        made = self._read(source)
        for target, tensor in ({name: made[source]} if source != name else made).items():
            place = _Place.of(self._modules, target)
            if place.empty is None or not place.is_empty:
                continue
            if place.empty.shape != tensor.shape:
                what = f"is {tuple(tensor.shape)}, and the model of its config has {tuple(place.empty.shape)}"
                raise InputError(what, file=self._path, tensor=target)
            place.fill(tensor)
            places.append(place)

    def _source(self, name: str) -> str | None:
        """The name under which the checkpoint gives a parameter: its own, or that of one that is the same."""
        if name in self._weights:
            return name
        return next((other for other in self._same.get(name, ()) if other in self._weights), None)

    def _read(self, name: str) -> dict[str, torch.Tensor]:
        weight = self._weights[name]
        tensors = {source: self._load_tensor(source) for source in weight.sources}
        tensors = {source: t.float() if t.is_floating_point() else t for source, t in tensors.items()}
        return weight.convert(tensors, self.model)

    def _drop_loose(self, *, to_nothing: bool = False) -> None:
        """Parameters outside of blocks; those of a module that is still running around the blocks stay."""
        kept = [] if to_nothing else [place for place in self._loose if place.is_around(self._blocks)]
        _drop([place for place in self._loose if place not in kept])
        self._loose = kept


class _Place:
    """A parameter of a module, and the empty one that stands there when it is not loaded."""

    def __init__(self, module: nn.Module, path: str, leaf: str) -> None:
        self._module, self._path, self._leaf = module, path, leaf
        self.empty = module._parameters[leaf]

    @classmethod
    def of(cls, modules: Mapping[str, nn.Module], name: str) -> _Place:
        path, _, leaf = name.rpartition(".")
        return cls(modules[path], path, leaf)

    @property
    def is_empty(self) -> bool:
        return self.empty is not None and self.empty.is_meta

    def fill(self, tensor: torch.Tensor) -> None:
        self._module._parameters[self._leaf] = nn.Parameter(tensor, requires_grad=False)

    def drop(self) -> None:
        self._module._parameters[self._leaf] = self.empty

    def is_around(self, blocks: set[str]) -> bool:
        return any(not self._path or block.startswith(f"{self._path}.") for block in blocks)


class _End(BaseException):
    """Ends a forward from inside: nothing that follows is of interest."""


class _Runner(threading.Thread):
    """One forward in a thread of its own, which runs only while `resume` waits for it."""

    def __init__(self, model: Any, feed: Mapping[str, torch.Tensor], threads: int) -> None:
        super().__init__(daemon=True)
        self._model, self._feed, self._threads = model, feed, threads
        self._go, self._parked = threading.Semaphore(0), threading.Semaphore(0)
        self._at: str | None = None
        self._error: BaseException | None = None
        self._is_ending = self._is_over = False

    def run(self) -> None:
        self._go.acquire()
        use_torch_threads(self._threads)
        try:
            if not self._is_ending:
                with torch.no_grad():
                    self._model(**self._feed)
        except _End:
            pass
        except BaseException as error:  # raised again where the forward is waited for
            self._error = error
        self._at, self._is_over = None, True
        self._parked.release()

    def resume(self) -> str | None:
        """Run up to the next block; its name, or None when the forward is over. Raises what the forward raised."""
        if self.ident is None:
            self.start()
        if self._is_over:
            return None
        self._go.release()
        self._parked.acquire()
        if self._error is not None:
            raise self._error
        return self._at

    def pause(self, at: str) -> None:
        """Called in the forward: wait at the block called `at`."""
        self._at = at
        self._parked.release()
        self._go.acquire()
        if self._is_ending:
            raise _End

    def stop(self) -> None:
        """End the forward where it waits, and return when it has."""
        if self.ident is not None:
            self._is_ending = True
            self._go.release()
            self.join()


def _current() -> _Runner:
    runner = threading.current_thread()
    assert isinstance(runner, _Runner)
    return runner


def _end(module: nn.Module, args: Any) -> None:
    raise _End


def _head(model: Any) -> nn.Module | None:
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def _same_names(model: nn.Module) -> dict[str, list[str]]:
    """For each parameter that the model has under several names, all of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _drop(places: Sequence[_Place]) -> None:
    for place in places:
        place.drop()
