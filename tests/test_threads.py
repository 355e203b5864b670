"""`stop_tangent_gradient()` entered from more threads than one."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tbcm_kernels as tk
from tbcm_kernels import _dual


def test_two_threads_inside_the_semi_gradient_raise() -> None:
    raised: list[str] = []

    def enter() -> None:
        try:
            with tk.stop_tangent_gradient():
                pass
        except RuntimeError as error:
            raised.append(str(error))

    with tk.stop_tangent_gradient():
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert "another thread is inside" in raised[0]
    with tk.stop_tangent_gradient(), tk.stop_tangent_gradient():
        pass


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
