"""Public functions of the op gate + residual + LayerNorm + modulate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tbcm_kernels import _dispatch, _dual
from tbcm_kernels._library import or_none
from tbcm_kernels.adaln import reference
from tbcm_kernels.adaln.autograd import adaln_op


def adaln(
    x: Tensor,
    h: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Gated residual, then LayerNorm without weights, then modulation: adaLN of DiT and SANA.

        x' = x + gate · h
        y  = LayerNorm(x') · (1 + scale) + shift

    Args:
        x: residual stream [B, N, C], fp32, bf16, fp16 or fp64.
        h: branch output of x's shape and dtype, or in 16 bits beside an x in fp32, as autocast
            makes it; None leaves x as it is.
        gate, scale, shift: modulations [..., C] that broadcast to x, such as [B, 1, C] per sample
            or [B, N, C] per token, of any floating dtype; None is 1, 0, 0.
        eps: added to the variance.
        dtype: of y, x's by default; bf16 or fp16 beside an x in fp32, as the layer after it
            takes it under autocast.
        impl: "auto", "cpu", "cuda", "triton" or "reference" (plain PyTorch,
            differentiable to any order).

    Returns:
        (x', y), of x's shape and dtype, y in the `dtype` asked for. Without h, x' is x.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an `impl` that cannot run here.
        RuntimeError: nested forward mode, torch.func.grad, or a double backward.

    Precision: arithmetic in fp32 (fp64 for fp64). x' is rounded to x's dtype before it is
    normalised, y at the end. Modulations keep their own precision.
    Cost: reads x, h and writes x', y once. Saves x' for backward, h where gate needs a gradient.
    Source: adaLN-Zero of DiT, arXiv 2212.09748.
    """
    inputs = (x, h, gate, scale, shift)
    _check("adaln", *inputs, dtype)
    eps = _dual.number("adaln", "eps", eps)
    if impl == "reference":
        out, y, _, _ = reference.forward(*inputs, *[None] * 5, eps, dtype)
        return (x if out is None else _dual.settled(out)), _dual.settled(y)
    _dual.guard_levels("adaln")
    primals, tangents = _dual.unpack(*inputs)
    out, y, tout, ty = _pair(primals, tangents, eps, dtype, impl)
    return _dual.pack(out, tout), _dual.pack(y, ty)


def adaln_jvp(
    x: Tensor,
    h: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    tx: Tensor | None = None,
    th: Tensor | None = None,
    tgate: Tensor | None = None,
    tscale: Tensor | None = None,
    tshift: Tensor | None = None,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`adaln` with explicit tangents, value and tangent in one pass.

        tx' = tx + tgate · h + gate · th
        ty  = r ((tx' − mean tx') − x̂ mean(x̂ tx')) · (1 + scale) + x̂ · tscale + tshift

    Args: those of `adaln`, then the tangent of each; None is a zero tangent, whose work is skipped.
        With "reference" too gradients are of first order.

    Returns:
        (x', y, tx', ty). A tangent is None where every input it depends on has none. Under
        `stop_tangent_gradient()` the tangents do not require grad.

    Raises: as `adaln`; ValueError for a tangent that does not match its primal, RuntimeError
        for a forward-AD dual among the arguments.

    Cost: reads x, h, tx, th and writes x', y, tx', ty once. Backward through a tangent is exact, by
    differentiating the reference, and then saves all inputs.
    """
    primals = (x, h, gate, scale, shift)
    tangents = (tx, th, tgate, tscale, tshift)
    _check("adaln_jvp", *primals, dtype)
    eps = _dual.number("adaln_jvp", "eps", eps)
    _dual.guard_levels("adaln")
    _dual.refuse_duals("adaln_jvp", *primals, *tangents)
    _dual.check_tangents(
        "adaln_jvp", x=(x, tx), h=(h, th), gate=(gate, tgate), scale=(scale, tscale),
        shift=(shift, tshift),
    )  # fmt: skip
    return _pair(primals, tangents, eps, dtype, impl)


def _pair(
    primals: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
    eps: float,
    dtype: torch.dtype | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    x, h = primals[:2]
    tangents = _dual.held(*tangents)
    through = not _dual.tangent_gradient_stopped()
    chosen = _dispatch.choose_for_rows("adaln", impl, x)
    out, y, tout, ty = adaln_op(*primals, *tangents, eps, dtype, through, chosen)
    residual_tangent = _dual.present(tangents[:3])
    return (
        x if h is None else out,
        y,
        tangents[0] if h is None else or_none(tout, residual_tangent),
        or_none(ty, _dual.present(tangents)),
    )


def _check(
    op: str, x: Tensor, h: Tensor | None, gate: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, dtype: torch.dtype | None,
) -> None:  # fmt: skip
    modulations = {"gate": gate, "scale": scale, "shift": shift}
    _dual.check_tensors(op, {"x": x}, {"h": h, **modulations})
    if x.ndim != 3 or not x.dtype.is_floating_point:
        raise ValueError(f"{op}: x must be [B, N, C] and floating, got {_dual.describe(x)}.")
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: x has width 0, and a row of nothing has no norm.")
    if dtype is not None and not _fits(dtype, x):
        raise ValueError(
            f"{op}: dtype must be x's, or bf16 or fp16 beside an x in fp32, got {dtype} for "
            f"{_dual.describe(x)}."
        )
    if h is not None and not (h.shape == x.shape and h.device == x.device and _fits(h.dtype, x)):
        raise ValueError(
            f"{op}: h must match x, or be in 16 bits beside an x in fp32, got "
            f"{_dual.describe(h)} for {_dual.describe(x)}."
        )
    if gate is not None and h is None:
        raise ValueError(f"{op}: gate was given without h; pass the branch output that it gates.")
    for name, m in modulations.items():
        if m is None:
            continue
        if m.device != x.device or not (m.is_floating_point() and _broadcasts(m.shape, x.shape)):
            raise ValueError(
                f"{op}: {name} must be floating, on x's device, and [..., C] that broadcasts to "
                f"x, such as [B, 1, C]; got {_dual.describe(m)} for {_dual.describe(x)}."
            )


def _fits(dtype: torch.dtype, x: Tensor) -> bool:
    narrow = dtype in (torch.bfloat16, torch.float16)
    return dtype == x.dtype or (narrow and x.dtype == torch.float32)


def _broadcasts(small: torch.Size, big: torch.Size) -> bool:
    if len(small) == 3 and small == (big[0], 1, big[2]):
        return True
    pairs = zip(reversed(small), reversed(big), strict=False)
    return len(small) <= 3 and small[-1:] == big[-1:] and all(s in (1, b) for s, b in pairs)
