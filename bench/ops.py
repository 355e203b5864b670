"""What is timed: each op at the shapes of real models, and the same maths in eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tbcm_kernels
from tbcm_kernels import _dispatch
from tbcm_kernels.testing.cases import Case, attention_case, op_case
from tbcm_kernels.testing.check import check
from tbcm_kernels.testing.compare import faults

Function = Callable[..., Any]
IMPLEMENTATIONS = _dispatch.IMPLEMENTATIONS[1:]
PASSES = ("forward", "jvp", "backward", "through")
"""The value; value and tangent; the value's gradient; the gradient of both, for attention."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the residual stream [B, N, C] of a model in training, and of its attention.

    Tokens are a square of pixels. Linear attention has heads of 32, as SANA's.
    """

    batch: int
    tokens: int
    width: int
    heads: int
    text: int = 0
    """Keys of cross-attention on text, whose tangent is zero; 0 for self-attention."""


SHAPES = {
    "digits": Shape(56, 16, 128, 4, 8),
    "sana-0.6b-512": Shape(16, 256, 1152, 16, 300),
    "sana-0.6b-1024": Shape(16, 1024, 1152, 16, 300),
    "sana-1.6b-1024": Shape(16, 1024, 2240, 20, 300),
    "dit-b-512": Shape(1, 1024, 768, 12),
    "dit-xl-512": Shape(1, 1024, 1152, 16),
    "sd3-1024": Shape(1, 4096, 1536, 24),
    "flux-1024": Shape(1, 4096, 3072, 24),
}


def plain_adaln(x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Any:
    """As diffusers writes it, with the modulations in x's dtype."""
    gate, scale, shift = (m.to(x.dtype) for m in (gate, scale, shift))
    out = x + gate * h
    return out, F.layer_norm(out, out.shape[-1:], eps=1e-6) * (1 + scale) + shift


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's own."""
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), 1e-5)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own, in the one form that has a forward derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def plain_conv_glu(a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GLUMBConv between its 1×1 convolutions, on the memory it has there: tokens seen as NCHW."""
    side = math.isqrt(a.shape[1])
    pixels = a.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    weight, bias = weight.to(a.dtype), bias.to(a.dtype)
    values, gates = F.conv2d(F.silu(pixels), weight, bias, padding=1, groups=len(bias)).chunk(2, 1)
    return values * F.silu(gates)


def plain_linear_attention(q: Tensor, k: Tensor, v: Tensor, *norms: Tensor) -> Tensor:
    """As diffusers' processor: fp32, tokens last, and a row of ones that sums the weights."""
    dtype = q.dtype
    if norms:
        q, k = (_norm_of_heads(x, w) for x, w in zip((q, k), norms, strict=True))
    q, k, v = F.relu(q).mT.float(), F.relu(k).float(), v.mT.float()
    o = F.pad(v, (0, 0, 0, 1), value=1.0) @ k @ q
    return (o[:, :, :-1] / (o[:, :, -1:] + 1e-15)).mT.to(dtype)


def _norm_of_heads(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over all heads, on tokens [B, N, C] as the model has them."""
    rows = x.transpose(1, 2)
    return plain_rms_norm(rows.flatten(2), weight).view(rows.shape).transpose(1, 2)


@dataclass(frozen=True)
class Op:
    """One op: its arguments, those that move, those that backward reads, and the eager form."""

    arguments: str
    moving: str
    saved: str
    plain: Function


QKV = "q k v"
NORMED = f"{QKV} q_weight k_weight"
OPS = {
    "attention": Op(QKV, QKV, QKV, plain_attention),
    "linear_attention": Op(QKV, QKV, NORMED, plain_linear_attention),
    "linear_attention+norm": Op(NORMED, QKV, NORMED, plain_linear_attention),
    "conv_glu": Op("a weight bias", "a", "a weight bias", plain_conv_glu),
    "adaln": Op("x h gate scale shift", "x h gate scale shift", "x h gate scale", plain_adaln),
    "rms_norm": Op("x weight", "x", "x weight", plain_rms_norm),
    "linear": Op("x weight bias", "x", "x weight", F.linear),
}
"""What follows a plus is a variant of the op that stands before it."""


def base(op: str) -> str:
    """The op of the library that a variant belongs to."""
    return op.partition("+")[0]


def draw(op: str, shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """Normal inputs and tangents: activations in `dtype`, modulations and norm weights in fp32."""
    b, n, c = shape.batch, shape.tokens, shape.width
    if op == "attention":
        return _attention(shape, dtype, device, shape.heads)
    if op == "linear":
        return _linear((b, n, c), dtype, device)
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
    """The inputs of the gate: two samples; of attention one head of one and at most 1024 tokens."""
    if op != "attention":
        return draw(op, replace(shape, batch=min(2, shape.batch)), dtype, device)
    return _attention(replace(shape, batch=1, tokens=min(1024, shape.tokens)), dtype, device, 1)


def passes(op: str) -> tuple[str, ...]:
    """The passes that are timed."""
    return PASSES if op == "attention" else PASSES[:3]


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
    plain = (F.linear(*case.primals), F.linear(case.tangents[0], case.primals[1]))
    return [
        fault
        for name, v, e, p in zip(("y", "ty"), values, exact, plain, strict=True)
        for fault in faults(name, v, e.cpu(), p.double().cpu(), v.dtype)
    ]


def ours(case: Case, impl: str) -> tuple[Function, Function]:
    """The op and its `_jvp` form in one implementation."""
    op, jvp = (getattr(tbcm_kernels, name) for name in (case.op, f"{case.op}_jvp"))
    if case.op == "linear_attention":
        return _with_norms(op, jvp, case, impl)
    options = {} if impl == "pair" else {"impl": impl}
    if case.op != "attention":
        options |= case.options
    return lambda *p: op(*p, **options), lambda *p: jvp(*p, **options)


def _with_norms(op: Function, jvp: Function, case: Case, impl: str) -> tuple[Function, Function]:
    """Linear attention, whose norms are options: a weight with its eps each."""

    def options(weights: Sequence[Tensor]) -> dict[str, Any]:
        named = zip("qk", weights, strict=False)
        return {f"{n}_norm": (w, case.options[f"{n}_eps"]) for n, w in named} | {"impl": impl}

    def pair(*both: Tensor | None) -> Any:
        primals, tangents = both[: len(both) // 2], both[len(both) // 2 :]
        return jvp(*primals[:3], *tangents[:3], **options(primals[3:]))

    return lambda q, k, v, *weights: op(q, k, v, **options(weights)), pair


def peers(case: Case) -> dict[str, tuple[Function, Function | None]]:
    """What else computes the op, value and pair; None where it cannot."""
    if case.op != "attention":
        return {}
    return {"sdpa": (F.scaled_dot_product_attention, None)}


def eager(case: Case) -> tuple[Function, Function]:
    """The same maths in PyTorch, and `torch.func.jvp` of it along the inputs that move."""
    plain = OPS[case.op].plain
    moving = [i for i, t in enumerate(case.tangents) if t is not None]

    def jvp(*both: Tensor | None) -> Any:
        primals, tangents = both[: len(both) // 2], both[len(both) // 2 :]

        def of_moving(*values: Tensor) -> Any:
            inputs = list(primals)
            for i, v in zip(moving, values, strict=True):
                inputs[i] = v
            return plain(*inputs)

        return torch.func.jvp(
            of_moving, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving)
        )

    return plain, jvp


def call(functions: tuple[Function, Function], what: str, case: Case) -> Callable[[], Any]:
    """One pass as a function of nothing: "backward" and "through" repeat a kept graph."""
    function, jvp = functions
    primals = [p for p in case.primals if p is not None]  # attention's norm weights are absent
    tangents = case.tangents[: len(primals)]
    if what in ("forward", "jvp"):
        inputs = primals if what == "forward" else primals + tangents
        return torch.no_grad()(lambda: (function if what == "forward" else jvp)(*inputs))
    leaves = [p.detach().requires_grad_() for p in primals]
    moving = [None if t is None else t.detach().requires_grad_() for t in tangents]
    outputs = tensors(function(*leaves) if what == "backward" else jvp(*leaves, *moving))
    cotangents = [torch.randn_like(o) for o in outputs]
    if what == "through":
        leaves += [t for t in moving if t is not None]
    return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a nested result."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value or () for t in tensors(v)]


def traffic(case: Case, what: str) -> int:
    """Bytes by count: every input read once, every output written once."""
    if case.op == "attention":
        return _attention_traffic(case, what)
    first = case.primals[0].nbytes
    outputs = {"adaln": 2 * first, "conv_glu": first // 2}.get(case.op, first)
    if what == "backward":
        named = dict(zip(case.arguments, case.primals, strict=True))
        saved = [named[a] for a in OPS[case.op].saved.split()]
        return outputs + _size(saved) + _size(case.primals)
    pair = outputs + _size(case.tangents) if what == "jvp" else 0
    return _size(case.primals) + outputs + pair


def _attention_traffic(case: Case, what: str) -> int:
    """q, k, v, o and, where they move, their tangents; twice in backward, with the gradients."""
    values = [*case.primals[:3], case.primals[0]]
    if what in ("jvp", "through"):
        values += [t for t in case.tangents if t is not None] + case.primals[:1]
    return _size(values) * (2 if what in ("backward", "through") else 1)


def operations(case: Case, what: str) -> int:
    """FLOPs by count of the matrix products; 0 for an op without."""
    if case.op == "attention":
        q, k = case.primals[:2]
        alone = case.tangents[1] is None
        jvp, through = (4, 10) if alone else (6, 15)
        products = {"forward": 2, "jvp": jvp, "backward": 5, "through": through}
        return 2 * q.numel() * k.shape[2] * products[what]
    if case.op != "linear":
        return 0
    x, weight, _ = case.primals
    return 2 * x.numel() * weight.shape[0] * (1 if what == "forward" else 2)


def _size(values: Sequence[Tensor | None]) -> int:
    return sum(v.nbytes for v in values if v is not None)
