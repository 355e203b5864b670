"""RMSNorm of [..., H, N, D] inside attention: of each head alone, or of a row over all heads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tbcm_kernels._dual import any_dual, describe
from tbcm_kernels._library import Rounding, differentiate, unrounded, wide
from tbcm_kernels.rms_norm import reference

Norm = tuple[Tensor, float]
"""Weight and eps of an RMSNorm."""


def normalized(
    x: Tensor, weight: Tensor | None, tx: Tensor | None, eps: float, operand: Rounding = unrounded
) -> tuple[Tensor, Tensor | None]:
    """The norm and its tangent in plain PyTorch, at least fp32; x itself without a weight.

    The weight is [D], for each head, or [H·D], over all heads.
    """
    x, tx = wide(x), wide(tx)
    if weight is None:
        return x, tx
    heads = heads_of_norm(x, weight)
    x, tx = (None if t is None else merge(t, heads) for t in (x, tx))
    pair = reference.forward(x, weight, tx, None, eps)
    return tuple(None if t is None else operand(split(t, heads)) for t in pair)


def norm_backward(
    gy: Tensor | None, gty: Tensor | None, x: Tensor, weight: Tensor, tx: Tensor | None, eps: float
) -> Sequence[Tensor | None]:
    """Gradients of x, the weight and tx from those of the normalised x and tx."""
    return differentiate(lambda x, w, tx: normalized(x, w, tx, eps), (x, weight, tx), (gy, gty))


def heads_of_norm(x: Tensor, weight: Tensor) -> int:
    """How many heads of x [B, H, N, D] make a row of a norm of this weight: all, or 1."""
    return 1 if weight.shape[0] == x.shape[-1] else x.shape[1]


def merge(x: Tensor, heads: int) -> Tensor:
    """[..., H, N, D] as rows of all heads, or as it is where `heads` is 1."""
    if heads == 1:
        return x
    x = x.transpose(-3, -2)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def split(x: Tensor, heads: int) -> Tensor:
    """The inverse of `merge`."""
    if heads == 1:
        return x
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(-3, -2)


def norm_argument(op: str, name: str, x: Tensor, norm: Norm | None) -> tuple[Tensor | None, float]:
    """Weight and eps of the norm of x [B, H, N, D] that an argument gives, if it does.

    Raises:
        ValueError: not a pair of a weight and eps, or a weight that fits neither D nor H·D.
        RuntimeError: a weight that carries a tangent.
    """
    if norm is None:
        return None, 0.0
    paired = isinstance(norm, tuple | list) and len(norm) == 2 and isinstance(norm[1], float | int)
    if not paired or not isinstance(norm[0], Tensor):
        raise ValueError(f"{op}: {name} must be a pair (weight tensor, eps), got {norm!r:.80}.")
    weight, eps = norm
    widths = (x.shape[3], x.shape[1] * x.shape[3])
    fits = weight.ndim == 1 and weight.shape[0] > 0 and any(weight.shape[0] == w for w in widths)
    if not (fits and weight.is_floating_point()) or weight.device != x.device:
        raise ValueError(
            f"{op}: {name} must be (weight, eps) with a floating weight of {widths[0]} elements "
            f"(each head alone) or {widths[1]} (all heads) on {x.device}, got {describe(weight)}."
        )
    if any_dual(weight):
        raise RuntimeError(
            f"{op}: the weight of {name} carries a tangent, which the kernels do not take: detach "
            f"it, or leave out the argument and apply rms_norm before (fuse() covers tangents of "
            f"inputs, not of parameters)."
        )
    return weight, float(eps)
