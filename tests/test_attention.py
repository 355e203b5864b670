"""Attention: the error policy with planted faults, the reference against PyTorch, every refusal."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tbcm_kernels as tk
from tbcm_kernels import _dispatch
from tbcm_kernels.attention import autograd, reference
from tbcm_kernels.testing import attention as harness
from tbcm_kernels.testing.cases import Case, attention_case, cases
from tbcm_kernels.testing.check import check, run

pytestmark = pytest.mark.kernels
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NARROW = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter truncates where a GPU rounds to bf16, so without a GPU Triton is tested in fp16.
TRITON_DTYPES = NARROW if GPU else [torch.float32, torch.float16]
COMBINATIONS = [
    *(("reference", "cpu", d) for d in NARROW),
    *(("cpu", "cpu", d) for d in NARROW),
    *(("triton", DEVICE, d) for d in TRITON_DTYPES),
]
FUZZ, SEED = (int(os.environ.get(n, d)) for n, d in (("TBCM_FUZZ", "40"), ("TBCM_FUZZ_SEED", "0")))


def _id(value: object) -> str:
    return str(value).removeprefix("torch.")


def _case(name: str, dtype: torch.dtype = torch.float32, **plan: Any) -> Case:
    torch.manual_seed(0)
    return attention_case(name, dtype, **{"sizes": (2, 4, 2, 9, 13, 16, 8), **plan})


def _heads(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]


# The policy, over implementations, and what must fail it.


@pytest.mark.parametrize(("impl", "device", "dtype"), COMBINATIONS, ids=_id)
def test_policy(impl: str, device: str, dtype: torch.dtype, need: Callable[[str], None]) -> None:
    need(impl)
    few = impl == "reference" or (impl == "triton" and not GPU)
    tried = list(cases("attention", dtype, device, few))
    assert len(tried) > (12 if few else 60)
    assert [f for case in tried for f in check(case, impl)] == []


def _fuzzed(seed: int) -> Case:
    """A random call; every choice follows from the seed."""
    torch.manual_seed(seed)
    pick = random.Random(seed)
    groups, shared = pick.choice([1, 2, 3]), pick.choice([1, 1, 2, 4])
    length = lambda: pick.choice([1, 2, 7, 16, 17, 31, 33, 63, 64, 65, 100, 129])  # noqa: E731
    width = lambda: pick.choice([8, 16, 24, 32, 40, 64, 72, 80, 96, 112, 128])  # noqa: E731
    batch, d = pick.choice([1, 2]), width()
    kind = pick.choice(["", "", "bias", "bool", "holes"])
    axes = "".join(pick.choice([a, "1"]) for a in "BHNS")[pick.choice([0, 0, 1, 2]) :]
    orders = ["heads", "tokens", "features", "shared", "sliced"]
    return attention_case(
        f"seed {seed}",
        pick.choice([torch.float32, torch.bfloat16, torch.float16]),
        sizes=(batch, groups * shared, groups, length(), length(), d, pick.choice([d, width()])),
        moving=" ".join(n for n in "qkv" if pick.random() < 0.7),
        mask=f"{kind} {axes}" if kind else "",
        key_mask=pick.random() < 0.3,
        causal=pick.choice(["", "", "upper_left", "lower_right"]),
        q_norm=pick.choice(["", "", "each", "all"]),
        k_norm=pick.choice(["", "", "each", "all"]),
        orders=[pick.choice(orders) for _ in range(6)],
        scale=pick.choice([None, None, 0.3, -0.1]),
        tangent_scale=pick.choice([1.0, 1.0, 0.01, 30.0]),
    )  # fmt: skip


def test_fuzz(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random calls by the policy: TBCM_FUZZ is their number, TBCM_FUZZ_SEED the first seed."""
    found = []
    for seed in range(SEED, SEED + FUZZ):
        chance = random.Random(-seed - 1)
        reached = tuple(i for i in range(4) if chance.random() < 0.5)
        monkeypatch.setattr(
            harness, "LOSSES", {"the value": (0,), f"outputs {reached}": reached or (2,)}
        )
        case = _fuzzed(seed)
        found += [f"{f} {_describe(case)}" for f in check(case, "auto")]
    assert found == []


def _describe(case: Case) -> str:
    shapes = [None if p is None else tuple(p.shape) for p in case.primals]
    moving = [t is not None for t in case.tangents[:3]]
    masks = {k: getattr(v, "shape", v) for k, v in case.options.items()}
    return f"{case.primals[0].dtype} {shapes} moving {moving} {masks}"


Forward = Callable[..., tuple[Tensor, ...]]
BACKWARD_ARGUMENTS = [
    "go", "glse", "gto", "gmu", *harness.INPUTS, "o", "lse", "to", "mu", "setting",
]  # fmt: skip


def _missing_mu(*args: Any) -> tuple[Tensor, ...]:
    o, lse, to, mu = reference.forward(*args)
    return o, lse, None if to is None else (to + mu.unsqueeze(-1) * o).to(o.dtype), mu


def _scaled(*args: Any) -> tuple[Tensor, ...]:
    *inputs, setting = args
    return reference.forward(*inputs, _with_scale(setting, 1.01))


def _with_scale(setting: reference.Setting, factor: float) -> reference.Setting:
    return reference.Setting(**{**vars(setting), "scale": setting.scale * factor})


def _dropped_key(*args: Any) -> tuple[Tensor, ...]:
    return reference.forward(*args[:8], _without_last_key(args[1], args[8]))


def _without_last_key(k: Tensor, setting: reference.Setting) -> reference.Setting:
    seen = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    seen[:, -1] = False
    return reference.Setting(**{**vars(setting), "key_mask": seen})


def _not_rescaled(*args: Any) -> tuple[Tensor, ...]:
    """The first keys keep the maximum that they had before a greater one came."""
    q, k, v, *_, setting = args
    o, lse, to, mu = reference.forward(*args)
    logits = setting.scale * (q.float() @ reference._keys(k, q.shape[1]).mT)
    first = logits[..., : k.shape[2] // 2]
    stale = first.amax(-1, keepdim=True) - logits.amax(-1, keepdim=True)
    weights = (logits - lse.unsqueeze(-1)).exp()
    weights[..., : k.shape[2] // 2] *= (-stale).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    values = reference._keys(v, q.shape[1])
    return (weights @ values).to(o.dtype), lse, to, mu


def _bad_row(*args: Any) -> tuple[Tensor, ...]:
    o, lse, to, mu = reference.forward(*args)
    o[0, 0, 3] *= 1.02
    return o, lse, to, mu


def _lost_tangent(*args: Any) -> tuple[Tensor, ...]:
    o, lse, to, mu = reference.forward(*args)
    return o, lse, None if to is None else torch.zeros_like(to), mu


def _backward_with(**changes: Callable[[Any], Any]) -> Forward:
    """The backward with some of its arguments replaced."""

    def backward(*args: Any) -> tuple[Tensor, ...]:
        given = dict(zip(BACKWARD_ARGUMENTS, args, strict=True))
        new = {n: f(given) for n, f in changes.items() if given[n] is not None}
        return reference.backward(*{**given, **new}.values())

    return backward


FORWARD_FAULTS = [_missing_mu, _scaled, _dropped_key, _not_rescaled, _bad_row, _lost_tangent]
BACKWARD_FAULTS: dict[str, Forward] = {
    "without mu": _backward_with(mu=lambda g: torch.zeros_like(g["mu"])),
    "without H·Ȯ": _backward_with(to=lambda g: torch.zeros_like(g["to"])),
    "without G·O": _backward_with(o=lambda g: torch.zeros_like(g["o"])),
    "of another scale": _backward_with(setting=lambda g: _with_scale(g["setting"], 1.01)),
    "without the last key": _backward_with(
        setting=lambda g: _without_last_key(g["k"], g["setting"])
    ),
    "of the value alone": _backward_with(gto=lambda g: torch.zeros_like(g["gto"])),
    "without the cotangent of lse": _backward_with(glse=lambda g: None),
    "without the cotangent of mu": _backward_with(gmu=lambda g: torch.zeros_like(g["gmu"])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
@pytest.mark.parametrize("fault", [None, *FORWARD_FAULTS, *BACKWARD_FAULTS], ids=str)
def test_planted_faults_fail(
    fault: str | Forward | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(forward=reference.forward, backward=reference.backward)
    if isinstance(fault, str):
        module.backward = BACKWARD_FAULTS[fault]
    elif fault is not None:
        module.forward = fault
    monkeypatch.setattr(_dispatch, "implementation", lambda op, impl: module)
    found = check(_case("planted", dtype, sizes=(2, 2, 2, 40, 50, 16, 16)), "auto")
    assert (found == []) is (fault is None), found


# Properties.


@pytest.mark.parametrize("dtype", NARROW, ids=_id)
def test_the_same_bits_whatever_the_threads(dtype: torch.dtype, on_threads: Callable) -> None:
    case = _case("threads", dtype, sizes=(2, 4, 2, 70, 130, 32, 32), q_norm="each", k_norm="all")
    for a, *others in zip(*on_threads(lambda: run(case, "auto")), strict=True):
        assert a is None or all(torch.equal(a, b) for b in others)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
def test_the_tangent_is_linear(impl: str, dtype: torch.dtype) -> None:
    """Powers of two scale the tangent to the bit, and a zero tangent gives exactly zero."""
    case = _case("linear", dtype, mask="holes BHNS", causal="lower_right", q_norm="each")

    def tangents(factor: float) -> tuple[Tensor, Tensor]:
        moved = [None if t is None else t * factor for t in (*case.primals, *case.tangents[:3])]
        return harness._call(case, [*case.primals, *moved[5:]], impl)[2:]

    for one, four, zero in zip(tangents(1.0), tangents(4.0), tangents(0.0), strict=True):
        assert torch.equal(four, 4 * one)
        assert not zero.any()


def test_inner_products_agree() -> None:
    """uᵀ(J t) = (Jᵀu)·t ties the tangent to the gradient, both from the kernels."""
    case = _case("inner", mask="bias NS", key_mask=True, q_norm="all", k_norm="each")
    case.primals, case.tangents = (
        [None if x is None else x.nan_to_num(3.0) for x in xs]
        for xs in (case.primals, case.tangents)
    )
    leaves = [x.clone().requires_grad_() for x in case.primals]
    o, lse, to, tlse = harness._call(case, [*leaves, *case.tangents[:3]], "auto")
    u, w = torch.randn_like(o), torch.randn_like(lse)
    seen = lse > -torch.inf
    forward = (u.double() * to.double()).sum() + (w * tlse)[seen].double().sum()
    grads = torch.autograd.grad([o, lse], leaves[:3], [u, w])
    reverse = sum(
        (g.double() * t.double()).sum() for g, t in zip(grads, case.tangents[:3], strict=True)
    )
    assert forward.item() == pytest.approx(reverse.item(), rel=1e-4)


def test_inputs_are_never_written() -> None:
    case = _case(
        "slices", orders=("sliced", "tokens"), key_mask=True, mask="holes 1HNS", q_norm="each"
    )
    tensors = [*case.primals, *case.tangents, *case.options.values()]
    tensors = [x for x in tensors if isinstance(x, Tensor)]
    before = [x.clone() for x in tensors]
    run(case, "auto")
    for b, x in zip(before, tensors, strict=True):
        torch.testing.assert_close(b, x, rtol=0, atol=0, equal_nan=True)


# The reference against PyTorch, and the op against the reference.

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
    inputs = _heads((2, 4, 5, 16), (2, groups, 7, 16), (2, groups, 7, 8), dtype=dtype)
    if "attn_mask" in options:
        bias = torch.randn(4, 5, 7).to(dtype)
        options["attn_mask"] = bias if name == "bias" else bias > -1
    return inputs, options


@pytest.mark.parametrize("name", OPTIONS)
def test_the_reference_is_the_jvp_of_sdpa(name: str) -> None:
    inputs, options = _arguments(name, torch.float64)
    tangents = _heads(*(x.shape for x in reversed(inputs)), dtype=torch.float64)[::-1]
    with sdpa_kernel(SDPBackend.MATH):
        want = torch.func.jvp(
            lambda *x: F.scaled_dot_product_attention(*x, **options), tuple(inputs), tuple(tangents)
        )
    got = tk.attention_jvp(*inputs, *tangents, **options, impl="reference")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["", "each", "all"])
def test_the_reference_is_the_limit_of_differences(norm: str) -> None:
    case = _case(
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
    case = _case("gradcheck", torch.float64, sizes=(1, 2, 1, 3, 4, 8, 8), **plan)
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
    q, k, v = (x.requires_grad_() for x in _heads((1, 1, 3, 8), (1, 1, 5, 8), (1, 1, 5, 8)))
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
    case = _case("opcheck", sizes=(2, 2, 1, 3, 5, 8, 16), **plan)
    values = [x for x in (*case.primals, *case.tangents) if x is not None]
    for x in values:
        x.nan_to_num_()
    for through in (True, False):
        torch.library.opcheck(autograd.attention_op, _op_arguments(case, through))


@pytest.mark.parametrize("reached", [(0,), (2,), (0, 1, 2, 3), (1, 3)], ids=str)
def test_opcheck_of_backward(reached: tuple[int, ...]) -> None:
    case = _case("opcheck", sizes=(2, 2, 1, 3, 5, 8, 16), orders=("tokens", "heads"))
    *inputs, _, _ = _op_arguments(case, True)
    outputs = autograd.attention_op(*inputs, False, "reference")
    inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    cotangents = [torch.randn_like(x) if i in reached else None for i, x in enumerate(outputs)]
    outputs = [x.detach() for x in outputs]
    torch.library.opcheck(
        autograd.attention_backward,
        (*cotangents, *inputs[:8], *outputs, *inputs[8:], "reference"),
    )


# What the public functions promise.


def test_merge_attention_is_attention_over_all_keys() -> None:
    """In value, tangent and gradients, from three parts, one of them hidden for some queries."""
    shapes = [(2, 2, 7, 16), (2, 2, 12, 16), (2, 2, 12, 8)]
    drawn = _heads(*shapes, *shapes, dtype=torch.float64)
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

    results = []
    for function in (whole, merged):
        (o, lse), (to, tlse) = torch.func.jvp(function, tuple(inputs), tuple(tangents))
        seen = lse > -torch.inf
        loss = o.square().sum() + to.square().sum() + (lse[seen] * tlse[seen]).sum()
        results.append([o, lse, to, tlse[seen], *torch.autograd.grad(loss, inputs)])
        assert (lse[:, :, 0] == -torch.inf).all() and not o[:, :, 0].any()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("moving", ["q", "q k v"])
def test_lanes_of_vmap_share_one_call(moving: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _heads((2, 2, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8))
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
    inputs = [x.requires_grad_() for x in _heads((1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8))]
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
    inputs = _heads((1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8))
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
    tokens = [x.requires_grad_() for x in _heads((2, 5, 4, 8), (2, 6, 2, 8), (2, 6, 2, 16))]
    q, k, v = (x.transpose(1, 2) for x in tokens)
    tangents = [torch.randn_like(x) for x in (q, k, v)]
    o, lse, to, tlse = tk.attention_jvp(q, k, v, *tangents, enable_gqa=True, return_lse=True)
    assert o.transpose(1, 2).is_contiguous() and to.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous() and tlse.is_contiguous()
    grads = torch.autograd.grad(o.sum() + to.sum(), [q, k, v])
    assert all(g.transpose(1, 2).is_contiguous() for g in grads)


def _saved(run: Callable[[], Any]) -> dict[int, Tensor]:
    """What a call keeps for backward, by storage."""
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    del out
    return kept


def test_what_is_saved_for_backward() -> None:
    """Inputs, o and lse; with the gradient of the tangent the tangents, to and tlse as well."""
    inputs = [x.requires_grad_() for x in _heads((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 16))]
    tangents = [torch.randn_like(x) for x in inputs]
    plain = _saved(lambda: tk.attention(*inputs))
    shapes = sorted(tuple(x.shape) for x in plain.values())
    value = [*(tuple(x.shape) for x in inputs), (2, 4, 5, 16), (2, 4, 5)]
    assert shapes == sorted(value)
    with tk.stop_tangent_gradient():
        semi = _saved(lambda: tk.attention_jvp(*inputs, *tangents))
    assert sorted(tuple(x.shape) for x in semi.values()) == shapes
    full = _saved(lambda: tk.attention_jvp(*inputs, *tangents))
    lanes = [*(tuple(x.shape) for x in tangents), (2, 4, 5, 16), (2, 4, 5)]
    assert sorted(x.numel() for x in full.values()) == sorted(
        torch.Size(s).numel() for s in value + lanes
    )


def test_no_grad_saves_nothing_and_absent_tangents_are_none() -> None:
    q, k, v = (x.requires_grad_() for x in _heads((1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8)))
    with torch.no_grad():
        assert _saved(lambda: tk.attention_jvp(q, k, v, q)) == {}
    o, to = tk.attention_jvp(q, k, v)
    assert to is None and o.requires_grad
    assert tk.attention_jvp(q, k, v, return_lse=True)[2:] == (None, None)


# Refusals.

Q, K = (2, 4, 5, 16), (2, 4, 7, 16)


def _refusals() -> Iterator[tuple[str, str, Callable[[Tensor, Tensor], Any]]]:
    def call(**options: Any) -> Callable[[Tensor, Tensor], Any]:
        return lambda q, k: tk.attention(q, k, k, **options)

    yield (
        "head dim",
        "head dim of q and k must be a multiple of 8 up to 256, got 28",
        lambda q, k: tk.attention(*(torch.zeros(1, 1, 3, 28) for _ in range(3))),
    )
    yield (
        "head dim of v",
        "head dim of v must be a multiple of 8 up to 256, got 12",
        lambda q, k: tk.attention(q, k, k[..., :12]),
    )
    yield (
        "wide",
        "multiple of 8 up to 256, got 264",
        lambda q, k: tk.attention(*(torch.zeros(1, 1, 3, 264) for _ in range(3))),
    )
    yield "dropout", "dropout_p must be 0, got 0.1", call(dropout_p=0.1)
    yield (
        "dtype",
        "k must have q's number of dimensions, dtype and device",
        lambda q, k: tk.attention(q, k.double(), k),
    )
    yield "integers", "q must be floating", lambda q, k: tk.attention(q.long(), k, k)
    yield (
        "dimensions",
        r"q must be floating \[B, H, N, D\] or \[B, N, D\]",
        lambda q, k: tk.attention(q[0, 0], k[0, 0], k[0, 0]),
    )
    yield (
        "batch",
        "expand them where they should broadcast",
        lambda q, k: tk.attention(q, k[:1], k[:1]),
    )
    yield "keys", "with q's B and D", lambda q, k: tk.attention(q, k, k[:, :, :3])
    yield (
        "heads",
        "q has 4 heads and k 2; pass enable_gqa=True",
        lambda q, k: tk.attention(q, k[:, :2], k[:, :2]),
    )
    yield (
        "multiple",
        "q's 4 heads are no multiple of k's 3",
        lambda q, k: tk.attention(q, k[:, :3], k[:, :3], enable_gqa=True),
    )
    yield (
        "mask shape",
        r"attn_mask must broadcast to \[B, H, N, S\] = \[2, 4, 5, 7\]",
        call(attn_mask=torch.zeros(5, 6)),
    )
    yield (
        "mask dtype",
        "attn_mask must be boolean or floating",
        call(attn_mask=torch.zeros(5, 7, dtype=torch.int)),
    )
    yield (
        "mask device",
        "attn_mask must be boolean or floating on cpu",
        call(attn_mask=torch.zeros(5, 7, device="meta")),
    )
    yield (
        "mask gradient",
        "attn_mask requires grad",
        call(attn_mask=torch.zeros(5, 7, requires_grad=True)),
    )
    yield (
        "key mask shape",
        r"key_mask must be boolean \[B, S\] = \[2, 7\]",
        call(key_mask=torch.ones(2, 6, dtype=torch.bool)),
    )
    yield "key mask dtype", "key_mask must be boolean", call(key_mask=torch.ones(2, 7))
    yield (
        "norm width",
        "q_norm must be .* of 16 elements .* or 64",
        call(q_norm=(torch.ones(32), 1e-6)),
    )
    yield "norm dtype", "k_norm must be", call(k_norm=(torch.ones(16).long(), 1e-6))
    yield (
        "alignment",
        "causal_alignment must be upper_left or lower_right, got 'left'",
        call(is_causal=True, causal_alignment="left"),
    )
    yield "impl", "impl must be one of auto, triton, cpu, reference, got 'cuda'", call(impl="cuda")
    yield (
        "tangent",
        "tq must match q in shape, dtype and device",
        lambda q, k: tk.attention_jvp(q, k, k, q[:1]),
    )
    yield "no parts", "parts must be pairs of o", lambda q, k: tk.merge_attention([])
    yield (
        "parts",
        "all parts must have one shape",
        lambda q, k: tk.merge_attention([(q, q[..., 0]), (k, k[..., 0])]),
    )


@pytest.mark.parametrize(
    ("message", "call"), [pytest.param(*rest, id=name) for name, *rest in _refusals()]
)
def test_refusals(message: str, call: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call(*_heads(Q, K))


def test_the_reference_takes_any_head_dim_and_differentiates_the_bias() -> None:
    q, k, v = _heads((1, 1, 3, 28), (1, 1, 4, 28), (1, 1, 4, 5))
    bias = torch.zeros(3, 4, requires_grad=True)
    o = tk.attention(q, k, v, attn_mask=bias, impl="reference")
    assert torch.autograd.grad(o.sum(), bias)[0].any()


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("attn_mask carries a tangent", lambda t: {"attn_mask": t[:5, :7]}),
        ("a norm weight carries a tangent", lambda t: {"q_norm": (t[0], 1e-6)}),
        ("a norm weight carries a tangent", lambda t: {"k_norm": (t[0], 1e-6)}),
    ],
)
def test_a_tangent_of_a_mask_or_weight_raises(
    message: str, options: Callable[[Tensor], dict[str, Any]]
) -> None:
    q, k = _heads(Q, K)
    moving = torch.ones(16, 16)
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(lambda t: tk.attention(q, k, k, **options(t)), (moving,), (moving,))
    if "weight" in message:
        with pytest.raises(RuntimeError, match="is a forward-AD dual"):
            torch.func.jvp(lambda t: tk.attention_jvp(q, k, k, **options(t)), (moving,), (moving,))


def test_auto_leaves_out_what_spills_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32, and the way through the tangent at large head dims; both run where asked for."""
    assert _dispatch._choice("attention", "auto", "cuda", torch.float32)[0] == "reference"
    monkeypatch.setattr(_dispatch, "choose", lambda op, impl, x: "triton")
    from tbcm_kernels.attention import functional

    def chosen(width: int, grad: bool, through: bool = True, impl: str = "auto") -> str:
        q = torch.randn(1, 1, 2, width, requires_grad=grad)
        return functional._choose(impl, (q, q, q, None, None), (q.detach(), None, None), through)

    with pytest.warns(UserWarning, match="above 128 spill"):
        assert chosen(136, True) == "reference"
    assert chosen(136, False) == chosen(136, True, False) == chosen(128, True) == "triton"
    assert chosen(136, True, impl="triton") == "triton"


def test_reference_stops_the_tangent_gradient_too() -> None:
    q, tq = _heads(*[(1, 2, 3, 8)] * 2)
    q.requires_grad_()
    with tk.stop_tangent_gradient():
        o, to = tk.attention_jvp(q, q, q, tq, impl="reference")
    assert o.requires_grad and not to.requires_grad


def test_lengths_may_change_under_compile() -> None:
    """No option makes a graph of its own for every length."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    q, k = _heads((1, 2, 5, 8), (1, 2, 40, 8))
    options = {"is_causal": True, "causal_alignment": "lower_right"}
    counter = CompileCounter()
    compiled = torch.compile(
        lambda k: tk.attention(q, k, k, **options), fullgraph=True, dynamic=True, backend=counter
    )
    for keys in range(6, 18):
        got = compiled(k[:, :, :keys])
        torch.testing.assert_close(got, tk.attention(q, k[:, :, :keys], k[:, :, :keys], **options))
    assert counter.frame_count <= 2


def test_a_nan_in_a_part_reaches_the_merged_result() -> None:
    o, lse = torch.ones(1, 2, 8), torch.zeros(1, 2)
    for parts in ([(o, lse * torch.nan), (o, lse)], [(o, lse * torch.nan)]):
        assert all(x.isnan().all() for x in tk.merge_attention(parts))


def test_batched_gradients_with_a_norm_of_all_heads() -> None:
    q, weight = _heads((1, 2, 3, 8), (16,))
    q.requires_grad_()
    o = tk.attention(q, q.detach(), q.detach(), q_norm=(weight, 1e-6))
    cotangents = torch.randn(3, *o.shape)
    (got,) = torch.autograd.grad(o, q, cotangents, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(o, q, c, retain_graph=True)[0] for c in cotangents]
    torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize("norm", [(torch.ones(8), None), (None, 1e-6), torch.ones(8)], ids=str)
def test_a_norm_that_is_no_pair_raises(norm: Any) -> None:
    (q,) = _heads((1, 2, 3, 8))
    with pytest.raises(ValueError, match="must be a pair"):
        tk.attention(q, q, q, q_norm=norm)


def test_autocast_casts_no_integers() -> None:
    q = torch.ones(1, 2, 3, 8, dtype=torch.int64)
    with torch.autocast(q.device.type, torch.bfloat16), pytest.raises(ValueError, match="floating"):
        tk.attention(q, q, q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=_id)
def test_every_16_bit_number_goes_through_the_cpu_kernel(
    dtype: torch.dtype, need: Callable[[str], None]
) -> None:
    """Attention to one key is its value, and to two equal keys the mean of theirs, rounded."""
    need("cpu")
    v = torch.arange(-(2**15), 2**15, device="cpu").to(torch.int16).view(dtype)
    v = v[v.double().abs() < 1e38]  # the sum of two is an fp32 number
    v = v[: len(v) // 64 * 64].reshape(-1, 8, 1, 8).contiguous()
    q = torch.zeros(len(v), 8, 1, 8, dtype=dtype, device="cpu")
    assert torch.equal(tk.attention(q, q, v, impl="cpu"), v)
    pairs = torch.cat([v, v.roll(1, -1)], 2)
    want = (0.5 * pairs.double().sum(2, keepdim=True)).to(dtype)
    keys = torch.zeros_like(pairs)
    assert torch.equal(tk.attention(q, keys, pairs, impl="cpu"), want)
