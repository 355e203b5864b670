"""What an op refuses under PyTorch's transforms, because a tangent would be lost, and the mends."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import tbcm_kernels as tk

T, TAPS, WEIGHT = torch.rand(1), torch.randn(8, 1, 3, 3), torch.ones(6, 8)
OPS: dict[str, Callable[..., Tensor]] = {
    "linear": lambda x: tk.linear(x, WEIGHT),
    "rms_norm": tk.rms_norm,
    "adaln": lambda x, **impl: tk.adaln(x, x.sin(), **impl)[1],
    "conv_glu": lambda x, **impl: tk.conv_glu(x, TAPS, height=2, width=2, **impl),
    "attention": lambda x, **impl: tk.attention(x, x.sin(), x.cos(), **impl),
    "linear_attention": lambda x, **impl: tk.linear_attention(x[None], x[None], x[None], **impl),
    "flow_input": lambda x, **impl: tk.flow_input(x, T, **impl)[0],
    "flow_output": lambda x, **impl: tk.flow_output(x, x.sin(), T, **impl),
}
PLAIN = {name: functools.partial(f, impl="reference") for name, f in OPS.items()}
PLAIN["linear"] = lambda x: F.linear(x, WEIGHT)


@pytest.mark.parametrize("name", OPS)
def test_vmap_inside_jvp_raises_with_the_mend(name: str) -> None:
    """The mend that it names is one: the reference's products are those of jvp inside vmap."""
    x, tx = torch.randn(2, 3, 1, 4, 8)
    with pytest.raises(RuntimeError, match="put jvp inside vmap"):
        torch.func.jvp(torch.func.vmap(OPS[name]), (x,), (tx,))
    got = torch.func.jvp(torch.func.vmap(PLAIN[name]), (x,), (tx,))
    want = torch.func.vmap(lambda x, tx: torch.func.jvp(OPS[name], (x,), (tx,)))(x, tx)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("name", [*OPS, "a fused layer"])
@pytest.mark.parametrize("default_device", [None])
def test_a_compiled_op_inside_jvp_keeps_the_tangent_or_raises(
    name: str, fullgraph: bool, default_device: None
) -> None:
    """With the "eager" backend, the one that PyTorch lets run there, on values without tangents."""
    torch._dynamo.reset()
    function = OPS[name] if name in OPS else tk.fuse(nn.Linear(8, 8)).model
    compiled = torch.compile(function, backend="eager", fullgraph=fullgraph)
    x, tx = torch.randn(1, 4, 8), torch.randn(1, 4, 8)

    def along(function: Callable[..., Tensor]) -> Tensor:
        return torch.func.jvp(lambda x: function(x.tanh()), (x,), (tx,))[1]

    if fullgraph:
        with pytest.raises(Exception, match=r"Observed exception|inside torch\.func\.jvp"):
            along(compiled)
    else:
        torch.testing.assert_close(along(compiled), along(function))


@pytest.mark.parametrize("name", OPS)
def test_vmap_inside_a_dual_level_raises_with_the_mend(name: str) -> None:
    """The mend is that of the test above, jvp inside vmap."""
    x, tx = torch.randn(2, 3, 1, 4, 8)
    with fwAD.dual_level(), pytest.raises(RuntimeError, match=r"put torch\.func\.jvp inside vmap"):
        torch.func.vmap(OPS[name])(fwAD.make_dual(x, tx))


@pytest.mark.parametrize("name", [*OPS, "a fused layer"])
def test_functionalize_inside_forward_mode_raises_with_the_mend(name: str) -> None:
    """Its wrappers have no tangent. The mend is the other order; a value has nothing to lose."""
    function = OPS[name] if name in OPS else tk.fuse(nn.Linear(8, 8)).model
    hidden, (x, tx) = torch.func.functionalize(function), torch.randn(2, 1, 4, 8)
    with pytest.raises(RuntimeError, match=r"put torch\.func\.jvp inside functionalize"):
        torch.func.jvp(hidden, (x,), (tx,))
    with fwAD.dual_level(), pytest.raises(RuntimeError, match="inside functionalize"):
        hidden(fwAD.make_dual(x, tx))
    want = torch.func.jvp(function, (x,), (tx,))
    got = torch.func.functionalize(lambda x, tx: torch.func.jvp(function, (x,), (tx,)))(x, tx)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(hidden(x), want[0])
    lanes = torch.func.functionalize(torch.func.vmap(function))
    with fwAD.dual_level(), pytest.raises(RuntimeError, match="inside functionalize"):
        lanes(fwAD.make_dual(x[None], tx[None]))


@pytest.mark.parametrize("name", OPS)
def test_lanes_without_tangents_run_inside_a_dual_level(name: str) -> None:
    """One level counts for all threads: it may be another's."""
    x = torch.randn(3, 1, 4, 8)
    want = torch.func.vmap(OPS[name])(x)
    with fwAD.dual_level():
        torch.testing.assert_close(torch.func.vmap(OPS[name])(x), want)
        leaf = x[0].clone().requires_grad_()
        y = OPS[name](leaf)
        several = torch.stack([torch.ones_like(y), y.detach()])
        if name == "linear":  # PyTorch's own backward
            torch.autograd.grad(y, leaf, several, is_grads_batched=True)
        else:
            with pytest.raises(RuntimeError, match=r"use torch\.func\.vmap"):
                torch.autograd.grad(y, leaf, several, is_grads_batched=True)


@pytest.mark.parametrize("name", [*OPS, "a fused layer"])
def test_a_gradient_made_inside_a_dual_level_raises(name: str) -> None:
    """PyTorch's has a tangent, of a loss that is linear too; ours would be a wrong one or none."""
    function = OPS[name] if name in OPS else tk.fuse(nn.Linear(8, 8)).model
    x, tx = torch.randn(2, 1, 4, 8)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(function(leaf).sum(), leaf)
    with fwAD.dual_level():
        y = function(fwAD.make_dual(leaf, tx))
        with pytest.raises(RuntimeError, match=r"after dual_level\(\) has ended"):
            torch.autograd.grad(y.sum(), leaf, retain_graph=True)
    with fwAD.dual_level():  # another, of which y is no dual
        (got,) = torch.autograd.grad(y.sum(), leaf)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", OPS)
def test_a_selective_checkpoint_of_constant_tangents_raises(name: str) -> None:
    """Backward, which computes values alone again, would take a kept tangent for one of them."""
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])

    def run(x: Tensor) -> Tensor:
        return checkpoint(OPS[name], x, use_reentrant=False, context_fn=contexts)

    x, tx = torch.randn(2, 1, 4, 8)
    with tk.stop_tangent_gradient():
        run(x.clone().requires_grad_()).sum().backward()
        with pytest.raises(RuntimeError, match="leave out context_fn"):
            torch.func.jvp(run, (x,), (tx,))


@pytest.mark.parametrize("name", OPS)
def test_the_vectorised_jacobian_raises_with_the_mend(name: str) -> None:
    """PyTorch's older form of vmap; but where the value is a call of its own it has all rules."""
    x = torch.randn(1, 4, 8)

    def older(function: Callable[..., Tensor]) -> Tensor:
        forward = {"vectorize": True, "strategy": "forward-mode"}
        return torch.autograd.functional.jacobian(function, x, **forward)

    want = torch.func.jacfwd(PLAIN[name])(x)
    torch.testing.assert_close(torch.func.jacfwd(OPS[name])(x), want, rtol=1e-4, atol=1e-5)
    if name == "linear":
        torch.testing.assert_close(older(OPS[name]), want)
        return
    with pytest.raises(RuntimeError, match=r"use torch\.func\.jacfwd"):
        older(OPS[name])


def test_vmap_over_nothing_raises() -> None:
    with pytest.raises(ValueError, match="at least one element"):
        torch.vmap(tk.rms_norm)(torch.randn(0, 3, 8))


@pytest.mark.parametrize("name", OPS)
def test_a_gradient_through_a_tangent_is_differentiated_again_or_refuses(name: str) -> None:
    x, tx = torch.randn(2, 1, 4, 8)

    def twice(function: Callable[..., Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        value, tangent = torch.func.jvp(function, (leaf,), (tx,))
        (first,) = torch.autograd.grad((value.square() * tangent).sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    if name == "attention":
        with pytest.raises(RuntimeError, match="second derivative"):
            twice(OPS[name])
    else:
        torch.testing.assert_close(twice(OPS[name]), twice(PLAIN[name]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: tk.rms_norm_jvp(x)[0],
        lambda x: tk.adaln_jvp(x)[1],
        lambda x: tk.conv_glu_jvp(x, TAPS, height=2, width=2)[0],
        lambda x: tk.linear_attention_jvp(x[None], x[None], x[None])[0],
        lambda x: tk.attention_jvp(x, x, x)[0],
        lambda x: tk.flow_input_jvp(x, T)[0],
        lambda x: tk.flow_output_jvp(x, x, T)[0],
    ],
)
def test_explicit_functions_raise_under_functional_reverse_mode(call: Callable) -> None:
    with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad"):
        torch.func.grad(lambda x: call(x).sum())(torch.randn(1, 4, 8))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_tangents_of_explicit_functions_are_constants_in_the_semi_gradient(impl: str) -> None:
    x, t, a = torch.randn(1, 4, 8), torch.randn(1, 4, 8), {"impl": impl}
    leaf = x.clone().requires_grad_()
    with tk.stop_tangent_gradient():
        moved = [
            tk.rms_norm_jvp(leaf, None, t, **a)[1],
            *tk.adaln_jvp(leaf, x, tx=t, **a)[2:],
            tk.conv_glu_jvp(leaf, TAPS, None, t, height=2, width=2, **a)[1],
            tk.flow_input_jvp(leaf, T, t, **a)[2],
            tk.flow_output_jvp(leaf, x, T, t, **a)[1],
        ]
    assert not any(y.requires_grad for y in moved)


def test_a_norm_of_constant_size_in_a_graph_of_any_sizes() -> None:
    """Dynamo's "in" does not compare a size that it does not know with one that it does."""
    torch.compiler.reset()

    def function(q: Tensor) -> Tensor:
        return tk.attention(q, q, q, q_norm=(torch.full((8,), 1.5), 1e-6))

    q = torch.randn(2, 2, 6, 8)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(q), function(q))
    torch.compiler.reset()
