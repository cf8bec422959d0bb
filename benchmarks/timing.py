"""Time and memory of variants of one computation, side by side.

Variants take turns, one round after another and in an order that changes, so that whatever else the
machine does meets all alike. The figure is the median over rounds of the ratio within a round; its
spread, the quartiles of those ratios.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from machine import synchronize
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A type and a shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}-{'x'.join(map(str, self.shape))}"


@contextlib.contextmanager
def no_gc():
    """Python's cycle collector off: it would run inside whichever variant crosses its threshold."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class Within:
    """A call inside a context, such as one backend; `seconds` enters it once, outside of the time
    that it takes."""

    context: Callable[[], contextlib.AbstractContextManager]
    call: Callable[[], object]

    def __call__(self) -> object:
        with self.context():
            return self.call()


def rotate(call: Callable[..., object], *inputs: Sequence) -> Callable[[], object]:
    """call(one of each), the next ones every time: of enough of them none is in a cache when its
    turn comes."""
    turns = itertools.cycle(list(zip(*inputs, strict=True)))
    return lambda: call(*next(turns))


def sets_beyond_cache(bytes_each: int, device: torch.device, most: int = 64) -> int:
    """How many sets of inputs exceed a GPU's L2 cache together, three times over; at least 2."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1
    return max(2, min(most, -(-3 * cache // max(bytes_each, 1))))


def captured(
    call: Callable[..., object], *inputs: Sequence, device: torch.device
) -> Callable[[], object]:
    """All of call(one of each) in a row, on a GPU as one CUDA graph: the device's time, without
    that of launches.

    The results lie apart, so that writing one finds no other one's memory in a cache.
    """
    sets = list(zip(*inputs, strict=True))
    if device.type != "cuda":
        return lambda: [call(*one) for one in sets]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for one in sets[:2] * 2:
            call(*one)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call(*one) for one in sets]

    def replay() -> object:
        graph.replay()
        return results

    return replay


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def seconds(
    call: Callable[[], object], times: int, device: torch.device, clock: str = "wall"
) -> float:
    """Of one call, over `times` calls in a row.

    clock: "wall"; or "processor", the time that all threads of this process ran, which others'
    work on the same cores does not lengthen: with one thread, for a machine that is never quiet.
    """
    if isinstance(call, Within):
        with call.context():
            return seconds(call.call, times, device, clock)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times
    now = CLOCKS[clock]
    start = now()
    for _ in range(times):
        call()
    return (now() - start) / times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def interleave(
    calls: dict[str, Callable[[], object]],
    base: str,
    device: torch.device,
    *,
    budget_s: float = 8.0,
    rounds: tuple[int, int] = (7, 60),
    at_least_s: float = 2e-3,
    untimed_s: float = 2e-2,
    always: tuple[str, ...] = ("dip",),
    seldom: int = 4,
    clock: str = "wall",
) -> dict[str, dict]:
    """Of each variant: median seconds, and median and quartiles of its ratio and difference to
    `base` within a round.

    calls: what to time, by name. budget_s: stop after this long, but within `rounds` = (fewest,
    most). at_least_s: a variant runs as often within a round as fills this time. untimed_s: a call
    shorter than this comes after an untimed one, or what runs once a round would find the caches
    full of another variant's data, and what runs often would not. Variants slower than 1.5 times
    the base, unless in `always`, take part in every `seldom`-th round only. clock: `seconds`'s.
    One that raises is returned as {"error": ...}.
    """
    results: dict[str, dict] = {}
    counts: dict[str, int] = {}
    once: dict[str, float] = {}
    for name, call in calls.items():
        try:
            for _ in range(3):
                call()
            synchronize(device)
            once[name] = min(seconds(call, n, device, clock) for n in (1, 2))
            counts[name] = max(1, round(at_least_s / max(once[name], 1e-8)))
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    if base not in counts:
        raise RuntimeError(f"{base}: {results[base]['error']}")
    frequent = {name for name in counts if name in (base, *always) or once[name] < 1.5 * once[base]}
    taken: dict[str, dict[int, float]] = {name: {} for name in counts}
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + budget_s
    with no_gc():
        for round_idx in range(rounds[1]):
            if round_idx >= rounds[0] and time.perf_counter() > end:
                break
            order = [name for name in counts if name in frequent or round_idx % seldom == 0]
            shuffle(order)
            for name in order:
                if once[name] < untimed_s:
                    calls[name]()
                taken[name][round_idx] = seconds(calls[name], counts[name], device, clock)
    for name, by_round in taken.items():
        ratios = quartiles([t / taken[base][i] for i, t in by_round.items()])
        differences = quartiles([t - taken[base][i] for i, t in by_round.items()])
        results[name] = {
            "seconds": statistics.median(by_round.values()),
            "rounds": len(by_round),
            "ratio": ratios[1],
            "quartiles": [ratios[0], ratios[2]],
            "over_base_s": differences[1],
            "over_base_quartiles_s": [differences[0], differences[2]],
        }
    return {name: results[name] for name in calls}


# ---- what the machine itself can do --------------------------------------------------------------


def _fastest_half(call, device: torch.device, times: int) -> float:
    """Median seconds of the faster half: what the machine can do, not what its neighbours let
    it."""
    taken = []
    for _ in range(times + 2):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(sorted(taken[2:])[: max(1, times // 2)])


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes read plus bytes written per second by a copy of `size` bytes."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest_half(lambda: target.copy_(source), device, 10)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations per second of a square matrix product of that size."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _fastest_half(lambda: a @ b, device, 6)


# ---- what is timed -------------------------------------------------------------------------------


def forward(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """The forward pass of training: autograd is on, and what backward needs is kept."""
    return lambda: module(x)


def backward_step(
    call: Callable[[], Tensor], dy: Tensor, leaves: Sequence[Tensor]
) -> Callable[[], None]:
    """Forward and backward, gradients of the leaves into fresh tensors, as after
    zero_grad(set_to_none=True). They are freed at the end: `peak_bytes` wants a step that starts
    with none."""

    def step() -> None:
        call().backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return step


def training_step(module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """backward_step of a module: gradients of its parameters and of x."""
    return backward_step(lambda: module(x), dy, [x, *module.parameters()])


def passes(x: Tensor, dy: Tensor) -> dict[str, Callable[[nn.Module], Callable[[], object]]]:
    """What is timed of a module: its forward pass, and that with backward."""
    return {
        "forward": lambda module: forward(module, x),
        "forward + backward": lambda module: training_step(module, x, dy),
    }


# ---- memory --------------------------------------------------------------------------------------


def saved_bytes(call: Callable[[], object], own: Sequence[Tensor] = ()) -> int:
    """What autograd keeps of a forward pass: every storage once, without those of `own` (the
    parameters)."""
    skip = {t.untyped_storage().data_ptr() for t in own}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in skip:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()  # alive until the end, so that no storage's address is used twice
    del result
    return sum(kept.values())


@contextlib.contextmanager
def _silent():
    """Standard error off, for what the profiler's C++ part says of itself."""
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that tensors allocated during the call take at any moment. On CPU: what torch's
    allocator reports.

    Raises ValueError for a call on CPU that frees what an earlier one allocated, such as gradients:
    its peak would come out too small by as much.
    """
    call()
    gc.collect()  # what earlier calls left in cycles is not freed during this one
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    for _ in range(5):  # now and then the profiler returns nothing
        with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        if events:
            break
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    held = list(itertools.accumulate(sizes, initial=0))
    if min(held) < 0:
        raise ValueError(
            f"call: expected one that frees nothing allocated before it, got {-min(held)} bytes "
            "freed; free them at the end of the call"
        )
    return max(held)
