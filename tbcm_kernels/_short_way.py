"""A call of an op past PyTorch's dispatcher, where nobody could tell.

Through the dispatcher and PyTorch's Python around custom ops a call takes 15 to 50 µs of CPU time
more, which is as much as a kernel on small tensors. Transforms, modes, compilers, profilers and
tensors that are not plain ones still find the op there; numbers in tensors are converted there.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_gradtrackingtensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


def short_way(
    op: Callable[..., Any], kernel: Callable[..., Any], setup_context: Callable[..., None] | None,
    gradient: Callable[..., Any],
) -> Callable[..., Any]:  # fmt: skip
    """A function that calls the op, the short way if it can; `.op` is the op itself."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = kernel(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    recorded = type(f"tbcm_{op._opname}", (torch.autograd.Function,), methods).apply
    takes = [_PLAIN.get(str(a.real_type), ()) for a in op._schema.arguments]
    plain = set()  # types of arguments that need no conversion

    def dispatched(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(map(_made_inside, args)):
            raise RuntimeError(
                f"tbcm_kernels: {op._opname} takes no parameter that was made inside "
                f"torch.func.jvp, as offloading makes them, for it would get no gradient: use "
                f"torch.no_grad() around, or dual_level()."
            )
        before = calls.own
        try:
            calls.own = True
            return op(*args)
        finally:
            calls.own = before

    def call(*args: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return op(*args)
        if (types := tuple(map(type, args))) not in plain:
            if len(types) != len(takes) or not all(map(operator.contains, takes, types)):
                return dispatched(*args)
            plain.add(types)
        if _watched(args):
            return dispatched(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return dispatched(*args) if _below_autograd() else recorded(*args)
        return kernel(*args)

    call.op = op
    return call


class _Calls(threading.local):
    """Whether an op is called from here, where tangents have been looked for, or by a graph."""

    own = False


calls = _Calls()
_TENSOR = (Tensor, torch.nn.Parameter)
_PLAIN = {
    "Tensor": _TENSOR, "Optional[Tensor]": (*_TENSOR, type(None)), "float": (float,),
    "int": (int,), "Optional[int]": (int, type(None)), "bool": (bool,), "str": (str,),
    "Optional[ScalarType]": (torch.dtype, type(None)),
}  # fmt: skip
"""What goes the short way for a type of a schema. A list of tensors does not: `autograd.Function`
would not look into it."""


def _keys(*names: str) -> int:
    sets = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names]
    return functools.reduce(operator.or_, sets).raw_repr()


_AUTOGRAD = _keys("AutogradCPU") & _keys("AutogradCUDA")  # of any device
_USUAL = _keys(
    "BackendSelect", "ADInplaceOrView", "CPU", "AutogradCPU", "AutocastCPU", "CUDA",
    "AutogradCUDA", "AutocastCUDA",
)  # fmt: skip
"""Dispatch keys that are there when nothing but autograd happens."""


def _watched(args: Sequence[Any]) -> bool:
    """Whether a transform, a mode, a profiler or a tensor that is no plain one may see the op."""
    if torch.autograd._profiler_enabled() or any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    ):
        return True
    tensors = [torch._C._dispatch_keys(a) for a in args if isinstance(a, Tensor)]
    return any(
        keys.raw_repr() & ~_USUAL for keys in (torch._C._dispatch_tls_local_include_set(), *tensors)
    )


def _made_inside(x: Any) -> bool:
    """Whether x requires grad inside the transform that is around this call, and not outside."""
    return isinstance(x, Tensor) and is_gradtrackingtensor(x) and x.requires_grad


def _below_autograd() -> bool:
    """Whether autograd is done with this call, as inside a custom op, and records nothing."""
    return bool(torch._C._dispatch_tls_local_exclude_set().raw_repr() & _AUTOGRAD)
