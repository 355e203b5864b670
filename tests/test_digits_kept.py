"""The kernels lose no digits where numbers share a large mean, or are many."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tbcm_kernels as tk


@pytest.fixture(autouse=True)
def _() -> None:
    torch.manual_seed(0)


def _error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).square().mean() / want.square().mean()).sqrt().item()


@pytest.mark.parametrize(("impl", "keys", "dtype", "share"), [
    ("cpu", 300, torch.float32, 1.0), ("cpu", 4096, torch.float32, 1.0),
    ("cpu", 300, torch.bfloat16, 0.05), ("triton", 300, torch.float32, 1.0),
    ("triton", 300, torch.bfloat16, 0.05),
])  # fmt: skip
def test_tangent_of_attention(
    impl: str, keys: int, dtype: torch.dtype, share: float, need: Callable[[str], None]
) -> None:
    """The error is at most that share of PyTorch's; what 16 bits hold of Ṡ itself is lost there."""
    need(impl)
    device = "cpu" if impl == "cpu" else None
    sizes = [(1, 2, 64, 64), (1, 2, keys, 64), (1, 2, keys, 64)] * 2
    means = [0, 10, 0, 10, 0, 0]
    inputs = [
        (torch.randn(s, device=device) + m).to(dtype) for s, m in zip(sizes, means, strict=True)
    ]
    want = tk.attention_jvp(*(x.double() for x in inputs), impl="reference")[1]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / 8, -1) @ v

    stock = torch.func.jvp(plain, tuple(inputs[:3]), tuple(inputs[3:]))[1]
    _, ours = tk.attention_jvp(*inputs, impl=impl)
    assert _error(ours, want) < share * _error(stock, want)


@pytest.mark.parametrize(("width", "mean", "spread"), [
    (1152, 1e3, 1.0), (1152, 100.0, 1e-3), (4096, 1e3, 0.1), (65536, 1e3, 1.0),
    (262144, 0.0, 1.0),
])  # fmt: skip
def test_layer_norm(width: int, mean: float, spread: float, need: Callable[[str], None]) -> None:
    need("cpu")
    x = mean + spread * torch.randn(1, 16, width, device="cpu")
    tx = torch.randn_like(x) + 10
    gy = torch.randn_like(x)
    found = []
    for at in (x.double(), x):

        def norm(x: Tensor) -> Tensor:
            return F.layer_norm(x, (width,), eps=1e-12)

        y, ty = torch.func.jvp(norm, (at,), (tx.to(at.dtype),))
        leaf = at.clone().requires_grad_()
        found.append([y, ty, *torch.autograd.grad(norm(leaf), leaf, gy.to(at.dtype))])
    leaf = x.clone().requires_grad_()
    _, y, _, ty = tk.adaln_jvp(x, tx=tx, eps=1e-12, impl="cpu")
    _, again = tk.adaln(leaf, eps=1e-12, impl="cpu")
    ours = [y, ty, *torch.autograd.grad(again, leaf, gy)]
    for got, stock, want in zip(ours, found[1], found[0], strict=True):
        assert _error(got, want) < 2 * _error(stock, want)


def test_a_wide_rms_norm(need: Callable[[str], None]) -> None:
    need("cpu")
    x = 10 + torch.randn(4, 262144, device="cpu")
    want = F.rms_norm(x.double(), x.shape[-1:], eps=1e-6)
    stock = F.rms_norm(x, x.shape[-1:], eps=1e-6)
    assert _error(tk.rms_norm(x, eps=1e-6, impl="cpu"), want) < 2 * _error(stock, want)


def test_the_norm_of_a_large_sample(need: Callable[[str], None]) -> None:
    """At t = 0 and F = 0 that of V, within an ulp or two."""
    need("cpu")
    v = 1 + torch.rand(1, 2**22, device="cpu") / 8
    zero, t = torch.zeros_like(v), torch.zeros(1, device="cpu")
    _, norm = tk.tangent_loss(zero, zero, v, zero, t, r=0.5, impl="cpu")
    assert _error(norm, v.double().norm(dim=-1)) < 2e-7
