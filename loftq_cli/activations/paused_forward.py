"""A forward of a model that waits before each block until `resume`. A forward runs in a separate thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from loftq_cli.runtime.workers import use_torch_threads


class EndForward(BaseException):
    """Ends a forward from inside: the rest of the forward is of no interest."""


class PausedForward(threading.Thread):
    """A forward in a separate thread, which runs only while `resume` waits.

    number   the number of the batch
    """

    def __init__(self, model: Any, feed: Mapping[str, torch.Tensor], number: int) -> None:
        super().__init__(daemon=True)
        self._model, self._feed, self.number = model, feed, number
        self._go, self._parked = threading.Semaphore(0), threading.Semaphore(0)
        self._block: str | None = None
        self._error: BaseException | None = None
        self._is_ending = self._is_over = self._is_trial = False

    def run(self) -> None:
        self._go.acquire()
        use_torch_threads(1)
        try:
            if not self._is_ending:
                with torch.no_grad():
                    self._model(**self._feed)
        except EndForward:
            pass
        except BaseException as error:  # `resume` raises the error again
            self._error = error
        self._block, self._is_over = None, True
        self._parked.release()

    def resume(self, *, is_trial: bool = False) -> str | None:
        """Run up to the next block, or through the block ahead and back if `is_trial` is true. Returns the name of the
        block ahead, or None when the forward is over. Raises the forward's exception.
        """
        if self.ident is None:
            self.start()
        if self._is_over:
            return None
        self._is_trial = is_trial
        self._go.release()
        self._parked.acquire()
        if self._error is not None:
            raise self._error
        return self._block

    def pause(self, block: str, trial: Callable[[], object]) -> None:
        """Wait before the block called `block`, and run `trial` in each trial. Called inside the forward."""
        self._block = block
        while True:
            self._parked.release()
            self._go.acquire()
            if self._is_ending:
                raise EndForward
            if not self._is_trial:
                return
            trial()

    def stop(self) -> None:
        """End the waiting forward, and return when the thread has ended."""
        if self.ident is not None:
            self._is_ending = True
            self._go.release()
            self.join()


def current_forward() -> PausedForward:
    """The forward of the current thread; only inside a call of the model by a forward."""
    forward = threading.current_thread()
    assert isinstance(forward, PausedForward)
    return forward


def copied(value: Any) -> Any:
    """`value` with copies of the tensors in tuples, lists and dicts.

    >>> x = torch.zeros(2)
    >>> copied({"x": x})["x"] is x
    False
    """
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: copied(item) for name, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(copied(item) for item in value)
    return value
