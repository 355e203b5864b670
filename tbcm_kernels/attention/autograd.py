"""The ops tbcm::attention and tbcm::attention_backward: schemas, fakes, what backward saves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tbcm_kernels import _dispatch
from tbcm_kernels._dual import present
from tbcm_kernels._library import in_order, lane_by_lane, or_none, present_or_absent, register
from tbcm_kernels.attention import buffers
from tbcm_kernels.attention.reference import Setting
from tbcm_kernels.rms_norm.autograd import through_norm

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, "
    "Tensor? tq, Tensor? tk, Tensor? tv"
)
_SETTING = (
    "Tensor? attn_mask, Tensor? key_mask, float scale, SymInt? causal, float q_eps, float k_eps"
)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *setting, _, impl = arguments[8:]
    kernel, q = _dispatch.implementation("attention", impl).forward, arguments[0]
    o, lse, to, mu = kernel(*arguments[:8], Setting(*setting))
    if impl == "reference":  # in the memory layout that the fake promises
        o, to = (None if x is None else in_order(q, x) for x in (o, to))
    return present_or_absent(q, (o, lse, to, mu))


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    q, _, v, _, _, *tangents = arguments[:8]
    return present_or_absent(q, buffers.outputs(q, v, tangents))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *setting, through, ctx.impl = inputs[8:]
    ctx.set_materialize_grads(False)
    ctx.rest = setting[2:]
    tangents, moved = inputs[5:8], output[2:]
    if not (through and present(tangents)):
        ctx.mark_non_differentiable(*moved)
        tangents, moved = (None,) * 3, (None,) * 2
    ctx.save_for_backward(*inputs[:5], *tangents, *setting[:2], *output[:2], *moved)


def _backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.needs_input_grad[8]:
        # One that was made inside torch.func.jvp does not show before that it requires grad.
        raise RuntimeError(
            'attention: attn_mask requires grad, which only impl="reference" computes: pass that, '
            "or detach the mask."
        )
    none = (None,) * 8
    if not present(cotangents):
        return (*none, *none)
    saved = ctx.saved_tensors
    inputs, masks, outputs = saved[:8], saved[8:10], saved[10:]
    found = attention_backward(*cotangents, *inputs, *outputs, *masks, *ctx.rest, ctx.impl)
    there = (True, True, True, *buffers.reached(inputs[5:], *cotangents[2:]))
    gq, gk, gv, gtq, gtk, gtv = map(or_none, found, there)
    q, k, _, q_weight, k_weight, tq, tk, _ = inputs
    *_, q_eps, k_eps = ctx.rest
    gq, gqw, gtq = through_norm(gq, gtq, q, q_weight, tq, q_eps, ctx.impl)
    if k_weight is not None and masks[1] is not None:  # hidden keys may be NaN: keep them out
        hidden = ~masks[1][:, None, :, None]
        k, tk = (None if x is None else x.masked_fill(hidden, 0) for x in (k, tk))
    gk, gkw, gtk = through_norm(gk, gtk, k, k_weight, tk, k_eps, ctx.impl)
    return gq, gk, gv, gqw, gkw, gtq, gtk, gtv, *none


def _backward_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, attn_mask, key_mask, scale, causal, q_eps, k_eps, impl = arguments
    q, k, v, *_ = tensors[4:]
    kernel = _dispatch.implementation("attention", impl).backward
    found = kernel(*tensors, Setting(attn_mask, key_mask, scale, causal, q_eps, k_eps))
    if impl == "reference":
        found = [
            None if g is None else in_order(x, g)
            for g, x in zip(found, (q, k, v, q, k, v), strict=True)
        ]
    return present_or_absent(q, found)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    gto, gmu, q, k, v, _, _, *tangents = arguments[2:12]
    return present_or_absent(q, buffers.gradients((q, k, v), tangents, gto, gmu))


def _vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
    """Lanes of tangents alone share S and P in one call; anything else goes lane by lane."""
    lanes = info.batch_size
    if any(d is not None for i, d in enumerate(in_dims) if i not in (5, 6, 7)):
        return lane_by_lane(attention_op)(info, in_dims, *args)
    tangents = [
        None if t is None else _lanes_first(t, d, lanes)
        for t, d in zip(args[5:8], in_dims[5:8], strict=True)
    ]
    o, lse, to, mu = attention_op(*args[:5], *tangents, *args[8:])
    to, mu = (t.unflatten(0, (lanes, -1)) for t in (to, mu))
    return (o, lse, to, mu), (None, None, 0, 0)


def _lanes_first(t: Tensor, dim: int | None, lanes: int) -> Tensor:
    t = t.expand(lanes, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1)


attention_op = register(
    "attention",
    f"({_INPUTS}, {_SETTING}, bool through, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _setup, _backward, vmap=_vmap,
)  # fmt: skip
attention_backward = register(
    "attention_backward",
    f"(Tensor? go, Tensor? glse, Tensor? gto, Tensor? gmu, {_INPUTS}, Tensor o, Tensor lse, "
    f"Tensor? to, Tensor? mu, {_SETTING}, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel, _backward_fake,
)  # fmt: skip
