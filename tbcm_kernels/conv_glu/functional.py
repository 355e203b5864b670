"""Public functions of the gated convolution: the middle of GLUMBConv."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tbcm_kernels import _dispatch, _dual
from tbcm_kernels._library import or_none
from tbcm_kernels.conv_glu import reference
from tbcm_kernels.conv_glu.autograd import conv_glu_op

_SHARED = 124 << 10
"""Bytes of shared memory that a block of the CUDA kernel's backward takes in fp32."""


def conv_glu(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    height: int,
    width: int,
    impl: str = "auto",
) -> Tensor:
    """SiLU, depthwise 3×3 convolution, gated linear unit, on tokens.

        u = silu(a),  [c₁; c₂] = conv(u) + bias,  y = c₁ · silu(c₂)

    Args:
        a: tokens [B, height · width, 2K] in row order, fp32, bf16, fp16 or fp64.
        weight: [2K, 1, 3, 3], as `torch.nn.Conv2d(2K, 2K, 3, padding=1, groups=2K)` holds it, of
            any floating dtype.
        bias: [2K] or None.
        height, width: the grid of the tokens; beyond its border are zeros.
        impl: "auto", "cpu", "cuda" or "reference" (plain PyTorch, differentiable to
            any order).

    Returns:
        y [B, height · width, K] of a's dtype.

    Raises:
        ValueError: a shape or device that does not fit, or an `impl` that cannot run here.
        RuntimeError: nested forward mode, torch.func.grad, or a double backward.

    Precision: arithmetic in fp32 (fp64 for fp64), rounded once at the end.
    Cost: reads a and writes y once. Saves a for backward.
    Source: GLUMBConv of SANA, arXiv 2410.10629.
    """
    _check("conv_glu", a, weight, bias, height, width)
    if impl == "reference":
        y, _ = reference.forward(a, weight, bias, None, None, None, height, width)
        return _dual.settled(y)
    _dual.guard_levels("conv_glu")
    primals, tangents = _dual.unpack(a, weight, bias)
    return _dual.pack(*_pair(primals, tangents, height, width, impl))


def conv_glu_jvp(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    ta: Tensor | None = None,
    tweight: Tensor | None = None,
    tbias: Tensor | None = None,
    *,
    height: int,
    width: int,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`conv_glu` with explicit tangents, value and tangent in one pass.

        tc = conv(silu′(a) ta) + conv(u; tweight) + tbias
        ty = tc₁ · silu(c₂) + c₁ · silu′(c₂) · tc₂

    Args: those of `conv_glu`, then the tangent of each; None is a zero tangent. With tangents of
        weight or bias "auto" runs the reference, and other kernels raise. With "reference" too
        gradients are of first order.

    Returns:
        (y, ty); ty is None where all tangents are, and does not require grad under
        `stop_tangent_gradient()`.

    Raises: as `conv_glu`; ValueError for a tangent that does not match its primal, RuntimeError
        for a forward-AD dual among the arguments.

    Cost: reads a, ta and writes y, ty once. Backward through ty is exact, by differentiating the
    reference, and then saves all inputs.
    """
    _check("conv_glu_jvp", a, weight, bias, height, width)
    primals, tangents = (a, weight, bias), (ta, tweight, tbias)
    _dual.guard_levels("conv_glu")
    _dual.refuse_duals("conv_glu_jvp", *primals, *tangents)
    _dual.check_tangents("conv_glu_jvp", a=(a, ta), weight=(weight, tweight), bias=(bias, tbias))
    return _pair(primals, tangents, height, width, impl)


def _pair(
    primals: Sequence[Tensor | None], tangents: Sequence[Tensor | None], height: int, width: int,
    impl: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    tangents = _dual.held(*tangents)
    through = not _dual.tangent_gradient_stopped()
    chosen = choose(impl, primals[0], weights_move=_dual.present(tangents[1:]))
    y, ty = conv_glu_op(*primals, *tangents, height, width, through, chosen)
    return y, or_none(ty, _dual.present(tangents))


def choose(impl: str, a: Tensor, weights_move: bool = False) -> str:
    """The implementation; kernels take a tangent of a alone, and CUDA's much memory in fp32."""
    unfit = avoid = ()
    if weights_move:
        reason = "it takes a tangent of a alone; leave impl out"
        unfit = tuple((kernel, reason) for kernel in _dispatch.OPS["conv_glu"])
    in_fp32 = a.is_cuda and a.dtype == torch.float32
    if in_fp32 and _dispatch.shared_memory(a.device.index) < _SHARED:
        reason = f"in fp32 its backward takes {_SHARED >> 10} KiB of shared memory a block"
        avoid = (("cuda", reason),)
    return _dispatch.choose("conv_glu", impl, a, unfit=unfit, avoid=avoid)


def _check(
    op: str, a: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int
) -> None:
    _dual.check_tensors(op, {"a": a, "weight": weight}, {"bias": bias})
    if any(n is None or isinstance(n, (float, str)) for n in (height, width)):
        raise ValueError(f"{op}: height and width must be integers, got {height!r} and {width!r}.")
    if a.ndim != 3 or a.shape[2] % 2 or a.shape[2] == 0 or not a.dtype.is_floating_point:
        raise ValueError(f"{op}: a must be [B, N, 2K] and floating, got {_dual.describe(a)}.")
    if height < 1 or width < 1 or a.shape[1] != height * width:
        raise ValueError(
            f"{op}: height · width must be a's {a.shape[1]} tokens, got {height} · {width}."
        )
    if weight.shape != (a.shape[2], 1, 3, 3) or weight.device != a.device:
        raise ValueError(
            f"{op}: weight must be [{a.shape[2]}, 1, 3, 3] on {a.device}, got "
            f"{_dual.describe(weight)}."
        )
    if not all(p is None or p.is_floating_point() for p in (weight, bias)):
        raise ValueError(f"{op}: weight and bias must be floating.")
    if bias is not None and (bias.shape != a.shape[2:] or bias.device != a.device):
        raise ValueError(
            f"{op}: bias must be [{a.shape[2]}] on {a.device}, got {_dual.describe(bias)}."
        )
