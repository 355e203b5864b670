"""The scratch that a CPU thread keeps: not much, and none after it could not be had."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, gc, resource, torch, tbcm_kernels as tk

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

def step(width):
    a = torch.randn(1, width, 2, requires_grad=True)
    tk.conv_glu(a, torch.randn(2, 1, 3, 3), height=1, width=width, impl="cpu").sum().backward()

torch.set_num_threads(1)
step(2)
before = resident()
step(8192)
print(resident() - before)

small = [torch.randn(1, 1, 64, 64)] * 3
want = tk.attention(*small, impl="cpu")
large = [torch.randn(1, 1, n, 256) for n in (16, 1 << 18, 1 << 18)]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), -1))
try:
    tk.attention(*large, impl="cpu")
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(torch.equal(tk.attention(*small, impl="cpu"), want))
"""


@pytest.mark.kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_scratch_is_given_back() -> None:
    """conv_glu's backward takes 73 MiB here; the keys and values of one head 512 MiB."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    kept, *error, equal = run.stdout.splitlines() or [""]
    assert run.returncode == 0, run.stderr
    assert int(kept) < 32
    assert "failed" in " ".join(error)
    assert equal == "True"
