"""The scratch that a CPU thread keeps: not much, none after it could not be had, and never read."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from tbcm_kernels.testing.cases import cases
from tbcm_kernels.testing.check import run

PROGRAM = """
import ctypes, gc, resource, torch, tbcm_kernels as tk

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

def step(width, pairs):
    a = torch.randn(1, width, 2 * pairs, requires_grad=True)
    taps = torch.randn(2 * pairs, 1, 3, 3)
    tk.conv_glu(a, taps, height=1, width=width, impl="cpu").sum().backward()

torch.set_num_threads(1)
step(2, 128)
before = resident()
step(8192, 128)
print(resident() - before)

small = [torch.randn(1, 1, 64, 64)] * 3
want = tk.attention(*small, impl="cpu")
large = [torch.randn(1, 1, n, 256) for n in (16, 1 << 18, 1 << 18)]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), -1))
step(1 << 17, 1)
try:
    tk.attention(*large, impl="cpu")
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(torch.equal(tk.attention(*small, impl="cpu"), want))
"""
WIDE = {
    "adaln": "shape (1, 3, 4096)", "attention": "shape (1, 1, 1, 33, 515, 256, 256)",
    "conv_glu": "shape (1, 4, 4, 320)", "linear_attention": "shape (1, 1, 9, 70, 256, 256)",
    "rms_norm": "shape (1, 3, 4096)",
}  # fmt: skip


@pytest.mark.kernels
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("op", WIDE)
def test_nan_of_one_call_is_not_read_by_the_next(op: str, need: Callable[[str], None]) -> None:
    need("cpu")
    tried = list(cases(op, torch.float32))
    wide = next(c for c in tried if c.name == WIDE[op])
    wants = [run(case, "cpu") for case in tried]
    for value in wide.primals + wide.tangents:
        if value is not None:
            value.fill_(float("nan"))
    for case, want in zip(tried, wants, strict=True):
        if case is wide:
            continue
        run(wide, "cpu")
        for a, b in zip(run(case, "cpu"), want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=case.name)


@pytest.mark.kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_scratch_is_given_back() -> None:
    """conv_glu's backward takes 73 MiB of 128 channel pairs; keys and values of one head 512 MiB.

    A row of 131072 pixels of one pair takes 88 MiB, 176 with AVX-512: none for other pairs.
    """
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept, error, equal = done.stdout.splitlines()
    assert int(kept) < 32 and "bad_alloc" in error and equal == "True"
