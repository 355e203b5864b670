"""Run one case on one implementation and judge every output and gradient."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

import tbcm_kernels
from tbcm_kernels import _dispatch
from tbcm_kernels._library import Rounding, unrounded
from tbcm_kernels.testing import attention, linear_attention, objective
from tbcm_kernels.testing.cases import Case
from tbcm_kernels.testing.compare import Values, each, exact, faults


def check(case: Case, impl: str) -> list[str]:
    """The faults of `impl` on `case`: outputs, tangents, gradients of the primal.

    Attention's also those through the tangent, of primals and tangents.
    """
    truth, baseline = _truth(case), _baseline(case, impl)
    noise = _noise(case, truth, impl)
    actual = run(case, impl)
    found = []
    for name, a, t, b, n in zip(_names(case), actual, truth, baseline, noise, strict=True):
        if (a is None) != (t is None):
            found.append(f"{name}: is {'missing' if a is None else 'there'} and should not be")
        elif a is not None:
            if name.endswith(("weight", "bias")):  # parameters have no rows to judge one by one
                a, t, b, n = each(Tensor.flatten, (a, t, b, n))
            elif case.op in objective.LEAVES and a.ndim > 1:  # a sample shares its numbers
                a, t, b, n = (x.flatten(1) for x in (a, t, b, n))
            elif name.endswith("lse"):  # each query has its own
                a, t, b, n = (x.unsqueeze(-1) for x in (a, t, b, n))
            found += faults(name, a, t, b, a.dtype, n, attention.rank(case, name))
    return [f"{case.op}[{case.name}] {impl}: {f}" for f in found]


def run(case: Case, impl: str) -> Values:
    """Outputs with tangents, outputs without, and gradients of these, of one implementation."""
    if case.op == "attention":
        return attention.run(case, impl)
    if case.op in objective.LEAVES:
        return objective.run(case, impl)
    with torch.no_grad():
        pair = call(case, case.primals, case.tangents, impl)
    leaves = each(lambda p: p.detach().requires_grad_(), case.primals)
    outputs = call(case, leaves, [None] * len(leaves), impl)
    grads = _gradients(outputs, leaves, _cotangents(case, outputs))
    return [*pair, *_alone(outputs), *grads]


def _alone(outputs: Values) -> Values:
    """Of outputs without tangents, the values: other code than with them."""
    return each(Tensor.detach, outputs[: len(outputs) // 2])


def call(case: Case, primals: Values, tangents: Values, impl: str = "auto") -> Values:
    """The op's `_jvp` function on such inputs, with the options of the case."""
    if case.op == "linear_attention":
        return linear_attention.call(case, primals, tangents, impl)
    function = getattr(tbcm_kernels, f"{case.op}_jvp")
    return list(function(*primals, *tangents, **case.options, impl=impl))


def _forward(case: Case, primals: Values, tangents: Values) -> Values:
    """The same from the reference."""
    if case.op == "linear_attention":
        return linear_attention.forward(case, primals, tangents)
    outputs = list(_reference(case.op).forward(*primals, *tangents, **case.options))
    if case.op == "adaln" and primals[1] is None:  # without h, x and its tangent are no sums
        outputs[0], outputs[2] = primals[0], tangents[0]
    return outputs


def _names(case: Case) -> list[str]:
    if case.op == "attention":
        return attention.names()
    if case.op in objective.LEAVES:
        return objective.names(case)
    values = ["x'", "y"] if case.op == "adaln" else ["y"]
    return [
        *values, *(f"t{v}" for v in values), *(f"{v} alone" for v in values),
        *(f"gradient of {a}" for a in case.arguments),
    ]  # fmt: skip


def _truth(case: Case) -> Values:
    if case.op == "attention":
        return attention.expected(case, exact)
    if case.op in objective.LEAVES:
        return objective.truth(case)
    primals, tangents = each(exact, case.primals), each(exact, case.tangents)
    pair = _forward(case, primals, tangents)
    leaves = each(Tensor.requires_grad_, primals)
    outputs = _forward(case, leaves, [None] * len(leaves))
    grads = _gradients(outputs, leaves, _cotangents(case, outputs))
    return [*pair, *_alone(outputs), *grads]


def _baseline(case: Case, impl: str) -> Values:
    """The reference on the inputs as they are: fp32 arithmetic, rounding at the stores.

    Triton's attention documents that factors of its products are rounded, too.
    """
    if case.op == "attention":
        return each(exact, attention.expected(case, _cpu, operand=_operand(case, impl)))
    if case.op in objective.LEAVES:
        return objective.baseline(case)
    primals, tangents = each(_cpu, case.primals), each(_cpu, case.tangents)
    pair = _forward(case, primals, tangents)
    plain = _forward(case, primals, [None] * len(primals))
    grads = _backward(case, primals, plain, _cotangents(case, plain))
    grads = [None if p is None else g.to(p.dtype) for g, p in zip(grads, case.primals, strict=True)]
    return each(exact, (*pair, *_alone(plain), *grads))


def _noise(case: Case, truth: Values, impl: str) -> Values:
    """The attentions and the objective subtract nearly equal numbers, which other ops do not."""
    if case.op == "attention":
        return attention.noise(case, truth, _operand(case, impl))
    if case.op == "linear_attention":
        cotangent = _cotangents(case, truth[:1])[0].cpu().double()
        return linear_attention.noise(case, truth, cotangent)
    if case.op in objective.LEAVES:
        return objective.noise(case, truth)
    return [None] * len(truth)


def _operand(case: Case, impl: str) -> Rounding:
    x = case.primals[0]
    if x.dtype.itemsize > 2 or _dispatch.choose(case.op, impl, x) != "triton":
        return unrounded
    return lambda factor: factor.to(x.dtype).to(factor.dtype)


def _cpu(x: Tensor) -> Tensor:
    return x.detach().cpu()


def _backward(case: Case, primals: Values, outputs: Values, cotangents: Values) -> Values:
    reference = _reference(case.op)
    if case.op == "rms_norm":
        x, weight = primals
        gy, needs = cotangents[0], weight is not None
        gx, gw = reference.backward(gy, x, weight, needs, 1, **case.options)
        return [gx, None if gw is None else gw.sum(0)]
    if case.op == "conv_glu":
        needs = (True, primals[2] is not None)
        ga, gw, gb = reference.backward(cotangents[0], *primals, *needs, **case.options)
        return [ga, gw.t().reshape(primals[1].shape), gb]
    if case.op == "linear_attention":
        return linear_attention.backward(case, primals, cotangents[0])
    _, h, gate, scale, shift = primals
    needs = [m is not None for m in (gate, scale, shift)]
    gout = cotangents[0] if h is not None else None
    gx, gh, *sums = reference.backward(
        gout, cotangents[1], outputs[0], h, gate, scale, *needs, 1, **case.options
    )
    modulations = [
        None if m is None else s.sum_to_size(m.shape)
        for s, m in zip(sums, (gate, scale, shift), strict=True)
    ]
    return [gx, None if h is None else gx if gate is None else gh, *modulations]


def _gradients(outputs: Sequence[Tensor | None], leaves: Values, cotangents: Values) -> Values:
    kept = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad([o for o, _ in kept], wanted, [c for _, c in kept]))
    return [None if leaf is None else next(grads) for leaf in leaves]


def _cotangents(case: Case, outputs: Sequence[Tensor | None]) -> Values:
    """The same random cotangents for every implementation, rounded to bf16 so that all agree.

    An output that is an input itself (x' without h) has none.
    """
    generator = torch.Generator().manual_seed(1)
    drawn: Values = []
    without_sum = case.op == "adaln" and case.primals[1] is None
    for i, o in enumerate(outputs):
        if o is None or (without_sum and i == 0):
            drawn.append(None)
            continue
        c = torch.randn(o.shape, generator=generator).to(torch.bfloat16)
        drawn.append(c.to(o.device, o.dtype))
    return drawn


def _reference(op: str) -> ModuleType:
    return importlib.import_module(f"tbcm_kernels.{op}.reference")
