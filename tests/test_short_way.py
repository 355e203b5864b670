"""Ops are called past PyTorch's dispatcher, but never past anybody who wants to see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._vmap_internals import _vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import tbcm_kernels as tk
from tbcm_kernels.rms_norm.autograd import rms_norm_op

X = torch.linspace(-1, 1, 12).view(3, 4)


class Overridden(Tensor):
    """A subclass that the dispatcher does not know."""


class Functions(TorchFunctionMode):
    """A mode that the dispatcher does not know."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The ops of this package that went through the dispatcher."""
    seen: set[str] = set()
    plain = torch._ops.OpOverload.__call__

    def watching(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if self.namespace == "tbcm":
            seen.add(self.name())
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", watching)
    return seen


def call(x: Tensor) -> Tensor:
    """The op as the public function calls it."""
    return rms_norm_op(x, None, None, None, 1e-6, True, "reference")[0]


def within(mode: Any) -> Tensor:
    with mode:
        return call(X)


WATCHERS = {
    "a dispatch mode": lambda: within(FlopCounterMode(display=False)),
    "a function mode": lambda: within(Functions()),
    "a profiler": lambda: within(profile(activities=[ProfilerActivity.CPU])),
    "a subclass": lambda: call(X.as_subclass(Overridden)),
    "fake tensors": lambda: call(FakeTensorMode().from_tensor(X)),
    "the meta device": lambda: call(X.to("meta")),
    "make_fx": lambda: make_fx(call)(X),
    "vmap": lambda: torch.vmap(call)(X),
    "batched gradients": lambda: _vmap(call)(X),
    "torch.func.jvp": lambda: torch.func.jvp(tk.rms_norm, (X,), (X,)),
    "torch.func.functionalize": lambda: torch.func.functionalize(call)(X),
    "a zero that is not there": lambda: call(torch._efficientzerotensor(3, 4)),
    "a negation that is not done": lambda: call(torch._neg_view(X)),
    "a number in a tensor": lambda: rms_norm_op(
        X, None, None, None, torch.tensor(1e-6), True, "cpu"
    ),
}


@pytest.mark.parametrize("who", WATCHERS)
def test_who_watches_sees_the_op(who: str, dispatched: set[str]) -> None:
    WATCHERS[who]()
    assert "tbcm::rms_norm" in dispatched


def test_a_compiled_graph_holds_the_op() -> None:
    targets = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    torch.compile(call, backend=backend, fullgraph=True)(X)
    assert rms_norm_op.op in targets


def test_else_values_and_gradients_pass_by_the_dispatcher(dispatched: set[str]) -> None:
    x, weight = X.clone().requires_grad_(), torch.nn.Parameter(torch.ones(4))

    def step() -> list[Tensor]:
        y = tk.rms_norm(x, weight)
        return [y, *torch.autograd.grad(y.square().sum(), (x, weight))]

    short = step()
    with torch.no_grad():
        tk.rms_norm(x, weight)
    with torch.inference_mode():
        tk.rms_norm(torch.ones(3, 4))
    assert dispatched == set()
    assert short[0].grad_fn.name() == "tbcm_rms_normBackward"
    with FlopCounterMode(display=False):
        long = step()
    assert dispatched == {"tbcm::rms_norm", "tbcm::rms_norm_backward"}
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))


def test_nothing_is_recorded_below_autograd() -> None:
    weight = torch.nn.Parameter(torch.ones(4))

    @torch.library.custom_op("tbcm_tests::norm", mutates_args=())
    def norm(x: Tensor) -> Tensor:
        return tk.rms_norm(x, weight)

    assert not norm(X).requires_grad
    assert torch.equal(norm(X), tk.rms_norm(X, weight))


def test_a_default_device_is_not_that_of_results(dispatched: set[str]) -> None:
    """Nor does it send a call the long way: `torch.set_default_device` is a mode of functions."""
    tokens = torch.randn(2, 12, 8, requires_grad=True)
    heads = torch.randn(2, 2, 12, 8, requires_grad=True)
    weight, taps = torch.randn(8, requires_grad=True), torch.randn(8, 1, 3, 3, requires_grad=True)
    t, guidance = torch.rand(2), torch.ones(2)

    def step() -> list[Tensor]:
        values = [
            *tk.adaln(tokens, tokens, weight, weight, weight), tk.rms_norm(tokens, weight),
            tk.conv_glu(tokens, taps, height=3, width=4), tk.linear(tokens, weight.expand(3, 8)),
            tk.attention(heads, heads, heads, q_norm=(weight, 1e-6), is_causal=True),
            tk.linear_attention(heads, heads, heads, k_norm=(weight, 1e-6)),
            tk.flow_output(tk.flow_input(tokens, t)[0], tokens, t),
            *tk.tangent_loss(tokens, *[tokens.detach()] * 3, t, 0.5, 0.1),
        ]  # fmt: skip
        with torch.no_grad():
            twice = torch.cat([tokens, tokens])
            values += tk.trajectory_step(tokens, twice, t, 0 * t, guidance)
        loss = sum(v.square().sum() for v in values if v.requires_grad)
        return [*values, *torch.autograd.grad(loss, (tokens, heads, weight, taps))]

    want = step()
    with torch.device("meta"):
        got = step()
    assert dispatched == set()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
