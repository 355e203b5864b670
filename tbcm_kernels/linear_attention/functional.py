"""Public functions of linear attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tbcm_kernels import _dispatch, _dual
from tbcm_kernels._dual import describe
from tbcm_kernels._library import or_none
from tbcm_kernels.linear_attention import reference
from tbcm_kernels.linear_attention.autograd import linear_attention_op
from tbcm_kernels.linear_attention.reference import FEATURE_MAPS, Setting
from tbcm_kernels.rms_norm.heads import Norm, norm_argument

MAX_HEAD_DIM = 256
CUDA_HEADS = 96
"""A warp each, twelve a block, eight blocks a cluster."""
CUDA_SHARED = 222 << 10
"""Bytes of shared memory of their blocks at most; every GPU that has them has clusters."""
TRITON_WIDEST = 128
"""The widest head dim that "auto" gives to Triton."""
_SPILLS = f"head dims above {TRITON_WIDEST} spill registers; ask by impl"


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "relu",
    eps: float = 1e-15,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    is_causal: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Linear attention with a normaliser, as SANA's ReLU attention.

        S = φ(k)ᵀ [v, 1],  n = φ(q) S,  o = n_v / (n_1 + eps)

    Args:
        q: [B, H, N, D]; any strides, so that a transposed [B, N, H, D] is not copied. fp32, bf16,
            fp16 or fp64, the same for q, k, v.
        k, v: [B, H, S, D] and [B, H, S, Dv]. D and Dv are at most 256.
        feature_map: φ: "relu", "elu+1", or "identity" for q and k that are features already.
        eps: added to the normaliser; 1e-15 in diffusers, 1e-8 in NVlabs' SANA.
        q_norm, k_norm: (weight, eps) of an RMSNorm that is applied before φ, in the op, from row
            statistics: weight [D] for each head alone, or [H·D] over all heads.
        is_causal: must be False: there is no causal form yet.
        impl: "auto", "cpu", "triton", "cuda" (relu, up to 96 heads of 32, bf16 and fp16, Hopper) or
            "reference" (plain PyTorch, any head dim, any order of backward).

    Returns:
        o [B, H, N, Dv] in q's dtype and memory order.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, or an `impl` that cannot
            run here.
        RuntimeError: nested forward mode, torch.func.grad, a double backward, or a tangent of a
            norm weight.

    Precision: arithmetic and state in fp32 (fp64 for fp64), also under autocast; rounded once at
    the end, and but for CUDA, where a norm is fused, its output's gradient on the way. Products
    have the digits of fp32; Triton's have 16 for bf16 with "elu+1", and 22 for fp16 in heads up to
    32, and for fp32 there where TF32 is allowed.
    Cost: 4·B·H·N·D·Dv FLOPs; reads q, k, v, writes o. Saves q, k, v and S, fp32 [B, H, D, Dv + 1].
    Source: arXiv 2006.16236; with ReLU, arXiv 2205.14756 and SANA, arXiv 2410.10629.
    """
    plain = impl == "reference"  # which PyTorch differentiates
    if not plain:
        _dual.guard_levels("linear_attention")
    primals, tangents = ((q, k, v), (None,) * 3) if plain else _dual.unpack(q, k, v)
    o, to = _run(
        "linear_attention", primals, tangents, feature_map, eps, q_norm, k_norm, is_causal, impl
    )
    return _dual.settled(o) if plain else _dual.pack(o, to)


def linear_attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    feature_map: str = "relu",
    eps: float = 1e-15,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    is_causal: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`linear_attention` with explicit tangents, value and tangent in one pass.

        Ṡ = (φ′(k) tk)ᵀ [v, 1] + φ(k)ᵀ [tv, 0],  ṅ = φ′(q) tq S + φ(q) Ṡ
        to = (ṅ_v − o ṅ_1) / (n_1 + eps)

    Args: those of `linear_attention`, with the tangents of q, k, v after them; None is a zero
        tangent.

    Returns:
        (o, to); to is None where tq, tk, tv all are, and does not require grad under
        `stop_tangent_gradient()`.

    Raises: as `linear_attention`; ValueError for a tangent that does not match its primal,
        RuntimeError for a forward-AD dual among the arguments.

    Cost: 12·B·H·N·D·Dv FLOPs; reads q, k, v and their tangents, writes o, to. Backward through to
    is exact, by differentiating the reference, and then saves all inputs.
    """
    if impl != "reference":
        _dual.guard_levels("linear_attention")
    _dual.refuse_duals("linear_attention_jvp", q, k, v, tq, tk, tv)
    _dual.check_tangents("linear_attention_jvp", q=(q, tq), k=(k, tk), v=(v, tv))
    return _run(
        "linear_attention_jvp", (q, k, v), (tq, tk, tv), feature_map, eps, q_norm, k_norm,
        is_causal, impl,
    )  # fmt: skip


def _run(
    op: str, primals: Sequence[Tensor], tangents: Sequence[Tensor | None], feature_map: str,
    eps: float, q_norm: Norm | None, k_norm: Norm | None, is_causal: bool, impl: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    _check(op, *primals, feature_map, is_causal, exact=impl != "reference")
    q, k, v = primals
    q_weight, q_eps = norm_argument(op, "q_norm", q, q_norm)
    k_weight, k_eps = norm_argument(op, "k_norm", k, k_norm)
    tangents = _dual.held(*tangents)
    inputs = (*primals, q_weight, k_weight, *tangents)
    setting = (feature_map, _dual.number(op, "eps", eps), q_eps, k_eps)
    if impl == "reference":
        o, to, _ = reference.forward(*inputs, Setting(*setting))
        return o, *_dual.held(to)
    chosen = _choose(impl, q, v, feature_map)
    through = not _dual.tangent_gradient_stopped()
    o, to, _ = linear_attention_op(*inputs, *setting, through, chosen)
    return o, or_none(to, _dual.present(tangents))


def _choose(impl: str, q: Tensor, v: Tensor, feature_map: str) -> str:
    """The implementation; Triton's spill at large head dims."""
    why_not = why_not_cuda(q, v, feature_map)
    unfit = (("cuda", why_not),) if why_not else ()
    avoid = (("triton", _SPILLS),) if max(q.shape[3], v.shape[3]) > TRITON_WIDEST else ()
    return _dispatch.choose("linear_attention", impl, q, unfit=unfit, avoid=avoid)


def why_not_cuda(q: Tensor, v: Tensor, feature_map: str) -> str | None:
    """Why the CUDA kernels do not take such tensors, in one clause; None where they do."""
    if feature_map != "relu" or (q.shape[3], v.shape[3]) != (32, 32) or q.shape[1] > CUDA_HEADS:
        return f'it takes feature_map="relu" and up to {CUDA_HEADS} heads of 32'
    if q.is_cuda and _dispatch.shared_memory(q.device.index) < CUDA_SHARED:
        size = f"{CUDA_SHARED >> 10} KiB of shared memory a block"
        return f"it needs a GPU with clusters of blocks and {size}, such as Hopper"
    return None


def _check(
    op: str, q: Tensor, k: Tensor, v: Tensor, feature_map: str, is_causal: bool, exact: bool
) -> None:
    _dual.check_tensors(op, {"q": q, "k": k, "v": v})
    if is_causal:
        raise ValueError(f"{op}: is_causal must be False; there is no causal form yet.")
    if feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"{op}: feature_map must be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}."
        )
    if q.ndim != 4 or not q.dtype.is_floating_point:
        raise ValueError(f"{op}: q must be floating [B, H, N, D], got {describe(q)}.")
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4 or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{op}: {name} must be of four dimensions and of q's dtype and device, got "
                f"{describe(x)} for {describe(q)}."
            )
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3] or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{op}: k must be [B, H, S, D] and v [B, H, S, Dv] with q's B, H and D, got "
            f"{list(k.shape)} and {list(v.shape)} for q {list(q.shape)}."
        )
    for name, width in (("q and k", q.shape[3]), ("v", v.shape[3])):
        if exact and not 0 < width <= MAX_HEAD_DIM:
            raise ValueError(
                f"{op}: the head dim of {name} must be from 1 to {MAX_HEAD_DIM}, got {width}; pass "
                f'impl="reference".'
            )
