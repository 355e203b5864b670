"""What is particular about judging linear attention: norms as arguments, and cancellation."""

from __future__ import annotations

import torch
from torch import Tensor

import tbcm_kernels
from tbcm_kernels._library import Rounding, unrounded
from tbcm_kernels.linear_attention import reference
from tbcm_kernels.linear_attention.reference import Setting
from tbcm_kernels.rms_norm.heads import norm_backward
from tbcm_kernels.testing.cases import Case
from tbcm_kernels.testing.compare import Values, each, exact, signs, spread, unit


def call(case: Case, primals: Values, tangents: Values, impl: str) -> Values:
    """The public function; the weights of the norms come with their eps."""
    options = dict(case.options)
    for name, weight in zip(("q_norm", "k_norm"), primals[3:], strict=True):
        eps = options.pop(f"{name[0]}_eps")
        options[name] = None if weight is None else (weight, eps)
    function = tbcm_kernels.linear_attention_jvp
    return list(function(*primals[:3], *tangents[:3], **options, impl=impl))


def forward(case: Case, primals: Values, tangents: Values, operand: Rounding = unrounded) -> Values:
    """o and its tangent from the reference."""
    setting = Setting(**case.options)
    return list(reference.forward(*primals, *tangents[:3], setting, operand=operand)[:2])


def backward(case: Case, primals: Values, go: Tensor, operand: Rounding = unrounded) -> Values:
    """Gradients of q, k, v and the weights from the reference, in its explicit form."""
    setting = Setting(**case.options)
    state = reference.forward(*primals, None, None, None, setting)[2]
    gq, gk, gv = reference.backward(go, *primals, state, setting, operand=operand)
    q, k, _, q_weight, k_weight = primals
    gq, gq_weight = _through_norm(gq, q, q_weight, setting.q_eps)
    gk, gk_weight = _through_norm(gk, k, k_weight, setting.k_eps)
    return [gq, gk, gv, gq_weight, gk_weight]


def _through_norm(
    g: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    if weight is None:
        return g, None
    gx, gw, _ = norm_backward(g, None, x, weight, None, eps)
    return gx.to(g.dtype), gw


def noise(case: Case, truth: Values, go: Tensor) -> Values:
    """How far the truth moves, in RMS, where every factor of a product is off by a `unit`."""
    generator = torch.Generator().manual_seed(7)
    off = unit(case.primals[0])

    def disturbed(x: Tensor) -> Tensor:
        return x * (1 + off * signs(x, generator))

    primals, tangents = each(exact, case.primals), each(exact, case.tangents)

    def moved() -> Values:
        outputs = forward(case, primals, tangents, disturbed)
        return [*outputs, outputs[0], *backward(case, primals, go, disturbed)]

    return spread(truth, moved)
