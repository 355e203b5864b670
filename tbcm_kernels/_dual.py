"""Dual numbers at the door of an op: unpack, guard, re-make, and the semi-gradient switch.

A `torch.library` op that receives a forward-AD dual returns a zero tangent without a word. So no op
of this package ever sees one: the public function unpacks every input here, calls the op on
explicit primals and tangents, and makes the dual again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_legacy_batchedtensor
from torch.nn import Parameter

T = TypeVar("T")
_owners: list[int] = []
"""The numbers of the threads that have entered a scope, one for each scope that is open."""
_owning = threading.Lock()
_stopped = False
"""Whether there are any; Dynamo guards on it."""
_witness: Tensor | None = None


@contextlib.contextmanager
def stop_tangent_gradient() -> Iterator[None]:
    """Treat every tangent as a constant in backward, and save nothing for it.

    This is the semi-gradient of sCM, TBCM and MeanFlow, whose losses use the tangent without
    differentiating it. Inside, tangents that the ops return do not require grad. PyTorch's own
    layers know nothing of it: what they do to a tangent after the last op has a graph again, so
    detach the tangent that `torch.func.jvp` returns. A checkpointed function runs again in
    backward, when the scope has been left: enter it inside that function. Selective checkpoints, in
    it or around it, are refused.

    It applies to the thread that enters it. Backward, which on a GPU has threads of its own, and
    compiled functions ask whether any thread is inside.
    """
    global _stopped
    # Not is_compiling(), which is true while any thread compiles.
    if torch.compiler.is_dynamo_compiling():
        before, _stopped = _stopped, True
        try:
            yield
        finally:
            _stopped = before
        return
    thread = threading.get_ident()  # a generator may end in another
    _count(_owners.append, thread)
    try:
        yield
    finally:
        _count(_owners.remove, thread)


def _count(change: Callable[[int], None], thread: int) -> None:
    global _stopped
    with _owning:
        change(thread)
        _stopped = bool(_owners)


def _forked() -> None:
    """In a child there is only the thread that forked, and another may have held the lock."""
    global _owning, _stopped
    _owning = threading.Lock()
    _owners[:] = [owner for owner in _owners if owner == threading.get_ident()]
    _stopped = bool(_owners)


os.register_at_fork(after_in_child=_forked)


def tangent_gradient_stopped() -> bool:
    """Whether the surrounding code runs under `stop_tangent_gradient()`."""
    if torch.compiler.is_dynamo_compiling():
        return _stopped
    if not _owners:
        return False
    return threading.get_ident() in _owners or torch._C._current_graph_task_id() != -1


def tangent_scope() -> contextlib.AbstractContextManager[object]:
    """The scope in which a tangent is computed: no_grad under `stop_tangent_gradient()`."""
    return torch.no_grad() if tangent_gradient_stopped() else contextlib.nullcontext()


def constant_under_compile(function: Callable[..., T]) -> Callable[..., T]:
    """What `torch.compiler.assume_constant_result` does, without importing the compiler for it."""
    function._dynamo_marked_constant = True
    return function


@constant_under_compile
def _functorch_levels() -> tuple[int, int, bool, bool]:
    """Levels of functorch around this call, forward and reverse; whether vmap is inside jvp, and
    functionalize inside jvp or, where there is none, around."""
    keys = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    kinds = torch._C._functorch.TransformType
    forward = keys.count(kinds.Jvp)
    inside = keys[keys.index(kinds.Jvp) if forward else 0 :]
    batched = forward > 0 and kinds.Vmap in inside
    return forward, keys.count(kinds.Grad), batched, kinds.Functionalize in inside


def guard_levels(op: str, mend: str = "") -> None:
    """Raise where PyTorch would drop or garble the tangents of `op`.

    Raises:
        RuntimeError: under nested forward mode, under `torch.func.grad` and its relatives, under
            vmap inside jvp, in a compiled function that is called inside `dual_level()`, or in a
            selective checkpoint where tangents are constants.
    """
    forward, reverse, batched, _ = _functorch_levels()
    if forward == 0 and fwAD._current_level >= 0 and _under_dynamo():
        raise RuntimeError(
            f"tbcm_kernels.{op}: a compiled function loses its tangents inside dual_level(), be it "
            f"another thread's; compile a function that calls torch.func.jvp instead."
        )
    if in_dual_level() and tangent_gradient_stopped() and _selective():
        raise RuntimeError(
            f"tbcm_kernels.{op}: a selective checkpoint inside torch.func.jvp keeps tangents, and "
            f"backward would take them for values; one around it cannot be told from that: leave "
            f"out context_fn."
        )
    if forward <= 1 and not reverse and not batched:
        return
    mend = mend or f'tbcm_kernels.{op}(..., impl="reference")'
    mend += ", or undo() the fuse() that has put it there"
    if forward > 1:
        raise RuntimeError(
            f"tbcm_kernels.{op} supports one level of forward mode, and {forward} are nested here; "
            f"plain PyTorch has any order: use {mend}."
        )
    if reverse:
        raise RuntimeError(
            f"tbcm_kernels.{op} does not run under torch.func.grad, vjp or jacrev: use "
            f"torch.autograd.grad or .backward(), or {mend}."
        )
    if batched:
        raise RuntimeError(
            f"tbcm_kernels.{op} does not run under torch.func.vmap inside jvp: put jvp inside "
            f"vmap, or use {mend}."
        )


def _under_dynamo() -> bool:
    """Whether a compiled function surrounds this call, traced or resumed after a graph break."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)


def _selective() -> bool:
    """Whether a selective checkpoint keeps what is computed here."""
    if torch.compiler.is_dynamo_compiling() or not torch._C._len_torch_dispatch_stack():
        return False
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
    from torch.utils.checkpoint import _CachingTorchDispatchMode

    modes = _get_current_dispatch_mode_stack()
    return any(isinstance(mode, _CachingTorchDispatchMode) for mode in modes)


def in_dual_level() -> bool:
    """Whether a tensor can be a forward-AD dual here, so that looking for one is worth it."""
    return fwAD._current_level >= 0


@constant_under_compile
def _levels_in_graph() -> int:
    """Levels of `torch.func.jvp` that the function which Dynamo traces opens itself."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    graphs = [tracer.graph for tracer in InstructionTranslator.current_tx().output.tracers]
    names = [node.name for graph in graphs for node in graph.nodes]
    opened, closed = "_jvp_increment_nesting", "_jvp_decrement_nesting"
    return sum((opened in name) - (closed in name) for name in names)


def _refuse_outer_levels() -> None:
    """Raise where Dynamo traces inside `torch.func.jvp`: its stand-ins for duals have no tangent.

    A function that may break then runs as it is.
    """
    if torch.compiler.is_dynamo_compiling() and _levels_in_graph() < _functorch_levels()[0]:
        raise RuntimeError(
            "tbcm_kernels: a compiled function loses its tangents inside torch.func.jvp; compile "
            "a function that calls torch.func.jvp instead."
        )


def _refuse_hidden(tensors: Sequence[Tensor | None]) -> bool:
    """Raise where PyTorch hides a tangent inside forward mode: in lanes of vmap, for which
    unpack_dual has no batching rule, and in what functionalize has wrapped.

    True if lanes are there that were looked into and hold none.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    given = [x for x in tensors if x is not None]
    if any(torch._is_functional_tensor(_under_lanes(x)) for x in given) and _functorch_levels()[3]:
        raise RuntimeError(
            "tbcm_kernels: torch.func.functionalize hides tangents inside torch.func.jvp and "
            "dual_level(): put torch.func.jvp inside functionalize."
        )
    if any(map(is_legacy_batchedtensor, given)):
        raise RuntimeError(
            "tbcm_kernels: autograd's is_grads_batched and vectorize do not run inside "
            "dual_level(), be it another thread's: use torch.func.vmap or torch.func.jacfwd."
        )
    lanes = [x for x in given if is_batchedtensor(x)]
    forward, _, batched, _ = _functorch_levels() if lanes else (0, 0, False, False)
    if batched or (not forward and any(map(_holds_dual, lanes))):
        raise RuntimeError(
            "tbcm_kernels: torch.func.vmap does not run inside dual_level(), nor inside "
            "torch.func.jvp where tangents are constants: put torch.func.jvp inside vmap, or use "
            "jacfwd."
        )
    return bool(lanes) and not forward


def _holds_dual(lanes: Tensor) -> bool:
    return fwAD.unpack_dual(_under_lanes(lanes)).tangent is not None


def _under_lanes(x: Tensor) -> Tensor:
    while is_batchedtensor(x):
        x = get_unwrapped(x)
    return x


def any_dual(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors carries a forward-AD tangent."""
    if not in_dual_level():
        return False
    _refuse_outer_levels()
    pass_lanes = _refuse_hidden(tensors)
    return any(
        x is not None
        and not (pass_lanes and is_batchedtensor(x))
        and fwAD.unpack_dual(x).tangent is not None
        for x in tensors
    )


def refuse_duals(op: str, *tensors: Tensor | None) -> None:
    """Raise for a forward-AD dual where tangents are explicit: its own would be lost.

    Raises:
        RuntimeError: one of the tensors carries a tangent.
    """
    if any_dual(*tensors):
        raise RuntimeError(
            f"tbcm_kernels.{op} takes tangents as arguments of their own, and one of its tensors "
            f"is a forward-AD dual, whose tangent would be lost: unpack it, or use the op without "
            f"_jvp (fuse() covers tangents of inputs, not of parameters)."
        )


def refuse_derivatives(op: str, *tensors: Tensor) -> None:
    """Raise where autograd asks a derivative of an op that has none.

    Raises:
        RuntimeError: a tensor requires grad and would pass it on, or carries a tangent.
    """
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if recorded or any_dual(*tensors):
        raise RuntimeError(
            f"tbcm_kernels.{op} has no derivative: call it under torch.no_grad() with tensors that "
            f'carry no tangent, or use impl="reference", which PyTorch differentiates to any order.'
        )


def unpack(*tensors: Tensor | None) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Primals and tangents of the inputs; a tangent is None where an input carries none.

    PyTorch makes duals of two dtypes, as `F.layer_norm` of bf16 with weights in fp32 does. Kernels
    read a tangent as they read its primal, so here it takes that dtype.
    """
    pass_lanes = False
    if in_dual_level():
        _refuse_outer_levels()
        pass_lanes = _refuse_hidden(tensors)
    primals: list[Tensor | None] = []
    tangents: list[Tensor | None] = []
    for x in tensors:
        bare = x is None or (pass_lanes and is_batchedtensor(x))
        primal, tangent = (x, None) if bare else fwAD.unpack_dual(x)
        primals.append(primal)
        tangents.append(None if tangent is None else tangent.to(primal.dtype))
    return primals, tangents


def number(op: str, name: str, value: Any) -> float:
    """An argument that is a number and nothing to differentiate by.

    Raises:
        ValueError: what is no number, or a tensor whose gradient or tangent would be lost.
    """
    if isinstance(value, Tensor) and (value.requires_grad or unpack(value)[1][0] is not None):
        raise ValueError(
            f"{op}: {name} is a number, and the gradient or tangent of a tensor would be lost; "
            f"detach it, or multiply by what is learned outside of the op."
        )
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{op}: {name} must be a number, got {value!r:.80}.") from None


def pack(y: Tensor, ty: Tensor | None) -> Tensor:
    """The dual y + ε ty, or y itself where there is no tangent.

    What gave y and ty knows no duals, so a gradient that backward makes inside the same
    `dual_level()` would have no tangent: it raises.
    """
    if ty is None:
        return y
    if not torch.compiler.is_dynamo_compiling():
        if is_legacy_batchedtensor(y):
            raise RuntimeError(
                "tbcm_kernels: torch.autograd.functional.jacobian has no rule for duals made under "
                "its vectorize=True: use torch.func.jacfwd."
            )
        if y.requires_grad and not tangent_gradient_stopped() and not _functorch_levels()[0]:
            y.register_hook(functools.partial(_refuse_inside, _level()))
    return fwAD.make_dual(y, ty)


def _level() -> Tensor:
    """A dual of the level that is open, which ends with it."""
    global _witness
    if _witness is None or fwAD.unpack_dual(_witness).tangent is None:
        _witness = fwAD.make_dual(torch.zeros(()), torch.zeros(()))
    return _witness


def _refuse_inside(level: Tensor, gradient: Tensor) -> None:
    if in_dual_level() and fwAD.unpack_dual(level).tangent is not None:
        raise RuntimeError(
            "tbcm_kernels: a tangent would be lost in the backward of what was called on a dual: "
            "call .backward() after dual_level() has ended."
        )


def settled(y: Tensor) -> Tensor:
    """y of plain PyTorch, its tangent a constant under `stop_tangent_gradient()`."""
    if not (in_dual_level() and tangent_gradient_stopped()):
        return y
    (primal,), (tangent,) = unpack(y)
    return pack(primal, *detached(tangent))


def held(*tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tangents, constants under `stop_tangent_gradient()`."""
    return detached(*tangents) if tangent_gradient_stopped() else tangents


def check_tangents(op: str, **pairs: tuple[Tensor | None, Tensor | None]) -> None:
    """Check each (primal, tangent) pair of an explicit call.

    Raises:
        ValueError: a tangent without its primal, or of another shape, dtype or device.
    """
    for name, (x, tx) in pairs.items():
        if tx is None:
            continue
        _check_dense(op, f"t{name}", tx)
        if x is None:
            raise ValueError(f"{op}: t{name} was given without {name}; pass both or neither.")
        if tx.shape != x.shape or tx.dtype != x.dtype or tx.device != x.device:
            raise ValueError(
                f"{op}: t{name} must match {name} in shape, dtype and device, got "
                f"{describe(tx)} for {describe(x)}."
            )


def check_tensors(
    op: str, needed: dict[str, Tensor], optional: dict[str, Tensor | None] | None = None
) -> None:
    """Check that arguments are dense tensors, or None where they may be.

    Raises:
        ValueError: naming one that is not.
    """
    given = {name: x for name, x in (optional or {}).items() if x is not None}
    for name, x in {**needed, **given}.items():
        _check_dense(op, name, x)


def takes_stock(x: Tensor) -> bool:
    """Whether a layer leaves x to PyTorch: a nested tensor, a DTensor, or none, which it names."""
    return not isinstance(x, Tensor) or x.is_nested or is_dtensor(x)


def is_dtensor(x: Tensor) -> bool:
    """Whether processes share x; asked so, its module need not be loaded."""
    return type(x) not in (Tensor, Parameter) and hasattr(x, "device_mesh")


def _check_dense(op: str, name: str, x: Any) -> None:
    if is_dtensor(x):
        raise ValueError(
            f"{op}: {name} is a DTensor; give its own part, {name}.to_local(), or the whole, "
            f"{name}.full_tensor()."
        )
    if not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided:
        nested = isinstance(x, Tensor) and x.is_nested
        got = "a nested one" if nested else getattr(x, "layout", type(x).__name__)
        raise ValueError(f"{op}: {name} must be a dense tensor, got {got}.")
    if x.dtype.itemsize == 1 and x.is_floating_point():
        raise ValueError(f"{op}: {name} is {describe(x)}; cast it to 16 or 32 bits.")


def describe(x: Tensor) -> str:
    """Shape, dtype and device, for messages."""
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def detached(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors without their graphs."""
    return tuple(None if t is None else t.detach() for t in tensors)


def present(tensors: Sequence[Tensor | None]) -> bool:
    """Whether any of the tensors is there."""
    return any(t is not None for t in tensors)
