"""SiLU → depthwise 3×3 → GLU on tokens in plain PyTorch: the definition of correct.

    u = silu(a)         c = conv(u; w) + b             y = c₁ silu(c₂)
    u̇ = silu′(a) ȧ      ċ = conv(u̇; w) + conv(u; ẇ) + ḃ    ẏ = ċ₁ silu(c₂) + c₁ silu′(c₂) ċ₂

with c = [c₁; c₂] along the channels. y and ẏ are rounded once, at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tbcm_kernels._library import cast, wide, without_autocast


@without_autocast
def forward(
    a: Tensor, weight: Tensor, bias: Tensor | None, ta: Tensor | None, tweight: Tensor | None,
    tbias: Tensor | None, height: int, width: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y and ẏ; ẏ is None where no input has a tangent."""
    grid = (height, width)
    a_, ta_ = wide(a), wide(ta)
    w_, b_, tw_, tb_ = (cast(v, a_.dtype) for v in (weight, bias, tweight, tbias))
    u = F.silu(a_)
    c1, c2 = depthwise(u, w_, b_, grid).chunk(2, -1)
    y = c1 * F.silu(c2)
    terms = []
    if ta_ is not None:
        terms.append(depthwise(slope(a_) * ta_, w_, None, grid))
    if tw_ is not None:
        terms.append(depthwise(u, tw_, None, grid))
    if tb_ is not None:
        terms.append(tb_.expand(*a.shape))
    if not terms:
        return y.to(a.dtype), None
    tc1, tc2 = sum(terms[1:], terms[0]).chunk(2, -1)
    return y.to(a.dtype), (tc1 * F.silu(c2) + c1 * slope(c2) * tc2).to(a.dtype)


@without_autocast
def backward(
    gy: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, needs_weight: bool,
    needs_bias: bool, height: int, width: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of a, of weight as [9, 2K] and of bias [2K].

    gc = [gy silu(c₂); gy c₁ silu′(c₂)],  ga = silu′(a) convᵀ(gc),
    gw[tap] = Σ gc[pixel] u[pixel + tap],  gb = Σ gc.
    """
    grid = (height, width)
    a_, gy_ = wide(a), wide(gy)
    w_, b_ = cast(weight, a_.dtype), cast(bias, a_.dtype)
    u = F.silu(a_)
    c1, c2 = depthwise(u, w_, b_, grid).chunk(2, -1)
    gc = torch.cat([gy_ * F.silu(c2), gy_ * c1 * slope(c2)], -1)
    ga = slope(a_) * depthwise(gc, w_.flip(-1, -2), None, grid)
    gw = None
    if needs_weight:
        padded = F.pad(u.unflatten(1, grid), (0, 0, 1, 1, 1, 1))
        pixels = gc.unflatten(1, grid)
        taps = [
            (padded[:, i : i + height, j : j + width] * pixels).sum((0, 1, 2))
            for i in range(3)
            for j in range(3)
        ]
        gw = torch.stack(taps)
    return ga.to(a.dtype), gw, gc.sum((0, 1)) if needs_bias else None


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """Depthwise 3×3 convolution with a border of zeros on tokens [B, H·W, C]."""
    pixels = x.unflatten(1, grid).permute(0, 3, 1, 2)
    y = F.conv2d(pixels, weight, bias, padding=1, groups=len(weight))
    return y.permute(0, 2, 3, 1).flatten(1, 2)


def slope(x: Tensor) -> Tensor:
    """silu′(x) = σ (1 + x (1 − σ))."""
    sigma = torch.sigmoid(x)
    return sigma * (1 + x * (1 - sigma))
