"""The ops tbcm::adaln and tbcm::adaln_backward: schemas, fakes, and what is saved for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbcm_kernels import _dispatch
from tbcm_kernels._dual import present
from tbcm_kernels._library import CHUNK, cast, differentiate, in_rows, present_or_absent, register
from tbcm_kernels.adaln import buffers, reference


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *operands, eps, dtype, _, impl = arguments
    x, h, gate, scale, shift, tx, th, *others = operands
    kernel, dtype = _dispatch.implementation("adaln", impl), dtype or x.dtype
    if _takes_both(kernel, x, dtype, h, th):
        return present_or_absent(x, kernel.forward(*operands, eps, dtype=dtype))
    h, th = cast(h, x.dtype), cast(th, x.dtype)  # saved as it came
    out, y, tout, ty = kernel.forward(x, h, gate, scale, shift, tx, th, *others, eps)
    return in_rows(x, (out, cast(y, dtype), tout, cast(ty, dtype)))


def _takes_both(kernel: Any, x: Tensor, dtype: torch.dtype, *narrow: Tensor | None) -> bool:
    """Whether a kernel reads and writes a stream in fp32 beside the others in 16 bits."""
    return (
        getattr(kernel, "MIXED", False)
        and x.dtype == torch.float32 != dtype
        and all(v is None or v.dtype == dtype for v in narrow)
    )


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    *operands, _, dtype, _, _ = arguments
    return present_or_absent(arguments[0], buffers.outputs(*operands, dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h, gate, scale, shift, *tangents, eps, dtype, through, impl = inputs
    ctx.set_materialize_grads(False)
    ctx.eps, ctx.impl, ctx.dtype = eps, impl, dtype
    ctx.h_dtype = None if h is None else h.dtype
    ctx.shapes = [None if m is None else (m.shape, m.dtype) for m in (gate, scale, shift)]
    ctx.through = through and present(tangents)
    if ctx.through:
        ctx.save_for_backward(x, h, gate, scale, shift, *tangents)
    else:
        ctx.mark_non_differentiable(*output[2:])
        kept_h = h if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(x if h is None else output[0], kept_h, gate, scale)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.through:
        # Exact through the tangent by differentiating the reference; the kernels take the rest.
        found = differentiate(
            lambda *inputs: reference.forward(*inputs, ctx.eps, ctx.dtype),
            ctx.saved_tensors,
            grads,
        )
        return *found, *[None] * 4
    gout, gy = grads[:2]
    out, h, gate, scale = ctx.saved_tensors
    gated, *others = ctx.needs_input_grad[2:5]
    needs = (gated, *(n and gy is not None for n in others))
    chunk = 0 if ctx.impl == "cuda" else CHUNK  # 0: it adds the chunks' sums itself
    if any(s is not None and s[0][-2:-1] == out.shape[1:2] for s in ctx.shapes):
        chunk = 1
    gx, gh, *sums = adaln_backward(
        gout, gy, out, h, gate, scale, *needs, chunk, ctx.eps, ctx.h_dtype, ctx.impl
    )
    reduced = [
        g.sum_to_size(s[0]).to(s[1]) if n else None
        for g, s, n in zip(sums, ctx.shapes, needs, strict=True)
    ]
    if ctx.h_dtype is None:
        gh = None
    elif gate is None:  # h is added as it is
        gh = gx.to(ctx.h_dtype)
    return gx, gh, *reduced, *[None] * 9


def _backward_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    gout, gy, out, h, gate, scale, *rest, dtype, impl = arguments
    kernel = _dispatch.implementation("adaln", impl)
    narrow = dtype or (out if gy is None else gy).dtype
    if _takes_both(kernel, out, narrow, gy, h):
        return present_or_absent(out, kernel.backward(*arguments[:-2], dtype=narrow))
    gy, h = cast(gy, out.dtype), cast(h, out.dtype)
    gx, gh, *sums = kernel.backward(gout, gy, out, h, gate, scale, *rest)
    return in_rows(out, (gx, cast(gh, dtype or out.dtype), *sums))


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    *operands, _, dtype, _ = arguments
    return present_or_absent(arguments[2], buffers.gradients(*operands, dtype))


adaln_op = register(
    "adaln",
    "(Tensor x, Tensor? h, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? tx, Tensor? th, "
    "Tensor? tgate, Tensor? tscale, Tensor? tshift, float eps, ScalarType? dtype, bool through, "
    "str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _setup, _backward,
)  # fmt: skip
adaln_backward = register(
    "adaln_backward",
    "(Tensor? gout, Tensor? gy, Tensor out, Tensor? h, Tensor? gate, Tensor? scale, "
    "bool needs_gate, bool needs_scale, bool needs_shift, int chunk, float eps, "
    "ScalarType? dtype, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel, _backward_fake,
)  # fmt: skip
