"""Every way in which PyTorch can lose a tangent gives the right one here, or raises."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from saved import saved, size
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import tbcm_kernels as tk

B, N, C = 2, 6, 16


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    shapes = [(B, N, C), (B, N, C), (B, 1, C), (B, 1, C), (B, 1, C), (C,), (2 * C, C)]
    shapes.append((2 * C, 1, 3, 3))
    primals = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    return primals, [torch.randn(s).to(dtype) for s in shapes]


def stack(x, h, gate, scale, shift, weight, matrix, taps, impl="auto"):
    """All ops in a row; one output."""
    out, y = tk.adaln(x, h, gate, scale, shift, impl=impl)
    q, k, v = (t.reshape(B, N, 2, 8).transpose(1, 2) for t in (y, h, x))
    norm = (torch.full((8,), 1.5), 1e-6)
    o = tk.attention(q, k, v, is_causal=True, k_norm=norm, impl=impl)
    o = o + tk.linear_attention(q, k, v, feature_map="elu+1", q_norm=norm, impl=impl)
    y = o.transpose(1, 2).flatten(-2)
    y = tk.conv_glu(tk.linear(y, matrix), taps, height=2, width=3, impl=impl)
    return out + tk.rms_norm(y, weight, impl=impl)


def _plain(*inputs: Tensor) -> Tensor:
    """The same in PyTorch, from primitives: F.layer_norm is not right to second order."""
    x, h, gate, scale, shift, weight, matrix, taps = inputs
    out = x + gate * h
    center = out - out.mean(-1, keepdim=True)
    y = center * torch.rsqrt(center.square().mean(-1, keepdim=True) + 1e-6) * (1 + scale) + shift
    q, k, v = (t.reshape(B, N, 2, 8).transpose(1, 2) for t in (y, h, x))
    nq, nk = (1.5 * t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-6) for t in (q, k))
    fq, fk = F.elu(nq) + 1, F.elu(k) + 1
    linear = fq @ (fk.mT @ v) / (fq @ fk.sum(-2).unsqueeze(-1))
    k = nk
    later = torch.ones(N, N, dtype=torch.bool).triu(1)
    p = torch.softmax((q @ k.mT / 8**0.5).masked_fill(later, -torch.inf), -1)
    y = (p @ v + linear).transpose(1, 2).flatten(-2)
    pixels = F.silu(y @ matrix.mT).unflatten(1, (2, 3)).permute(0, 3, 1, 2)
    mixed = F.conv2d(pixels, taps, padding=1, groups=2 * C).flatten(2).mT
    y = mixed[..., :C] * F.silu(mixed[..., C:])
    return out + weight * y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)


def _expected() -> tuple[Tensor, Tensor]:
    primals, tangents = _inputs(torch.float64)
    return torch.func.jvp(_plain, tuple(primals), tuple(tangents))


def _agrees(pair: tuple[Tensor, Tensor]) -> None:
    for got, want in zip(pair, _expected(), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_func_jvp() -> None:
    primals, tangents = _inputs()
    _agrees(torch.func.jvp(stack, tuple(primals), tuple(tangents)))


def test_dual_level() -> None:
    primals, tangents = _inputs()
    with fwAD.dual_level():
        pair = fwAD.unpack_dual(stack(*map(fwAD.make_dual, primals, tangents)))
    _agrees(pair)


def test_func_jvp_with_aux_under_no_grad() -> None:
    primals, tangents = _inputs()
    with torch.no_grad():
        value, tangent, aux = torch.func.jvp(
            lambda *p: (stack(*p), 2 * p[0].detach()), tuple(primals), tuple(tangents), has_aux=True
        )
    _agrees((value, tangent))
    assert torch.equal(aux, 2 * primals[0]) and not tangent.requires_grad


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("stop", [False, True])
def test_compile_fullgraph_forward_and_backward(backend: str, stop: bool) -> None:
    torch._dynamo.reset()
    primals, tangents = _inputs()

    def both(*values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(stack, values[:8], values[8:])

    def run(function: object) -> list[Tensor]:
        value, tangent = function(*primals, *tangents)
        assert tangent.requires_grad is not stop
        loss = value.square().sum() + (0 if stop else tangent.square().sum())
        return [value, tangent, *torch.autograd.grad(loss, primals)]

    compiled = torch.compile(both, fullgraph=True, backend=backend)
    if stop:
        with tk.stop_tangent_gradient():
            got, want = run(compiled), run(both)
    else:
        got, want = run(compiled), run(both)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("lengths", [(5, 7), (7, 5)])
def test_compile_of_attention_with_every_option(lengths: tuple[int, int]) -> None:
    """Masks, norms, shared keys and [B, N, H, D] buffers; the fakes promise the right strides."""
    torch._dynamo.reset()
    queries, keys = lengths
    inputs = [torch.randn(2, n, h, 8).requires_grad_() for n, h in ((queries, 4), *[(keys, 2)] * 2)]
    tangents = [torch.randn_like(x) for x in inputs]
    weight = torch.ones(32).requires_grad_()
    bias, seen = torch.randn(4, 1, keys), torch.rand(2, keys) > 0.3

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in inputs)
        return tk.attention(
            q, k, v, attn_mask=bias, key_mask=seen, q_norm=(weight, 1e-6), enable_gqa=True,
            is_causal=True, causal_alignment="lower_right", return_lse=True,
        )  # fmt: skip

    def run(jvp: object) -> list[Tensor]:
        (o, lse), (to, tlse) = jvp(*inputs, *tangents)
        assert o.transpose(1, 2).is_contiguous() and to.transpose(1, 2).is_contiguous()
        some = lse > -torch.inf
        loss = o.square().sum() + (to * o).sum() + (lse[some] * tlse[some]).sum()
        return [o, lse, to, tlse, *torch.autograd.grad(loss, [*inputs, weight])]

    def both(*values: Tensor) -> tuple:
        return torch.func.jvp(function, values[:3], values[3:])

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled), run(both), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_function_inside_dual_level_keeps_the_tangent_or_raises(fullgraph: bool) -> None:
    """PyTorch itself drops the tangent here (pytorch#187284), so the door refuses.

    Without fullgraph the refusal breaks the graph, and what follows would run half compiled.
    """
    torch._dynamo.reset()
    primals, tangents = _inputs()
    compiled = torch.compile(stack, fullgraph=fullgraph, backend="aot_eager")
    torch.testing.assert_close(compiled(*primals), stack(*primals))  # compiled before, outside
    with fwAD.dual_level(), pytest.raises(Exception, match=r"dual_level|dual tensor"):
        compiled(*map(fwAD.make_dual, primals, tangents))


def test_dual_level_inside_a_compiled_function_keeps_the_tangent_or_raises() -> None:
    torch._dynamo.reset()
    primals, tangents = _inputs()

    def both(*values: Tensor) -> tuple[Tensor, Tensor]:
        with fwAD.dual_level():
            return tuple(fwAD.unpack_dual(stack(*map(fwAD.make_dual, values[:8], values[8:]))))

    try:
        pair = torch.compile(both, fullgraph=True, backend="aot_eager")(*primals, *tangents)
    except Exception as refusal:
        assert "dual_level" in str(refusal)
    else:
        _agrees(pair)


@pytest.mark.parametrize("record", [
    lambda f, x: torch.export.export(f, (x,)).module(), torch.jit.trace, lambda f, x: make_fx(f)(x),
], ids=["export", "trace", "make_fx"])  # fmt: skip
@pytest.mark.parametrize("default_device", [None])  # PyTorch's own recorders do not like a mode
def test_a_recorded_graph_raises_under_forward_mode(record: Callable, default_device: None) -> None:
    """It holds tbcm's ops as they are below the functions that look for tangents."""
    x, tx = torch.randn(2, 2, 3, 16)
    for module in (torch.nn.RMSNorm(16), torch.nn.LayerNorm(16, elementwise_affine=False)):
        recorded = record(tk.fuse(module).model, x)
        torch.testing.assert_close(recorded(x), module(x))
        with pytest.raises(RuntimeError, match=r"would lose a tangent.*call that on the model"):
            torch.func.jvp(recorded, (x,), (tx,))
        with fwAD.dual_level(), pytest.raises(RuntimeError, match="would lose a tangent"):
            recorded(fwAD.make_dual(x, tx))


def test_a_graph_recorded_of_a_jvp_keeps_the_tangent() -> None:
    x, tx = torch.randn(2, 2, 3, 16)
    norm = tk.fuse(torch.nn.RMSNorm(16)).model

    def pair(x: Tensor, tx: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(norm, (x,), (tx,))

    for found, want in zip(make_fx(pair)(x, tx)(x, tx), pair(x, tx), strict=True):
        torch.testing.assert_close(found, want)


def test_gradient_through_the_tangent_is_exact() -> None:
    primals, tangents = _inputs()
    want_primals, want_tangents = _inputs(torch.float64)
    got = _gradients_of_both(stack, primals, tangents)
    want = _gradients_of_both(_plain, want_primals, want_tangents)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()


def _gradients_of_both(f: object, primals: list[Tensor], tangents: list[Tensor]) -> tuple:
    value, tangent = torch.func.jvp(f, tuple(primals), tuple(tangents))
    return torch.autograd.grad(value.sum() + tangent.square().sum(), primals)


def test_stop_tangent_gradient_gives_the_gradient_of_the_value_alone() -> None:
    primals, tangents = _inputs()
    with tk.stop_tangent_gradient():
        value, tangent = torch.func.jvp(stack, tuple(primals), tuple(tangents))
    assert not tangent.requires_grad
    got = torch.autograd.grad(value.sum(), primals)
    want = torch.autograd.grad(stack(*primals).sum(), primals)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_stop_tangent_gradient_saves_nothing_for_the_tangent() -> None:
    primals, tangents = _inputs()

    def dual() -> int:
        with saved() as kept:
            torch.func.jvp(stack, tuple(primals), tuple(tangents))
        return size(kept)

    with saved() as plain:
        stack(*primals)
    with tk.stop_tangent_gradient():
        assert dual() == size(plain)
    assert dual() > size(plain)


@pytest.mark.parametrize("through", [torch.bfloat16, torch.float64])
def test_a_dual_of_two_dtypes_keeps_its_tangent(through: torch.dtype) -> None:
    """As `F.layer_norm` makes it of bf16 with weights in fp32."""
    primals, tangents = _inputs()
    tangents = [t.bfloat16().to(through) for t in tangents]
    with fwAD.dual_level():
        duals = [fwAD.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
        pair = fwAD.unpack_dual(stack(*duals))
    exact = [[t.detach().double() for t in kind] for kind in (primals, tangents)]
    for got, want in zip(pair, torch.func.jvp(_plain, *map(tuple, exact)), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    x, w = torch.randn(4, 16).bfloat16(), torch.ones(16)

    def normed(x: Tensor) -> Tensor:
        return tk.rms_norm(F.layer_norm(x, (16,), w.double() if x.itemsize == 8 else w))

    _, tangent = torch.func.jvp(normed, (x,), (x.cos(),))
    _, want = torch.func.jvp(normed, (x.double(),), (x.cos().double(),))
    torch.testing.assert_close(tangent.double(), want, rtol=0.02, atol=0.02)


def test_the_reference_takes_the_tangent_as_a_constant_too() -> None:
    primals, tangents = _inputs()
    t = torch.rand(B)
    x, w = primals[0], primals[5]
    calls = {
        "rms_norm": lambda x, impl: tk.rms_norm(x, w, impl=impl),
        "adaln": lambda x, impl: sum(tk.adaln(x, primals[1], *primals[2:5], impl=impl)),
        "conv_glu": lambda x, impl: tk.conv_glu(
            F.pad(x, (0, C)), primals[7], height=2, width=3, impl=impl
        ),
        "flow_input": lambda x, impl: tk.flow_input(x, t, impl=impl)[0],
        "flow_output": lambda x, impl: tk.flow_output(x, x.sin(), t, impl=impl),
    }
    for name, call in calls.items():
        grads = []
        for impl in ("auto", "reference"):
            with tk.stop_tangent_gradient():
                y, ty = torch.func.jvp(lambda x: call(x, impl), (x,), (tangents[0],))  # noqa: B023
            assert not ty.requires_grad, (name, impl)
            grads.append(torch.autograd.grad(y.square().sum() + ty.sum(), x)[0])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4, msg=name)


def test_backward_of_a_checkpoint_inside_a_dual_level() -> None:
    x = torch.randn(2, 6, requires_grad=True)
    with fwAD.dual_level():
        y = checkpoint(tk.rms_norm, x, use_reentrant=False)
        (got,) = torch.autograd.grad(y.square().sum(), x)
    (want,) = torch.autograd.grad(tk.rms_norm(x).square().sum(), x)
    assert torch.equal(got, want)


def test_vmap_over_tangents() -> None:
    primals, _ = _inputs()
    lanes = torch.randn(3, B, N, C)

    def along(t: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: stack(x, *primals[1:]), (primals[0],), (t,))[1]

    want = torch.stack([along(t) for t in lanes])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch's slow fallback would warn
        got = torch.func.vmap(along)(lanes)
    order = (
        {"rtol": 1e-4, "atol": 1e-4} if lanes.is_cuda else {}
    )  # products of other sizes on a GPU
    torch.testing.assert_close(got, want, **order)


def test_checkpoint_of_explicit_pairs() -> None:
    primals, tangents = _inputs()
    x, h, *modulations = primals[:5]

    def pair(x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return tk.adaln_jvp(x, h, *modulations, *tangents[:5])

    y = torch.utils.checkpoint.checkpoint(pair, x, h, use_reentrant=False)[1]
    got = torch.autograd.grad(y.sum(), [x, h])
    want = torch.autograd.grad(pair(x, h)[1].sum(), [x, h])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_checkpoint_of_attention_pairs() -> None:
    """The gradient passes through value and tangent, in a scope entered again or in none."""
    inputs = [torch.randn(2, 2, n, 8).requires_grad_() for n in (5, 6, 6)]
    tangents = [torch.randn_like(x) for x in inputs]

    def pair(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return tk.attention_jvp(*inputs, *tangents)

    for stop in (False, True):
        with tk.stop_tangent_gradient() if stop else contextlib.nullcontext():
            kept = torch.utils.checkpoint.checkpoint(pair, *inputs, use_reentrant=False)
            grads = [
                torch.autograd.grad(o.sum() + to.detach().sum() if stop else (o + to).sum(), inputs)
                for o, to in (kept, pair(*inputs))
            ]
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)


def _nested(primals: list[Tensor], tangents: list[Tensor], impl: str) -> Tensor:
    def first(*p: Tensor) -> Tensor:
        return torch.func.jvp(lambda *q: stack(*q, impl=impl), p, tuple(tangents))[1]

    return torch.func.jvp(first, tuple(primals), tuple(tangents))[1]


def test_nested_forward_mode_raises() -> None:
    with pytest.raises(RuntimeError, match="one level of forward mode"):
        _nested(*_inputs(), "auto")


def test_nested_forward_mode_raises_under_compile() -> None:
    torch._dynamo.reset()
    primals, tangents = _inputs()
    compiled = torch.compile(lambda *p: _nested(list(p), tangents, "auto"), backend="eager")
    with pytest.raises(Exception, match="one level of forward mode"):
        compiled(*primals)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_functional_reverse_mode_raises_with_the_mend(transform: object) -> None:
    primals, _ = _inputs()
    with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad"):
        transform(lambda x: stack(x, *primals[1:]).sum())(primals[0])


@pytest.mark.parametrize(
    "call",
    [
        lambda x, p: tk.rms_norm_jvp(x, p[5]),
        lambda x, p: tk.adaln_jvp(p[0], p[1], tx=x),
        lambda x, p: tk.conv_glu_jvp(x, p[7][:C], height=2, width=3),
        lambda x, p: tk.linear_jvp(p[0], p[6], None, x),
        lambda x, p: tk.attention_jvp(p[0], x, p[0]),
        lambda x, p: tk.attention_jvp(p[0], p[0], p[0], None, x),
        lambda x, p: tk.linear_attention_jvp(p[0][None], p[0][None], x[None]),
    ],
)
def test_a_dual_given_to_an_explicit_function_raises(call: object) -> None:
    primals, tangents = _inputs()
    with pytest.raises(RuntimeError, match="is a forward-AD dual"):
        torch.func.jvp(lambda x: call(x, primals), (primals[0],), (tangents[0],))


def test_forward_mode_over_backward_raises() -> None:
    primals, tangents = _inputs()
    with fwAD.dual_level():
        y = tk.rms_norm(fwAD.make_dual(primals[0], tangents[0]), primals[5])
        with pytest.raises(RuntimeError, match="lost in the backward of"):
            torch.autograd.grad(y.pow(3).sum(), primals[0])


def test_levels_that_attention_refuses() -> None:
    """Alone, for in `stack` another op refuses first."""
    x = torch.randn(1, 4, 8)
    along = lambda f: lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]  # noqa: E731
    function = lambda x: tk.attention(x, x, x)  # noqa: E731
    with pytest.raises(RuntimeError, match="one level of forward mode"):
        along(along(function))(x)
    with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad"):
        torch.func.grad(lambda x: function(x).sum())(x)
    leaf = x.clone().requires_grad_()
    with fwAD.dual_level():
        o = tk.attention(fwAD.make_dual(leaf, torch.ones_like(x)), x, x)
        with pytest.raises(RuntimeError, match="lost in the backward of"):
            torch.autograd.grad(o.pow(3).sum(), leaf)


def test_nested_levels_of_the_reference_are_right() -> None:
    """What the refusals advise: plain PyTorch to any order."""
    x, t = torch.randn(2, 1, 4, 8, dtype=torch.float64)
    along = lambda f: lambda x: torch.func.jvp(f, (x,), (t,))[1]  # noqa: E731
    got = along(along(lambda x: tk.attention(x, x, x, impl="reference")))(x)
    want = along(along(lambda x: torch.softmax(x @ x.mT / 8**0.5, -1) @ x))(x)
    torch.testing.assert_close(got, want)


def test_a_tensor_that_learns_is_no_number() -> None:
    """As an argument that the ops take for a number, its gradient and tangent would vanish."""
    x = torch.randn(2, 2, 4, 8)
    calls = {
        "scale": lambda s: tk.attention(x, x, x, scale=s),
        "eps": lambda s: tk.rms_norm(x, eps=s),
        " eps": lambda s: tk.adaln(x[0], eps=s),
        "  eps": lambda s: tk.linear_attention(x, x, x, eps=s),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name.strip()} is a number, and the gradient"):
            call(torch.tensor(0.5, requires_grad=True))
        with pytest.raises(ValueError, match=f"{name.strip()} is a number, and the gradient"):
            torch.func.jvp(call, (torch.tensor(0.5),), (torch.tensor(1.0),))
        assert call(torch.tensor(0.5)) is not None
        with pytest.raises(ValueError, match=f"{name.strip()} must be a number, got 'half'"):
            call("half")


def test_numbers_of_the_objective_are_none_to_learn() -> None:
    x, t = torch.randn(2, 3, 4), torch.full((2,), 0.5)
    both = torch.cat((x, x))
    calls = {
        "r": lambda r: tk.tangent_loss(x, x, x, x, t, r)[0],
        "sigma_data": lambda s: tk.trajectory_step(x, both, t, t, t, s)[0],
    }
    for name, call in calls.items():
        for learns in (torch.tensor(0.5, requires_grad=True), "half"):
            with pytest.raises(ValueError, match=f"{name} (is|must be) a number"):
                call(learns)
        with pytest.raises(ValueError, match=f"{name} is a number"):
            torch.func.jvp(call, (torch.tensor(0.5),), (torch.tensor(1.0),))
        assert torch.equal(call(1), call(1.0))


def test_reverse_mode_of_linear_without_a_tangent() -> None:
    """Nothing can be lost there; with a tangent it raises as before."""
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    found, stock = (
        torch.func.grad(lambda x, f=f: f(x, weight, bias).square().sum())(x)
        for f in (tk.linear, F.linear)
    )
    assert torch.equal(found, stock)
    square = torch.func.grad(lambda x: tk.linear(x, weight, bias).square().sum())
    with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad"):
        torch.func.jvp(square, (x,), (x,))


def test_the_reference_rounds_the_same_under_autocast() -> None:
    primals, _ = _inputs()
    x, taps = primals[0], primals[7][:C]
    q = x.unflatten(-1, (2, 8)).transpose(1, 2)
    calls = (
        lambda: tk.conv_glu(x, taps, height=2, width=3, impl="reference"),
        lambda: tk.linear_attention(q, q, q, impl="reference"),
    )
    for call in calls:
        with torch.autocast("cpu", torch.bfloat16):
            inside = call()
        assert torch.equal(inside, call())


def test_outputs_never_alias_inputs() -> None:
    x, h = torch.randn(2, 2, 3, 4).double()
    tangent = torch.ones_like(x)
    tk.adaln_jvp(x, h, tx=tangent)[2].mul_(2)
    tk.adaln_jvp(x, shift=h, tshift=tangent)[3].mul_(2)
    assert torch.equal(tangent, torch.ones_like(x))


def test_double_backward_raises() -> None:
    primals, _ = _inputs()
    gated = tk.conv_glu(primals[0], primals[7][:C], height=2, width=3)
    attended = tk.attention(primals[0], primals[1], primals[1])
    linear = tk.linear_attention(*(p.unsqueeze(1) for p in (primals[0], primals[1], primals[1])))
    norms = tk.adaln(*primals[:5])[1], tk.rms_norm(primals[0], primals[5])
    for y in (*norms, gated, attended, linear):
        (first,) = torch.autograd.grad(y.sum(), primals[0], create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            first.sum().backward()


def test_a_tangent_of_the_wrong_shape_raises() -> None:
    x = torch.randn(B, N, C)
    with pytest.raises(ValueError, match="tx must match x"):
        tk.rms_norm_jvp(x, None, x[:, :1])
    with pytest.raises(ValueError, match="tgate was given without gate"):
        tk.adaln_jvp(x, x, tgate=x[:, :1])


def test_autocast_casts_pairs_alike() -> None:
    primals, tangents = _inputs()
    with torch.autocast(primals[0].device.type, torch.bfloat16):
        y, ty = tk.linear_jvp(primals[0], primals[6], None, tangents[0])
        bias, moving = torch.randn(2, len(primals[6])).to(primals[0])
        z, tz = tk.linear_jvp(primals[0], primals[6], bias, None, primals[6], moving)
    assert y.dtype == ty.dtype == z.dtype == tz.dtype == torch.bfloat16
