"""Public functions `linear` and `linear_jvp`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tbcm_kernels import _dual


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` that spends no GEMM on a tangent that is not there.

        y = x Wᵀ + b

    Args: those of `F.linear`: x [..., I], weight [O, I], bias [O] or None, one dtype.

    Returns:
        y [..., O].

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: under forward mode, a second level of it, or torch.func.grad.

    Cost: one GEMM, two under forward mode; `torch.func.jvp` over `F.linear` runs three, because it
    multiplies by a materialised zero tangent of the weight.
    """
    if _dual.takes_stock(x) or not x.layout == weight.layout == torch.strided:
        return F.linear(x, weight, bias)
    if not _dual.in_dual_level():  # also under torch.func.grad: no tangent to lose
        return _pair("linear", x, weight, bias)[0]
    _dual.guard_levels("linear", "F.linear")
    primals, tangents = _dual.unpack(x, weight, bias)
    return _dual.pack(*_pair("linear", *primals, *tangents))


def linear_jvp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    tx: Tensor | None = None,
    tweight: Tensor | None = None,
    tbias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`linear` with explicit tangents.

        ty = tx Wᵀ + x tWᵀ + tb

    Args: those of `linear`, then the tangent of each; None is a zero tangent.

    Returns:
        (y, ty); ty is None where all tangents are, and does not require grad under
        `stop_tangent_gradient()`, whose backward then reads the primals alone.

    Raises:
        ValueError: shapes that do not fit, or a tangent that does not match its primal.
        RuntimeError: a forward-AD dual among the arguments.

    Precision: that of PyTorch's GEMM; autocast applies to the tangents too.
    """
    _dual.refuse_duals("linear_jvp", x, weight, bias, tx, tweight, tbias)
    _dual.check_tangents("linear_jvp", x=(x, tx), weight=(weight, tweight), bias=(bias, tbias))
    return _pair("linear_jvp", x, weight, bias, tx, tweight, tbias)


def _pair(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, tx: Tensor | None = None,
    tweight: Tensor | None = None, tbias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    _check(op, x, weight, bias)
    y, shape = _rows(x, weight, bias), (*x.shape[:-1], weight.shape[0])
    with _dual.tangent_scope():
        terms = []
        if tx is not None:
            terms.append(_rows(tx, weight))
        if tweight is not None:
            terms.append(_rows(x, tweight))
        if tbias is not None:
            tb = tbias.to(y.dtype)
            terms.append(tb.expand_as(y) if terms else tb.repeat(y.shape[0], 1))
        ty = sum(terms[1:], terms[0]) if terms else None
    # A view that is made under no_grad would refuse to be changed in place later.
    return y.view(shape), None if ty is None else ty.view(shape)


def _rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` on rows: on more dimensions it saves other tensors inside
    `torch.func.jvp` than outside, and a checkpointed function would not find them again."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 has no meaning where x is empty
    return F.linear(rows, weight, bias)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _dual.check_tensors(op, {"x": x, "weight": weight}, {"bias": bias})
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: weight must be [O, I] with I = x's last dimension, got "
            f"{_dual.describe(weight)} for {_dual.describe(x)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be [{weight.shape[0]}], got {_dual.describe(bias)}.")
