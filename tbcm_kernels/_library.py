"""Registration shared by all ops: kernels, fakes, autograd, vmap, refusal of double backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tbcm_kernels._dual import any_dual, in_dual_level
from tbcm_kernels._short_way import calls, short_way

Rounding = Callable[[Tensor], Tensor]
"""What a factor becomes where it enters a matrix product."""

CHUNK = 16
"""Rows whose weight gradients one worker sums; fixed, so that sums are deterministic."""


class _Library(torch.library.Library):
    """A library whose ops refuse forward-AD duals, as a graph that was recorded calls them with."""

    def impl(self, name: str, kernel: Any, key: str = "", **options: Any) -> None:
        super().impl(name, _refusing(name, kernel) if key == "Autograd" else kernel, key, **options)


def _refusing(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    def refusing(keyset: Any, *args: Any, **options: Any) -> Any:
        if in_dual_level() and not calls.own and any_dual(*_tensors(args)):
            raise RuntimeError(
                f"tbcm::{name} would lose a tangent: a graph that torch.export, a tracer or a "
                f'backend such as "eager" has recorded knows the values alone. Record or '
                f"compile a function that calls torch.func.jvp, or call that on the model."
            )
        return kernel(keyset, *args, **options)

    return refusing


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among arguments, and in lists of them."""
    flat = (x for v in values for x in (v if isinstance(v, list) else [v]))
    return [x for x in flat if isinstance(x, Tensor)]


_library = _Library("tbcm", "DEF")


def register(
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define the op `tbcm::name` and return a function that calls it, the short way if it can.

    Without `backward` it refuses differentiation. `vmap` is its batching rule; without one it runs
    lane by lane.
    """
    qualified = f"tbcm::{name}"
    _library.define(f"{name}{schema}", tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    gradient = _guarded(name, backward) if backward else _refuse(name)
    torch.library.register_autograd(qualified, gradient, setup_context=setup_context, lib=_library)
    op = getattr(torch.ops.tbcm, name).default
    torch.library.register_vmap(qualified, vmap or lane_by_lane(op), lib=_library)
    return short_way(op, kernel, setup_context, gradient)


def _guarded(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """Forward mode over backward would lose the tangents of cotangents and saved tensors."""

    def guarded(ctx: Any, *grads: Tensor | list[Tensor | None] | None) -> Any:
        if in_dual_level():
            ctx = _ReadOnce(ctx)
            if any_dual(*_tensors(grads), *ctx.saved_tensors):
                raise RuntimeError(
                    f"tbcm_kernels: a tangent would be lost in the backward of {name}, which has "
                    f"none: call .backward() after dual_level() has ended, or torch.func.jvp on a "
                    f"function without a backward in it."
                )
        return backward(ctx, *grads)

    return guarded


class _ReadOnce:
    """A ctx whose saved tensors are unpacked once, for checkpointing allows no second time."""

    def __init__(self, ctx: Any) -> None:
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


def _refuse(name: str) -> Callable[..., Any]:
    op = name.removesuffix("_backward")

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"tbcm_kernels: {name} has no second derivative; for a JVP use torch.func.jvp, for a "
            f'double backward tbcm_kernels.{op}(..., impl="reference"), which PyTorch '
            f"differentiates to any order, or the layer that a module of ours has replaced."
        )

    return backward


def lane_by_lane(op: Callable[..., Any]) -> Callable[..., Any]:
    """vmap by one call per lane: correct for every op; a kernel that shares work replaces it."""

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        if not info.batch_size:
            raise ValueError("tbcm_kernels: vmap must be over at least one element, got none.")
        lanes = [op(*_lane(list(args), in_dims, i)) for i in range(info.batch_size)]
        if isinstance(lanes[0], Tensor):
            return torch.stack(lanes), 0
        stacked = type(lanes[0])(map(torch.stack, zip(*lanes, strict=True)))
        return stacked, type(lanes[0])(0 for _ in stacked)

    return rule


def _lane(values: Any, dims: Any, i: int) -> Any:
    if isinstance(values, list):
        return [_lane(v, d, i) for v, d in zip(values, dims, strict=True)]
    return values if dims is None else values.select(dims, i)


def unrounded(x: Tensor) -> Tensor:
    """The Rounding of products whose factors stay as they are."""
    return x


def absent(like: Tensor) -> Tensor:
    """The placeholder that an op returns for an output that is not there."""
    return like.new_empty(0)


def present_or_absent(like: Tensor, outputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Outputs with placeholders for those that are None."""
    return tuple(absent(like) if o is None else o for o in outputs)


def in_rows(like: Tensor, outputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The same, contiguous as `fresh` makes them: the reference's have their inputs' order."""
    return present_or_absent(like, [None if o is None else o.contiguous() for o in outputs])


def fresh(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor like x, in another dtype if one is given."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def shaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """A result of ours in another shape, and no view: in place, autograd lets views do less."""
    return torch.ops.aten._unsafe_view(y, shape)


def floats(x: Tensor | None) -> Tensor | None:
    """A parameter or number for a kernel: contiguous fp32, the tensor itself where it is that."""
    return None if x is None else x.to(torch.float32).contiguous()


def unit_stride(x: Tensor | None) -> Tensor | None:
    """The tensor with unit stride along its last dimension, itself where it has that."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def fresh_heads(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised [..., B, H, N, D] in the memory order of heads and tokens that `like` has.

    Attention of [B, N, H, D] buffers seen as [B, H, N, D] then returns such buffers.
    """
    *lead, heads, tokens, width = shape
    if like.stride(-2) > like.stride(-3):
        return like.new_empty((*lead, tokens, heads, width)).transpose(-3, -2)
    return like.new_empty((*lead, heads, tokens, width))


def in_order(like: Tensor, x: Tensor) -> Tensor:
    """A copy of x [..., B, H, N, D] in the memory order that `fresh_heads` gives."""
    return fresh_heads(like, x.shape).copy_(x)


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to there, None where it is off; meta alone has none."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast(tensors: Sequence[Tensor | None], device: str) -> list[Tensor | None]:
    """The tensors as PyTorch's autocast gives them to a matrix product."""
    dtype, cast = autocast_dtype(device), (torch.float32, torch.bfloat16, torch.float16)
    return [t.to(dtype) if dtype and t is not None and t.dtype in cast else t for t in tensors]


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reference whose products autocast does not round: it rounds where it says so alone."""

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        if autocast_dtype(device) is None:
            return function(*args, **options)
        with torch.autocast(device, enabled=False):
            return function(*args, **options)

    return run


def wide(x: Tensor | None) -> Tensor | None:
    """The tensor in the dtype that arithmetic runs in: at least fp32."""
    return None if x is None else x.to(torch.promote_types(x.dtype, torch.float32))


def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in a dtype, if it is there."""
    return None if x is None else x.to(dtype)


def per_sample(t: Tensor, x: Tensor) -> Tensor:
    """One number a sample, t [B], in the dtype of x [B, ...] and shaped to broadcast over it."""
    return t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def flat_samples(x: Tensor | None) -> Tensor | None:
    """The operand [B, ...] as [B, D] with unit stride along D."""
    if x is None:
        return None
    return unit_stride(x.reshape(x.shape[0], math.prod(x.shape[1:])))


def in_one_dtype(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as they are where all have one dtype, else in fp32, for kernels of one dtype."""
    dtypes = {x.dtype for x in tensors if x is not None}
    return [x if x is None or len(dtypes) == 1 else x.float() for x in tensors]


def chunk_sum(x: Tensor, chunk: int) -> Tensor:
    """Sums over groups of `chunk` rows of x [B, N, C]; the last group may be short."""
    pad = -x.shape[1] % chunk
    return torch.nn.functional.pad(x, (0, 0, 0, pad)).unflatten(1, (-1, chunk)).sum(2)


def or_none(x: Tensor, there: bool) -> Tensor | None:
    """An op's output, or None where it is a placeholder."""
    return x if there else None


def differentiate(
    function: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Vector-Jacobian product of a plain PyTorch function, for every tensor in `inputs`.

    For gradients through a tangent where an op has no kernel for them. In a backward with
    create_graph=True the result can be differentiated again.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [_leaf(x, again) for x in inputs]
        outputs = function(*leaves)
        kept = [
            (o, g)
            for o, g in zip(outputs, cotangents, strict=True)
            if o is not None and g is not None and o.requires_grad
        ]
        wanted = [x for x in leaves if x is not None]
        grads = torch.autograd.grad(
            [o for o, _ in kept],
            wanted,
            [g for _, g in kept],
            allow_unused=True,
            create_graph=again,
        )
    found = iter(grads)
    return [None if x is None else next(found) for x in leaves]


def _leaf(x: Tensor | None, keep_graph: bool) -> Tensor | None:
    if x is None:
        return None
    if keep_graph and x.requires_grad:
        return x.view_as(x)
    return x.detach().requires_grad_()
