"""The simulated GPU catches what it is there to catch, and lets correct code pass."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.interpreter import carried
from support.simulated_gpu import SimulatedGpu, simulated_gpu

from loftq_cli.triton_kernels.codebook.contract import quantize_codebook


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    with simulated_gpu(memory_nbytes=1 << 20) as gpu:
        yield gpu


def kinds(gpu: SimulatedGpu) -> list[str]:
    return [sync.kind for sync in gpu.syncs]


def pinned(n: int, value: float) -> torch.Tensor:
    return torch.full((n,), value, pin_memory=True)


def test_operations_in_place_and_views_reach_the_same_memory(gpu):
    x = torch.arange(12.0, device="cuda").view(3, 4)
    x[1:, ::2].add_(100)
    x.view(torch.int32)[0].bitwise_and_(0)
    torch.mul(x[2], 2, out=x.T[:, 0])
    x[0, torch.tensor([3], device="cuda")] = 7.0
    expected = [[216.0, 18.0, 220.0, 7.0], [104.0, 5.0, 106.0, 7.0], [108.0, 9.0, 110.0, 11.0]]
    assert x.device == torch.device("cuda:0") and x.is_cuda
    assert x.tolist() == expected


def test_linear_algebra_gives_what_it_gives_on_the_cpu(gpu):
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    square = matrix @ matrix.T + torch.eye(6)

    def decompose(square: torch.Tensor) -> list[torch.Tensor]:
        lower, _ = torch.linalg.cholesky_ex(square)
        solved = torch.linalg.solve_triangular(lower, square, upper=False)
        low, high = torch.aminmax(square, dim=0)
        bounds = torch.sort(low).values
        found = torch.bucketize(high, bounds).repeat_interleave(2)
        product = square.bfloat16() @ square.bfloat16()
        return [*torch.linalg.eigh(square), *torch.linalg.qr(square), solved, found, product, square.sum().double()]

    for simulated, expected in zip(decompose(square.cuda()), decompose(square), strict=True):
        assert simulated.is_cuda
        assert torch.equal(simulated.cpu(), expected)


def test_tensors_of_two_devices_do_not_mix_but_for_scalars(gpu):
    x = torch.ones(3, device="cuda")
    assert (x + torch.tensor(2.0)).tolist() == [3.0, 3.0, 3.0]
    for mix in (lambda: x + torch.ones(3), lambda: torch.ones(3).add_(x), lambda: torch.cat([x, torch.ones(1)])):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            mix()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


@pytest.mark.parametrize(
    ("waiting", "kind"),
    [
        (lambda x: x.sum().item(), "item"),
        (lambda x: bool(x.any()), "item"),
        (lambda x: x.cpu(), "copy to host"),
        (lambda x: torch.empty(4).copy_(x, non_blocking=True), "copy to host"),
        (lambda x: torch.ones(4).to("cuda", non_blocking=True), "pageable copy"),
        (lambda x: torch.tensor([1, 2], device="cuda"), "pageable copy"),
        (lambda x: x[[0, 1]], "pageable copy"),
        (lambda x: pinned(4, 1.0).cuda(), "blocking copy"),
        (lambda x: x[x > 0], "boolean index"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.repeat_interleave(x.int()), "repeat_interleave"),
        (lambda x: torch.linalg.eigh(x.diag()), "linalg_eigh"),
        (lambda x: torch.linalg.inv(x.diag()), "linalg error check"),
        (lambda x: torch.cuda.synchronize(), "device.synchronize"),
        (lambda x: torch.cuda.current_stream().synchronize(), "stream.synchronize"),
        (lambda x: torch.cuda.current_stream().record_event().synchronize(), "event.synchronize"),
    ],
)
def test_a_wait_of_the_host_is_seen_with_its_line(gpu, waiting, kind):
    x = torch.ones(4, device="cuda")
    waiting(x)
    assert kinds(gpu) == [kind]
    assert gpu.syncs[0].place == f"test_simulated_gpu.py:{waiting.__code__.co_firstlineno}"


def test_what_needs_no_wait_is_not_one(gpu):
    x = torch.ones(4, device="cuda")
    torch.linalg.qr(x.diag())
    torch.linalg.cholesky_ex(x.diag())
    x[x > 0] = 2.0
    x.repeat_interleave(x.int(), output_size=8)
    x.new_zeros(3).fill_(1.0).add_(torch.tensor(2.0))
    pinned(4, 1.0).to("cuda", non_blocking=True)
    pinned(4, 1.0).copy_(x, non_blocking=True)
    assert gpu.syncs == []


def test_a_pinned_buffer_is_garbage_until_the_host_has_waited_for_the_copy(gpu):
    x, buffer = torch.ones(4, device="cuda"), pinned(4, 0.0)
    buffer.copy_(x, non_blocking=True)
    done = torch.cuda.current_stream().record_event()
    x.zero_()  # in order after the copy, which it does not change
    assert buffer.isnan().all()
    assert not done.query()
    done.synchronize()
    assert done.query()
    assert buffer.tolist() == [1.0] * 4


def test_torch_pins_what_it_copies_to_the_host_without_waiting(gpu):
    copied = torch.ones(4, device="cuda").to("cpu", non_blocking=True)
    assert copied.is_pinned() and copied.isnan().all()


def test_waiting_for_an_earlier_copy_leaves_a_buffer_that_a_later_one_goes_to_garbage(gpu):
    buffer, stream = pinned(4, 0.0), torch.cuda.current_stream()
    buffer.copy_(torch.ones(4, device="cuda"), non_blocking=True)
    first = stream.record_event()
    buffer.copy_(torch.zeros(4, device="cuda"), non_blocking=True)
    first.synchronize()
    assert buffer.isnan().all()


def test_slots_of_one_pinned_buffer_are_waited_for_one_by_one(gpu):
    buffer, stream = pinned(8, 1.0), torch.cuda.current_stream()
    slots = torch.from_numpy(buffer.numpy()).view(2, 4)  # the memory is pinned, whoever looks at it
    x = slots[0].to("cuda", non_blocking=True)
    sent = stream.record_event()
    slots[1].copy_(x, non_blocking=True)
    sent.synchronize()
    slots[0].fill_(2.0)
    assert slots[1].isnan().all()
    torch.cuda.synchronize()
    assert slots.tolist() == [[2.0] * 4, [1.0] * 4]


def test_memory_that_was_not_written_is_nan(gpu):
    made = [torch.empty(3, device="cuda"), torch.empty_like(torch.ones(3), device="cuda")]
    made += [made[0].new_empty(3), torch.empty_like(made[0])]
    assert all(torch.isnan(x).all() for x in made)


def test_overwriting_a_pinned_source_before_its_copy_was_waited_for_is_a_race(gpu):
    source = pinned(4, 1.0)
    source.to("cuda", non_blocking=True)
    source.fill_(2.0)
    with gpu.expect_race("changed before the host waited"):
        torch.cuda.synchronize()


def test_overwriting_a_pinned_source_after_its_copy_is_right(gpu):
    source = pinned(4, 1.0)
    x = source.to("cuda", non_blocking=True)
    torch.cuda.current_stream().record_event().synchronize()
    source.fill_(2.0)
    torch.cuda.synchronize()
    assert x.tolist() == [1.0] * 4


def test_a_source_that_nobody_waits_for_is_looked_at_when_the_block_ends():
    with pytest.raises(AssertionError, match="race"), simulated_gpu():
        source = pinned(4, 1.0)
        source.to("cuda", non_blocking=True)
        source.fill_(2.0)


def test_a_race_that_the_code_caught_fails_the_block():
    with pytest.raises(AssertionError, match="race"), simulated_gpu():
        x = torch.zeros(4, device="cuda")
        with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(AssertionError):
            x.add_(1)


@pytest.mark.parametrize("order", ["nothing", "event", "stream", "host"])
def test_work_on_two_streams_needs_an_order(gpu, order):
    copies, main = torch.cuda.Stream(), torch.cuda.current_stream()
    with torch.cuda.stream(copies):
        x = pinned(4, 1.0).to("cuda", non_blocking=True)
        copied = copies.record_event()
    if order == "event":
        main.wait_event(copied)
    elif order == "stream":
        main.wait_stream(copies)
    elif order == "host":
        copied.synchronize()
    else:
        with gpu.expect_race("stream 0 reads .* stream 1 writes"):
            x + 1
        return
    x.record_stream(main)
    assert (x + 1).tolist() == [2.0] * 4


def test_two_streams_may_read_the_same_memory_and_write_different_parts_of_it(gpu):
    x = torch.zeros(2, 4, device="cuda")
    other, main = torch.cuda.Stream(), torch.cuda.current_stream()
    other.wait_stream(main)
    x.record_stream(other)
    with torch.cuda.stream(other):
        x[0].add_(1)
        y = x[1] + 1
    z = x[1] + 1
    with gpu.expect_race("stream 0 writes .* stream 1 reads"):
        x[1].add_(1)
    main.wait_stream(other)
    y.record_stream(main)
    assert x[0].tolist() == [1.0] * 4
    assert torch.equal(y, z)


def test_memory_freed_while_another_stream_uses_it_is_a_race(gpu):
    other, main = torch.cuda.Stream(), torch.cuda.current_stream()
    for is_recorded in (True, False):
        x = torch.zeros(4, device="cuda")
        other.wait_stream(main)
        with torch.cuda.stream(other):
            x.add_(1)
        if is_recorded:
            x.record_stream(other)
        del x
        if is_recorded:
            torch.zeros(4, device="cuda")
    with gpu.expect_race("record_stream"):
        torch.zeros(4, device="cuda")


def test_memory_is_counted_by_storage_and_limited(gpu):
    x = torch.zeros(1000, device="cuda")
    view = x[10:].view(torch.int32)
    assert torch.cuda.memory_allocated() == 4000
    del x
    assert torch.cuda.memory_allocated() == 4000
    del view
    gc.collect()
    assert torch.cuda.memory_allocated() == 0
    assert torch.cuda.max_memory_allocated() == 4000
    assert torch.cuda.mem_get_info() == (1 << 20, 1 << 20)
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(1 << 18, device="cuda").add(1)
    assert torch.cuda.memory_allocated() == 0


def test_worker_threads_have_the_device_and_streams_of_their_own(gpu):
    def work(i: int) -> list[float]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            x = torch.full((3,), float(i), device="cuda") + torch.ones(3).cuda()
            assert torch.cuda.current_stream() is stream
        host = torch.empty(3, pin_memory=True)
        with torch.cuda.stream(stream):
            host.copy_(x, non_blocking=True)
        stream.synchronize()
        return host.tolist()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(12))) == [[i + 1.0] * 3 for i in range(12)]
    assert torch.cuda.current_stream() is torch.cuda.default_stream()


@pytest.mark.interpreter
def test_interpreted_kernels_give_the_bytes_of_the_cpu_and_the_host_does_not_wait(gpu):
    pytest.importorskip("triton")
    weight = torch.randn(64 * 130, generator=torch.Generator().manual_seed(0))
    simulated = weight.cuda()
    quantize_codebook(simulated, "nf4", 64)  # makes the tables
    gpu.syncs.clear()
    packed, absmax = quantize_codebook(simulated, "nf4", 64)
    assert gpu.syncs == []
    for made, expected in zip((packed, absmax), quantize_codebook(weight, "nf4", 64), strict=True):
        assert made.is_cuda
        assert torch.equal(made.cpu(), expected)


@pytest.mark.interpreter
def test_a_kernel_is_ordered_by_streams_as_operations_are(gpu):
    pytest.importorskip("triton")
    with torch.cuda.stream(torch.cuda.Stream()):
        weight = torch.ones(128, device="cuda")
    with gpu.expect_race("stream 0 reads .* stream 1 writes"):
        quantize_codebook(weight, "nf4", 64)


@pytest.mark.interpreter
def test_a_kernel_takes_no_tensor_of_the_host(gpu):
    pytest.importorskip("triton")
    weight = torch.ones(128, device="cuda")
    with pytest.raises(ValueError, match="cannot be accessed"):
        quantize_codebook(weight, "nf4", 64, minus=torch.ones(128))


@pytest.mark.interpreter
def test_tensors_carried_to_the_device_for_a_test_come_back_as_they_were_laid(gpu):
    """What tests of kernels do where there is a GPU: views keep their strides, outputs their places."""
    pytest.importorskip("triton")
    weight, both = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 128)
    out = both[1, 1:65].view(torch.uint8)[:128], torch.empty(4)

    def quantize(weights, *, out):
        assert weights[0].is_cuda and weights[0].stride() == (1, 128)
        return {"codes": quantize_codebook(weights[0].T[0, :64].contiguous(), "nf4", 32, out=(out[0][:32], out[1][:2]))}

    made = carried(quantize, [weight.T], out=out)["codes"]
    expected = quantize_codebook(weight[0, :64].contiguous(), "nf4", 32)
    assert made[0].is_cpu and torch.equal(made[0], expected[0]) and torch.equal(out[0][:32], expected[0])
    assert torch.equal(out[1][:2], expected[1])
    assert not both[0].any() and not both[2].any() and both[1].view(torch.uint8)[4:36].equal(expected[0])


def test_torch_is_as_before_after_the_block():
    replaced = (torch.empty, torch.cuda.Stream, torch.cuda.is_available, torch.Tensor.pin_memory)
    with simulated_gpu():
        x = torch.ones(3, device="cuda")
        with torch.device("cuda"):
            assert torch.empty(3).is_cuda
    assert replaced == (torch.empty, torch.cuda.Stream, torch.cuda.is_available, torch.Tensor.pin_memory)
    assert not torch.cuda.is_available()
    with torch.device("meta"):
        assert torch.empty(3).is_meta
    for use in (lambda: torch.ones(3, device="cuda"), lambda: x + 1):
        with pytest.raises((RuntimeError, NotImplementedError)):
            use()
