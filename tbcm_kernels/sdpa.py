"""Softmax attention for modules that call `F.scaled_dot_product_attention` themselves.

Such a module runs in the scope of a function mode, which costs about 3 µs for each of its calls of
PyTorch, and nothing under `torch.compile`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tbcm_kernels._layers import COUNTERPARTS, refuse_modes
from tbcm_kernels.attention import attention

# diffusers' function calls the first by default.
_NAMES = {"scaled_dot_product_attention", "dispatch_attention_fn"}


class _Instead(TorchFunctionMode):
    """In its scope `F.scaled_dot_product_attention` is `attention`."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            refuse_modes()
            return _attend(*args, **kwargs)
        if function is Tensor.unflatten:  # whose super() Dynamo does not trace
            return args[0].unflatten(*args[1:], **kwargs)
        return function(*args, **kwargs)


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`attention` by the names of PyTorch's arguments."""
    return attention(query, key, value, *args, **kwargs)


def forward(stock: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the module's class, `stock`, in which attention has a tangent."""
    with _Instead():
        return stock(module, *args, **kwargs)


COUNTERPARTS.add(forward)


def calls_attention(module: nn.Module) -> bool:
    """Whether its forward or its processor names PyTorch's attention, or what they call does."""
    kinds = type(module), type(getattr(module, "processor", None))
    return any(map(_names_attention, (kinds[0].forward, kinds[1].__call__), kinds))


def _names_attention(function: Any, owner: type) -> bool:
    """Whether a method of `owner` names it, or a function or method that this one names does."""
    if not inspect.isfunction(function):
        return False
    function = inspect.unwrap(function)
    names = function.__code__.co_names
    called = (function.__globals__.get(n, getattr(owner, n, None)) for n in names)
    codes = (inspect.unwrap(f).__code__.co_names for f in called if inspect.isfunction(f))
    return not _NAMES.isdisjoint(itertools.chain(names, *codes))
