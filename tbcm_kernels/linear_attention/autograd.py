"""The ops tbcm::linear_attention and its backward: schemas, fakes, what backward saves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbcm_kernels import _dispatch
from tbcm_kernels._dual import present
from tbcm_kernels._library import differentiate, in_order, present_or_absent, register
from tbcm_kernels.linear_attention import buffers, reference
from tbcm_kernels.linear_attention.reference import Setting
from tbcm_kernels.rms_norm.autograd import through_norm

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight"
_SETTING = "str feature_map, float eps, float q_eps, float k_eps"


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *setting, _, impl = arguments[8:]
    kernel, q = _dispatch.implementation("linear_attention", impl).forward, arguments[0]
    o, to, state = kernel(*arguments[:8], Setting(*setting))
    if impl == "reference":  # in the memory layout that the fake promises
        o, to = (None if x is None else in_order(q, x) for x in (o, to))
    return present_or_absent(q, (o, to, state))


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    q, _, v, _, _, *tangents = arguments[:8]
    return present_or_absent(q, buffers.outputs(q, v, present(tangents)))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *setting, through, ctx.impl = inputs[8:]
    ctx.set_materialize_grads(False)
    ctx.setting = tuple(setting)
    ctx.through = through and present(inputs[5:8])
    ctx.mark_non_differentiable(*output[2 if ctx.through else 1 :])
    kept = inputs[5:8] if ctx.through else (output[2],)
    ctx.save_for_backward(*inputs[:5], *kept)


def _backward(
    ctx: Any, go: Tensor | None, gto: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if ctx.through:
        # Exact through the tangent by differentiating the reference; the kernels take the rest.
        found = differentiate(
            lambda *inputs: reference.forward(*inputs, Setting(*ctx.setting))[:2],
            ctx.saved_tensors, (go, gto),
        )  # fmt: skip
        return (*found, *[None] * 6)
    if go is None:
        return (None,) * 14
    q, k, v, q_weight, k_weight, state = ctx.saved_tensors
    inputs = (q, k, v, q_weight, k_weight)
    *grads, gqw, gkw = linear_attention_backward(go, *inputs, state, *ctx.setting, ctx.impl)
    weights = (None if w is None else g for w, g in ((q_weight, gqw), (k_weight, gkw)))
    return *grads, *weights, *[None] * 9


def _backward_kernel(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, state: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *setting, impl = rest
    kernel = _dispatch.implementation("linear_attention", impl).backward
    found = kernel(go, q, k, v, q_weight, k_weight, state, Setting(*setting))
    if len(found) == 3:  # those of q and k are before their norms
        gq, gk, gv = found
        *_, q_eps, k_eps = setting
        gq, gqw, _ = through_norm(gq, None, q, q_weight, None, q_eps, impl)
        gk, gkw, _ = through_norm(gk, None, k, k_weight, None, k_eps, impl)
        ordered = (in_order(x, g) for x, g in zip((q, k, v), (gq, gk, gv), strict=True))
        found = (*ordered, gqw, gkw)
    return present_or_absent(q, found)


def _backward_fake(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    weights = (None if w is None else torch.empty_like(w) for w in (q_weight, k_weight))
    return present_or_absent(q, (*buffers.gradients(q, k, v), *weights))


linear_attention_op = register(
    "linear_attention",
    f"({_INPUTS}, Tensor? tq, Tensor? tk, Tensor? tv, {_SETTING}, bool through, str impl) "
    "-> (Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _setup, _backward,
)  # fmt: skip
linear_attention_backward = register(
    "linear_attention_backward",
    f"(Tensor go, {_INPUTS}, Tensor state, {_SETTING}, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel, _backward_fake,
)  # fmt: skip
