"""What a machine can do at most: the roofs of a roofline, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from tbcm.cost import Machine

Call = Callable[[], Any]
WARM_UP, ROUNDS = 3, 7


def machine(device: str, dtype: torch.dtype) -> Machine:
    """A device with its bandwidth and its matmul peak in a dtype."""
    return Machine(copy_bandwidth(device), matmul_peak(device, dtype))


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a large copy: the roof of a memory-bound op."""
    source = torch.ones(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(rounds(lambda: target.copy_(source), device))


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square product: the roof of attention and linear."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(rounds(lambda: a @ b, device))


def rounds(call: Call, device: str) -> list[float]:
    """Seconds of each of several calls, after some that do not count."""
    return [seconds(call, device) for _ in range(WARM_UP + ROUNDS)][WARM_UP:]


def seconds(call: Call, device: str) -> float:
    """How long one call takes, its launches included."""
    return _events(call) if device == "cuda" else _clock(call)


def _clock(sweep: Call) -> float:
    start = time.perf_counter()
    sweep()
    return time.perf_counter() - start


def _events(sweep: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    sweep()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
