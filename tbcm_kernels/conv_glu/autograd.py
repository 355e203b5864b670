"""The ops tbcm::conv_glu and tbcm::conv_glu_backward: schemas, fakes, what backward saves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tbcm_kernels import _dispatch
from tbcm_kernels._dual import present
from tbcm_kernels._library import differentiate, in_rows, present_or_absent, register
from tbcm_kernels.conv_glu import buffers, reference


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *operands, _, impl = arguments
    kernel = _dispatch.implementation("conv_glu", impl).forward
    return in_rows(operands[0], kernel(*operands))


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    a, _, _, *tangents = arguments[:6]
    return present_or_absent(a, buffers.outputs(a, present(tangents)))


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
    needs = ctx.needs_input_grad[1:3]
    ga, gw, gb = conv_glu_backward(gy, a, weight, bias, *needs, *ctx.grid, ctx.impl)
    gw = gw.t().reshape(weight.shape).to(weight.dtype) if needs[0] else None
    return ga, gw, gb.to(bias.dtype) if needs[1] else None, *[None] * 7


def _backward_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    *operands, impl = arguments
    kernel = _dispatch.implementation("conv_glu", impl).backward
    return in_rows(operands[1], kernel(*operands))


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    _, a, _, _, *needs = arguments[:6]
    return present_or_absent(a, buffers.gradients(a, *needs))


conv_glu_op = register(
    "conv_glu",
    "(Tensor a, Tensor weight, Tensor? bias, Tensor? ta, Tensor? tweight, Tensor? tbias, "
    "SymInt height, SymInt width, bool through, str impl) -> (Tensor, Tensor)",
    _forward, _forward_fake, _setup, _backward,
)  # fmt: skip
conv_glu_backward = register(
    "conv_glu_backward",
    "(Tensor gy, Tensor a, Tensor weight, Tensor? bias, bool needs_weight, bool needs_bias, "
    "SymInt height, SymInt width, str impl) -> (Tensor, Tensor, Tensor)",
    _backward_kernel, _backward_fake,
)  # fmt: skip
