"""How it is timed: variants take turns, each on several input sets, and medians are reported."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tbcm.graphed import capture
from tbcm.peaks import Call, seconds

MIN_ROUNDS, MAX_ROUNDS, WARM_UP = 7, 400, 3


def beyond_cache(device: str) -> int:
    """Bytes of input sets that no cache of the device keeps until their next turn."""
    if device == "cuda":
        return 3 * torch.cuda.get_device_properties(0).L2_cache_size
    return 2**27


def stopwatch(calls: list[Call], device: str) -> tuple[Callable[[], float], bool]:
    """A function that gives seconds per call over one sweep, and whether a CUDA graph replays it.

    On CUDA a graph leaves the launches out, for every variant whose calls can be captured.
    """

    def sweep() -> list[Any]:
        # Results stay until the end: in the memory of the one before, a result would stay in cache.
        return [call() for call in calls]

    for _ in range(WARM_UP):
        sweep()
    replay = _captured(sweep) if device == "cuda" else None
    return lambda: seconds(replay or sweep, device) / len(calls), replay is not None


def _captured(sweep: Call) -> Call | None:
    """The sweep as a graph on the current stream, on which backward's kept graphs were made too."""
    torch.cuda.synchronize()
    try:
        graph, _ = capture(sweep, stream=torch.cuda.current_stream())
    except RuntimeError:  # something in it synchronises; the row then says graph: false
        return None
    return graph.replay


def interleave(measures: dict[str, Callable[[], float]], budget: float) -> dict[str, list[float]]:
    """Samples of every variant; the order turns round each time, so drift falls on all alike."""
    keep_freed_memory()
    samples: dict[str, list[float]] = {name: [] for name in measures}
    order, end = list(measures), time.perf_counter() + budget
    rounds = 0
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() < end):
        for name in order:
            samples[name].append(measures[name]())
        order.reverse()
        rounds += 1
    return samples


def keep_freed_memory() -> None:
    """From here on glibc gives no freed memory up to 32 MiB back to the system.

    It did after some calls, in some processes, and the next call then faulted its outputs in again,
    page by page: a fifth of a kernel's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)


def summary(samples: list[float]) -> dict[str, float]:
    """Median, p20 and p80 in microseconds."""
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    median = statistics.median(samples)
    return {"us": 1e6 * median, "p20_us": 1e6 * low, "p80_us": 1e6 * high}


def peak_memory(call: Call, device: str) -> float | None:
    """MiB that a call takes at its peak beyond what is held before; None where unknown.

    On CUDA by PyTorch's count; on the CPU by the process's resident memory, as Linux counts it.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    reset = Path("/proc/self/clear_refs")
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not reset.exists():
        return None
    trim(0)  # memory that was freed and kept would serve the call uncounted
    reset.write_text("5")  # the high-water mark starts again
    before = _resident("VmRSS")
    result = call()
    peak = _resident("VmHWM") - before
    del result
    return peak / 2**10


def _resident(name: str) -> int:
    """Kibibytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
