"""What is timed: each op at the shapes of real models, beside the same maths in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tbcm_kernels
from bench import counts, peers
from bench import eager as plain
from bench.shapes import SHAPES, Shape
from tbcm_kernels import _dispatch
from tbcm_kernels.testing.cases import OBJECTIVE, Case, attention_case, objective_case, op_case
from tbcm_kernels.testing.check import check
from tbcm_kernels.testing.compare import faults

__all__ = ["OPS", "SHAPES", "Shape", "Variant", "call", "draw", "eager", "ours"]

Function = Callable[..., Any]
IMPLEMENTATIONS = (*_dispatch._DEVICES, "reference")
PASSES = {
    "forward": "value",
    "jvp": "value and tangent",
    "backward": "gradient of the value",
    "through": "gradient of both",
    "step": "value, tangent, gradient of the value",
}
"""A "step" is what a loss that takes the tangent as a constant needs of an op, forward included."""
MOST = ("forward", "jvp", "backward", "step")


@dataclass(frozen=True)
class Variant:
    """One way to compute an op: its value, and value with tangent of (*primals, *tangents)."""

    value: Function
    pair: Function | None
    one_pass: bool = False
    """Whether the pair's value has a graph, so that a step needs no second forward."""
    through: bool = True
    """Whether gradients through the tangent are right."""

    def takes(self, what: str) -> bool:
        """Whether it has a pass."""
        return what in ("forward", "backward") or (
            self.pair is not None and (self.through or what != "through")
        )


@dataclass(frozen=True)
class Op:
    """An op: its arguments, those that move, those backward reads, its eager form and its leaves.

    Leaves, to which there are gradients, are the arguments where they are not named.
    """

    arguments: str
    moving: str
    saved: str
    plain: Function
    leaves: str | None = None
    passes: tuple[str, ...] = MOST
    sana: bool = False
    """Only SANA's blocks have it."""

    @property
    def gradients(self) -> str:
        """The names of the leaves."""
        return self.arguments if self.leaves is None else self.leaves


QKV, NORMED = "q k v", "q k v q_weight k_weight"
STEP, LOSS = (OBJECTIVE[o][f] for o, f in (
    ("trigflow", "trajectory_step"), ("tangent_loss", "tangent_loss"),
))  # fmt: skip
OPS = {
    "attention": Op(QKV, QKV, QKV, plain.attention, passes=tuple(PASSES)),
    "linear_attention": Op(QKV, QKV, NORMED, plain.linear_attention, NORMED, sana=True),
    "linear_attention+norm": Op(NORMED, QKV, NORMED, plain.linear_attention, NORMED, sana=True),
    "conv_glu": Op("a weight bias", "a", "a weight bias", plain.conv_glu, sana=True),
    "adaln": Op("x h gate scale shift", "x h gate scale shift", "x h gate scale", plain.adaln),
    "rms_norm": Op("x weight", "x", "x weight", plain.rms_norm),
    "linear": Op("x weight bias", "x", "x weight", F.linear),
    "flow_input": Op("x t", "x t", "t", plain.flow_input, "x"),
    "flow_output": Op("v x t", "v x t", "t", plain.flow_output, "v"),
    "trajectory_step": Op(STEP, "", "", plain.trajectory_step, "", ("forward",)),
    "tangent_loss": Op(
        LOSS, "", "out jvp velocity x", plain.tangent_loss, "out", ("forward", "backward")
    ),
}
"""What follows a plus is a variant of the op that stands before it."""


def base(op: str) -> str:
    """The op of the library, a folder, that a row belongs to."""
    return "trigflow" if op in OBJECTIVE["trigflow"] else op.partition("+")[0]


def has(shape: Shape, op: str) -> bool:
    """Whether the model of a shape has an op."""
    return shape.sana or not OPS[op].sana


def draw(op: str, shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """Normal inputs and tangents: activations in `dtype`, modulations and norm weights in fp32."""
    b, n, c = shape.batch, shape.tokens, shape.width
    if op == "attention":
        return _attention(shape, dtype, device, shape.heads)
    if op == "linear":
        return _linear((b, n, c), dtype, device)
    if op in OBJECTIVE.get(base(op), ()):
        return objective_case(op, (b, *shape.latent), dtype, device)
    sizes = {
        "conv_glu": (b, math.isqrt(n), math.isqrt(n), 5 * c // 2),
        "linear_attention": (b, c // 32, n, n, 32, 32),
    }
    size = sizes.get(base(op), (b, n, c))
    present, moving = OPS[op].arguments.split(), OPS[op].moving.split()
    return op_case(base(op), size, dtype, device, present=present, moving=moving)


def _linear(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> Case:
    width = size[-1]
    x, tx, weight, bias = (
        torch.randn(s, dtype=dtype, device=device) for s in (size, size, (width, width), (width,))
    )
    names = ["x", "weight", "bias"]
    return Case("linear", f"shape {size}", names, [x, weight, bias], [tx, None, None], {})


def _attention(shape: Shape, dtype: torch.dtype, device: str, heads: int) -> Case:
    """Self-attention, or cross-attention on text where the queries alone move."""
    width = shape.width // shape.heads
    keys = shape.text or shape.tokens
    sizes = (shape.batch, heads, heads, shape.tokens, keys, width, width)
    moving = "q" if shape.text else "q k v"
    return attention_case(str(shape), dtype, device, sizes=sizes, moving=moving)


def checked(op: str, shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """The inputs of the gate: two samples; of attention one head of one and at most 512 tokens."""
    if op != "attention":
        return draw(op, replace(shape, batch=min(2, shape.batch)), dtype, device)
    return _attention(replace(shape, batch=1, tokens=min(512, shape.tokens)), dtype, device, 1)


def implementations(
    op: str, device: str, dtype: torch.dtype, asked: list[str] | None = None
) -> list[str]:
    """The kernels asked for, or all that can run; the function itself where the op has none."""
    kernels = _dispatch.OPS[base(op)]
    able = [k for k in kernels if _dispatch.refusal(base(op), k, device, dtype) is None]
    return (asked or able) if kernels else ["pair"]


def wrong(case: Case, impl: str) -> list[str]:
    """The gate: the faults of an implementation on such inputs; what has any is not timed."""
    if case.op != "linear":
        try:
            return check(case, impl)
        except ValueError as refusal:  # asked for by name, and cannot run here
            return [str(refusal)]
    values = tbcm_kernels.linear_jvp(*case.primals, *case.tangents)
    x, weight, bias = (p.double() for p in case.primals)
    exact = (F.linear(x, weight, bias), F.linear(case.tangents[0].double(), weight))
    rounded = (F.linear(*case.primals), F.linear(case.tangents[0], case.primals[1]))
    return [
        fault
        for name, v, e, p in zip(("y", "ty"), values, exact, rounded, strict=True)
        for fault in faults(name, v, e.cpu(), p.double().cpu(), v.dtype)
    ]


def ours(case: Case, impl: str) -> Variant:
    """The op and its `_jvp` form in one implementation."""
    op = getattr(tbcm_kernels, case.op)
    jvp = getattr(tbcm_kernels, f"{case.op}_jvp", None)
    if case.op == "linear_attention":
        return _with_norms(op, jvp, case, impl)
    options = {} if impl == "pair" else {"impl": impl}
    if case.op != "attention":
        options |= case.options
    if case.op == "tangent_loss":  # whose numbers stand between its tensors
        return Variant(lambda *p: op(**dict(zip(case.arguments, p, strict=True)), **options), None)
    pair = jvp and (lambda *p: jvp(*p, **options))
    return Variant(lambda *p: op(*p, **options), pair, one_pass=True)


def _with_norms(op: Function, jvp: Function, case: Case, impl: str) -> Variant:
    """Linear attention, whose norms are options: a weight with its eps each."""

    def options(weights: Sequence[Tensor]) -> dict[str, Any]:
        named = zip("qk", weights, strict=False)
        return {f"{n}_norm": (w, case.options[f"{n}_eps"]) for n, w in named} | {"impl": impl}

    def pair(*both: Tensor | None) -> Any:
        primals, tangents = both[: len(both) // 2], both[len(both) // 2 :]
        return jvp(*primals[:3], *tangents[:3], **options(primals[3:]))

    return Variant(lambda q, k, v, *weights: op(q, k, v, **options(weights)), pair, one_pass=True)


def eager(case: Case) -> Variant:
    """The same maths in PyTorch, and `torch.func.jvp` of it along the inputs that move."""
    moving = [i for i, t in enumerate(case.tangents) if t is not None]
    function = OPS[case.op].plain
    return Variant(function, plain.jvp_of(function, moving) if moving else None)


def baselines(case: Case, compiled: bool) -> dict[str, Variant]:
    """How PyTorch computes the op; "two-pass" is how people train, its value by the fastest way."""
    own = eager(case)
    found = {"eager": own, "two-pass": own}
    if case.op == "attention":
        found["sdpa"] = Variant(F.scaled_dot_product_attention, None)
        found["two-pass"] = replace(own, value=F.scaled_dot_product_attention)
    if compiled:
        functions = (f and torch.compile(f, dynamic=False) for f in (own.value, own.pair))
        found["compile"] = Variant(*functions)
    return found


def peer() -> Variant:
    """The installed peer."""
    return Variant(*peers.functions(), one_pass=True, through=False)


def off(case: Case, variant: Variant) -> str | None:
    """How a peer is wrong: further from fp64 than four times eager PyTorch in value or tangent."""
    present = len([p for p in case.primals if p is not None])
    inputs = case.primals[:present] + case.tangents[:present]
    own = eager(case)
    exact = tensors(own.pair(*(x if x is None else x.double() for x in inputs)))
    for name, e, a, b in zip(
        ("value", "tangent"), exact, tensors(variant.pair(*inputs)), tensors(own.pair(*inputs)),
        strict=True,
    ):  # fmt: skip
        error, limit = ((x.double() - e).norm() / e.norm() for x in (a, b))
        if not error <= 4 * limit:
            return f"its {name} is off by {error:.2g} where eager PyTorch's is by {limit:.2g}"
    return None


def takes_part(name: str, variant: Variant, what: str) -> bool:
    """Whether a variant is timed in a pass; eager's step is called "two-pass"."""
    return variant.takes(what) and name != ("eager" if what == "step" else "two-pass")


def call(variant: Variant, what: str, case: Case) -> Callable[[], Any]:
    """One pass as a function of nothing: "backward" and "through" repeat a kept graph."""
    primals = [p for p in case.primals if p is not None]  # attention's norm weights are absent
    tangents = case.tangents[: len(primals)]
    if what == "forward":
        return torch.no_grad()(lambda: variant.value(*primals))
    if what == "jvp":
        return torch.no_grad()(lambda: variant.pair(*primals, *tangents))
    names = OPS[case.op].gradients.split()
    inputs = [
        p.detach().requires_grad_(name in names)
        for name, p in zip(case.arguments, primals, strict=False)
    ]
    leaves = [x for x in inputs if x.requires_grad]
    if what == "step":
        return _step(variant, inputs, tangents, leaves)
    moving = [None if t is None else t.detach().requires_grad_() for t in tangents]
    result = variant.value(*inputs) if what == "backward" else variant.pair(*inputs, *moving)
    outputs = [o for o in tensors(result) if o.requires_grad]
    cotangents = [torch.randn_like(o) for o in outputs]
    if what == "through":
        leaves += [t for t in moving if t is not None]
    return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def _step(
    variant: Variant, inputs: list[Tensor], tangents: list[Tensor | None], leaves: list[Tensor]
) -> Callable[[], Any]:
    """Value with its graph, tangent without one, and the value's gradient."""

    def both() -> tuple[list[Tensor], Any]:
        if variant.one_pass:
            with tbcm_kernels.stop_tangent_gradient():
                pair = tensors(variant.pair(*inputs, *tangents))
            return pair[: len(pair) // 2], pair
        with torch.no_grad():
            tangent = variant.pair(*inputs, *tangents)
        return tensors(variant.value(*inputs)), tangent

    cotangents = [torch.randn_like(o) for o in both()[0]]

    def step() -> Any:
        values, tangent = both()
        outputs, given = zip(
            *((o, c) for o, c in zip(values, cotangents, strict=True) if o.requires_grad),
            strict=True,
        )
        return torch.autograd.grad(outputs, leaves, given), tangent

    return step


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a nested result."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value or () for t in tensors(v)]


def traffic(case: Case, what: str) -> int:
    """Bytes of a pass, by count."""
    return counts.traffic(case, what, OPS[case.op].saved, OPS[case.op].gradients)
