"""The ops tbcm::conv_glu and tbcm::conv_glu_backward: schemas, fakes, what backward saves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbcm_kernels import _dispatch
from tbcm_kernels._dual import present
from tbcm_kernels._library import absent, differentiate, present_or_absent, register
from tbcm_kernels.conv_glu import reference


def _forward(
    a: Tensor, weight: Tensor, bias: Tensor | None, ta: Tensor | None, tweight: Tensor | None,
    tbias: Tensor | None, height: int, width: int, through: bool, impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    kernel = _dispatch.implementation("conv_glu", impl).forward
    return present_or_absent(a, kernel(a, weight, bias, ta, tweight, tbias, height, width))


def _forward_fake(
    a: Tensor, weight: Tensor, bias: Tensor | None, ta: Tensor | None, tweight: Tensor | None,
    tbias: Tensor | None, height: int, width: int, through: bool, impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    y = a.new_empty((*a.shape[:2], a.shape[2] // 2))
    moving = present((ta, tweight, tbias))
    return y, torch.empty_like(y) if moving else absent(a)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, weight, bias, *tangents, height, width, through, impl = inputs
    ctx.set_materialize_grads(False)
    ctx.grid, ctx.impl = (height, width), impl
    ctx.through = through and present(tangents)
    if not ctx.through:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(a, weight, bias, *(tangents if ctx.through else ()))


def _backward(ctx: Any, gy: Tensor | None, gty: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.through:
        # Exact through the tangent by differentiating the reference; the kernels take the rest.
        found = differentiate(
            lambda *inputs: reference.forward(*inputs, *ctx.grid), ctx.saved_tensors, (gy, gty)
        )
        return *found, None, None, None, None
    if gy is None:
        return (None,) * 10
    a, weight, bias = ctx.saved_tensors
    needs = (ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2])
    ga, gw, gb = conv_glu_backward(gy, a, weight, bias, *needs, *ctx.grid, ctx.impl)
    gw = gw.t().reshape(weight.shape).to(weight.dtype) if needs[0] else None
    return ga, gw, gb.to(bias.dtype) if needs[1] else None, *[None] * 7


def _backward_kernel(
    gy: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, needs_weight: bool,
    needs_bias: bool, height: int, width: int, impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    kernel = _dispatch.implementation("conv_glu", impl).backward
    found = kernel(gy, a, weight, bias, needs_weight, needs_bias, height, width)
    return present_or_absent(a, found)


def _backward_fake(
    gy: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, needs_weight: bool,
    needs_bias: bool, height: int, width: int, impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    accumulate = torch.promote_types(a.dtype, torch.float32)
    gw = a.new_empty((9, a.shape[2]), dtype=accumulate) if needs_weight else absent(a)
    gb = a.new_empty(a.shape[2], dtype=accumulate) if needs_bias else absent(a)
    return a.new_empty(a.shape), gw, gb


conv_glu_op = register(
    "conv_glu",
    "(Tensor a, Tensor weight, Tensor? bias, Tensor? ta, Tensor? tweight, Tensor? tbias, "
    "int height, int width, bool through, str impl) -> (Tensor, Tensor)",
    _forward, _forward_fake, _setup, _backward,
)  # fmt: skip
conv_glu_backward = register(
    "conv_glu_backward",
    "(Tensor gy, Tensor a, Tensor weight, Tensor? bias, bool needs_weight, bool needs_bias, "
    "int height, int width, str impl) -> (Tensor, Tensor, Tensor)",
    _backward_kernel, _backward_fake,
)  # fmt: skip
