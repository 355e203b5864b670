"""Softmax attention with its JVP in plain PyTorch: the definition of correct.

    S = s QKᵀ + bias       P = softmax S          O = PV              L = log Σ exp S
    Ṡ = s(Q̇Kᵀ + QK̇ᵀ)       μ = rowsum(P∘Ṡ)        Ȯ = (P∘Ṡ)V − μO + PV̇     L̇ = μ

Q and K are RMS-normalised first where weights are given. Tangents have a leading dimension of lanes
that share S and P: [T, B, H, N, D]. Outputs are rounded at the end; L and μ keep at least fp32.
`operand` marks the rounding of a factor that enters a matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tbcm_kernels._library import Rounding, cast, unrounded, wide, without_autocast
from tbcm_kernels.rms_norm.heads import normalized

FIRST_KEYS = 16
"""Over the mean of which Triton's rates are taken, whatever its blocks."""


@dataclass(frozen=True)
class Setting:
    """What is neither differentiated nor a tensor, and the masks."""

    attn_mask: Tensor | None
    key_mask: Tensor | None
    scale: float
    causal: int | None
    q_eps: float
    k_eps: float


@without_autocast
def forward(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, setting: Setting,
    operand: Rounding = unrounded,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """O [B, H, N, Dv], L [B, H, N], Ȯ [T, B, H, N, Dv], μ [T, B, H, N]; no tangents, no Ȯ and μ.

    `setting.causal` is the offset c of the rule that query i sees key j where j ≤ i + c, or None.
    """
    dtype, heads = q.dtype, q.shape[1]
    q, tq = normalized(q, q_weight, tq, setting.q_eps, operand)
    k, v, tk, tv = (_shown(x, setting.key_mask) for x in (k, v, tk, tv))
    k, tk = normalized(k, k_weight, tk, setting.k_eps, operand)
    k, v, tk, tv = (_keys(x, heads) for x in (k, v, tk, tv))
    logits = setting.scale * (q @ k.mT)
    logits = _masked(logits, setting)
    top = logits.detach().amax(-1, keepdim=True) if k.shape[2] else logits.new_zeros(())
    top = top.masked_fill(top == -torch.inf, 0)
    e = (logits - top).exp()
    total = e.sum(-1, keepdim=True)
    unseen = total == 0
    total = total.masked_fill(unseen, 1)
    inverse = 1 / total
    o = (operand(e) @ v) * inverse
    lse = (top + total.log()).masked_fill(unseen, -torch.inf).squeeze(-1)
    if tq is None and tk is None and tv is None:
        return o.to(dtype), lse, None, None
    lanes = next(t for t in (tq, tk, tv) if t is not None).shape[0]
    mu = o.new_zeros((lanes, *lse.shape))
    to = o.new_zeros((lanes, *o.shape))
    if tq is not None or tk is not None:
        rate = _tangent_of_logits(q, k, tq, tk, setting.scale)
        # Around its mean, a constant: autograd would subtract large numbers. Kernels that round
        # P∘Ṡ take the mean over the first keys, which they know before P.
        if operand is unrounded:
            center = ((e * rate).sum(-1, keepdim=True) * inverse).detach()
        else:
            center = _mean_of_first(rate, setting.key_mask)
        weighted = e * (rate - center)
        rest = weighted.sum(-1, keepdim=True) * inverse
        mu = (center + rest).squeeze(-1)
        to = (operand(weighted) @ v) * inverse - rest * o
    if tv is not None:
        to = to + (operand(e) @ tv) * inverse
    return o.to(dtype), lse, to.to(dtype), mu


@without_autocast
def backward(
    go: Tensor | None, glse: Tensor | None, gto: Tensor | None, gmu: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, o: Tensor, lse: Tensor,
    to: Tensor | None, mu: Tensor | None, setting: Setting,
    operand: Rounding = unrounded,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v, tq, tk, tv, those of q and k before their norm, also through Ȯ and μ.

    With cotangents G of O, γ of L, H of Ȯ, η of μ and row scalars a = H·O − η, d = G·O + H·Ȯ − γ:
    A = HVᵀ;  dṠ = P∘(A − a);  dS = P∘(GVᵀ + HV̇ᵀ − d + (A − a)∘(Ṡ − μ));  Ṗ = P∘(Ṡ − μ)
    dV = PᵀG + ṖᵀH;  dV̇ = PᵀH;  dQ = s(dS K + dṠ K̇);  dQ̇ = s dṠ K;
    dK = s(dSᵀQ + dṠᵀQ̇);  dK̇ = s dṠᵀQ.
    """
    dtype, scale = q.dtype, setting.scale
    heads, groups = q.shape[1], k.shape[1]
    q, tq = normalized(q, q_weight, tq, setting.q_eps, operand)
    k, v, tk, tv = (_shown(x, setting.key_mask) for x in (k, v, tk, tv))
    k, tk = normalized(k, k_weight, tk, setting.k_eps, operand)
    k, v, tk, tv = (_keys(x, heads) for x in (k, v, tk, tv))
    go, gto, o, to = (wide(x) for x in (go, gto, o, to))
    finite = lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)
    p = (_masked(scale * (q @ k.mT), setting) - finite).exp()
    ds = _column(glse, p)
    gv = torch.zeros_like(v)
    if go is not None:
        ds = ds + go @ v.mT - (go * o).sum(-1, keepdim=True)
        gv = gv + operand(p).mT @ go
    gtq = gtk = gtv = dts = None
    if gto is not None or gmu is not None:
        dts = _column(gmu, p)
        rate = 0 if tq is None and tk is None else _tangent_of_logits(q, k, tq, tk, scale)
        rate = rate - mu.unsqueeze(-1)
        if gto is not None:
            dts = dts + gto @ v.mT - (gto * o).sum(-1, keepdim=True)
            ds = ds - (gto * to).sum((0, -1)).unsqueeze(-1)
            gv = gv + (operand(p * rate).mT @ gto).sum(0)
            if tv is not None:
                ds = ds + (gto @ tv.mT).sum(0)
                gtv = operand(p).mT @ gto
        ds = ds + (dts * rate).sum(0)
        dts = operand(p * dts)
        gtq = scale * (dts @ k) if tq is not None else None
        gtk = scale * (dts.mT @ q) if tk is not None else None
    ds = operand(p * ds)
    gq, gk = ds @ k, ds.mT @ q
    if dts is not None and tk is not None:
        gq = gq + (dts @ tk).sum(0)
    if dts is not None and tq is not None:
        gk = gk + (dts.mT @ tq).sum(0)
    gk, gv, gtk, gtv = (_grouped(g, groups) for g in (gk, gv, gtk, gtv))
    if setting.key_mask is not None:
        hidden = ~setting.key_mask[:, None, :, None]
        gk, gv, gtk, gtv = (
            None if g is None else g.masked_fill(hidden, 0) for g in (gk, gv, gtk, gtv)
        )
    found = (scale * gq, scale * gk, gv, gtq, gtk, gtv)
    return tuple(cast(g, dtype) for g in found)


def _shown(x: Tensor | None, key_mask: Tensor | None) -> Tensor | None:
    """Keys or values, zero where the key mask hides them, which may be NaN."""
    if x is None or key_mask is None:
        return x
    return x.masked_fill(~key_mask[:, None, :, None], 0)


def _keys(x: Tensor | None, heads: int) -> Tensor | None:
    """Keys or values for every query head."""
    if x is None:
        return None
    x = wide(x)
    return x if x.shape[-3] == heads else x.repeat_interleave(heads // x.shape[-3], -3)


def _grouped(g: Tensor | None, groups: int) -> Tensor | None:
    """The sum over the query heads that share a key head."""
    return None if g is None else g.unflatten(-3, (groups, -1)).sum(-3)


def _masked(logits: Tensor, setting: Setting) -> Tensor:
    mask = setting.attn_mask
    if mask is not None and mask.dtype != torch.bool:
        logits = logits + mask.to(logits.dtype)
    elif mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if setting.key_mask is not None:
        logits = logits.masked_fill(~setting.key_mask[:, None, None], -torch.inf)
    if setting.causal is not None:
        queries, keys = (torch.arange(n, device=logits.device) for n in logits.shape[-2:])
        logits = logits.masked_fill(keys > queries[:, None] + setting.causal, -torch.inf)
    return logits


def _tangent_of_logits(
    q: Tensor, k: Tensor, tq: Tensor | None, tk: Tensor | None, scale: float
) -> Tensor:
    parts = [] if tq is None else [tq @ k.mT]
    parts += [] if tk is None else [q @ tk.mT]
    return scale * sum(parts[1:], parts[0])


def _mean_of_first(rate: Tensor, key_mask: Tensor | None) -> Tensor:
    """[..., N, 1] over the first keys, but for hidden ones, whose rate is zero."""
    first = rate[..., :FIRST_KEYS]
    there = first.new_tensor(first.shape[-1])
    if key_mask is not None:
        there = key_mask[:, None, None, :FIRST_KEYS].sum(-1, keepdim=True)
    return first.sum(-1, keepdim=True) / there.clamp(min=1)


def _column(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(()) if x is None else x.unsqueeze(-1)
