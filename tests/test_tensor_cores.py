"""Products of Triton's linear_attention as a GPU's tensor cores have them, in its interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tbcm_kernels.testing.cases import cases
from tbcm_kernels.testing.prove import _faults

pytest.importorskip("triton")
# Digits of a half of a number, and the terms that are added at once.
SORTS = {"bf16x3": (8, 16), "tf32x3": (11, 8)}
# In these gradients cancel.
CANCELLING = ("shape (2, 2, 1, 1, 16, 16)", "shape (2, 2, 5, 1, 8, 1)", "tangent of q")


def upper(x: NDArray, digits: int) -> NDArray:
    """The upper digits of numbers of fp32, rounded."""
    unit = 1 << (24 - digits)
    return ((x.view(np.uint32) + np.uint32(unit // 2)) & np.uint32(2**32 - unit)).view(np.float32)


def cut_off(x: NDArray) -> NDArray:
    """Numbers of fp64 in fp32, rounded towards zero."""
    y = x.astype(np.float32)
    return np.where(np.abs(y) > np.abs(x), np.nextafter(y, np.float32(0)), y)


def product(a: NDArray, b: NDArray, total: NDArray, sort: str) -> NDArray:
    """total + a b by three products of halves."""
    digits, terms = SORTS[sort]
    a1, b1 = (upper(x, digits) for x in (a, b))
    a2, b2 = (upper(x - x1, digits) for x, x1 in ((a, a1), (b, b1)))
    found = np.zeros_like(total)
    for left, right in ((a2, b1), (a1, b2), (a1, b1)):
        for i in range(0, a.shape[1], terms):
            here = slice(i, i + terms)
            more = left[:, here].astype(np.float64) @ right[here].astype(np.float64)
            found = cut_off(found + more)
    return found + total


def test_fp32_does_with_tf32_where_pytorch_may() -> None:
    """In both of its ways to say so; after the newer one, asking in the older way raises."""
    from tbcm_kernels.attention import triton as attention
    from tbcm_kernels.linear_attention import triton as linear_attention

    def chosen() -> tuple[str, ...]:
        narrow, wide = (linear_attention._precision(torch.float32, False, n) for n in (32, 64))
        return attention._precision(torch.float32), narrow, wide

    exact, fast = ("ieee", "ieee", "ieee"), ("tf32", "tf32x3", "ieee")
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    assert chosen() == exact
    try:
        products.fp32_precision = "tf32"
        assert chosen() == fast
        products.fp32_precision = before
        torch.set_float32_matmul_precision("high")
        assert chosen() == fast
    finally:
        products.fp32_precision = before
        torch.set_float32_matmul_precision("highest")
    assert chosen() == exact
    assert attention._precision(torch.bfloat16) == "ieee"


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensor cores are at hand")
def test_fp16_has_digits_enough_where_gradients_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of TF32 do; those of bf16 have failed on an H200, with these errors."""
    from triton.runtime import interpreter

    from tbcm_kernels.linear_attention import triton as linear_attention

    def faults(sort: str) -> list[str]:
        def dot(self, a, b, total, *options):
            data = product(a.data, b.data, total.data, sort)
            return interpreter.TensorHandle(data, total.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        tried = [c for c in cases("linear_attention", torch.float16) if c.name in CANCELLING]
        assert len(tried) == len(CANCELLING)
        return [fault for case in tried for fault in _faults(case, "triton")]

    assert faults(linear_attention._precision(torch.float16, exact=False, width=32)) == []
    found = faults("bf16x3")
    assert any("gradient of k: RMS error 5.62e-06" in fault for fault in found)
