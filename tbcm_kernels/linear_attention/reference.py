"""Linear attention with its JVP in plain PyTorch: the definition of correct.

With φ applied to q and k, RMS-normalised first where weights are given, and v' = [v, 1]:

    S = φ(k)ᵀ v'      n = φ(q) S           o = n_v / (n_1 + ε)
    Ṡ = φ̇ᵀv' + φᵀ[v̇, 0]   ṅ = φ̇(q) S + φ(q) Ṡ   ȯ = (ṅ_v − o ṅ_1) / (n_1 + ε)

where φ̇ = φ′(k) k̇. Outputs and gradients are rounded once, at the end; the state
S [B, H, D, Dv + 1] keeps at least fp32. `operand` marks a factor that enters a matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tbcm_kernels._library import Rounding, unrounded, wide, without_autocast
from tbcm_kernels.rms_norm.heads import normalized

FEATURE_MAPS = ("relu", "elu+1", "identity")


@dataclass(frozen=True)
class Setting:
    """What is neither differentiated nor a tensor."""

    feature_map: str
    eps: float
    q_eps: float
    k_eps: float


@without_autocast
def forward(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, setting: Setting,
    operand: Rounding = unrounded,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """o [B, H, N, Dv], ȯ, which is None without tangents, and the state S."""
    q, tq = features(*normalized(q, q_weight, tq, setting.q_eps), setting.feature_map)
    k, tk = features(*normalized(k, k_weight, tk, setting.k_eps), setting.feature_map)
    v1 = F.pad(wide(v), (0, 1), value=1.0)

    def product(x: Tensor, y: Tensor) -> Tensor:
        return operand(x) @ operand(y)

    state = product(k.mT, v1)
    n = product(q, state)
    inverse = 1 / (n[..., -1:] + setting.eps)
    o = n[..., :-1] * inverse
    tn = [] if tq is None else [product(tq, state)]
    if tk is not None:
        tn.append(product(q, product(tk.mT, v1)))
    if tv is not None:
        tn.append(product(q, product(k.mT, F.pad(wide(tv), (0, 1)))))
    if not tn:
        return o.to(v.dtype), None, state
    tn = sum(tn[1:], tn[0])
    to = (tn[..., :-1] - o * tn[..., -1:]) * inverse
    return o.to(v.dtype), to.to(v.dtype), state


@without_autocast
def backward(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    state: Tensor, setting: Setting, operand: Rounding = unrounded,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, those of q and k before their feature map and after their norm.

    g_n = [g, −g·o] / (n_1 + ε);  gφ(q) = g_n Sᵀ;  gS = φ(q)ᵀ g_n
    gφ(k) = v' gSᵀ;  gv = (φ(k) gS)_v
    """
    q, _ = normalized(q, q_weight, None, setting.q_eps)
    k, _ = normalized(k, k_weight, None, setting.k_eps)
    (fq, sq), (fk, sk) = (features(x, torch.ones_like(x), setting.feature_map) for x in (q, k))
    v1 = F.pad(wide(v), (0, 1), value=1.0)
    n = operand(fq) @ operand(state)
    inverse = 1 / (n[..., -1:] + setting.eps)
    go = wide(go)
    gn = torch.cat([go, -(go * n[..., :-1]).sum(-1, keepdim=True) * inverse], -1) * inverse
    gstate = operand(fq).mT @ operand(gn)
    gq = operand(gn) @ operand(state).mT
    gk = operand(v1) @ operand(gstate).mT
    gv = operand(fk) @ operand(gstate)
    return (gq * sq).to(v.dtype), (gk * sk).to(v.dtype), gv[..., :-1].to(v.dtype)


def features(x: Tensor, tx: Tensor | None, feature_map: str) -> tuple[Tensor, Tensor | None]:
    """φ(x) and φ′(x) ẋ."""
    if feature_map == "identity":
        return x, tx
    if feature_map == "relu":
        return F.relu(x), None if tx is None else tx * (x > 0)
    return F.elu(x) + 1, None if tx is None else tx * x.clamp(max=0).exp()
