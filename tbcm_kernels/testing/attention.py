"""Run one case of attention: outputs, and gradients of the value, the tangent and both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import tbcm_kernels
from tbcm_kernels._library import Rounding, unrounded
from tbcm_kernels.attention import reference
from tbcm_kernels.rms_norm.heads import norm_backward
from tbcm_kernels.testing.cases import Case
from tbcm_kernels.testing.compare import Values, each, exact, signs, spread, unit

EPS = 1e-6
OUTPUTS = ("o", "lse", "to", "tlse")
INPUTS = ("q", "k", "v", "q_weight", "k_weight", "tq", "tk", "tv")
LOSSES: dict[str, tuple[int, ...]] = {
    "the value": (0,), "all outputs": (0, 1, 2, 3), "the tangent": (2,),
}  # fmt: skip
"""Outputs that have a cotangent; the value's own is that of a call without tangents."""


def names() -> list[str]:
    """What the values of `run` and `expected` are, in order."""
    gradients = (f"gradient from {loss} of {x}" for loss in LOSSES for x in INPUTS)
    return [*OUTPUTS, "o alone", "alone, lse", *gradients]


def run(case: Case, impl: str) -> Values:
    """Outputs with and without tangents, and gradients of one implementation."""
    with torch.no_grad():
        found = [*_call(case, _inputs(case), impl)]
        found += _call(case, _inputs(case, "the value"), impl)[:2]
    for loss, reached in LOSSES.items():
        leaves = each(lambda x: x.detach().requires_grad_(), _inputs(case, loss))
        got = _call(case, leaves, impl)
        kept = [got[i] for i in reached if got[i] is not None]
        cotangents = [_cotangent(case, i) for i in reached if got[i] is not None]
        found += _gradients(kept, leaves, cotangents)
    return found


def expected(
    case: Case, enter: Rounding, operand: Rounding = unrounded,
    settle: Callable[[Values], tuple[Values, Values]] | None = None,
) -> Values:  # fmt: skip
    """The same from the reference.

    `enter` is what a tensor becomes as a pass reads it; `settle` makes of the outputs what is
    returned and what is saved.
    """
    setting = _setting(case)
    inputs = _lanes(_inputs(case), 5)
    outputs = reference.forward(*each(enter, inputs), setting, operand)
    outputs, saved = settle(outputs) if settle else (outputs, each(enter, outputs))
    found = [x.squeeze(0) if x is not None and i > 1 else x for i, x in enumerate(outputs)]
    found += outputs[:2]  # they do not depend on the tangents
    for loss, reached in LOSSES.items():
        cotangents = [
            _cotangent(case, i) if i in reached and x is not None else None
            for i, x in enumerate(outputs)
        ]
        read = [*each(enter, [*_lanes(cotangents, 2), *inputs]), *saved]
        if loss == "the value":  # a call without tangents
            read = [x if i not in (9, 10, 11, 14, 15) else None for i, x in enumerate(read)]
        grads = _backward(*read, setting, operand)
        found += [g.squeeze(0) if g is not None and i > 4 else g for i, g in enumerate(grads)]
    return found


def _lanes(values: Values, start: int) -> Values:
    """The values with the dimension of lanes from the one at `start` on, where tangents begin."""
    return [x.unsqueeze(0) if x is not None and i >= start else x for i, x in enumerate(values)]


def noise(case: Case, truth: Values, operand: Rounding) -> Values:
    """How far the truth moves, in RMS, where each tensor that a pass reads is off by a `unit`.

    For saved o and to it is half that of their dtype in 16 bits, and (P∘Ṡ)V − μO is off by a unit
    of μO. Factors of products round as `operand` does.
    """
    generator = torch.Generator().manual_seed(7)
    q = case.primals[0]
    fine = unit(q)
    coarse = torch.finfo(q.dtype).eps / 2 if q.dtype.itemsize < 4 else fine

    def disturbed(x: Tensor, by: float = fine) -> Tensor:
        return exact(x) * (1 + by * signs(x, generator))

    def settle(outputs: Values) -> tuple[Values, Values]:
        o, lse, to, mu = outputs
        if to is None:
            return outputs, [disturbed(o, coarse), disturbed(lse), None, None]
        to = to + fine * signs(to, generator) * mu.unsqueeze(-1) * o
        saved = [disturbed(o, coarse), disturbed(lse), disturbed(to, coarse), disturbed(mu)]
        return [o, lse, to, mu], saved

    def rounded(x: Tensor) -> Tensor:
        factor = 1 + torch.rand((), generator=generator, dtype=x.dtype)
        return operand(x * factor) / factor

    off = operand if operand is unrounded else rounded
    return spread(truth, lambda: expected(case, disturbed, off, settle))


def rank(case: Case, name: str) -> int | None:
    """How many keys make a row of outputs or gradients of q, and queries one of k and v."""
    if case.op != "attention":
        return None
    q, k = case.primals[:2]
    of_keys = name.split()[-1] in ("k", "v", "tk", "tv")
    return q.shape[2] * q.shape[1] // max(k.shape[1], 1) if of_keys else k.shape[2]


def _backward(*arguments: object) -> Values:
    cotangents, inputs, (setting, operand) = arguments[:4], arguments[4:12], arguments[16:]
    if all(c is None for c in cotangents):
        return [None] * len(INPUTS)
    q, k, _, q_weight, k_weight, tq, tk, _ = inputs
    grads = reference.backward(*arguments[:16], setting, operand)
    gq, gk, gv, gtq, gtk, gtv = grads
    gq_weight = gk_weight = None
    if q_weight is not None:
        gq, gq_weight, gtq = norm_backward(gq, gtq, q, q_weight, tq, EPS)
    if k_weight is not None:
        if setting.key_mask is not None:  # hidden keys may be NaN
            hidden = ~setting.key_mask[:, None, :, None]
            k, tk = each(lambda x: x.masked_fill(hidden, 0), (k, tk))
        gk, gk_weight, gtk = norm_backward(gk, gtk, k, k_weight, tk, EPS)
    found = [gq, gk, gv, gq_weight, gk_weight, gtq, gtk, gtv]
    return [
        None if x is None else torch.zeros_like(x) if g is None else g
        for g, x in zip(found, inputs, strict=True)
    ]


def _inputs(case: Case, loss: str = "") -> Values:
    alone = loss == "the value"
    return [*case.primals, *([None] * 3 if alone else case.tangents[:3])]


def _call(case: Case, inputs: Values, impl: str) -> Sequence[Tensor | None]:
    q, k, v, q_weight, k_weight, *tangents = inputs
    q_norm, k_norm = (None if w is None else (w, EPS) for w in (q_weight, k_weight))
    return tbcm_kernels.attention_jvp(
        q, k, v, *tangents, q_norm=q_norm, k_norm=k_norm, return_lse=True, impl=impl, **case.options
    )


def _gradients(outputs: Values, leaves: Values, cotangents: Values) -> Values:
    """Gradients of the leaves; one that plays no part has a zero gradient."""
    kept = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not kept:
        return [torch.zeros_like(x) if outputs and x is not None else None for x in leaves]
    wanted = [x for x in leaves if x is not None]
    outputs, cotangents = zip(*kept, strict=True)
    grads = torch.autograd.grad(outputs, wanted, cotangents, materialize_grads=True)
    found = iter(grads)
    return [None if x is None else next(found) for x in leaves]


def _cotangent(case: Case, output: int) -> Tensor:
    """The same random cotangent of one output for every implementation."""
    q, _, v = case.primals[:3]
    generator = torch.Generator().manual_seed(1 + output)
    dtype = torch.promote_types(q.dtype, torch.float32) if output % 2 else q.dtype
    shape = q.shape[:3] if output % 2 else (*q.shape[:3], v.shape[3])
    return torch.randn(shape, generator=generator).to(q.device, dtype)


def _setting(case: Case) -> reference.Setting:
    q, k = case.primals[:2]
    given = case.options
    right = given["causal_alignment"] == "lower_right"
    causal = (k.shape[2] - q.shape[2] if right else 0) if given["is_causal"] else None
    scale = q.shape[3] ** -0.5 if given["scale"] is None else given["scale"]
    masks = each(Tensor.cpu, (given["attn_mask"], given["key_mask"]))
    return reference.Setting(*masks, scale, causal, EPS, EPS)
