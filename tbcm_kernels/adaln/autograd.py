"""The ops tbcm::adaln and tbcm::adaln_backward: schemas, fakes, and what is saved for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbcm_kernels import _dispatch
from tbcm_kernels._dual import present
from tbcm_kernels._library import CHUNK, absent, differentiate, present_or_absent, register
from tbcm_kernels.adaln import reference
from tbcm_kernels.adaln.buffers import outputs_there


def _forward(
    x: Tensor, h: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    tx: Tensor | None, th: Tensor | None, tgate: Tensor | None, tscale: Tensor | None,
    tshift: Tensor | None, eps: float, dtype: torch.dtype | None, through: bool, impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    kernel, dtype = _dispatch.implementation("adaln", impl), dtype or x.dtype
    if _takes_both(kernel, x, dtype, h, th):
        outputs = kernel.forward(
            x, h, gate, scale, shift, tx, th, tgate, tscale, tshift, eps, dtype
        )
    else:
        h, th = _as(x.dtype, h), _as(x.dtype, th)  # saved as it came
        outputs = kernel.forward(x, h, gate, scale, shift, tx, th, tgate, tscale, tshift, eps)
        out, y, tout, ty = outputs
        outputs = out, _as(dtype, y), tout, _as(dtype, ty)
    return present_or_absent(x, outputs)


def _takes_both(kernel: Any, x: Tensor, dtype: torch.dtype, *narrow: Tensor | None) -> bool:
    """Whether a kernel reads and writes a stream in fp32 beside the others in 16 bits."""
    return (
        getattr(kernel, "MIXED", False)
        and x.dtype == torch.float32 != dtype
        and all(v is None or v.dtype == dtype for v in narrow)
    )


def _as(dtype: torch.dtype, x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _forward_fake(
    x: Tensor, h: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    tx: Tensor | None, th: Tensor | None, tgate: Tensor | None, tscale: Tensor | None,
    tshift: Tensor | None, eps: float, dtype: torch.dtype | None, through: bool, impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    there = outputs_there(h, tx, th, tgate, tscale, tshift)
    dtypes = (x.dtype, dtype or x.dtype) * 2
    return tuple(
        x.new_empty(x.shape, dtype=d) if t else absent(x)
        for t, d in zip(there, dtypes, strict=True)
    )


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
    needs = [
        n and s is not None for n, s in zip(ctx.needs_input_grad[2:5], ctx.shapes, strict=True)
    ]
    chunk = 0 if ctx.impl == "cuda" else CHUNK  # 0: it adds the chunks' sums itself
    if any(s is not None and s[0][-2:-1] == out.shape[1:2] for s in ctx.shapes):
        chunk = 1
    gx, gh, *sums = adaln_backward(
        gout, gy, out, h, gate, scale, *needs, chunk, ctx.eps, ctx.h_dtype, ctx.impl
    )
    there = (needs[0], needs[1] and gy is not None, needs[2] and gy is not None)
    reduced = [
        g.sum_to_size(s[0]).to(s[1]) if t else None
        for g, s, t in zip(sums, ctx.shapes, there, strict=True)
    ]
    if ctx.h_dtype is None:
        gh = None
    elif gate is None:  # h is added as it is
        gh = gx.to(ctx.h_dtype)
    return gx, gh, *reduced, *[None] * 9


def _backward_kernel(
    gout: Tensor | None, gy: Tensor | None, out: Tensor, h: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, needs_gate: bool, needs_scale: bool, needs_shift: bool, chunk: int,
    eps: float, dtype: torch.dtype | None, impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    kernel, needs = _dispatch.implementation("adaln", impl), (needs_gate, needs_scale, needs_shift)
    narrow = dtype or (out if gy is None else gy).dtype
    if _takes_both(kernel, out, narrow, gy, h):
        grads = kernel.backward(gout, gy, out, h, gate, scale, *needs, chunk, eps, narrow)
    else:
        gy, h = _as(out.dtype, gy), _as(out.dtype, h)
        gx, gh, *sums = kernel.backward(gout, gy, out, h, gate, scale, *needs, chunk, eps)
        grads = gx, _as(dtype or out.dtype, gh), *sums
    return present_or_absent(out, grads)


def _backward_fake(
    gout: Tensor | None, gy: Tensor | None, out: Tensor, h: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, needs_gate: bool, needs_scale: bool, needs_shift: bool, chunk: int,
    eps: float, dtype: torch.dtype | None, impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, tokens, width = out.shape
    accumulate = torch.promote_types(out.dtype, torch.float32)
    sums = out.new_empty((batch, -(-tokens // chunk) if chunk else 1, width), dtype=accumulate)
    norm = gy is not None
    return (
        out.new_empty(out.shape),
        out.new_empty(out.shape, dtype=dtype) if gate is not None else absent(out),
        torch.empty_like(sums) if needs_gate else absent(out),
        torch.empty_like(sums) if needs_scale and norm else absent(out),
        torch.empty_like(sums) if needs_shift and norm else absent(out),
    )


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
