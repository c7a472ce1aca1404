"""Threads that share work, and matrices that are read by rows: the order and the bytes never depend on the threads."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from loftq_cli.methods.method import Fitting, load_method
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.runtime.workers import SERIAL, Workers, available_threads, started, torch_threads
from loftq_cli.tensors.metrics import adapter_delta, delta_rows, layer_error
from loftq_cli.tensors.rows import SLAB_NUMEL, ComputedRows, TensorRows, row_multiple, slabs
from loftq_cli.tensors.specs import AffineSpec, CodebookSpec, LoraSpec, Pooling
from loftq_cli.triton_kernels import backend

# One thread in the thread that asks, one beside it, and several.
KINDS = {"inline": (1, True), "one": (1, False), "two": (2, True), "three": (3, True), "seven": (7, True)}


@pytest.fixture(params=KINDS)
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    threads, inline = KINDS[request.param]
    made = Workers(threads, inline=inline)
    yield made
    made.close()


def is_inline(workers: Workers) -> bool:
    return workers.map(lambda _: threading.get_ident(), [0]).__next__() == threading.get_ident()


class Gauge:
    """Work that counts how often it was begun and how much of it runs. A piece of it takes `seconds`, and ends when all
    threads of a barrier have met.
    """

    def __init__(self, seconds: float = 0.0, together: threading.Barrier | None = None) -> None:
        self.seconds, self.together = seconds, together
        self.begun: list[int] = []
        self.running = self.most = 0
        self._lock = threading.Condition()

    def wait_until_begun(self, count: int) -> None:
        with self._lock:
            assert self._lock.wait_for(lambda: len(self.begun) >= count, timeout=60)

    def __call__(self, item: int) -> int:
        with self._lock:
            self.begun.append(item)
            self.running += 1
            self.most = max(self.most, self.running)
            self._lock.notify_all()
        try:
            time.sleep(self.seconds)
            if self.together is not None:
                self.together.wait()
            if item < 0:
                raise ValueError(f"item {item}")
            return 10 * item
        finally:
            with self._lock:
                self.running -= 1


# Order.


def test_results_come_in_the_order_of_the_work_whatever_finished_first(workers):
    def after_the_next(item: int) -> int:
        if item % 3 == 0 and workers.threads > 1:
            assert ended[item + 1].wait(timeout=60)
        ended[item].set()
        return 10 * item

    for ahead in (0, 1, 5):
        ended = [threading.Event() for _ in range(20)]
        assert list(workers.map(after_the_next, range(20), ahead=ahead)) == [10 * item for item in range(20)]
    assert list(workers.map(after_the_next, [])) == []


def test_two_threads_do_work_at_the_same_time_and_still_answer_in_order():
    second_began = threading.Event()
    workers = Workers(2)

    def first_waits_for_second(item: int) -> int:
        if item == 1:
            second_began.set()
        assert second_began.wait(timeout=60)
        return item

    assert list(workers.map(first_waits_for_second, range(3))) == [0, 1, 2]
    workers.close()


def test_as_much_runs_at_once_as_there_are_threads(workers):
    gauge = Gauge(together=threading.Barrier(workers.threads, timeout=60))
    workers.each(gauge, range(10 * workers.threads))
    assert gauge.most == workers.threads
    assert sorted(gauge.begun) == list(range(10 * workers.threads))


def test_one_thread_is_the_one_that_asks_unless_it_is_not_to_be():
    here = threading.get_ident()
    assert set(Workers(1).map(lambda _: threading.get_ident(), range(3))) == {here}
    beside = Workers(1, inline=False)
    (there,) = set(beside.map(lambda _: threading.get_ident(), range(3)))
    assert there != here
    assert beside.submit(threading.get_ident).result() == there
    beside.close()


# Items are taken when they are wanted.


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_at_most_ahead_items_are_taken_beyond_the_threads(workers, ahead):
    taken, got = 0, 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(40):
            taken += 1
            assert taken - got <= (1 if is_alone else workers.threads + ahead)
            yield item

    is_alone = is_inline(workers)
    results = workers.map(lambda item: item, items(), ahead)
    assert taken == 0
    for result in results:
        assert result == got
        got += 1
    assert (taken, got) == (40, 40)


def test_items_are_taken_in_the_thread_that_asks(workers):
    threads = set()

    def items() -> Iterator[int]:
        for item in range(8):
            threads.add(threading.get_ident())
            yield item

    workers.each(Gauge(), items())
    assert threads == {threading.get_ident()}


# When something goes wrong.


def test_an_exception_is_raised_and_nothing_runs_after_it(workers):
    gauge = Gauge(0.01)
    with pytest.raises(ValueError, match="item -1"):
        list(workers.map(gauge, [1, 2, 3, -1, *range(4, 40)]))
    assert gauge.running == 0
    begun = len(gauge.begun)
    assert begun <= 4 + workers.threads + 1
    # The threads are there for the next work, and nothing of the first is left before it.
    assert list(workers.map(gauge, [50, 60])) == [500, 600]
    assert sorted(gauge.begun[begun:]) == [50, 60]


def test_results_before_an_exception_are_given_and_the_first_of_several_is_raised(workers):
    got = []
    with pytest.raises(ValueError, match="item -2"):
        for result in workers.map(Gauge(0.005), [1, 2, -2, -3, -4, 3]):
            got.append(result)
    assert got == [10, 20]


def test_an_exception_where_the_items_come_from_is_raised_when_what_has_begun_is_done(workers):
    def items() -> Iterator[int]:
        yield from (1, 2, 3)
        raise KeyError("no more")

    gauge = Gauge(0.02)
    with pytest.raises(KeyError, match="no more"):
        workers.each(gauge, items())
    assert gauge.running == 0


def test_who_stops_asking_leaves_nothing_running(workers):
    gauge = Gauge(0.01)
    results = workers.map(gauge, range(40))
    assert next(results) == 0
    results.close()
    assert gauge.running == 0
    begun = len(gauge.begun)
    assert begun <= 1 + workers.threads + 1
    workers.each(gauge, [50, 60])
    assert sorted(gauge.begun[begun:]) == [50, 60]


def test_who_is_interrupted_leaves_nothing_running(workers):
    gauge, ended, alone = Gauge(0.05), [], is_inline(workers)
    waiting, interrupted = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        waiting.set()

    def interrupt(*_: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    def interrupts_who_asks(item: int) -> None:
        assert alone or waiting.wait(timeout=60)
        os.kill(os.getpid(), signal.SIGINT)
        # A signal just before a thread begins to wait does not end the waiting: another one does.
        while not interrupted.wait(timeout=0.05):
            os.kill(os.getpid(), signal.SIGINT)
        gauge(item)
        ended.append(item)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            workers.each(interrupts_who_asks, items())
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == ([] if alone else [0])


def test_closing_waits_for_what_has_begun():
    gauge = Gauge(0.05)
    workers = Workers(2)
    futures = [workers.submit(lambda: gauge(1)) for _ in range(2)]
    gauge.wait_until_begun(2)
    workers.close()
    assert gauge.running == 0 and [future.result() for future in futures] == [10, 10]
    with pytest.raises(RuntimeError):
        workers.submit(lambda: gauge(1))


def loftq_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loftq")]


@pytest.mark.parametrize("threads", [1, 3])
def test_started_workers_end_with_their_block_and_torch_is_as_it_was(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with started(threads) as workers:
            assert workers.threads == threads
            assert torch.get_num_threads() == 1
            assert set(workers.map(lambda _: torch.get_num_threads(), range(6))) == {1}
        assert torch.get_num_threads() == 2
        assert loftq_threads() == []
        with pytest.raises(ValueError, match="item -1"), started(threads) as workers:
            workers.each(Gauge(), [1, -1])
        assert torch.get_num_threads() == 2
        assert loftq_threads() == []
    finally:
        torch.set_num_threads(before)


def test_workers_run_the_kernels_that_were_chosen_where_they_are_asked(workers):
    def kernels(_: object = None) -> str:
        return backend.implementation("codebook", "cpu").__name__.rpartition(".")[2]

    assert set(workers.map(kernels, range(6))) == {"reference"}  # the threads have been started
    backend.use_backend("cpu", "triton")
    try:
        assert set(workers.map(kernels, range(6))) == {"triton"}
        if not is_inline(workers):
            assert workers.submit(kernels).result() == "triton"
    finally:
        backend.use_reference_kernels()
    assert set(workers.map(kernels, range(6))) == {"reference"}


@pytest.mark.parametrize("count", [1, 5])
def test_torch_threads_are_those_of_the_calling_thread_alone(count):
    def elsewhere() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before, of_new_threads = torch.get_num_threads(), elsewhere()
    with pytest.raises(KeyError), torch_threads(count):
        assert (torch.get_num_threads(), elsewhere()) == (count, of_new_threads)
        raise KeyError
    assert (torch.get_num_threads(), elsewhere()) == (before, of_new_threads)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no processor affinity on this system")
def test_as_many_threads_are_available_as_processors_may_be_used():
    allowed = os.sched_getaffinity(0)
    assert available_threads() == len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)


# Rows.

SHAPES = [
    (1, 1),
    (7, 3),
    (1536, 4096),
    (3, SLAB_NUMEL + 1),
    (5000, 1001),
    (100_000, 48),
    (2 * SLAB_NUMEL + 3, 1),
    (513, 4096),
    (512, 4096),
]


@pytest.mark.parametrize("multiple", [1, 2, 64, 4096])
@pytest.mark.parametrize("shape", SHAPES)
def test_slabs_hold_every_row_once_in_parts_of_whole_multiples(shape, multiple):
    rows, columns = shape
    parts = slabs(shape, multiple)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == rows
    lengths = [part.stop - part.start for part in parts]
    assert all(0 < length == lengths[0] and length % multiple == 0 for length in lengths[:-1])
    assert 0 < lengths[-1] <= lengths[0]
    assert all(length * columns <= SLAB_NUMEL or length <= multiple for length in lengths)
    if len(parts) > 1:  # and are not smaller than they must be
        assert (lengths[0] + multiple) * columns > SLAB_NUMEL


def test_slabs_take_the_size_that_they_are_given():
    assert [(part.start, part.stop) for part in slabs((10, 8), 1, 24)] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [(part.start, part.stop) for part in slabs((10, 8), 2, 24)] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    assert [(part.start, part.stop) for part in slabs((10, 8), 4, 1)] == [(0, 4), (4, 8), (8, 10)]


def test_a_matrix_without_rows_has_no_slabs_and_one_without_columns_all_its_rows_in_one():
    assert slabs((0, 64)) == []
    assert sum(part.stop - part.start for part in slabs((5, 0))) == 5


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("columns", [1, 3, 31, 32, 33, 48, 64, 96, 100, 1000, 4096, 5120])
def test_the_fewest_rows_of_whole_blocks(columns, block_size):
    fewest = next(rows for rows in itertools.count(1) if rows * columns % block_size == 0)
    assert row_multiple(columns, block_size) == fewest


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_a_tensor_are_its_rows_in_a_dtype_that_kernels_read(dtype, transposed):
    tensor = torch.randn(24, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrix = tensor.T if transposed else tensor
    rows = TensorRows(tensor, transposed)
    assert rows.shape == tuple(matrix.shape)
    for part in (slice(0, 1), slice(3, 17), slice(19, 20), slice(0, rows.shape[0])):
        found = rows.rows(part)
        assert found.dtype == (dtype if dtype == torch.bfloat16 else torch.float32)
        assert found.is_contiguous()
        assert torch.equal(found, matrix[part].to(found.dtype))


# What is made of a matrix of several slabs.

LARGE = (1536, 4096)
ODD = (2100, 1501)  # 64 rows are the fewest that are whole blocks of 64
QUANTIZERS = {
    "nf4": (CodebookSpec(), "absmax"),
    "nf4, plain constants": (CodebookSpec(double_quant=False), "absmax"),
    "nf4, searched constants": (CodebookSpec(), "search"),
    "int4": (AffineSpec(4, 64, symmetric=False), "absmax"),
    "int2 with biases, searched": (AffineSpec(2, 64, symmetric=False, zero_point="float"), "search"),
}
METHODS = ("loftq", "qlora", "qalora")
NOT_POOLED = ("qalora", "nf4")  # it has integers only


def normal(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def parts_of(value: Any) -> list[Any]:
    """Every tensor and number of a result, in a fixed order."""
    if isinstance(value, tuple | list):
        return [part for item in value for part in parts_of(item)]
    names = getattr(value, "__dataclass_fields__", None)
    return [value] if names is None else [part for name in names for part in parts_of(getattr(value, name))]


def assert_same(found: Any, expected: Any) -> None:
    pairs = list(zip(parts_of(found), parts_of(expected), strict=True))
    assert any(isinstance(value, torch.Tensor) for value, _ in pairs)
    for value, other in pairs:
        assert type(value) is type(other)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def loftq(weight: torch.Tensor, spec: Any, scales: str, workers: Workers, **options: Any) -> Any:
    lora = LoraSpec(8, 8, pooling=Pooling("peft", 64) if options.get("method") == "qalora" else None)
    initialize = load_method(options.pop("method", "loftq"))
    fitting = Fitting(**{"iterations": 2, "init": "residual", **options})
    generator = torch.Generator().manual_seed(0)
    quantizer = make_quantizer(spec, "bfloat16", scales)
    return initialize(TensorRows(weight), quantizer, lora, fitting, generator=generator, workers=workers)


def test_loftq_makes_the_same_bytes_with_any_number_of_threads():
    weight = normal(LARGE)
    assert len(slabs(LARGE)) == 3
    made = []
    for threads in (1, 2, 3):
        with started(threads) as workers:
            made.append(loftq(weight, CodebookSpec(), "absmax", workers))
    assert made[0].iteration_errors[1] < made[0].iteration_errors[0] < made[0].quantization_error
    assert_same(made[1], made[0])
    assert_same(made[2], made[0])


@pytest.mark.parametrize(
    ("method", "name"),
    [(method, name) for method in METHODS for name in QUANTIZERS if (method, name[:3]) != NOT_POOLED],
)
def test_every_method_makes_the_same_bytes_with_any_number_of_threads(method, name):
    spec, scales = QUANTIZERS[name]
    weight = normal((700, 4096), dtype=torch.float32)
    assert len(slabs((700, 4096))) == 2
    made = []
    for threads in (1, 2):
        with started(threads) as workers:
            made.append(loftq(weight, spec, scales, workers, method=method))
    assert_same(made[1], made[0])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("name", "shape", "codes"), [("nf4", ODD, "packed"), ("int4", LARGE, "codes")])
def test_codes_go_to_a_sink_in_order_and_are_not_kept(name, shape, codes, threads):
    weight, subtracted = normal(shape), normal(shape, seed=1)
    quantizer = make_quantizer(QUANTIZERS[name][0], "bfloat16")
    expected = quantizer.quantize(TensorRows(weight), minus=lambda part: subtracted[part])
    got: list[tuple[slice, torch.Tensor]] = []
    with started(threads) as workers:
        found = quantizer.quantize(
            TensorRows(weight),
            minus=lambda part: subtracted[part],
            sink=lambda part, some: got.append((part, some)),
            workers=workers,
        )
    parts = [part for part, _ in got]
    assert len(parts) > 1 and parts[-1].stop == shape[0]
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert getattr(found, codes).numel() == 0
    assert_same(replace(found, **{codes: torch.cat([some for _, some in got])}), expected)


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in QUANTIZERS for shape in ((5, 64), (130, 192), ODD) if name[:3] == "nf4" or shape != ODD],
)
def test_decoded_rows_are_those_of_the_whole(name, shape):
    spec, scales = QUANTIZERS[name]
    quantizer = make_quantizer(spec, "bfloat16", scales)
    quantized = quantizer.quantize(TensorRows(normal(shape)))
    whole, rows = quantizer.dequantize(quantized), quantizer.decoded(quantized)
    assert rows.shape == shape and whole.dtype == torch.float32 and whole.shape == shape
    parts = slabs(shape, rows.multiple, 1)
    assert len(parts) == -(-shape[0] // rows.multiple)
    assert torch.equal(torch.cat([rows.rows(part) for part in parts]).float(), whole)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_error_of_a_layer_is_that_of_the_whole_matrix_in_float64(threads):
    weight, quantizer = normal(ODD), make_quantizer(CodebookSpec(), "bfloat16")
    made = loftq(weight, CodebookSpec(), "absmax", SERIAL, iterations=1)
    with started(threads) as workers:
        found = layer_error(TensorRows(weight), quantizer.decoded(made.quantized), made.lora, workers)
    w, q = weight.double(), quantizer.dequantize(made.quantized)
    delta = adapter_delta(made.lora)
    difference = w - (q + delta)
    assert found.squared_weight == pytest.approx(float(w.square().sum()), rel=1e-12)
    assert found.squared_base_error == pytest.approx(float((w - q).square().sum()), rel=1e-12)
    # Products of float32 factors, whose last bits depend on how many rows are multiplied at once.
    assert found.squared_error == pytest.approx(float(difference.square().sum()), rel=1e-7)
    assert found.max_error == pytest.approx(float(difference.abs().max()), rel=1e-6)
    assert found.squared_delta == pytest.approx(float(delta.double().square().sum()), rel=1e-7)


def test_a_layer_that_is_not_a_number_somewhere_has_no_finite_error():
    weight = normal((1030, 4096), dtype=torch.float32)
    for row in (0, 700, 1029):
        spoiled = weight.clone()
        spoiled[row, 5] = float("nan")
        error = layer_error(TensorRows(weight), TensorRows(spoiled), None)
        assert not error.error < float("inf")


def test_rows_that_are_computed_are_asked_for_once_and_a_few_at_a_time():
    weight, asked = normal(LARGE), []

    def rows(part: slice) -> torch.Tensor:
        asked.append((part.start, part.stop))
        return weight[part]

    quantizer = make_quantizer(AffineSpec(4, 64, symmetric=True), "bfloat16")
    found = quantizer.quantize(ComputedRows(LARGE, rows))
    assert [start for start, _ in asked] == [0, *(stop for _, stop in asked[:-1])] and asked[-1][1] == LARGE[0]
    assert all((stop - start) * LARGE[1] <= SLAB_NUMEL for start, stop in asked)
    assert_same(found, quantizer.quantize(TensorRows(weight)))


def test_what_an_adapter_adds_is_the_same_by_rows():
    lora = loftq(normal((256, 256)), AffineSpec(4, 64, symmetric=False), None, SERIAL, method="qalora").lora
    whole, rows = adapter_delta(lora), delta_rows(lora)
    assert whole.shape == (256, 256)
    found = torch.cat([rows(slice(start, start + 50)) for start in range(0, 256, 50)])
    assert float((found - whole).abs().max()) <= 1e-6 * float(whole.abs().max())
