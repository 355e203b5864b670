"""Gate + residual + LayerNorm + modulate in plain PyTorch: the definition of correct.

    x' = x + γ h                  ẋ' = ẋ + γ̇ h + γ ḣ
    x̂  = r (x' − mean x')         ẋ̂  = r ((ẋ' − mean ẋ') − x̂ mean(x̂ ẋ')),   r = (var x' + ε)^−½
    y  = x̂ (1 + c) + b            ẏ  = ẋ̂ (1 + c) + x̂ ċ + ḃ

Arithmetic is at least fp32; x', ẋ' are rounded before they are normalised, y, ẏ at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels._dual import present
from tbcm_kernels._library import chunk_sum, wide


def forward(
    x: Tensor, h: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    tx: Tensor | None, th: Tensor | None, tgate: Tensor | None, tscale: Tensor | None,
    tshift: Tensor | None, eps: float, dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """x', y, ẋ', ẏ; x' and ẋ' are None without h, and tangents where all that they need are.

    y and ẏ are in `dtype`, x's by default.
    """
    x_, h_, gate_, scale_, shift_, tx_, th_, tgate_, tscale_, tshift_ = (
        wide(v) for v in (x, h, gate, scale, shift, tx, th, tgate, tscale, tshift)
    )
    out = tout = None
    if h_ is not None:
        out = (x_ + h_ if gate_ is None else x_ + gate_ * h_).to(x.dtype)
        x_ = wide(out)
    if present((th_, tgate_)):
        tx_ = _residual_tangent(x_, h_, gate_, tx_, th_, tgate_)
    if h is not None and tx_ is not None:
        tout = (tx_.clone() if tx_ is tx else tx_).to(x.dtype)  # an op may not return its input
        tx_ = wide(tout)
    center = x_ - x_.mean(-1, keepdim=True)
    r = torch.rsqrt(center.square().mean(-1, keepdim=True) + eps)
    xhat = r * center
    y = _modulate(xhat, scale_, shift_)
    terms = []
    if tx_ is not None:
        tcenter = tx_ - tx_.mean(-1, keepdim=True)
        txhat = r * (tcenter - xhat * (xhat * tcenter).mean(-1, keepdim=True))
        terms.append(txhat if scale_ is None else txhat * (1 + scale_))
    if tscale_ is not None:
        terms.append(xhat * tscale_)
    if tshift_ is not None:
        terms.append(tshift_)
    # The sum starts at zeros: a lone ḃ must neither alias its input nor stay narrow.
    ty = sum(terms, torch.zeros_like(y)).to(dtype or x.dtype) if terms else None
    return out, y.to(dtype or x.dtype), tout, ty


def _residual_tangent(
    x: Tensor, h: Tensor, gate: Tensor | None, tx: Tensor | None, th: Tensor | None,
    tgate: Tensor | None,
) -> Tensor:  # fmt: skip
    total = torch.zeros_like(x) if tx is None else tx
    if tgate is not None:
        total = total + tgate * h
    if th is not None:
        total = total + (th if gate is None else gate * th)
    return total


def _modulate(xhat: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    y = xhat if scale is None else xhat * (1 + scale)
    return y if shift is None else y + shift


def backward(
    gout: Tensor | None, gy: Tensor | None, out: Tensor, h: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, needs_gate: bool, needs_scale: bool, needs_shift: bool, chunk: int,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x and h, and of gate, scale, shift summed over `chunk` tokens [B, ⌈N/chunk⌉, C].

    With g = gy (1 + c):  gx = gout + r (g − mean g − x̂ mean(g x̂)),  gh = γ gx,
    gγ = Σ gx h,  gc = Σ gy x̂,  gb = Σ gy. gh is None without a gate, where it equals gx.
    """
    gx = torch.zeros_like(wide(out)) if gout is None else wide(gout)
    gscale = gshift = None
    if gy is not None:
        x_, gy_ = wide(out), wide(gy)
        center = x_ - x_.mean(-1, keepdim=True)
        r = torch.rsqrt(center.square().mean(-1, keepdim=True) + eps)
        xhat = r * center
        g = gy_ if scale is None else gy_ * (1 + wide(scale))
        gx = gx + r * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
        gscale = chunk_sum(gy_ * xhat, chunk) if needs_scale else None
        gshift = chunk_sum(gy_, chunk) if needs_shift else None
    ggate = chunk_sum(gx * wide(h), chunk) if needs_gate else None
    gh = None if gate is None else (wide(gate) * gx).to(out.dtype)
    return gx.to(out.dtype), gh, ggate, gscale, gshift
