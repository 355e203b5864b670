"""Linear maps inside a fused block that save for backward only what the block holds anyway.

`F.linear` keeps its input for the gradient of its weight, and a product with a gate keeps both
factors. Here what a tensor on the left was made of is kept, and it is computed again in backward:

    of_adaln       y = LN(x)(1 + scale) + shift      keeps x, not y
    of_conv_glu    y = conv_glu(a)                   keeps a, not y
    gated_sum      h = o Wᵀ + b in x + γ h           keeps o, not h

Tangents are computed without a graph: these functions are for the semi-gradient, and for no
tangents at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbcm_kernels import _dual
from tbcm_kernels._library import autocast, register
from tbcm_kernels.adaln.autograd import adaln_op
from tbcm_kernels.conv_glu.autograd import conv_glu_op

Pair = tuple[Tensor, Tensor | None]
LONG = 256
"""Tokens per sample from which activations are worth computing again."""


def worth_it(x: Tensor, *tangents: Tensor | None) -> bool:
    """Whether x [B, N, C] is long, something is saved for it, and its tangents need no graph."""
    if x.shape[1] < LONG or not torch.is_grad_enabled():
        return False
    return _dual.tangent_gradient_stopped() or not _dual.present(tangents)


def of_adaln(
    y: Pair, x: Tensor, scale: Tensor, shift: Tensor, eps: float, layers: Sequence[nn.Linear],
    impl: str,
) -> list[Pair]:  # fmt: skip
    """Each layer on y = LN(x)(1 + scale) + shift, for y made by `adaln` in the implementation."""
    weights, biases = _parameters(layers, y[0])
    values = linear_of_adaln(_cast(y[0]), x, scale, shift, eps, weights, biases, impl)
    return _with_tangents(values, y[1], weights)


def of_conv_glu(
    y: Pair, a: Tensor, depth: Tensor, bias: Tensor | None, grid: tuple[int, int], weight: Tensor,
    impl: str,
) -> Pair:  # fmt: skip
    """y Wᵀ for y = conv_glu(a) in the implementation."""
    _dual.refuse_duals("linear_jvp", weight)
    weight = _cast(weight)
    value = linear_of_conv_glu(_cast(y[0]), a, depth, bias, *grid, weight, impl)
    return _with_tangents([value], y[1], [weight])[0]


def gated_sum(x: Pair, gate: Pair, o: Pair, layer: nn.Linear) -> Pair:
    """x + γ (o Wᵀ + b) and its tangent, for a gate γ [B, 1, C]."""
    weights, biases = _parameters([layer], o[0])
    out, h = gated_linear(x[0], gate[0], _cast(o[0]), weights[0], *(biases or [None]))
    with torch.no_grad():
        th = None if o[1] is None else F.linear(_cast(o[1]), weights[0])
        return out, tangent_of_gated_sum(x[1], gate, (h, th), out.dtype)


def tangent_of_gated_sum(tx: Tensor | None, gate: Pair, h: Pair, dtype: torch.dtype) -> Any:
    """ẋ + γ̇ h + γ ḣ."""
    for one, other in ((gate[1], h[0]), (gate[0], h[1])):
        if one is not None and other is not None:
            tx = one.to(dtype) * other if tx is None else add_product(tx, one, other)
    return None if tx is None else tx.to(dtype)


def add_product(x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
    """x + γ h in x's dtype. PyTorch reads a narrower h as it is: no copy of it in fp32."""
    if torch.promote_types(x.dtype, h.dtype) != x.dtype:
        h = h.to(x.dtype)
    return torch.addcmul(x, gate.to(x.dtype), h)


def _parameters(layers: Sequence[nn.Linear], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Weights, and the biases if there are any, as autocast has them."""
    device = x.device.type
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    _dual.refuse_duals("linear_jvp", *weights, *biases)
    return autocast(weights, device), autocast(biases, device)


def _cast(x: Tensor) -> Tensor:
    return autocast((x,), x.device.type)[0]


def _with_tangents(values: Sequence[Tensor], ty: Tensor | None, weights: Sequence[Tensor]) -> Any:
    if ty is None:
        return [(v, None) for v in values]
    with torch.no_grad():
        ty = _cast(ty)
        return [(v, F.linear(ty, w)) for v, w in zip(values, weights, strict=True)]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])  # flatten() has no batching rule


def _through_linears(
    grads: Sequence[Tensor | None], weights: Sequence[Tensor], needs: tuple[bool, Any, Any],
    again: Callable[[], Tensor],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    """Gradients of y, of the weights and of the biases; `again` gives y."""
    need_y, need_weights, need_biases = needs
    gy = None
    for g, w in zip(grads, weights, strict=True):
        if g is not None and need_y:
            gy = _rows(g) @ w if gy is None else torch.addmm(gy, _rows(g), w)
            shape = (*g.shape[:-1], w.shape[1])
    y = _rows(again()) if any(need_weights) else None
    gws = [
        _rows(g).mT @ y if g is not None and n else None
        for g, n in zip(grads, need_weights, strict=True)
    ]
    gbs = [
        _rows(g).sum(0) if g is not None and n else None
        for g, n in zip(grads, need_biases, strict=False)
    ]
    return None if gy is None else gy.view(shape), gws, gbs


def _adaln_forward(y: Tensor, *arguments: Any) -> list[Tensor]:
    *_, weights, biases, _ = arguments
    return [F.linear(y, w, biases[i] if biases else None) for i, w in enumerate(weights)]


def _adaln_fake(y: Tensor, *arguments: Any) -> list[Tensor]:
    *_, weights, _, _ = arguments
    return [y.new_empty((*y.shape[:-1], w.shape[0])) for w in weights]


def _adaln_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    y, x, scale, shift, ctx.eps, weights, _, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.dtype = y.dtype
    ctx.save_for_backward(x, scale, shift, *weights)


def _adaln_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, scale, shift, *weights = ctx.saved_tensors

    def again() -> Tensor:
        inputs = (x, None, None, scale, shift, *[None] * 5)
        _, y, _, _ = adaln_op(*inputs, ctx.eps, ctx.dtype, False, ctx.impl)
        return y

    needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:7])
    gy, gws, gbs = _through_linears(grads, weights, needs, again)
    return gy, None, None, None, None, gws, gbs, None


linear_of_adaln = register(
    "linear_of_adaln",
    "(Tensor y, Tensor x, Tensor scale, Tensor shift, float eps, Tensor[] weights, "
    "Tensor[] biases, str impl) -> Tensor[]",
    _adaln_forward, _adaln_fake, _adaln_setup, _adaln_backward,
)  # fmt: skip


def _conv_forward(y: Tensor, *arguments: Any) -> Tensor:
    *_, weight, _ = arguments
    return F.linear(y, weight)


def _conv_fake(y: Tensor, *arguments: Any) -> Tensor:
    *_, weight, _ = arguments
    return y.new_empty((*y.shape[:-1], weight.shape[0]))


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, a, depth, bias, height, width, weight, ctx.impl = inputs
    ctx.dtype, ctx.grid = y.dtype, (height, width)
    ctx.save_for_backward(a, depth, bias, weight)


def _conv_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    a, depth, bias, weight = ctx.saved_tensors

    def again() -> Tensor:
        op = conv_glu_op(a, depth, bias, None, None, None, *ctx.grid, False, ctx.impl)
        return op[0].to(ctx.dtype)

    needs = (ctx.needs_input_grad[0], [ctx.needs_input_grad[6]], [])
    gy, (gw,), _ = _through_linears([g], [weight], needs, again)
    return gy, None, None, None, None, None, gw, None


linear_of_conv_glu = register(
    "linear_of_conv_glu",
    "(Tensor y, Tensor a, Tensor depth, Tensor? bias, SymInt height, SymInt width, Tensor weight, "
    "str impl) -> Tensor",
    _conv_forward, _conv_fake, _conv_setup, _conv_backward,
)  # fmt: skip


def _gated_forward(
    x: Tensor, gate: Tensor, o: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    h = F.linear(o, weight, bias)
    return add_product(x, gate, h), h


def _gated_fake(
    x: Tensor, gate: Tensor, o: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), o.new_empty((*o.shape[:-1], weight.shape[0]))


def _gated_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, gate, o, weight, bias = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gate, o, weight, bias)


def _gated_backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 5
    gate, o, weight, bias = ctx.saved_tensors
    _, need_gate, *needs = ctx.needs_input_grad
    narrow = g.to(o.dtype)
    ggate = None
    if need_gate:
        ggate = (narrow * F.linear(o, weight, bias)).sum_to_size(gate.shape).to(gate.dtype)
    needs = (needs[0], needs[1:2], needs[2:])
    scaled = narrow * gate.to(o.dtype)
    go, (gw,), (gb,) = _through_linears([scaled], [weight], needs, lambda: o)
    return g, ggate, go, gw, gb


gated_linear = register(
    "gated_linear",
    "(Tensor x, Tensor gate, Tensor o, Tensor weight, Tensor? bias) -> (Tensor, Tensor)",
    _gated_forward, _gated_fake, _gated_setup, _gated_backward,
)  # fmt: skip
