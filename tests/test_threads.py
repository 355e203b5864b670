"""`stop_tangent_gradient()` and forward mode in more threads than one."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tbcm_kernels as tk
from tbcm_kernels import _dual


def learns() -> bool:
    """Whether a tangent has a graph here."""
    x = torch.ones(2, 8, requires_grad=True)
    return tk.rms_norm_jvp(x, None, torch.ones(2, 8))[1].requires_grad


def elsewhere(call: Callable[[], Any]) -> Any:
    """What a call returns in a thread of its own."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


@contextlib.contextmanager
def meanwhile(work: Callable[[Callable[[], None]], Any]) -> Iterator[None]:
    """Another thread is in the middle of `work`, which calls its argument there."""
    there, leave = threading.Event(), threading.Event()

    def wait() -> None:
        there.set()
        leave.wait(60)

    thread = threading.Thread(target=work, args=(wait,))
    thread.start()
    assert there.wait(60)
    try:
        yield
    finally:
        leave.set()
        thread.join()


def compiling(wait: Callable[[], None]) -> None:
    def backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        wait()
        return graph.forward

    torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(3))


def inside(wait: Callable[[], None]) -> None:
    with tk.stop_tangent_gradient():
        wait()


@pytest.fixture(autouse=True)
def _left() -> Iterator[None]:
    """Every scope is over after a test."""
    yield
    assert learns() and not _dual._stopped and not _dual._owners


def test_a_scope_is_its_threads_alone() -> None:
    with tk.stop_tangent_gradient():
        assert not learns() and elsewhere(learns)
        with tk.stop_tangent_gradient():
            pass
        assert not learns()
    with meanwhile(inside):
        assert learns()
        with tk.stop_tangent_gradient():
            assert not learns()
        assert learns()


def test_a_scope_begins_and_ends_while_another_thread_compiles() -> None:
    with contextlib.ExitStack() as scope:
        with meanwhile(compiling):
            scope.enter_context(tk.stop_tangent_gradient())
            assert not learns()
        assert not learns()
    with contextlib.ExitStack() as scope:
        scope.enter_context(tk.stop_tangent_gradient())
        with meanwhile(compiling):
            scope.close()
            assert learns()


def test_a_scope_may_be_left_in_another_thread() -> None:
    scope = contextlib.ExitStack()
    elsewhere(lambda: scope.enter_context(tk.stop_tangent_gradient()))
    assert learns()
    scope.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_knows_no_scope_of_a_thread_that_it_has_not() -> None:
    def ends_well() -> bool:
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)  # a lock that nobody is there to open
            fine = learns() and not _dual._stopped
            with tk.stop_tangent_gradient():
                os._exit(0 if fine and not learns() else 1)
        return os.waitpid(child, 0)[1] == 0

    def holding(wait: Callable[[], None]) -> None:
        with tk.stop_tangent_gradient(), _dual._owning:
            wait()

    with meanwhile(holding):
        assert ends_well()


def test_who_compiles_nothing_is_not_refused_for_others_that_do() -> None:
    """Forward mode's level belongs to the process, and one thread's compiling did."""

    def dual(wait: Callable[[], None]) -> None:
        with fwAD.dual_level():
            wait()

    x = torch.randn(2, 8)
    want = tk.rms_norm(x)
    with meanwhile(dual), meanwhile(compiling):
        assert torch.equal(tk.rms_norm(x), want)
        assert torch.equal(torch.func.vmap(tk.rms_norm)(x[None])[0], want)


def test_a_checkpoint_enters_again_from_a_thread_of_autograd() -> None:
    """As backward on CUDA is, while the thread that called it stays inside."""
    x, done = torch.randn(3, 8).requires_grad_(), []

    def pair(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with tk.stop_tangent_gradient():
            return torch.func.jvp(tk.rms_norm, (x,), (torch.ones_like(x),))

    with tk.stop_tangent_gradient():
        y, _ = checkpoint(pair, x, use_reentrant=False)
        thread = threading.Thread(target=lambda: done.append(y.sum().backward()))
        thread.start()
        thread.join()
    (want,) = torch.autograd.grad(tk.rms_norm(x).sum(), x)
    assert done and torch.equal(x.grad, want)


def test_scopes_of_two_threads_of_autograd_end_in_any_order() -> None:
    """One thread of autograd for each GPU: the scope that was entered first is left first."""
    entered, left, seen = threading.Barrier(2), threading.Event(), []

    class Enters(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, first: bool) -> Tensor:
            ctx.first = first
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            with tk.stop_tangent_gradient():
                entered.wait(10)
                if not ctx.first:
                    left.wait(10)
                    seen.append(_dual.tangent_gradient_stopped())
            left.set()
            return grad, None

    outputs = [Enters.apply(torch.ones(2, requires_grad=True), first) for first in (True, False)]
    threads = [threading.Thread(target=out.sum().backward) for out in outputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] and not _dual.tangent_gradient_stopped()


def test_backward_in_a_thread_of_its_own_knows_the_scope() -> None:
    x, found = torch.ones(2, 8, requires_grad=True), []
    y = x * 2
    y.register_hook(lambda _: found.append(_dual.tangent_gradient_stopped()))
    with tk.stop_tangent_gradient():
        elsewhere(y.sum().backward)
    assert found == [True]
