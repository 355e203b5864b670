"""Run one case of the training objective's ops: outputs, and gradients of what training moves."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import tbcm_kernels
from tbcm_kernels._library import Rounding
from tbcm_kernels.testing.cases import Case
from tbcm_kernels.testing.compare import Values, each, exact, signs, spread

LEAVES: dict[str, tuple[str, ...]] = {
    "flow_input": ("x",), "flow_output": ("v",), "trajectory_step": (),
    "tangent_loss": ("out", "log_variance"),
}  # fmt: skip
"""The functions, and the arguments to which kernels compute gradients."""

OUTPUTS: dict[str, list[str]] = {
    "flow_input": ["x_fm", "t_fm", "tx_fm", "tt_fm", "x_fm alone", "t_fm alone"],
    "flow_output": ["F", "tF", "F alone"],
    "trajectory_step": ["velocity", "x'"], "tangent_loss": ["loss", "norm"],
}  # fmt: skip


def run(case: Case, impl: str) -> Values:
    """Outputs, where there are tangents with and without them, and gradients of the value."""
    with torch.no_grad():
        outputs = _call(case, case.primals, impl, moving=False)
        if case.op.startswith("flow"):
            outputs = (*_call(case, case.primals, impl, moving=True), *outputs)
    leaves = [
        x.detach().requires_grad_() if x is not None and name in LEAVES[case.op] else x
        for name, x in zip(case.arguments, case.primals, strict=True)
    ]
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    if not wanted:
        return [*outputs]
    value = _call(case, leaves, impl, moving=False)[0]
    return [*outputs, *torch.autograd.grad(value, wanted, _cotangent(value))]


def names(case: Case) -> list[str]:
    """What the values of `run` are, in order."""
    present = dict(zip(case.arguments, case.primals, strict=True))
    return OUTPUTS[case.op] + [
        f"gradient of {a}" for a in LEAVES[case.op] if present[a] is not None
    ]


def truth(case: Case) -> Values:
    """The reference in fp64."""
    return _reference(case, exact)


def noise(case: Case, truth: Values) -> Values:
    """How far the truth moves, in RMS, where each input is off by a unit of the arithmetic.

    x' and the direction are differences, and a sample's gradient is divided by the size of its
    direction.
    """
    generator = torch.Generator().manual_seed(7)
    unit = torch.finfo(torch.promote_types(case.primals[0].dtype, torch.float32)).eps

    def disturbed(x: Tensor) -> Tensor:
        return exact(x) * (1 + unit * signs(x, generator))

    return spread(truth, lambda: _reference(case, disturbed))


def baseline(case: Case) -> Values:
    """The reference on the inputs as they are: fp32 arithmetic, one rounding at the end."""
    return each(exact, _reference(case, Tensor.cpu))


def _reference(case: Case, enter: Rounding) -> Values:
    """`run` of the reference; `enter` is what a tensor becomes as it is read."""
    primals, tangents = each(enter, case.primals), each(enter, case.tangents)
    return run(dataclasses.replace(case, primals=primals, tangents=tangents), "reference")


def _call(case: Case, primals: Values, impl: str, *, moving: bool) -> tuple[Tensor | None, ...]:
    named = dict(zip(case.arguments, primals, strict=True))
    if moving:
        tangents = zip(case.arguments, case.tangents, strict=True)
        named |= {f"t{name}": x for name, x in tangents}
    function = getattr(tbcm_kernels, f"{case.op}_jvp" if moving else case.op)
    found = function(**named, **case.options, impl=impl)
    return (found,) if isinstance(found, Tensor) else found


def _cotangent(value: Tensor) -> Tensor:
    """The same random cotangent for every implementation; of a loss, what .backward() gives."""
    if value.ndim == 0:
        return torch.ones_like(value)
    drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return drawn.to(torch.bfloat16).to(value.device, value.dtype)
