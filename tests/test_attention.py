"""Attention by the error policy, with planted faults that must fail it, and its properties."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_inputs import draw
from implementations import DEVICE, GPU, TRITON_DTYPES, id_of
from torch import Tensor

import tbcm_kernels as tk
from tbcm_kernels import _dispatch
from tbcm_kernels.attention import reference
from tbcm_kernels.testing import attention as harness
from tbcm_kernels.testing.cases import Case, attention_case, cases
from tbcm_kernels.testing.check import check, run

pytestmark = pytest.mark.kernels
NARROW = [torch.float32, torch.bfloat16, torch.float16]
COMBINATIONS = [
    *(("reference", "cpu", d) for d in NARROW),
    *(("cpu", "cpu", d) for d in NARROW),
    *(("triton", DEVICE, d) for d in TRITON_DTYPES),
]
FUZZ, SEED = (int(os.environ.get(n, d)) for n, d in (("TBCM_FUZZ", "40"), ("TBCM_FUZZ_SEED", "0")))


# The policy, over implementations, and what must fail it.


@pytest.mark.parametrize(("impl", "device", "dtype"), COMBINATIONS, ids=id_of)
def test_policy(
    impl: str, device: str, dtype: torch.dtype, need: Callable[[str], None],
    ran: dict[str, set[str]],
) -> None:  # fmt: skip
    need(impl)
    few = impl == "reference" or (impl == "triton" and not GPU)
    tried = list(cases("attention", dtype, device, few))
    assert len(tried) > (12 if few else 60)
    assert [f for case in tried for f in check(case, impl)] == []
    assert impl == "reference" or ran["attention"] == {impl}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=id_of)
@pytest.mark.parametrize("fault", [None, *FORWARD_FAULTS, *BACKWARD_FAULTS], ids=id_of)
def test_planted_faults_fail(
    fault: str | Forward | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(forward=reference.forward, backward=reference.backward)
    if isinstance(fault, str):
        module.backward = BACKWARD_FAULTS[fault]
    elif fault is not None:
        module.forward = fault
    monkeypatch.setattr(_dispatch, "implementation", lambda op, impl: module)
    found = check(draw("planted", dtype, sizes=(2, 2, 2, 40, 50, 16, 16)), "auto")
    assert (found == []) is (fault is None), found


# Properties.


@pytest.mark.parametrize("sizes", [(2, 4, 2, 70, 130, 32, 32), (1, 4, 1, 70, 130, 32, 32)], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=id_of)
def test_the_same_bits_whatever_the_threads(
    dtype: torch.dtype, sizes: tuple[int, ...], on_threads: Callable
) -> None:
    """Also where threads share the heads' gradients, as two do one key head."""
    case = draw("threads", dtype, sizes=sizes, q_norm="each", k_norm="all")
    for a, *others in zip(*on_threads(lambda: run(case, "auto")), strict=True):
        assert a is None or all(torch.equal(a, b) for b in others)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=id_of)
def test_the_tangent_is_linear(impl: str, dtype: torch.dtype) -> None:
    """Powers of two scale the tangent to the bit, and a zero tangent gives exactly zero."""
    case = draw("linear", dtype, mask="holes BHNS", causal="lower_right", q_norm="each")

    def tangents(factor: float) -> tuple[Tensor, Tensor]:
        moved = [None if t is None else t * factor for t in (*case.primals, *case.tangents[:3])]
        return harness._call(case, [*case.primals, *moved[5:]], impl)[2:]

    for one, four, zero in zip(tangents(1.0), tangents(4.0), tangents(0.0), strict=True):
        assert torch.equal(four, 4 * one)
        assert not zero.any()


def test_inner_products_agree() -> None:
    """uᵀ(J t) = (Jᵀu)·t ties the tangent to the gradient, both from the kernels."""
    case = draw("inner", mask="bias NS", key_mask=True, q_norm="all", k_norm="each")
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


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("bias", "factor"), [(-1e4, 1e6), (-200.0, 1e12), (-40.0, 1e4)])
def test_rates_of_keys_that_hardly_count_cost_no_digits(
    bias: float, factor: float, late: bool
) -> None:
    """A block of keys that is nearly hidden and moves fast, before or after one that is neither."""
    torch.manual_seed(0)
    q, tq = torch.randn(2, 1, 1, 4, 16)
    k, v, t = torch.randn(3, 1, 1, 600, 16)
    faint = slice(300, None) if late else slice(0, 300)
    t, mask = t.clone(), torch.zeros(1, 1, 4, 600)
    t[:, :, faint] *= factor
    mask[..., faint] = bias

    def moved(dtype: torch.dtype, impl: str) -> list[Tensor]:
        inputs = [x.to(dtype) for x in (q, k, v, tq, t)]
        options = {"attn_mask": mask.to(dtype), "return_lse": True, "impl": impl}
        return tk.attention_jvp(*inputs, **options)[2:]

    exact = moved(torch.float64, "reference")
    for got, want in zip(moved(torch.float32, "cpu"), exact, strict=True):
        assert (got - want).abs().max() < 2e-6 * want.abs().max()


def test_inputs_are_never_written() -> None:
    case = draw(
        "slices", orders=("sliced", "tokens"), key_mask=True, mask="holes 1HNS", q_norm="each"
    )
    tensors = [*case.primals, *case.tangents, *case.options.values()]
    tensors = [x for x in tensors if isinstance(x, Tensor)]
    before = [x.clone() for x in tensors]
    run(case, "auto")
    for b, x in zip(before, tensors, strict=True):
        torch.testing.assert_close(b, x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=id_of)
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


def test_arguments_by_place_are_those_of_sdpa() -> None:
    q, k, v = torch.randn(3, 2, 2, 6, 8)
    mask = torch.rand(6, 6) < 0.6
    mask[:, 0] = True
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.3)
    torch.testing.assert_close(tk.attention(q, k, v, mask, 0.0, False, scale=0.3), want)
