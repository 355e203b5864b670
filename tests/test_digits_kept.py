"""The C++ kernels lose no digits that PyTorch keeps where numbers share a large mean."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tbcm_kernels as tk


@pytest.fixture(autouse=True)
def _(need: Callable[[str], None]) -> None:
    need("cpu")
    torch.manual_seed(0)


def _error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).square().mean() / want.square().mean()).sqrt().item()


@pytest.mark.parametrize("keys", [300, 4096])
def test_tangent_of_attention(keys: int) -> None:
    q, k, v = (
        torch.randn(1, 2, 64, 64),
        torch.randn(1, 2, keys, 64) + 10,
        torch.randn(1, 2, keys, 64),
    )
    tq, tk_, tv = torch.randn_like(q) + 10, torch.randn_like(k), torch.randn_like(v)
    exact = [x.double() for x in (q, k, v, tq, tk_, tv)]
    want = tk.attention_jvp(*exact, impl="reference")[1]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / 8, -1) @ v

    stock = torch.func.jvp(plain, (q, k, v), (tq, tk_, tv))[1]
    ours = tk.attention_jvp(q, k, v, tq, tk_, tv, impl="cpu")[1]
    assert _error(ours, want) < _error(stock, want)


@pytest.mark.parametrize(("width", "mean", "spread"), [
    (1152, 1e3, 1.0), (1152, 100.0, 1e-3), (4096, 1e3, 0.1), (65536, 1e3, 1.0),
])  # fmt: skip
def test_layer_norm(width: int, mean: float, spread: float) -> None:
    x = mean + spread * torch.randn(1, 16, width)
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


def test_a_wide_rms_norm() -> None:
    x = 10 + torch.randn(4, 262144)
    want = F.rms_norm(x.double(), x.shape[-1:], eps=1e-6)
    stock = F.rms_norm(x, x.shape[-1:], eps=1e-6)
    assert _error(tk.rms_norm(x, eps=1e-6, impl="cpu"), want) < 2 * _error(stock, want)
