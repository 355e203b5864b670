"""The ops tbcm::tangent_loss and tbcm::tangent_loss_backward: schemas, fakes, what is saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbcm_kernels import _dispatch
from tbcm_kernels._library import absent, fresh, in_rows, register


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *operands, impl = arguments
    return _dispatch.implementation("tangent_loss", impl).forward(*operands)


def _forward_fake(out: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(out.dtype, torch.float32)
    shapes = [(), *[out.shape[:1]] * 3]
    return tuple(out.new_empty(shape, dtype=dtype) for shape in shapes)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, log_variance, r, _, sigma_data, impl = inputs
    _, _, slope, glv = output
    ctx.set_materialize_grads(False)
    ctx.r, ctx.sigma_data, ctx.impl = r, sigma_data, impl
    ctx.lv_dtype = None if log_variance is None else log_variance.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(slope, glv, *tensors)


def _backward(ctx: Any, gloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if gloss is None:
        return (None,) * 12
    gout, glv = tangent_loss_backward(
        gloss, *ctx.saved_tensors, ctx.r, ctx.sigma_data, ctx.needs_input_grad[0], ctx.impl
    )
    gout = gout if ctx.needs_input_grad[0] else None
    glv = None if ctx.lv_dtype is None else glv.to(ctx.lv_dtype)
    return gout, *[None] * 6, glv, *[None] * 4


def _backward_kernel(
    gloss: Tensor, slope: Tensor, glv: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *operands, needs_out, impl = arguments
    if not needs_out:
        return absent(operands[0]), gloss * glv
    kernel = _dispatch.implementation("tangent_loss", impl).backward
    return in_rows(gloss, (kernel(gloss, slope, *operands), gloss * glv))


def _backward_fake(_: Tensor, __: Tensor, glv: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    out, needs_out = arguments[0], arguments[-2]
    return fresh(out) if needs_out else absent(out), torch.empty_like(glv)


tangent_loss_op = register(
    "tangent_loss",
    "(Tensor out, Tensor jvp, Tensor velocity, Tensor x, Tensor t, Tensor? keep, Tensor? weight, "
    "Tensor? log_variance, float r, float c, float sigma_data, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _setup, _backward,
)  # fmt: skip
tangent_loss_backward = register(
    "tangent_loss_backward",
    "(Tensor gloss, Tensor slope, Tensor glv, Tensor out, Tensor jvp, Tensor velocity, Tensor x, "
    "Tensor t, float r, float sigma_data, bool needs_out, str impl) -> (Tensor, Tensor)",
    _backward_kernel, _backward_fake,
)  # fmt: skip
