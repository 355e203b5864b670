"""Attention that a model of one's own calls: where it is found, and what it may be given."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import pytest
import torch
from test_layers import OwnAttention, worst
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import tbcm_kernels as tk
from tbcm_kernels import _dispatch


class Doubled(OwnAttention):
    """Names nothing itself."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Biased(nn.Module):
    """With a learned bias of the logits, by another name of PyTorch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return sdpa(q, q, q, self.bias * 1).transpose(1, 2).flatten(2)


def test_attention_is_found_through_super_and_by_another_name() -> None:
    x = torch.randn(2, 12, 32)
    for module in (Doubled(32, 2), Biased()):
        with sdpa_kernel(SDPBackend.MATH):
            want = torch.func.jvp(module, (x,), (x.cos(),))
        with tk.fuse(nn.Sequential(module, torch.jit.script(nn.GELU()))):
            got = torch.func.jvp(module, (x,), (x.cos(),))
        assert max(map(worst, got, want)) < 1e-5


@functools.wraps(sdpa)
def _wrapped(*args: Tensor) -> Tensor:
    return sdpa(*args)


def _generated(**names: Callable) -> Callable:
    """A function of no module."""
    exec("def attend(x): return wrapped(x, x, x)", names)
    return names["attend"]


class Generated(nn.Module):
    helper = staticmethod(_generated(wrapped=_wrapped))

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)


def test_attention_is_found_in_generated_and_decorated_functions() -> None:
    x, dx = torch.randn(2, 1, 2, 6, 8)
    value, tangent = torch.func.jvp(tk.fuse(Generated()).model, (x,), (dx,))
    with sdpa_kernel(SDPBackend.MATH):
        stock = torch.func.jvp(Generated(), (x,), (dx,))
    torch.testing.assert_close((value, tangent), stock)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    x, dx = torch.randn(2, 3, 8)
    stock = torch.func.jvp(traced, (x,), (dx,))
    with tk.fuse(traced):
        for ours, theirs in zip(torch.func.jvp(traced, (x,), (dx,)), stock, strict=True):
            torch.testing.assert_close(ours, theirs)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v)


class Elsewhere:
    """Where a model may find its attention: a class, an attribute, a variable around, a default."""

    attend = staticmethod(_attend)


helpers = types.ModuleType("helpers")
helpers.by = _attend


def _around(found: Callable[..., Tensor]) -> type[nn.Module]:
    class Around(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return found(x, x, x)

    return Around


class OfAClass(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Elsewhere.attend(x, x, x)


class OfAModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return helpers.by(x, x, x)


class Kept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kept = _attend

    def forward(self, x: Tensor) -> Tensor:
        return self.kept(x, x, x)


class Default(nn.Module):
    def forward(self, x: Tensor, by: Callable[..., Tensor] = _attend) -> Tensor:
        return by(x, x, x)


class KeywordDefault(nn.Module):
    def forward(self, x: Tensor, *, by: Callable[..., Tensor] = _attend) -> Tensor:
        return by(x, x, x)


@pytest.mark.parametrize(
    "kind", [OfAClass, OfAModule, Kept, Default, KeywordDefault, _around(_attend)]
)
def test_attention_is_found_where_a_forward_takes_it_from(kind: type[nn.Module]) -> None:
    x, dx = torch.randn(2, 1, 2, 6, 8)
    with sdpa_kernel(SDPBackend.MATH):
        stock = torch.func.jvp(kind(), (x,), (dx,))
    torch.testing.assert_close(torch.func.jvp(tk.fuse(kind()).model, (x,), (dx,)), stock)


def test_a_head_dim_that_kernels_do_not_take_runs_in_the_reference() -> None:
    model, (x, dx) = OwnAttention(24, 2), torch.randn(2, 2, 6, 24)
    with sdpa_kernel(SDPBackend.MATH):
        stock = torch.func.jvp(model, (x,), (dx,))
    _dispatch._notice_fallback.cache_clear()
    with tk.fuse(model), pytest.warns(UserWarning, match="multiples of 8 up to 256"):
        for ours, theirs in zip(torch.func.jvp(model, (x,), (dx,)), stock, strict=True):
            torch.testing.assert_close(ours, theirs)


class Masked(nn.Module):
    """Attention of [..., H, N, D] under a mask that `mask` makes of a parameter and of x."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.bias, self.mask = nn.Parameter(torch.randn(6, 6)), mask

    def forward(self, x: Tensor) -> Tensor:
        return sdpa(x.sin(), x, x.cos(), self.mask(self.bias, x))


@pytest.mark.parametrize("mask", [
    lambda bias, x: bias, lambda bias, x: 2 * bias, lambda bias, x: x @ x.mT,
], ids=["learns", "is made of what learns", "moves"])  # fmt: skip
def test_a_mask_that_learns_or_moves_is_pytorchs(mask: Callable) -> None:
    """Inside torch.func.jvp one that was made there does not show that it requires grad."""
    module, (x, dx) = Masked(mask), torch.randn(2, 2, 3, 6, 8)
    leaves = [x.requires_grad_(), module.bias]

    def pair() -> list[Tensor]:
        value, tangent = torch.func.jvp(module, (x,), (dx,))
        loss = value.sin().sum() + tangent.cos().sum()
        return [value, tangent, *torch.autograd.grad(loss, leaves, materialize_grads=True)]

    with sdpa_kernel(SDPBackend.MATH):
        stock = pair()
    _dispatch._notice_fallback.cache_clear()
    with tk.fuse(module), pytest.warns(UserWarning, match="neither moves nor learns"):
        torch.testing.assert_close(pair(), stock)


def test_the_gradient_of_a_learned_bias_is_not_lost_without_a_tangent() -> None:
    module, x = Biased(), torch.randn(2, 12, 32)
    (want,) = torch.autograd.grad(module(x).sin().sum(), module.bias)
    with tk.fuse(module):
        (got,) = torch.autograd.grad(module(x).sin().sum(), module.bias)
    assert worst(got, want) < 1e-5


@pytest.mark.parametrize("shape", [(6, 8), (3, 6, 8), (2, 2, 3, 6, 8), (2, 1, 2, 3, 6, 8)], ids=str)
def test_attention_of_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    holes = torch.rand(*shape[:-1], 6) < 0.7
    for mask in (None, holes, holes[..., :1, :], torch.ones(6, 6, dtype=torch.bool).tril()):
        module, (x, dx) = Masked(lambda *_, mask=mask: mask), torch.randn(2, *shape)
        with sdpa_kernel(SDPBackend.MATH):
            stock = torch.func.jvp(module, (x,), (dx,))
        with tk.fuse(module):
            found = torch.func.jvp(module, (x,), (dx,))
        seen = stock[0].isfinite()  # of a query that sees no key PyTorch's is NaN
        for ours, theirs in zip(found, stock, strict=True):
            torch.testing.assert_close(ours[seen], theirs[seen])


def test_attention_broadcasts_as_pytorchs_does() -> None:
    q, dq, k = *torch.randn(2, 2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    for other in (k[:1], k[:, :1], k[:1, :1]):
        attend = Attends(other)
        with sdpa_kernel(SDPBackend.MATH):
            stock = torch.func.jvp(attend, (q,), (dq,))
        with tk.fuse(attend):
            torch.testing.assert_close(torch.func.jvp(attend, (q,), (dq,)), stock)


_attend_causally = functools.partial(sdpa, is_causal=True)


class Attends(nn.Module):
    """Attention to keys that are given, by a partial function."""

    def __init__(self, keys: Tensor) -> None:
        super().__init__()
        self.register_buffer("keys", keys)

    def forward(self, q: Tensor) -> Tensor:
        return _attend_causally(q, self.keys, self.keys)


class Calls(nn.Module):
    """Attention of what it is given."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, **self.options)


CALLS = {
    "wide": ([(2, 1, 6, 264)] * 3, {}),
    "values of another width": ([(2, 3, 6, 8)] * 2 + [(2, 3, 6, 12)], {}),
    "shared keys": ([(2, 4, 6, 8)] + [(2, 2, 6, 8)] * 2, {"enable_gqa": True}),
    "a mask that broadcasts": ([(2, 2, 3, 6, 8)] * 3, {"attn_mask": (2, 1, 3, 6, 6)}),
}


@pytest.mark.parametrize("moving", ["qkv", "q", "k", "v"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:tbcm_kernels.attention runs its plain PyTorch")
def test_every_call_is_that_of_pytorch(name: str, moving: str) -> None:
    shapes, options = CALLS[name]
    torch.manual_seed(0)
    inputs = dict(zip("qkv", map(torch.randn, shapes), strict=True))
    module = Calls(**{n: torch.randn(v) if n == "attn_mask" else v for n, v in options.items()})

    def function(*moved: Tensor) -> Tensor:
        return module(**inputs | dict(zip(moving, moved, strict=True)))

    primals = tuple(inputs[n] for n in moving)
    tangents = tuple(x.cos() for x in primals)
    with sdpa_kernel(SDPBackend.MATH):
        stock = torch.func.jvp(function, primals, tangents)
    with tk.fuse(module):
        torch.testing.assert_close(torch.func.jvp(function, primals, tangents), stock)
