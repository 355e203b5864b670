"""The ops tbcm::rms_norm and tbcm::rms_norm_backward: schemas, fakes, what backward saves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tbcm_kernels import _dispatch
from tbcm_kernels._dual import present
from tbcm_kernels._library import CHUNK, differentiate, in_rows, present_or_absent, register
from tbcm_kernels.rms_norm import buffers, heads, reference


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *operands, eps, _, impl = arguments
    kernel = _dispatch.implementation("rms_norm", impl).forward
    return in_rows(operands[0], kernel(*operands, eps))


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    x, _, *tangents = arguments[:4]
    return present_or_absent(x, buffers.outputs(x, present(tangents)))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, *tangents, eps, through, impl = inputs
    ctx.set_materialize_grads(False)
    ctx.eps, ctx.impl = eps, impl
    ctx.through = through and present(tangents)
    if not ctx.through:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, *(tangents if ctx.through else ()))


def _backward(ctx: Any, gy: Tensor | None, gty: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.through:
        # Exact through the tangent by differentiating the reference; the kernels take the rest.
        found = differentiate(
            lambda *inputs: reference.forward(*inputs, ctx.eps), ctx.saved_tensors, (gy, gty)
        )
        return *found, None, None, None
    if gy is None:
        return (None,) * 7
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad[1]
    return *_gradients(gy, x, weight, needs, ctx.eps, ctx.impl), *[None] * 5


def _gradients(
    gy: Tensor, x: Tensor, weight: Tensor | None, needs_weight: bool, eps: float, impl: str
) -> tuple[Tensor, Tensor | None]:
    """Of x and the weight; the CUDA kernels add the chunks' sums themselves."""
    chunk = 0 if impl == "cuda" else CHUNK
    gx, gw = rms_norm_backward(gy, x, weight, needs_weight, chunk, eps, impl)
    if not needs_weight:
        return gx, None
    return gx, (gw.sum(0) if chunk else gw[0]).to(weight.dtype)


def _backward_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    *operands, impl = arguments
    kernel = _dispatch.implementation("rms_norm", impl).backward
    return in_rows(operands[1], kernel(*operands))


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    _, x, _, needs_weight, chunk, _, _ = arguments
    return present_or_absent(x, buffers.gradients(x, needs_weight, chunk))


rms_norm_op = register(
    "rms_norm",
    "(Tensor x, Tensor? weight, Tensor? tx, Tensor? tweight, float eps, bool through, str impl) "
    "-> (Tensor, Tensor)",
    _forward, _forward_fake, _setup, _backward,
)  # fmt: skip
rms_norm_backward = register(
    "rms_norm_backward",
    "(Tensor gy, Tensor x, Tensor? weight, bool needs_weight, int chunk, float eps, str impl) "
    "-> (Tensor, Tensor)",
    _backward_kernel, _backward_fake,
)  # fmt: skip


def through_norm(
    gy: Tensor, gty: Tensor | None, x: Tensor, weight: Tensor | None, tx: Tensor | None,
    eps: float, impl: str,
) -> Sequence[Tensor | None]:  # fmt: skip
    """`heads.norm_backward`, by the kernel where the tangent has no cotangent.

    `impl` is the attention's; beside one in Triton runs the CUDA kernel where "auto" takes it.
    """
    if weight is None:
        return gy, None, gty
    if gty is not None:
        return heads.norm_backward(gy, gty, x, weight, tx, eps)
    count = heads.heads_of_norm(x, weight)
    if _dispatch.refusal("rms_norm", impl, x.device.type, x.dtype) is not None:
        impl = "reference"
    rows = [heads.merge(t, count) for t in (gy, x)]
    if impl == "triton" and _dispatch.choose_for_rows("rms_norm", "auto", rows[1]) == "cuda":
        impl = "cuda"
    gx, gw = _gradients(*rows, weight, True, eps, impl)
    return heads.split(gx, count), gw, None
