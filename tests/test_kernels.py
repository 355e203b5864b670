"""Every implementation of every op, by the error policy, with planted faults that must fail it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
from collections.abc import Callable

import pytest
import torch
from implementations import COMBINATIONS, DEVICE, GPU, TRITON_DTYPES, id_of
from torch._subclasses.fake_tensor import FakeTensorMode

import tbcm_kernels as tk
from tbcm_kernels import _dispatch
from tbcm_kernels.testing.cases import Case, cases
from tbcm_kernels.testing.check import call, check, run
from tbcm_kernels.testing.prove import mixed_faults, prove

pytestmark = pytest.mark.kernels
OPS = ["adaln", "conv_glu", "linear_attention", "rms_norm"]
LARGEST = {
    "adaln": "shape (2, 150, 320)", "conv_glu": "shape (2, 16, 16, 40)",
    "linear_attention": "shape (2, 4, 257, 257, 32, 32)", "rms_norm": "shape (2, 150, 320)",
}  # fmt: skip
SMALL = {
    "adaln": "shape (2, 3, 4)", "conv_glu": "shape (1, 1, 1, 4)",
    "linear_attention": "shape (2, 2, 5, 7, 4, 12)", "rms_norm": "shape (2, 3, 4)",
}  # fmt: skip
ALL = [*COMBINATIONS, *(("cuda", DEVICE, d) for d in TRITON_DTYPES if GPU)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("impl", "device", "dtype"), ALL, ids=id_of)
def test_policy(
    op: str, impl: str, device: str, dtype: torch.dtype, need: Callable[[str], None],
    ran: dict[str, set[str]],
) -> None:  # fmt: skip
    if impl not in ("reference", *_dispatch.OPS[op]):
        with pytest.raises(ValueError, match=f"no {impl} implementation"):
            _dispatch.choose(op, impl, torch.empty(0, dtype=dtype, device=device))
        return
    need(impl)
    few = impl == "triton" and not GPU
    tried = list(cases(op, dtype, device, few))
    assert len(tried) > 8
    assert [f for case in tried for f in check(case, impl)] == []
    assert impl == "reference" or ran[op] == {impl}


@pytest.mark.parametrize("op", OPS)
def test_deterministic_whatever_the_threads(op: str, on_threads: Callable) -> None:
    case = next(c for c in cases(op, torch.float32) if c.name == LARGEST[op])
    for a, *others in zip(*on_threads(lambda: run(case, "auto")), strict=True):
        assert all(torch.equal(a, b) for b in others)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_tangent_is_linear(op: str, impl: str) -> None:
    """Powers of two scale the tangent to the bit, and a zero tangent gives exactly zero."""
    case = next(c for c in cases(op, torch.float32) if c.name == LARGEST[op])

    def tangents(factor: float) -> list[torch.Tensor]:
        moved = [None if t is None else t * factor for t in case.tangents]
        values = call(case, case.primals, moved, impl)
        return values[len(values) // 2 :]

    for one, four, zero in zip(tangents(1.0), tangents(4.0), tangents(0.0), strict=True):
        assert torch.equal(four, 4 * one)
        assert not zero.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=id_of)
@pytest.mark.parametrize("op", OPS)
def test_inner_products_agree(op: str, dtype: torch.dtype) -> None:
    """uᵀ(J t) = (Jᵀu)·t ties the tangent to the gradient, both from the kernels."""
    case = next(c for c in cases(op, dtype) if c.name == LARGEST[op])
    leaves = [p.clone().requires_grad_() for p in case.primals]
    values = call(case, leaves, case.tangents)
    half = len(values) // 2
    torch.manual_seed(3)
    u = [torch.randn_like(v) for v in values[:half]]
    forward = sum((a.double() * t.double()).sum() for a, t in zip(u, values[half:], strict=True))
    grads = torch.autograd.grad(call(case, leaves, [None] * len(leaves))[:half], leaves, u)
    reverse = sum(
        (g.double() * t.double()).sum()
        for g, t in zip(grads, case.tangents, strict=True)
        if t is not None
    )
    assert forward.item() == pytest.approx(reverse.item(), rel=1e-4)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck_with_and_through_the_tangent(op: str) -> None:
    case = next(c for c in cases(op, torch.float64) if c.name == SMALL[op])
    half = len(case.primals)
    inputs = [
        v if v is None else v.detach().clone().requires_grad_()
        for v in case.primals + case.tangents
    ]
    torch.autograd.gradcheck(lambda *v: call(case, list(v[:half]), list(v[half:])), inputs)

    def value(*primals: torch.Tensor) -> list[torch.Tensor]:
        outputs = call(case, list(primals), [None] * half)
        return [o for o in outputs if o is not None]

    torch.autograd.gradcheck(value, inputs[:half])


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_every_subset_and_cotangent(op: str) -> None:
    """Frozen inputs and unused outputs take other paths through the kernels."""
    case = next(c for c in cases(op, torch.float32) if c.name == SMALL[op])
    count = len(case.primals)
    for chosen in range(1, 2**count):
        wanted = [i for i in range(count) if chosen >> i & 1]
        got = _single_gradients(case, case.primals, wanted, "auto")
        doubles = [p.double() for p in case.primals]
        want = _single_gradients(case, doubles, wanted, "reference")
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-7, wanted


def _single_gradients(
    case: Case, primals: list[torch.Tensor], wanted: list[int], impl: str
) -> list[torch.Tensor]:
    """Gradients of each output alone with respect to the wanted inputs, the others frozen."""
    leaves = [p.detach().clone().requires_grad_(i in wanted) for i, p in enumerate(primals)]
    outputs = call(case, leaves, [None] * len(leaves), impl)
    found = []
    for output in [o for o in outputs if o is not None]:
        torch.manual_seed(5)
        cotangent = torch.randn(output.shape).to(output.dtype)
        inputs = [leaves[i] for i in wanted]
        if not output.requires_grad:
            found += [torch.zeros_like(i) for i in inputs]
            continue
        grads = torch.autograd.grad(output, inputs, cotangent, retain_graph=True, allow_unused=True)
        # Not used and used with a zero gradient are the same to a user.
        found += [
            torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True)
        ]
    return found


def test_extreme_inputs_of_the_gate() -> None:
    """silu and its slope vanish far left, also where exp overflows; NaN and infinity spread."""
    a = torch.tensor([-1e30, -200.0, -90.0, 1e30, 60.0, float("nan")])
    tokens = a.repeat_interleave(2)[None, :, None].expand(1, 12, 2).reshape(1, 12, 2).contiguous()
    taps = torch.zeros(2, 1, 3, 3)
    taps[0, 0, 1, 1] = 1
    for impl in ("cpu", "reference"):
        y, ty = tk.conv_glu_jvp(
            tokens, taps, torch.tensor([0.0, 2.0]), torch.ones_like(tokens), height=12, width=1,
            impl=impl,
        )  # fmt: skip
        assert (y[0, :6] == 0).all() and (ty[0, :6].abs() < 1e-30).all(), impl
        # The stencil multiplies its neighbours by zero, so the NaN reaches one pixel to each side.
        assert torch.isfinite(ty[0, :9]).all() and y[0, 9:].isnan().all(), impl


def test_a_gate_that_is_shut_hides_what_would_overflow() -> None:
    """y = c₁ silu(c₂) where c₁ c₂ is no number of fp32."""
    a, taps, bias = torch.zeros(1, 1, 2), torch.zeros(2, 1, 3, 3), torch.tensor([1e30, -1e10])
    for impl in ("cpu", "reference"):
        pair = tk.conv_glu_jvp(a, taps, bias, torch.ones_like(a), height=1, width=1, impl=impl)
        assert all((y == 0).all() for y in pair), impl


@pytest.mark.parametrize("tokens", [(4096, 4096), (64, 16384), (16384, 64)], ids=str)
def test_long_inputs_of_linear_attention_keep_their_digits(tokens: tuple[int, int]) -> None:
    """Sums over all tokens err as PyTorch's, by the policy's factor, in all outputs."""
    torch.manual_seed(0)
    n, s = tokens
    q, tq, go = torch.randn(3, 1, 2, n, 32)
    k, v, tk_, tv = torch.randn(4, 1, 2, s, 32)

    def run(impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        moving = [x.to(dtype) for x in (tq, tk_, tv)]
        with tk.stop_tangent_gradient():
            o, to = tk.linear_attention_jvp(*leaves, *moving, impl=impl)
        return [o, to, *torch.autograd.grad(o, leaves, go.to(dtype))]

    def error(got: torch.Tensor, want: torch.Tensor) -> float:
        return (got.double() - want).square().mean().sqrt().item()

    exact = run("reference", torch.float64)
    ours, plain = (run(impl, torch.float32) for impl in ("cpu", "reference"))
    for mine, theirs, want in zip(ours, plain, exact, strict=True):
        assert error(mine, want) <= 1.25 * error(theirs, want)


@pytest.mark.parametrize("name", ["attention_jvp", "linear_attention_jvp"])
def test_a_norm_of_tiny_rows_has_a_tangent(name: str) -> None:
    """Where 1 / rms² is no number of fp32."""
    torch.manual_seed(0)
    q, k, v, tq, tk_ = torch.randn(5, 1, 2, 8, 32)
    norm = torch.ones(32), 0.0
    at = {"q_norm": norm, "k_norm": norm}
    call = functools.partial(getattr(tk, name), **at)
    want = call(q, k, v, tq, tk_, None, impl="reference")
    got = call(*(3e-20 * x for x in (q, k)), v, *(3e-20 * x for x in (tq, tk_)), None)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "op", ["adaln", "conv_glu", "rms_norm", "flow_input", "flow_output", "tangent_loss"]
)
def test_a_fake_has_the_strides_of_the_reference(op: str) -> None:
    """Of inputs in another order of memory, where "auto" takes it; compiled code relies on them."""
    x = torch.randn(2, 8, 6, dtype=torch.float64).transpose(1, 2)
    taps, t = torch.ones(8, 1, 3, 3), torch.rand(2).double()
    calls = {
        "adaln": lambda x: tk.adaln_jvp(x, x, tx=x), "rms_norm": lambda x: tk.rms_norm_jvp(x, tx=x),
        "conv_glu": lambda x: tk.conv_glu_jvp(x, taps, ta=x, height=2, width=3),
        "flow_input": lambda x: tk.flow_input_jvp(x, t, x),
        "flow_output": lambda x: tk.flow_output_jvp(x, x, t, x),
        "tangent_loss": lambda x: tk.tangent_loss(x, x, x, x, t, 1.0),
    }  # fmt: skip

    def layouts(x: torch.Tensor) -> list[tuple]:
        leaf = x.detach().requires_grad_()
        values = [y for y in calls[op](leaf) if y is not None]
        values += torch.autograd.grad(values[0], leaf, torch.ones_like(values[0]))
        return [(y.shape, y.stride(), y.dtype) for y in values]

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        promised = layouts(mode.from_tensor(x))
    assert layouts(x) == promised


@pytest.mark.parametrize("moving", ["weight", "bias"])
def test_moving_weights_of_the_gate_are_the_references(
    moving: str, need: Callable[[str], None]
) -> None:
    """Kernels take a tangent of a alone: "auto" falls back and says so, an explicit impl raises."""
    need("cpu")
    torch.manual_seed(0)
    a, ta = torch.randn(2, 1, 6, 8)
    weight, tweight = torch.randn(2, 8, 1, 3, 3)
    bias, tbias = torch.randn(2, 8)
    arguments = (a, weight, bias, ta, *((tweight,) if moving == "weight" else (None, tbias)))
    _dispatch._remembered.cache_clear()
    _dispatch._notice_fallback.cache_clear()
    with pytest.warns(UserWarning, match="conv_glu runs its plain PyTorch.*tangent of a alone"):
        found = tk.conv_glu_jvp(*arguments, height=2, width=3)
    want = tk.conv_glu_jvp(*arguments, height=2, width=3, impl="reference")
    assert all(torch.equal(f, w) for f, w in zip(found, want, strict=True))
    with pytest.raises(ValueError, match="impl='cpu' cannot run: it takes a tangent of a alone"):
        tk.conv_glu_jvp(*arguments, height=2, width=3, impl="cpu")


def _mutants() -> dict[str, object]:
    def scaled(values: list) -> None:
        values[-1].mul_(1.01)

    def shifted(values: list) -> None:
        values[0].add_(values[0].abs().mean() * 0.01)

    def one_row(values: list) -> None:
        values[1][0, 0].mul_(1.02)

    def lost_tangent(values: list) -> None:
        values[3].zero_()

    def not_a_number(values: list) -> None:
        values[1][-1, -1, -1] = float("nan")

    return {f.__name__: f for f in (scaled, shifted, one_row, lost_tangent, not_a_number)}


def test_linear_attention_of_a_head_is_the_same_in_any_group(need) -> None:
    """72 heads are worked on by fours, and 9 of a sample are no multiple of that."""
    need("cpu")
    torch.manual_seed(0)
    inputs = torch.randn(6, 8, 9, 33, 17)

    def pass_(inputs: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        with tk.stop_tangent_gradient():
            o, to = tk.linear_attention_jvp(*leaves, *inputs[3:], impl="cpu")
        return [o, to, *torch.autograd.grad(o.square().sum(), leaves)]

    together = pass_(inputs)
    for h in range(9):
        alone = pass_(inputs[:, :1, h : h + 1])
        for one, all_ in zip(alone, together, strict=True):
            assert torch.equal(one, all_[:1, h : h + 1])


@pytest.mark.parametrize("feature_map", ["relu", "elu+1", "identity"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_linear_attention_spreads_what_is_not_finite(bad: float, feature_map: str, need) -> None:
    """From each input to the same places as the reference: not to other heads, and never lost."""
    need("cpu")
    for which in range(7):
        torch.manual_seed(0)
        values = list(torch.rand(7, 2, 5, 40, 17) + 0.1)
        values[which][1, 3, 7, 4] = bad
        *inputs, cotangent = values
        found = []
        for impl in ("cpu", "reference"):
            leaves = [x.clone().requires_grad_() for x in inputs[:3]]
            with tk.stop_tangent_gradient():
                o, to = tk.linear_attention_jvp(
                    *leaves, *inputs[3:], feature_map=feature_map, impl=impl
                )
            found.append([o, to, *torch.autograd.grad(o, leaves, cotangent)])
        for got, want in zip(*found, strict=True):
            assert torch.equal(got.isfinite(), want.isfinite()), which


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=id_of)
@pytest.mark.parametrize("mutant", _mutants())
def test_planted_faults_fail(
    mutant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tbcm_kernels.testing import check as harness

    case = next(c for c in cases("adaln", dtype) if c.name == LARGEST["adaln"])
    assert check(case, "auto") == []

    def broken(*arguments: object) -> list:
        values = [v.clone() for v in run(*arguments)]
        _mutants()[mutant](values)
        return values

    monkeypatch.setattr(harness, "run", broken)
    assert check(case, "auto") != []


def test_a_proof_finds_what_the_policy_does(
    need: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    need("cpu")
    kernels = importlib.import_module("tbcm_kernels.tangent_loss.cpu")
    forward = kernels.forward

    def off(*arguments: object) -> tuple:
        loss, *rest = forward(*arguments)
        return loss * 1.01, *rest

    proved = functools.partial(prove, "tangent_loss", "cpu", "cpu", torch.float32, few=True)
    assert proved().faults == []
    monkeypatch.setattr(kernels, "forward", off)
    assert proved().faults


def test_two_runs_that_differ_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("tbcm_kernels.testing.prove")
    runs = itertools.cycle([[torch.zeros(2)], [torch.ones(2)]])
    monkeypatch.setattr(module, "run", lambda *_: next(runs))
    proof = module.prove("rms_norm", "reference", "cpu", torch.float32, few=True)
    assert len(proof.faults) == proof.cases > 8
    assert all(fault.endswith("two runs differ") for fault in proof.faults)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    module = importlib.import_module(f"tbcm_kernels.{op}.autograd")
    case = next(c for c in cases(op, torch.float32) if c.name == SMALL[op])
    leaves = [v.clone().requires_grad_() for v in case.primals]
    # The weights of linear_attention's norms have no tangents.
    every = case.tangents[:3] if op == "linear_attention" else case.tangents
    alone = [[t if t is one else None for t in every] for one in every]
    for tangents in ([None] * len(every), every, *alone):
        through = any(t is not None for t in tangents)
        # adaln's y is in 16 bits where all move.
        dtype = [torch.bfloat16 if tangents is every else None] if op == "adaln" else []
        arguments = (*leaves, *tangents, *case.options.values(), *dtype, through, "reference")
        torch.library.opcheck(getattr(module, f"{op}_op").op, arguments)


def test_inputs_are_never_written() -> None:
    for op in OPS:
        case = next(c for c in cases(op, torch.float32) if c.name == "slices of larger buffers")
        before = [None if v is None else v.clone() for v in case.primals + case.tangents]
        run(case, "auto")
        for b, v in zip(before, case.primals + case.tangents, strict=True):
            assert b is None or torch.equal(b, v)


@pytest.mark.parametrize("impl", ["cpu", "triton", "reference"])
def test_adaln_in_16_bits_beside_a_stream_in_fp32(impl: str, need: Callable[[str], None]) -> None:
    need(impl)
    assert mixed_faults(impl, "cpu") == []
    x = torch.randn(2, 3, 8)
    for dtype in (torch.float64, torch.int32):
        with pytest.raises(ValueError, match="dtype must be x's, or bf16 or fp16 beside"):
            tk.adaln(x, dtype=dtype)


@pytest.mark.parametrize("through", [False, True])
def test_adaln_gives_the_dtype_of_the_layer_behind_it(through: bool) -> None:
    """y and its tangent, in any of the ways to ask for them, and gradients through both."""
    x, tx = torch.randn(2, 2, 5, 24)
    scale, tscale = torch.randn(2, 2, 1, 24)
    wanted = tk.adaln_jvp(x, scale=scale, tx=tx, tscale=tscale)
    _, got, _, moved = tk.adaln_jvp(x, scale=scale, tx=tx, tscale=tscale, dtype=torch.bfloat16)
    assert torch.equal(got, wanted[1].bfloat16()) and torch.equal(moved, wanted[3].bfloat16())
    dual = torch.func.jvp(
        lambda *a: tk.adaln(a[0], scale=a[1], dtype=torch.bfloat16)[1],
        (x, scale), (tx, tscale),
    )  # fmt: skip
    assert torch.equal(dual[0], got) and torch.equal(dual[1], moved)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = x.clone().requires_grad_()
        _, y, _, ty = tk.adaln_jvp(leaf, scale=scale, tx=tx, tscale=tscale, dtype=dtype)
        out = y + ty if through else y
        grads += torch.autograd.grad(out, leaf, torch.ones_like(out))
    assert torch.equal(*grads)


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_adaln_takes_and_saves_a_branch_in_16_bits(impl: str, stop: bool) -> None:
    """As autocast makes it beside a residual stream in fp32: as with its copy in fp32."""
    x, tx = torch.randn(2, 2, 5, 24)
    h, th = torch.randn(2, 2, 5, 24).bfloat16()
    gate, scale, tscale = torch.randn(3, 2, 1, 24)
    results, kept = [], []

    def pack(saved: torch.Tensor) -> torch.Tensor:
        kept.append(saved.dtype)
        return saved

    for branch, moving in ((h, th), (h.float(), th.float())):
        leaves = [v.detach().requires_grad_() for v in (x, branch, gate, scale)]
        context = tk.stop_tangent_gradient() if stop else contextlib.nullcontext()
        with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
            outputs = tk.adaln_jvp(
                *leaves, None, tx, moving, None, tscale, impl=impl
            )  # fmt: skip
        loss = sum(o.square().sum() for o in outputs if o.requires_grad)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    assert torch.bfloat16 in kept
    assert results[0][5].dtype == torch.bfloat16
    results[1][5] = results[1][5].bfloat16()
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="16 bits beside an x in fp32"):
        tk.adaln(x, h.double(), impl=impl)
    with pytest.raises(ValueError, match="16 bits beside an x in fp32"):
        tk.adaln(h, x, impl=impl)


@pytest.mark.parametrize("name", ["adaln", "rms_norm", "linear_attention"])
@pytest.mark.parametrize("moving", [False, True])
def test_gradients_know_the_eps(name: str, moving: bool) -> None:
    torch.manual_seed(0)
    x, tx = torch.randn(2, 2, 3, 4, 8, dtype=torch.float64)
    x.requires_grad_()
    functions = {
        "adaln": lambda x, **options: tk.adaln(x[0], **options)[1],
        "rms_norm": tk.rms_norm,
        "linear_attention": lambda x, **options: tk.linear_attention(x, x, x, **options),
    }
    grads = []
    for impl in ("auto", "reference"):
        function = functools.partial(functions[name], eps=0.3, impl=impl)
        outputs = torch.func.jvp(function, (x,), (tx,)) if moving else [function(x)]
        grads.append(torch.autograd.grad(sum(y.sin().sum() for y in outputs), x))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("op", OPS)
def test_cotangents_lie_in_memory_as_they_like(op: str) -> None:
    """One number for all, as `sum` gives them, and transposed."""
    case = next(c for c in cases(op, torch.float32) if c.name == LARGEST[op])
    leaves = [p.detach().clone().requires_grad_() for p in case.primals]
    outputs = [o for o in call(case, leaves, [None] * len(leaves)) if o is not None]
    for make in (
        lambda o: torch.ones(()).expand(o.shape),
        lambda o: torch.randn(o.mT.shape).mT,
        lambda o: torch.randn(o.shape[::-1]).permute(*reversed(range(o.ndim))),
    ):
        cotangents = [make(o) for o in outputs]
        got, want = (
            torch.autograd.grad(outputs, leaves, given, retain_graph=True)
            for given in (cotangents, [c.contiguous() for c in cotangents])
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_the_gate_in_another_dtype(impl: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a = torch.randn(2, 6, 8)
    weight, bias = torch.randn(8, 1, 3, 3).bfloat16(), torch.randn(8).bfloat16()
    options = {"height": 2, "width": 3, "impl": impl}
    got = tk.conv_glu(a, weight.to(dtype), bias.to(dtype), **options)
    torch.testing.assert_close(got, tk.conv_glu(a, weight.float(), bias.float(), **options))


def test_frozen_parameters_of_the_gate_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from tbcm_kernels.conv_glu import autograd

    asked, backward = [], autograd.conv_glu_backward
    monkeypatch.setattr(
        autograd, "conv_glu_backward", lambda *a: asked.append(a[4:6]) or backward(*a)
    )
    a, weight = torch.ones(2, 6, 8, requires_grad=True), torch.ones(8, 1, 3, 3)
    tk.conv_glu(a, weight, weight[:, 0, 0, 0], height=2, width=3).sum().backward()
    assert asked == [(False, False)]


@pytest.mark.parametrize("shape", [(20, 8), (1, 20, 8)])
def test_modulations_of_tokens_that_all_samples_share(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, cotangent = torch.randn(2, 2, 20, 8)
    scale = torch.randn(shape, requires_grad=True)
    got, want = (
        torch.autograd.grad(tk.adaln(x, scale=scale, impl=impl)[1], scale, cotangent)
        for impl in ("auto", "reference")
    )
    torch.testing.assert_close(got, want)
