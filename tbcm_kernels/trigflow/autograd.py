"""The ops tbcm::flow_input, flow_output and trajectory_step: schemas, fakes, what is saved.

Both wraps scale each sample by numbers of its own. A diagonal map is its own transpose, so the
gradient of v, λ gF, is computed by the kernel of x_FM = λ x.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tbcm_kernels import _dispatch
from tbcm_kernels._dual import present
from tbcm_kernels._library import differentiate, fresh, in_rows, present_or_absent, register, wide
from tbcm_kernels.trigflow import reference


def _input(*arguments: Any) -> tuple[Tensor, ...]:
    *operands, _, impl = arguments
    kernel = _dispatch.implementation("trigflow", impl).flow_input
    return in_rows(operands[0], kernel(*operands))


def _input_fake(
    x: Tensor, t: Tensor, tx: Tensor | None, tt: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    moving = fresh(x) if present((tx, tt)) else None
    return present_or_absent(x, (fresh(x), fresh(t), moving, None if tt is None else fresh(t)))


def _input_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, t, tx, tt, through, impl = inputs
    _save(ctx, (x, t), (tx, tt), through, impl, ctx.needs_input_grad[1])
    if not ctx.through:
        ctx.mark_non_differentiable(*output[2:])


def _input_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.differentiated:
        return *differentiate(reference.flow_input, ctx.saved_tensors, grads), None, None
    return _scaled(ctx, grads[0]), *[None] * 5


def _output(*arguments: Any) -> tuple[Tensor, ...]:
    *operands, _, impl = arguments
    kernel = _dispatch.implementation("trigflow", impl).flow_output
    return in_rows(operands[0], kernel(*operands))


def _output_fake(_: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    moving = fresh(x) if present(arguments[1:4]) else None
    return present_or_absent(x, (fresh(x), moving))


def _output_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    v, x, t, *tangents, through, impl = inputs
    ctx.v_dtype = v.dtype
    _save(ctx, (v, x, t), tangents, through, impl, any(ctx.needs_input_grad[1:3]))
    if not ctx.through:
        ctx.mark_non_differentiable(output[1])


def _output_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.differentiated:
        return *differentiate(reference.flow_output, ctx.saved_tensors, grads), None, None
    gout = grads[0]
    if gout is not None and gout.dtype != ctx.v_dtype:
        gout = wide(gout)  # so that gv is rounded once
    gv = _scaled(ctx, gout)
    return None if gv is None else gv.to(ctx.v_dtype), *[None] * 7


def _save(
    ctx: Any, primals: tuple[Tensor, ...], tangents: Any, through: bool, impl: str, needs: bool
) -> None:
    """Save all inputs where the reference is differentiated, and else t alone.

    The reference gives what a training step does not need: gradients through a tangent, of t, and
    of x in flow_output.
    """
    ctx.set_materialize_grads(False)
    ctx.through = through and present(tangents)
    ctx.differentiated, ctx.impl = ctx.through or needs, impl
    kept = tangents if ctx.through else [None] * len(tangents)
    ctx.save_for_backward(*((*primals, *kept) if ctx.differentiated else primals[-1:]))


def _scaled(ctx: Any, grad: Tensor | None) -> Tensor | None:
    """λ · grad."""
    (t,) = ctx.saved_tensors
    return None if grad is None else flow_input_op(grad, t, None, None, False, ctx.impl)[0]


def _step(*arguments: Any) -> tuple[Tensor, Tensor]:
    *operands, impl = arguments
    kernel = _dispatch.implementation("trigflow", impl).trajectory_step
    return in_rows(operands[0], kernel(*operands))


def _step_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return fresh(x), fresh(x)


flow_input_op = register(
    "flow_input",
    "(Tensor x, Tensor t, Tensor? tx, Tensor? tt, bool through, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _input, _input_fake, _input_setup, _input_backward,
)  # fmt: skip
flow_output_op = register(
    "flow_output",
    "(Tensor v, Tensor x, Tensor t, Tensor? tv, Tensor? tx, Tensor? tt, bool through, str impl) "
    "-> (Tensor, Tensor)",
    _output, _output_fake, _output_setup, _output_backward,
)  # fmt: skip
trajectory_step_op = register(
    "trajectory_step",
    "(Tensor x, Tensor out, Tensor t, Tensor s, Tensor guidance, float sigma_data, str impl) "
    "-> (Tensor, Tensor)",
    _step, _step_fake,
)  # fmt: skip
