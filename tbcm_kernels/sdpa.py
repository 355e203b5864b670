"""Softmax attention for modules that call `F.scaled_dot_product_attention` themselves.

Such a module runs in the scope of a function mode, which costs about 3 µs for each of its calls of
PyTorch, and nothing under `torch.compile`. Where no tangent comes, PyTorch's attention stays.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_gradtrackingtensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from tbcm_kernels._dispatch import fall_back
from tbcm_kernels._dual import any_dual
from tbcm_kernels._layers import COUNTERPARTS, refuse_modes
from tbcm_kernels.attention import attention
from tbcm_kernels.attention.functional import MAX_HEAD_DIM

# The others are diffusers' and transformers', which call the first by default.
_NAMES = {"scaled_dot_product_attention", "dispatch_attention_fn", "ALL_ATTENTION_FUNCTIONS"}
_DEPTH = 3
"""How far calls are followed: a forward, what it calls, and what that calls."""


class _Instead(TorchFunctionMode):
    """In its scope `F.scaled_dot_product_attention` of a dual is `attention`."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        if function is Tensor.unflatten:  # whose super() Dynamo does not trace
            return args[0].unflatten(*args[1:], **kwargs)
        return function(*args, **kwargs)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """PyTorch's attention, or ours of a dual; arguments have PyTorch's names, for keywords."""
    if not any_dual(query, key, value, attn_mask):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
    refuse_modes()
    if moves_or_learns(attn_mask):
        return pytorchs(query, key, value, attn_mask, *args, **kwargs)
    if any(x.shape[-1] % 8 or x.shape[-1] > MAX_HEAD_DIM for x in (query, value)):
        reason = f"its kernels take head dims that are multiples of 8 up to {MAX_HEAD_DIM}"
        kwargs["impl"] = fall_back("attention", query.device.type, query.dtype, reason)
    if not kwargs.get("enable_gqa"):  # PyTorch broadcasts
        shape = torch.broadcast_shapes(*(x.shape[:-2] for x in (query, key, value)))
        query, key, value = (x.expand(*shape, -1, -1) for x in (query, key, value))
    if query.ndim in (3, 4):
        return attention(query, key, value, attn_mask, *args, **kwargs)
    if attn_mask is not None and attn_mask.ndim > 3:
        attn_mask = _four(attn_mask.expand(*query.shape[:-3], *attn_mask.shape[-3:]))
    o = attention(*map(_four, (query, key, value)), attn_mask, *args, **kwargs)
    return o.reshape(*query.shape[:-1], value.shape[-1])


def _four(x: Tensor) -> Tensor:
    """[N, D] or [..., H, N, D] as [B, H, N, D]."""
    return x.reshape(-1, *x.shape[-3:]) if x.ndim > 3 else x[None, None]


def moves_or_learns(mask: Tensor | None) -> bool:
    """Whether a mask has a tangent or requires grad, which our kernels do not compute."""
    if mask is None or any_dual(mask):
        return mask is not None
    while not torch.compiler.is_dynamo_compiling() and is_gradtrackingtensor(mask):
        mask = get_unwrapped(mask)  # one that was made inside torch.func.jvp hides it
    return mask.requires_grad and torch.is_grad_enabled()


def pytorchs(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's attention with a mask that moves or learns, by what has a tangent; it is told."""
    reason = "its kernels take a mask that neither moves nor learns"
    fall_back("attention", query.device.type, query.dtype, reason)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, *args, **kwargs)


def forward(stock: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the module's class, `stock`, in which attention has a tangent."""
    with _Instead():
        return stock(module, *args, **kwargs)


COUNTERPARTS.add(forward)


def calls_attention(module: nn.Module) -> bool:
    """Whether its forward or its processor names PyTorch's attention, or what they call does."""
    owners = (module, "forward"), (getattr(module, "processor", None), "__call__")
    for owner, name in owners:
        kind = type(owner)
        scopes = [vars(k) for k in kind.__mro__] + [getattr(owner, "__dict__", {})]
        if _names_attention(inspect.getattr_static(kind, name, None), scopes, _DEPTH):
            return True
    return False


def _names_attention(function: Any, scopes: list[Mapping[str, Any]], depth: int) -> bool:
    """Whether it names PyTorch's attention, or calls what does, up to `depth` calls deep.

    `scopes` are those of the object whose method it may be: attributes are looked up there.
    """
    while isinstance(function, staticmethod | classmethod | functools.partial):
        function = getattr(function, "func", None) or function.__func__
    if function is F.scaled_dot_product_attention:
        return True
    if depth == 0 or not inspect.isfunction(function):
        return False
    inner = inspect.unwrap(function)
    function = inner if inspect.isfunction(inner) else function
    # By its globals: a decorator or exec() may have set __module__ to another name, or to None.
    if str(function.__globals__.get("__name__")).startswith("torch."):
        return False
    names = set(_names(function.__code__))
    if _NAMES & names:
        return True
    named = _found(names, [function.__globals__, *scopes])
    inside = [vars(x) for x in named if isinstance(x, types.ModuleType | type)]
    named += _found(names, inside) + _given(function)
    return any(_names_attention(f, scopes, depth - 1) for f in named)


def _found(names: set[str], scopes: list[Mapping[str, Any]]) -> list[Any]:
    return [scope[n] for scope in scopes for n in names & scope.keys()]


def _given(function: types.FunctionType) -> list[Any]:
    """What a function got when it was made: defaults, and variables of the function around it."""
    cells = [c for c in function.__closure__ or () if c != types.CellType()]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [c.cell_contents for c in cells] + defaults


def _names(code: types.CodeType) -> Iterator[str]:
    """The names that code and the functions inside it use."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)
