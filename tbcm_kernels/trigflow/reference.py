"""The wrap of a flow-matching network and the teacher's step in plain PyTorch: the definition.

    λ = 1 / (sin t + cos t),  δ = cos t − sin t

    x_FM = λ x                     ẋ_FM = λ ẋ − λ² δ ṫ x
    t_FM = λ sin t                 ṫ_FM = λ² ṫ
    F    = λ (δ x + v)             Ḟ = λ (δ ẋ + v̇) − λ² ṫ (2 x + δ v)

    V = σ (F_∅ + γ (F_c − F_∅))    x' = cos(t − s) x − sin(t − s) V

`store` marks the one rounding point: every output at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels._library import Store, per_sample, wide


def flow_input(
    x: Tensor, t: Tensor, tx: Tensor | None, tt: Tensor | None, store: Store | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x_FM, t_FM and their tangents, each None where nothing that it depends on has one."""
    store_x, store_t = store or (lambda v: v.to(x.dtype)), store or (lambda v: v.to(t.dtype))
    x_, tx_ = wide(x), wide(tx)
    lam, delta = _scalars(t, x_)
    sin = per_sample(t, x_).sin()
    terms = [] if tx_ is None else [lam * tx_]
    tt_fm = None
    if tt is not None:
        tt_ = per_sample(tt, x_)
        terms.append(-(lam.square() * delta * tt_) * x_)
        tt_fm = store_t((lam.square() * tt_).reshape(t.shape))
    tx_fm = store_x(sum(terms[1:], terms[0])) if terms else None
    return store_x(lam * x_), store_t((lam * sin).reshape(t.shape)), tx_fm, tt_fm


def flow_output(
    v: Tensor, x: Tensor, t: Tensor, tv: Tensor | None, tx: Tensor | None, tt: Tensor | None,
    store: Store | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """F and Ḟ; Ḟ is None where no input has a tangent."""
    store = store or (lambda f: f.to(x.dtype))
    x_, tx_ = wide(x), wide(tx)
    v_, tv_ = (None if a is None else a.to(x_.dtype) for a in (v, tv))
    lam, delta = _scalars(t, x_)
    terms = [] if tx_ is None else [lam * (delta * tx_)]
    if tv_ is not None:
        terms.append(lam * tv_)
    if tt is not None:
        terms.append(-(lam.square() * per_sample(tt, x_)) * (2 * x_ + delta * v_))
    tout = store(sum(terms[1:], terms[0])) if terms else None
    return store(lam * (delta * x_ + v_)), tout


def trajectory_step(
    x: Tensor, out: Tensor, t: Tensor, s: Tensor, guidance: Tensor, sigma_data: float,
    store: Store | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """V and x'."""
    store = store or (lambda v: v.to(x.dtype))
    x_ = wide(x)
    unconditional, conditional = out.to(x_.dtype).tensor_split(2)
    scale, d = per_sample(guidance, x_), per_sample(t, x_) - per_sample(s, x_)
    velocity = sigma_data * (unconditional + scale * (conditional - unconditional))
    return store(velocity), store(torch.cos(d) * x_ - torch.sin(d) * velocity)


def _scalars(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """λ and δ of each sample, in x's dtype."""
    t = per_sample(t, x)
    sin, cos = t.sin(), t.cos()
    return 1 / (sin + cos), cos - sin
