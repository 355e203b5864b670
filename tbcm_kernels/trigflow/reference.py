"""The wrap of a flow-matching network and the teacher's step in plain PyTorch: the definition.

    λ = 1 / (sin t + cos t),  δ = cos t − sin t

    x_FM = λ x                     ẋ_FM = λ ẋ − λ² δ ṫ x
    t_FM = λ sin t                 ṫ_FM = λ² ṫ
    F    = λ (δ x + v)             Ḟ = λ (δ ẋ + v̇) − λ² ṫ (2 x + δ v)

    V = σ (F_∅ + γ (F_c − F_∅))    x' = cos(t − s) x − sin(t − s) V

Arithmetic is at least fp32; every output is rounded once, at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels._library import cast, per_sample, wide


def flow_input(
    x: Tensor, t: Tensor, tx: Tensor | None, tt: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x_FM, t_FM and their tangents, each None where nothing that it depends on has one."""
    x_, tx_ = wide(x), wide(tx)
    lam, delta = _scalars(t, x_)
    sin = per_sample(t, x_).sin()
    terms = [] if tx_ is None else [lam * tx_]
    tt_fm = None
    if tt is not None:
        tt_ = per_sample(tt, x_)
        terms.append(-(lam.square() * delta * tt_) * x_)
        tt_fm = (lam.square() * tt_).reshape(t.shape).to(t.dtype)
    tx_fm = sum(terms[1:], terms[0]).to(x.dtype) if terms else None
    return (lam * x_).to(x.dtype), (lam * sin).reshape(t.shape).to(t.dtype), tx_fm, tt_fm


def flow_output(
    v: Tensor, x: Tensor, t: Tensor, tv: Tensor | None, tx: Tensor | None, tt: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """F and Ḟ; Ḟ is None where no input has a tangent."""
    x_, tx_ = wide(x), wide(tx)
    v_, tv_ = (cast(a, x_.dtype) for a in (v, tv))
    lam, delta = _scalars(t, x_)
    terms = [] if tx_ is None else [lam * (delta * tx_)]
    if tv_ is not None:
        terms.append(lam * tv_)
    if tt is not None:
        terms.append(-(lam.square() * per_sample(tt, x_)) * (2 * x_ + delta * v_))
    tout = sum(terms[1:], terms[0]).to(x.dtype) if terms else None
    return (lam * (delta * x_ + v_)).to(x.dtype), tout


def trajectory_step(
    x: Tensor, out: Tensor, t: Tensor, s: Tensor, guidance: Tensor, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """V and x'."""
    x_ = wide(x)
    unconditional, conditional = out.to(x_.dtype).tensor_split(2)
    scale, d = per_sample(guidance, x_), per_sample(t, x_) - per_sample(s, x_)
    velocity = sigma_data * (unconditional + scale * (conditional - unconditional))
    moved = torch.cos(d) * x_ - torch.sin(d) * velocity
    return velocity.to(x.dtype), moved.to(x.dtype)


def _scalars(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """λ and δ of each sample, in x's dtype."""
    t = per_sample(t, x)
    sin, cos = t.sin(), t.cos()
    return 1 / (sin + cos), cos - sin
