"""Public functions of softmax attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tbcm_kernels import _dispatch, _dual
from tbcm_kernels._dual import describe
from tbcm_kernels._library import autocast
from tbcm_kernels.attention import reference
from tbcm_kernels.attention.autograd import attention_op
from tbcm_kernels.attention.reference import Setting
from tbcm_kernels.rms_norm.heads import Norm, norm_argument

MAX_HEAD_DIM = 256
_TRITON_THROUGH = 128
"""The widest head dim whose backward through the tangent "auto" gives to Triton; more spill."""
_SPILLS = f"head dims above {_TRITON_THROUGH} spill registers through the tangent; ask by impl"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_mask: Tensor | None = None,
    causal_alignment: str = "upper_left",
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention with the arguments of `F.scaled_dot_product_attention`.

        S = scale · q kᵀ + bias,  P = softmax S,  o = P v

    Args:
        q: [B, H, N, D], or [B, N, D] for one head; any strides, so that a transposed [B, N, H, D]
            is not copied. fp32, bf16, fp16 or fp64, the same for q, k, v.
        k, v: [B, Hk, S, D] and [B, Hk, S, Dv]. D and Dv are multiples of 8 up to 256.
        attn_mask: broadcastable to [B, H, N, S] and never copied to that size. Boolean: True takes
            part. Floating: added to the logits; one that requires grad is refused.
        dropout_p: must be 0.
        is_causal: query i sees key j where j ≤ i; goes together with the masks.
        scale: factor of the logits; None is D^−½.
        enable_gqa: H may be a multiple of Hk, and consecutive query heads share a key head.
        key_mask: boolean [B, S], True takes part. Hidden keys and values are not read: they may
            hold NaN.
        causal_alignment: "upper_left" as in PyTorch, or "lower_right": j ≤ i + S − N, so that the
            last query sees the last key.
        q_norm, k_norm: (weight, eps) of an RMSNorm that is applied first, in the op: weight
            [D] for each head alone, or [H·D] ([Hk·D]) over all heads. On CPUs from row statistics
            as tiles are read; on GPUs written out once, as a key's tile is read many times.
        return_lse: also return the log-sum-exp of the logits, for `merge_attention`.
        impl: "auto", "cpu", "triton" or "reference" (plain PyTorch, any head dim, any order of
            backward, also of attn_mask).

    Returns:
        o [B, H, N, Dv] in q's dtype and memory order, or (o, lse) with lse [B, H, N], at least
        fp32. A query that sees no key gets o = 0 and lse = −∞.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, a mask that requires grad,
            or an `impl` that cannot run.
        RuntimeError: nested forward mode, torch.func.grad, a double backward, or a tangent of a
            mask or norm weight.

    Precision: accumulates in fp32 (fp64 for fp64). On CPUs rounded once, at the end. On GPUs in
    bf16 and fp16, P and P∘Ṡ (in backward also dS, dṠ, Ṗ) and the normalised q, k are rounded to
    that dtype where they enter a product, as FlashAttention does. Under autocast q, k and v are
    cast first, as for `F.scaled_dot_product_attention`, and o has that dtype.
    Cost: 2 GEMMs of 2·B·H·N·S·D FLOPs; memory O(N + S). Saves q, k, v, o, lse for backward.
    Source: arXiv 2205.14135; the tangent: attention/README.md.
    """
    _check_dropout(dropout_p)
    plain = impl == "reference"  # which PyTorch differentiates
    if not plain:
        _dual.guard_levels("attention")
    primals, tangents = ((q, k, v), (None,) * 3) if plain else _dual.unpack(q, k, v)
    _refuse_moving(attn_mask)
    values = _run(
        "attention", primals, tangents, q_norm, k_norm, attn_mask, key_mask, is_causal,
        causal_alignment, scale, enable_gqa, impl,
    )  # fmt: skip
    if plain:
        o, lse = map(_dual.settled, values[:2])
    else:
        o, lse = map(_dual.pack, values[:2], values[2:])
    return (o, lse) if return_lse else o


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_mask: Tensor | None = None,
    causal_alignment: str = "upper_left",
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> tuple[Tensor | None, ...]:
    """`attention` with explicit tangents, value and tangent in one pass.

        Ṡ = scale · (tq kᵀ + q tkᵀ),  μ = rowsum(P∘Ṡ),  to = (P∘Ṡ) v − μ o + P tv

    Args: those of `attention`, with the tangents of q, k, v after them; None is a zero tangent.

    Returns:
        (o, to), or (o, lse, to, tlse) with `return_lse`, where tlse = μ [B, H, N]. Tangents are
        None where tq, tk, tv all are, and do not require grad under `stop_tangent_gradient()`.

    Raises: as `attention`; ValueError for a tangent that does not match its primal, RuntimeError
        for a forward-AD dual among the arguments.

    Cost: 6 GEMMs for tangents of q, k and v, 4 for that of q alone, in one launch. Backward through
    `to` is exact for all six inputs, in 15 GEMMs, and saves them, o, lse, to and tlse.
    """
    _check_dropout(dropout_p)
    if impl != "reference":
        _dual.guard_levels("attention")
    _dual.refuse_duals("attention_jvp", q, k, v, tq, tk, tv, attn_mask)
    _dual.check_tangents("attention_jvp", q=(q, tq), k=(k, tk), v=(v, tv))
    o, lse, to, tlse = _run(
        "attention_jvp", (q, k, v), (tq, tk, tv), q_norm, k_norm, attn_mask, key_mask, is_causal,
        causal_alignment, scale, enable_gqa, impl,
    )  # fmt: skip
    return (o, lse, to, tlse) if return_lse else (o, to)


def merge_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over disjoint parts of them, as rings do.

        lse = log Σᵢ exp lseᵢ,  o = Σᵢ exp(lseᵢ − lse) oᵢ

    Args:
        parts: (o [..., N, Dv], lse [..., N]) of each part, as `attention(..., return_lse=True)`
            gives them; they may be duals.

    Returns:
        (o, lse) in the dtypes of the first part. Plain PyTorch: tangents and gradients follow.

    Raises:
        ValueError: no parts, or parts of different shapes.
    """
    parts = list(parts)
    if not parts or any(o.shape[:-1] != lse.shape for o, lse in parts):
        raise ValueError("merge_attention: parts must be pairs of o [..., N, D] and lse [..., N].")
    if any(o.shape != parts[0][0].shape for o, _ in parts):
        raise ValueError("merge_attention: all parts must have one shape.")
    # A part without keys has lse = −∞, whose tangent and gradient must stay out: exp(−∞) = 0, but
    # 0 · NaN is not.
    seen = torch.stack([lse != -torch.inf for _, lse in parts])
    lses = torch.stack([lse for _, lse in parts])
    lses = torch.where(seen, lses, torch.finfo(lses.dtype).min / 2)
    top = lses.detach().amax(0)  # torch.logsumexp of a dual has no backward in dual_level()
    lse = top + (lses - top).exp().sum(0).log()
    weights = (lses - lse).exp() * seen
    o = sum(w.unsqueeze(-1) * o for w, (o, _) in zip(weights, parts, strict=True))
    lse = torch.where(seen.any(0), lse, -torch.inf)
    return tuple(
        _dual.settled(x.to(like.dtype)) for x, like in zip((o, lse), parts[0], strict=True)
    )


def _run(
    op: str, primals: Sequence[Tensor], tangents: Sequence[Tensor | None], q_norm: Norm | None,
    k_norm: Norm | None, attn_mask: Tensor | None, key_mask: Tensor | None, is_causal: bool,
    alignment: str, scale: float | None, enable_gqa: bool, impl: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(o, lse, to, tlse); checks the arguments and makes them canonical."""
    masks = {"attn_mask": attn_mask, "key_mask": key_mask}
    _dual.check_tensors(op, dict(zip("qkv", primals, strict=True)), masks)
    primals, tangents = (autocast(x, primals[0].device.type) for x in (primals, tangents))
    _check(op, *primals, enable_gqa, exact=impl != "reference")
    squeeze = primals[0].ndim == 3
    q, k, v = (x.unsqueeze(1) for x in primals) if squeeze else primals
    tangents = [None if t is None else t.unsqueeze(1) if squeeze else t for t in tangents]
    norms = [
        norm_argument(op, n, x, w) for n, x, w in (("q_norm", q, q_norm), ("k_norm", k, k_norm))
    ]
    attn_mask, key_mask = _masks(op, q, k, attn_mask, key_mask, squeeze, impl)
    if alignment not in ("upper_left", "lower_right"):
        raise ValueError(
            f"{op}: causal_alignment must be upper_left or lower_right, got {alignment!r}."
        )
    causal = (k.shape[2] - q.shape[2] if alignment == "lower_right" else 0) if is_causal else None
    scale = max(1, q.shape[3]) ** -0.5 if scale is None else _dual.number(op, "scale", scale)
    setting = (attn_mask, key_mask, scale, causal, norms[0][1], norms[1][1])
    inputs = (q, k, v, norms[0][0], norms[1][0])
    values = _pair(inputs, tangents, setting, impl)
    return tuple(None if x is None else x.squeeze(1) for x in values) if squeeze else values


def _pair(
    inputs: Sequence[Tensor | None], tangents: Sequence[Tensor | None], setting: Sequence,
    impl: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    tangents = _dual.held(*tangents)
    lanes = [None if t is None else t.unsqueeze(0) for t in tangents]
    if impl == "reference":
        o, lse, *moved = reference.forward(*inputs, *lanes, Setting(*setting))
        moved = [None if x is None else x.squeeze(0) for x in moved]
        return o, lse, *_dual.held(*moved)
    through = not _dual.tangent_gradient_stopped()
    chosen = _choose(impl, inputs, tangents, through)
    o, lse, to, mu = attention_op(*inputs, *lanes, *setting, through, chosen)
    if not _dual.present(tangents):
        return o, lse, None, None
    return o, lse, to.squeeze(0), mu.squeeze(0)


def _choose(
    impl: str, inputs: Sequence[Tensor | None], tangents: Sequence[Tensor | None], through: bool
) -> str:
    """The implementation; the way through the tangent spills in Triton at large head dims."""
    q, _, v, *_ = inputs
    spills = (
        max(q.shape[3], v.shape[3]) > _TRITON_THROUGH
        and through
        and _dual.present(tangents)
        and torch.is_grad_enabled()
        and any(x is not None and x.requires_grad for x in (*inputs, *tangents))
    )
    return _dispatch.choose("attention", impl, q, avoid=(("triton", _SPILLS),) if spills else ())


def _check_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise ValueError(
            f"attention: dropout_p must be 0, got {dropout_p}; call model.eval(), or set it to 0."
        )


def _refuse_moving(attn_mask: Tensor | None) -> None:
    if isinstance(attn_mask, Tensor) and _dual.any_dual(attn_mask):
        raise RuntimeError(
            "attention: attn_mask carries a tangent, which the kernels do not take: use "
            "F.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)."
        )


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool, exact: bool) -> None:
    if q.ndim not in (3, 4) or not q.dtype.is_floating_point:
        raise ValueError(f"{op}: q must be floating [B, H, N, D] or [B, N, D], got {describe(q)}.")
    for name, x in (("k", k), ("v", v)):
        if x.ndim != q.ndim or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{op}: {name} must have q's number of dimensions, dtype and device, got "
                f"{describe(x)} for {describe(q)}."
            )
    if k.shape[-1] != q.shape[-1] or k.shape[:-1] != v.shape[:-1] or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"{op}: k must be [B, Hk, S, D] and v [B, Hk, S, Dv] with q's B and D, got "
            f"{list(k.shape)} and {list(v.shape)} for q {list(q.shape)}; expand them where they "
            f"should broadcast."
        )
    if q.ndim == 4 and q.shape[1] != k.shape[1]:
        if not enable_gqa:
            raise ValueError(
                f"{op}: q has {q.shape[1]} heads and k {k.shape[1]}; pass enable_gqa=True where "
                f"query heads share key heads."
            )
        if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            raise ValueError(f"{op}: q's {q.shape[1]} heads are no multiple of k's {k.shape[1]}.")
    for name, width in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
        if exact and (width % 8 or not 0 < width <= MAX_HEAD_DIM):
            raise ValueError(
                f"{op}: the head dim of {name} must be a multiple of 8 up to {MAX_HEAD_DIM}, got "
                f'{width}; pad it, or pass impl="reference".'
            )


def _masks(
    op: str, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_mask: Tensor | None,
    squeeze: bool, impl: str,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """attn_mask as a view [B, H, N, S], key_mask [B, S], which a mask of keys alone becomes."""
    batch, keys = k.shape[0], k.shape[2]
    if key_mask is not None and (
        key_mask.shape != (batch, keys)
        or key_mask.dtype != torch.bool
        or key_mask.device != q.device
    ):
        raise ValueError(
            f"{op}: key_mask must be boolean [B, S] = [{batch}, {keys}] on {q.device}, got "
            f"{describe(key_mask)}."
        )
    if attn_mask is None:
        return None, key_mask
    boolean = attn_mask.dtype == torch.bool
    if not (boolean or attn_mask.is_floating_point()) or attn_mask.device != q.device:
        raise ValueError(
            f"{op}: attn_mask must be boolean or floating on {q.device}, got {describe(attn_mask)}."
        )
    if attn_mask.requires_grad and torch.is_grad_enabled() and impl != "reference":
        raise ValueError(
            f"{op}: attn_mask requires grad, which the kernels do not compute: detach it, or pass "
            f'impl="reference".'
        )
    if squeeze and attn_mask.ndim == 3:
        attn_mask = attn_mask.unsqueeze(1)
    shape = (*q.shape[:3], keys)
    sizes = zip(reversed(attn_mask.shape), reversed(shape), strict=False)
    if attn_mask.ndim > 4 or any(m not in (1, n) for m, n in sizes):
        raise ValueError(
            f"{op}: attn_mask must broadcast to [B, H, N, S] = {list(shape)}, got "
            f"{list(attn_mask.shape)}."
        )
    full = attn_mask.expand(shape)
    of_keys = boolean and all(n == 1 for n in attn_mask.shape[-3:-1])
    if of_keys and key_mask is None and 0 not in shape[1:3]:
        return None, full[:, 0, 0]
    return full, key_mask
