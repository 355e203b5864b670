"""Attention against PyTorch, and what its public functions promise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from attention_inputs import draw, heads
from saved import saved
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tbcm_kernels as tk
from tbcm_kernels import _dispatch
from tbcm_kernels.attention import autograd
from tbcm_kernels.testing import attention as harness
from tbcm_kernels.testing.cases import Case

pytestmark = pytest.mark.kernels


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": -0.4},
    "bias": {"attn_mask": "bias"},
    "bool": {"attn_mask": "bool"},
    "shared keys": {"enable_gqa": True},
}


def _arguments(name: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    options = dict(OPTIONS[name])
    groups = 2 if "enable_gqa" in options else 4
    inputs = heads((2, 4, 5, 16), (2, groups, 7, 16), (2, groups, 7, 8), dtype=dtype)
    if "attn_mask" in options:
        bias = torch.randn(4, 5, 7).to(dtype)
        options["attn_mask"] = bias if name == "bias" else bias > -1
    return inputs, options


@pytest.mark.parametrize("name", OPTIONS)
def test_the_reference_is_the_jvp_of_sdpa(name: str) -> None:
    inputs, options = _arguments(name, torch.float64)
    tangents = heads(*(x.shape for x in reversed(inputs)), dtype=torch.float64)[::-1]
    with sdpa_kernel(SDPBackend.MATH):
        want = torch.func.jvp(
            lambda *x: F.scaled_dot_product_attention(*x, **options), tuple(inputs), tuple(tangents)
        )
    got = tk.attention_jvp(*inputs, *tangents, **options, impl="reference")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["", "each", "all"])
def test_the_reference_is_the_limit_of_differences(norm: str) -> None:
    case = draw(
        "limit", torch.float64, mask="bias NS", causal="lower_right", q_norm=norm, k_norm=norm
    )  # fmt: skip
    step, tangents = 1e-6, case.tangents[:3]

    def at(t: float) -> tuple[Tensor, Tensor]:
        moved = [x + t * tx for x, tx in zip(case.primals[:3], tangents, strict=True)]
        return harness._call(case, [*moved, *case.primals[3:], None, None, None], "reference")[:2]

    got = harness._call(case, [*case.primals, *tangents], "reference")[2:]
    for g, high, low in zip(got, at(step), at(-step), strict=True):
        torch.testing.assert_close(g, (high - low) / (2 * step), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"mask": "bias NS", "causal": "lower_right", "scale": 0.7},
        {"mask": "bool BHNS", "key_mask": True},
        {"q_norm": "each", "k_norm": "all"},
        {"moving": "q", "k_norm": "each"},
        {"moving": "k v"},
        {"moving": ""},
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_gradcheck_through_the_tangent(impl: str, plan: dict[str, Any]) -> None:
    """All inputs, tangents and weights; "auto" in fp64 is the op with the reference's backward."""
    case = draw("gradcheck", torch.float64, sizes=(1, 2, 1, 3, 4, 8, 8), **plan)
    tensors = [*case.primals, *case.tangents[:3]]
    leaves = [x.nan_to_num().requires_grad_() for x in tensors if x is not None]

    def outputs(*values: Tensor) -> list[Tensor]:
        left = iter(values)
        inputs = [None if x is None else next(left) for x in tensors]
        o, lse, to, tlse = harness._call(case, inputs, impl)
        seen = lse > -torch.inf
        found = [o, lse[seen], to, None if tlse is None else tlse[seen]]
        return [x for x in found if x is not None and x.requires_grad]

    torch.autograd.gradcheck(outputs, leaves, fast_mode=len(leaves) > 5)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("boolean", [True, False])
def test_loss_on_the_lse_of_a_query_without_keys(boolean: bool, impl: str) -> None:
    """Its lse is −∞ and its gradient zero."""
    q, k, v = (x.requires_grad_() for x in heads((1, 1, 3, 8), (1, 1, 5, 8), (1, 1, 5, 8)))
    seen = torch.ones(3, 5).tril(-1).bool()
    mask = seen if boolean else torch.zeros(3, 5).masked_fill(~seen, -torch.inf)
    o, lse, to, tlse = tk.attention_jvp(
        q, k, v, q, k, v, attn_mask=mask, return_lse=True, impl=impl
    )
    assert lse[0, 0, 0] == -torch.inf
    assert not any(x[0, 0, 0].any() for x in (o, to, tlse))
    loss = o.sum() + lse.sum() + to.sum() + tlse.sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [q, k, v]))


def _op_arguments(case: Case, through: bool) -> list[Any]:
    tangents = [None if t is None else t.unsqueeze(0) for t in case.tangents[:3]]
    leaves = [None if x is None else x.requires_grad_() for x in case.primals]
    setting = harness._setting(case)
    mask, (q, k) = setting.attn_mask, case.primals[:2]
    mask = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
    rest = (mask, setting.key_mask, setting.scale, setting.causal, 1e-6, 1e-6)
    return [*leaves, *tangents, *rest, through, "reference"]


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"moving": ""},
        {"moving": "q", "q_norm": "each"},
        {"moving": "v", "mask": "bias BHNS", "orders": ("tokens",)},
        {"moving": "k v", "mask": "bool NS", "k_norm": "all", "causal": "upper_left"},
        {"q_norm": "all", "k_norm": "each", "key_mask": True, "orders": ("tokens", "heads")},
    ],
    ids=str,
)
def test_opcheck(plan: dict[str, Any]) -> None:
    case = draw("opcheck", sizes=(2, 2, 1, 3, 5, 8, 16), **plan)
    values = [x for x in (*case.primals, *case.tangents) if x is not None]
    for x in values:
        x.nan_to_num_()
    for through in (True, False):
        torch.library.opcheck(autograd.attention_op.op, _op_arguments(case, through))


@pytest.mark.parametrize("reached", [(0,), (2,), (0, 1, 2, 3), (1, 3)], ids=str)
def test_opcheck_of_backward(reached: tuple[int, ...]) -> None:
    case = draw("opcheck", sizes=(2, 2, 1, 3, 5, 8, 16), orders=("tokens", "heads"))
    *inputs, _, _ = _op_arguments(case, True)
    outputs = autograd.attention_op(*inputs, False, "reference")
    inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    cotangents = [torch.randn_like(x) if i in reached else None for i, x in enumerate(outputs)]
    outputs = [x.detach() for x in outputs]
    torch.library.opcheck(
        autograd.attention_backward.op,
        (*cotangents, *inputs[:8], *outputs, *inputs[8:], "reference"),
    )


# What the public functions promise.


def test_merge_attention_is_attention_over_all_keys() -> None:
    """In value, tangent and gradients, from three parts, one of them hidden for some queries."""
    shapes = [(2, 2, 7, 16), (2, 2, 12, 16), (2, 2, 12, 8)]
    drawn = heads(*shapes, *shapes, dtype=torch.float64)
    inputs, tangents = [x.requires_grad_() for x in drawn[:3]], drawn[3:]
    mask = torch.ones(7, 12, dtype=torch.bool)
    mask[:, 4:8] = mask[3:, :4] = mask[0] = False

    def whole(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return tk.attention(q, k, v, attn_mask=mask, return_lse=True)

    def merged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return tk.merge_attention([
            tk.attention(q, k[:, :, s], v[:, :, s], attn_mask=mask[:, s], return_lse=True)
            for s in (slice(0, 4), slice(4, 8), slice(8, 12))
        ])  # fmt: skip

    def in_dual_level(inputs: list[Tensor], tangents: list[Tensor]) -> tuple:
        with fwAD.dual_level():
            pairs = [fwAD.unpack_dual(x) for x in merged(*map(fwAD.make_dual, inputs, tangents))]
        return tuple(zip(*pairs, strict=True))

    results = []
    for function in (whole, merged, in_dual_level):
        jvp = function if function is in_dual_level else partial(torch.func.jvp, function)
        (o, lse), (to, tlse) = jvp(tuple(inputs), tuple(tangents))
        seen = lse > -torch.inf
        loss = o.square().sum() + to.square().sum() + (lse[seen] * tlse[seen]).sum()
        results.append([o, lse, to, tlse[seen], *torch.autograd.grad(loss, inputs)])
        assert (lse[:, :, 0] == -torch.inf).all() and not o[:, :, 0].any()
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with tk.stop_tangent_gradient():
        _, merged_tangents = torch.func.jvp(merged, tuple(inputs), tuple(tangents))
    assert not any(x.requires_grad for x in merged_tangents)
    lanes = torch.vmap(lambda x: tk.merge_attention([(x, x[..., 0])] * 2)[0])
    refused = pytest.raises(RuntimeError, match=r"put torch\.func\.jvp inside vmap")
    with tk.stop_tangent_gradient(), refused:
        torch.func.jvp(lanes, (drawn[0],), (drawn[0],))


@pytest.mark.parametrize("moving", ["q", "q k v"])
def test_lanes_of_vmap_share_one_call(moving: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = heads((2, 2, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8))
    lanes = [torch.randn(3, *x.shape) for x in inputs]
    chosen = ["qkv".index(n) for n in moving.split()]
    calls = []
    kernel = _dispatch.implementation("attention", _dispatch.choose("attention", "auto", inputs[0]))
    monkeypatch.setattr(kernel, "forward", _counting(kernel.forward, calls))

    def along(*tangents: Tensor) -> tuple[Tensor, ...]:
        def function(*moved: Tensor) -> tuple[Tensor, Tensor]:
            given = list(inputs)
            for i, x in zip(chosen, moved, strict=True):
                given[i] = x
            return tk.attention(*given, return_lse=True)

        return torch.func.jvp(function, tuple(inputs[i] for i in chosen), tangents)[1]

    got = torch.func.vmap(along)(*(lanes[i] for i in chosen))
    assert len(calls) == 1
    alone = [along(*(lanes[i][j] for i in chosen)) for j in range(3)]
    assert len(calls) == 4
    for g, want in zip(got, map(torch.stack, zip(*alone, strict=True)), strict=True):
        torch.testing.assert_close(g, want, rtol=1e-5, atol=1e-6)


def _counting(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    return counted


def test_gradients_of_a_vmap_over_tangents() -> None:
    inputs = [x.requires_grad_() for x in heads((1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8))]
    lanes = torch.randn(3, *inputs[0].shape).requires_grad_()

    def along(t: Tensor) -> Tensor:
        return tk.attention_jvp(*inputs, t, t_k)[1]

    t_k = torch.randn_like(inputs[1])
    got = torch.func.vmap(along)(lanes)
    want = torch.stack([along(t) for t in lanes])
    leaves = [*inputs, lanes]
    grads = [torch.autograd.grad(x.square().sum(), leaves) for x in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "flat"),
    [*((name, False) for name in OPTIONS), *((n, True) for n in OPTIONS if n != "shared keys")],
)
def test_a_drop_in_for_sdpa(name: str, flat: bool) -> None:
    inputs, options = _arguments(name, torch.float32)
    if flat:
        inputs = [x.flatten(0, 1) for x in inputs]
        if isinstance(mask := options.get("attn_mask"), Tensor):
            options["attn_mask"] = mask.repeat(2, 1, 1)
    leaves = [x.requires_grad_() for x in inputs]
    results = []
    for function in (tk.attention, F.scaled_dot_product_attention):
        o = function(*leaves, **options)
        results.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast_casts_as_sdpa_does() -> None:
    inputs = heads((1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8))
    tangents = [torch.randn_like(x) for x in inputs]
    leaves = [x.requires_grad_() for x in inputs]
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        o, to = tk.attention_jvp(*leaves, *tangents)
        want = F.scaled_dot_product_attention(*inputs)
    assert o.dtype == to.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(o, want, rtol=2e-2, atol=2e-2)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad((o + to).sum(), leaves))


def test_outputs_lie_in_memory_as_the_queries_do() -> None:
    """Views of [B, N, H, D] buffers give such buffers, tangents and gradients too."""
    tokens = [x.requires_grad_() for x in heads((2, 5, 4, 8), (2, 6, 2, 8), (2, 6, 2, 16))]
    q, k, v = (x.transpose(1, 2) for x in tokens)
    tangents = [torch.randn_like(x) for x in (q, k, v)]
    o, lse, to, tlse = tk.attention_jvp(q, k, v, *tangents, enable_gqa=True, return_lse=True)
    assert o.transpose(1, 2).is_contiguous() and to.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous() and tlse.is_contiguous()
    grads = torch.autograd.grad(o.sum() + to.sum(), [q, k, v])
    assert all(g.transpose(1, 2).is_contiguous() for g in grads)


def test_what_is_saved_for_backward() -> None:
    """Inputs, o and lse; with the gradient of the tangent the tangents, to and tlse as well."""
    inputs = [x.requires_grad_() for x in heads((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 16))]
    tangents = [torch.randn_like(x) for x in inputs]
    with saved() as plain:
        tk.attention(*inputs)
    shapes = sorted(tuple(x.shape) for x in plain.values())
    value = [*(tuple(x.shape) for x in inputs), (2, 4, 5, 16), (2, 4, 5)]
    assert shapes == sorted(value)
    with tk.stop_tangent_gradient(), saved() as semi:
        tk.attention_jvp(*inputs, *tangents)
    assert sorted(tuple(x.shape) for x in semi.values()) == shapes
    with saved() as full:
        tk.attention_jvp(*inputs, *tangents)
    lanes = [*(tuple(x.shape) for x in tangents), (2, 4, 5, 16), (2, 4, 5)]
    assert sorted(x.numel() for x in full.values()) == sorted(
        torch.Size(s).numel() for s in value + lanes
    )


def test_no_grad_saves_nothing_and_absent_tangents_are_none() -> None:
    q, k, v = (x.requires_grad_() for x in heads((1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8)))
    with torch.no_grad(), saved() as kept:
        tk.attention_jvp(q, k, v, q)
    assert kept == {}
    o, to = tk.attention_jvp(q, k, v)
    assert to is None and o.requires_grad
    assert tk.attention_jvp(q, k, v, return_lse=True)[2:] == (None, None)


def test_reference_stops_the_tangent_gradient_too() -> None:
    q, tq = heads(*[(1, 2, 3, 8)] * 2)
    q.requires_grad_()
    with tk.stop_tangent_gradient():
        o, to = tk.attention_jvp(q, q, q, tq, impl="reference")
    assert o.requires_grad and not to.requires_grad


def test_lengths_may_change_under_compile() -> None:
    """No option makes a graph of its own for every length."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    q, k = heads((1, 2, 5, 8), (1, 2, 40, 8))
    options = {"is_causal": True, "causal_alignment": "lower_right"}
    counter = CompileCounter()
    compiled = torch.compile(
        lambda k: tk.attention(q, k, k, **options), fullgraph=True, dynamic=True, backend=counter
    )
    for keys in range(6, 18):
        got = compiled(k[:, :, :keys])
        torch.testing.assert_close(got, tk.attention(q, k[:, :, :keys], k[:, :, :keys], **options))
    assert counter.frame_count <= 2


def test_merged_parts_keep_the_dtypes_of_the_first() -> None:
    o, lse = torch.randn(2, 3, 4), torch.randn(2, 3)
    merged = tk.merge_attention([(o.bfloat16(), lse), (o, lse.double())])
    assert [x.dtype for x in merged] == [torch.bfloat16, torch.float32]


def test_a_nan_in_a_part_reaches_the_merged_result() -> None:
    o, lse = torch.ones(1, 2, 8), torch.zeros(1, 2)
    for parts in ([(o, lse * torch.nan), (o, lse)], [(o, lse * torch.nan)]):
        assert all(x.isnan().all() for x in tk.merge_attention(parts))


def test_batched_gradients_with_a_norm_of_all_heads() -> None:
    q, weight = heads((1, 2, 3, 8), (16,))
    q.requires_grad_()
    o = tk.attention(q, q.detach(), q.detach(), q_norm=(weight, 1e-6))
    cotangents = torch.randn(3, *o.shape)
    (got,) = torch.autograd.grad(o, q, cotangents, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(o, q, c, retain_graph=True)[0] for c in cotangents]
    torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize("shape", [(1, 7), (2, 1, 1, 7), (4, 1, 7)])
@pytest.mark.parametrize("beside", [False, True])
def test_boolean_masks_of_keys_alone(shape: tuple[int, ...], beside: bool) -> None:
    """One for all heads or for each, also beside a key_mask."""
    inputs = heads((2, 4, 5, 16), (2, 4, 7, 16), (2, 4, 7, 8))
    mask, key_mask = torch.rand(shape) < 0.6, torch.rand(2, 7) < 0.6
    mask[..., 0] = key_mask[:, 0] = True
    both = mask & key_mask[:, None, None] if beside else mask
    got = tk.attention(*inputs, mask, key_mask=key_mask if beside else None)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(*inputs, both))


@pytest.mark.parametrize(("count", "queries"), [(4, 0), (0, 5)])
def test_a_boolean_mask_of_keys_beside_no_queries(count: int, queries: int) -> None:
    q, k, v = heads((2, count, queries, 16), (2, count, 7, 16), (2, count, 7, 8))
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    assert tk.attention(q, k, v, mask).shape == (2, count, queries, 8)


@pytest.mark.parametrize("stop", [False, True])
def test_each_norm_has_an_eps_of_its_own(stop: bool) -> None:
    q, k, v, tq, tk_, tv = heads(*[(1, 2, 5, 8)] * 6, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    weight = torch.ones(8, dtype=torch.float64)

    def norm(x: Tensor, eps: float) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(norm(q, 0.1), norm(k, 0.7), v)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tk.attention(q, k, v, q_norm=(weight, 0.1), k_norm=(weight, 0.7))

    results = []
    for function in (ours, plain):
        scope = tk.stop_tangent_gradient if stop else contextlib.nullcontext
        with sdpa_kernel(SDPBackend.MATH), scope():
            o, to = torch.func.jvp(function, (q, k, v), (tq, tk_, tv))
        loss = o.square().sum() + (0 if stop else to.square().sum())
        results.append([o, to, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_a_part_of_low_logits_is_merged() -> None:
    o, lse = torch.randn(2, 3, 4), torch.full((2, 3), -3e4)
    hidden = torch.zeros_like(o), torch.full_like(lse, -torch.inf)
    torch.testing.assert_close(tk.merge_attention([(o, lse), hidden]), (o, lse))


def test_a_gradient_of_the_lse_that_is_one_number_for_all() -> None:
    leaves = [x.requires_grad_() for x in heads((1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8))]
    tangents = [torch.randn_like(x) for x in leaves]
    results = []
    for impl in ("auto", "reference"):
        _, lse, _, tlse = tk.attention_jvp(*leaves, *tangents, return_lse=True, impl=impl)
        results.append(torch.autograd.grad((lse + tlse).sum(), leaves[:2]))
    torch.testing.assert_close(*results)


def test_a_flat_mask_is_for_all_samples() -> None:
    q, k = heads((3, 5, 8), (3, 7, 8))
    mask = torch.randn(5, 7)
    want = F.scaled_dot_product_attention(q, k, k, mask)
    torch.testing.assert_close(tk.attention(q, k, k, mask), want)


@pytest.mark.parametrize("through", [False, True])
def test_hidden_keys_stay_out_of_the_gradients_of_their_norm(through: bool) -> None:
    q, k, weight = heads((2, 2, 5, 8), (2, 2, 6, 8), (8,))
    seen = torch.rand(2, 6) < 0.7
    hidden = ~seen[:, None, :, None]
    grads = []
    for value in (0.0, torch.nan):
        leaves = [q.requires_grad_(), k.masked_fill(hidden, value).requires_grad_(), weight]
        weight.requires_grad_()
        o, to = tk.attention_jvp(
            leaves[0],
            leaves[1],
            q.new_ones(2, 2, 6, 8),
            q.detach().cos(),
            leaves[1].detach().cos() if through else None,
            key_mask=seen,
            k_norm=(weight, 1e-6),
        )
        loss = o.square().sum() + (to.square().sum() if through else 0)
        grads.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(*grads)


def test_lanes_of_a_mask() -> None:
    q, k = heads((1, 2, 5, 8), (1, 2, 6, 8))
    masks = torch.randn(3, 5, 6)
    got = torch.vmap(lambda m: tk.attention(q, k, k, m))(masks)
    torch.testing.assert_close(got, torch.stack([tk.attention(q, k, k, m) for m in masks]))
