"""RMSNorm in plain PyTorch: the definition of correct.

    y = w x r,   ẏ = w r (ẋ − x r² m) + ẇ x r,   r = (mean x² + ε)^−½,  m = mean(x ẋ)

Arithmetic is at least fp32; y and ẏ are rounded once, at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels._library import cast, chunk_sum, wide


def forward(
    x: Tensor, weight: Tensor | None, tx: Tensor | None, tweight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """y and ẏ; ẏ is None where neither input has a tangent."""
    x_, w_, tx_, tw_ = (wide(v) for v in (x, weight, tx, tweight))
    r = torch.rsqrt(x_.square().mean(-1, keepdim=True) + eps)
    y = x_ * r if w_ is None else w_ * x_ * r
    ty = None
    if tx_ is not None:
        ty = r * (tx_ - x_ * r.square() * (x_ * tx_).mean(-1, keepdim=True))
        ty = ty if w_ is None else w_ * ty
    if tw_ is not None:
        ty = tw_ * x_ * r if ty is None else ty + tw_ * x_ * r
    return y.to(x.dtype), cast(ty, x.dtype)


def backward(
    gy: Tensor, x: Tensor, weight: Tensor | None, needs_weight: bool, chunk: int, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Gradient of x, and of weight summed over `chunk` rows: [⌈rows/chunk⌉, C].

    gx = r g − x r³ mean(x g) with g = w gy;  gw = Σ gy x r.
    """
    x_, gy_ = wide(x), wide(gy)
    r = torch.rsqrt(x_.square().mean(-1, keepdim=True) + eps)
    g = gy_ if weight is None else wide(weight) * gy_
    gx = r * (g - x_ * r.square() * (x_ * g).mean(-1, keepdim=True))
    gw = chunk_sum((gy_ * x_ * r).reshape(1, -1, x.shape[-1]), chunk)[0] if needs_weight else None
    return gx.to(x.dtype), gw
