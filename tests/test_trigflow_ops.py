"""The TrigFlow wrap and the teacher's step: policy, derivatives, and ways to lose a tangent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from implementations import COMBINATIONS, DEVICE, GPU, id_of
from torch import Tensor

import tbcm_kernels as tk
from tbcm import rollout, trigflow
from tbcm_kernels.testing import check as harness
from tbcm_kernels.testing.cases import Case, cases
from tbcm_kernels.testing.check import check, run
from tbcm_kernels.trigflow import autograd, reference

pytestmark = pytest.mark.kernels
LARGE = "shape (2, 4, 32, 32)"


def case(function: str, name: str = LARGE, dtype: torch.dtype = torch.float32) -> Case:
    return next(c for c in cases("trigflow", dtype) if (c.op, c.name) == (function, name))


def inputs(
    dtype: torch.dtype = torch.float32, device: str | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """v, x, t and a tangent of each; the times include both ends."""
    torch.manual_seed(0)
    v, x, tv, tx = torch.randn(4, 4, 3, 5, dtype=torch.float64).to(device, dtype)
    t, tt = torch.linspace(0, math.pi / 2, 4), torch.randn(4)
    return [v, x, t.to(device, dtype)], [tv, tx, tt.to(device, dtype)]


def wrapped(v: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """A network between the two ops; one that needs t_FM."""
    x_fm, t_fm = tk.flow_input(x, t)
    return tk.flow_output(v * torch.tanh(x_fm) + trigflow.like(t_fm, x), x, t)


def plain(v: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The same by the trainer's plain formula, which spells λ and t_FM out."""
    return trigflow.wrapped(
        lambda x_fm, t_fm: v * torch.tanh(x_fm) + trigflow.like(t_fm, x), x, t
    )  # fmt: skip


def expected() -> tuple[Tensor, Tensor]:
    primals, tangents = inputs(torch.float64)
    return torch.func.jvp(plain, tuple(primals), tuple(tangents))


def agrees(pair: tuple[Tensor, Tensor]) -> None:
    for got, want in zip(pair, expected(), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("impl", "device", "dtype"), COMBINATIONS, ids=id_of)
def test_policy(impl: str, device: str, dtype: torch.dtype, need: Callable[[str], None]) -> None:
    need(impl)
    tried = list(cases("trigflow", dtype, device, impl == "triton" and not GPU))
    assert {c.op for c in tried} == {"flow_input", "flow_output", "trajectory_step"}
    assert [f for c in tried for f in check(c, impl)] == []


def _scaled(values: list) -> None:
    values[1].mul_(1.01)


def _last_element(values: list) -> None:
    values[0].view(-1)[-1] = 0


def _neighbours_number(values: list) -> None:
    values[0].copy_(values[0].roll(1, 0))


def _one_element(values: list) -> None:
    values[1].view(-1)[values[1].numel() // 2] *= 1.02


def _not_a_number(values: list) -> None:
    values[0].view(-1)[0] = float("nan")


def _absent(values: list) -> None:
    values[-1] = None


MUTANTS = (_scaled, _last_element, _neighbours_number, _one_element, _not_a_number, _absent)


@pytest.mark.parametrize("function", ["flow_input", "flow_output", "trajectory_step"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_faults_fail(
    mutant: Callable[[list], None], function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> list:
        values = [v.clone() for v in run(*arguments)]
        mutant(values)
        return values

    chosen = case(function)
    assert check(chosen, "auto") == []
    monkeypatch.setattr(harness, "run", broken)
    assert check(chosen, "auto") != []


@pytest.mark.parametrize(
    ("function", "term"),
    [("flow_input", "x"), ("flow_input", "t"), *(("flow_output", a) for a in "vxt")],
)
def test_a_missing_term_fails(function: str, term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(whole: Case, impl: str) -> list:
        pairs = zip(whole.arguments, whole.tangents, strict=True)
        kept = [0 * tangent if name == term else tangent for name, tangent in pairs]
        return run(dataclasses.replace(whole, tangents=kept), impl)

    monkeypatch.setattr(harness, "run", broken)
    assert check(case(function), "auto") != []


def test_reference_is_the_wrap_and_its_derivative() -> None:
    """λ = 1/(sin t + cos t) against the formula of the method, and tangents against PyTorch's."""
    (v, x, t), (tv, tx, tt) = inputs(torch.float64)

    def both(v: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen: list[Tensor] = []
        out = trigflow.wrapped(lambda *state: seen.extend(state) or v, x, t)
        return out, *seen

    values, tangents = torch.func.jvp(both, (v, x, t), (tv, tx, tt))
    x_fm, t_fm, tx_fm, tt_fm = reference.flow_input(x, t, tx, tt)
    got = [*reference.flow_output(v, x, t, tv, tx, tt), x_fm, tx_fm, t_fm, tt_fm]
    pairs = zip(values, tangents, strict=True)
    for a, b in zip(got, [v for pair in pairs for v in pair], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_step_is_that_of_the_rollout() -> None:
    torch.manual_seed(0)
    x, out, guidance = torch.randn(3, 2, 5), torch.randn(6, 2, 5), torch.tensor([0.0, 1.0, 4.5])
    t, s = torch.tensor(1.2), torch.tensor(0.7)
    for a, b in zip(
        tk.trajectory_step(x, out, t, s, guidance),
        rollout.trajectory_step(x, out, t, s, guidance), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("t", [0.0, math.pi / 2, 1.5708])
@pytest.mark.parametrize("impl", ["cpu", "triton", "reference"])
def test_both_ends_are_finite(t: float, impl: str, need: Callable[[str], None]) -> None:
    need(impl)
    x, time = torch.ones(1, 4, device=DEVICE), torch.tensor([t], device=DEVICE)
    if impl == "cpu" and GPU:
        x, time = x.cpu(), time.cpu()
    values = (
        *tk.flow_input_jvp(x, time, x, time, impl=impl),
        *tk.flow_output_jvp(x, x, time, x, x, time, impl=impl),
        *tk.trajectory_step(x, torch.cat([x, x]), time, 0 * time, time, impl=impl),
    )
    assert all(v.isfinite().all() for v in values)


@pytest.mark.parametrize("function", ["flow_input", "flow_output", "trajectory_step"])
def test_deterministic_whatever_the_threads(function: str, on_threads: Callable) -> None:
    chosen = case(function, "shape (2, 3, 37, 101)")
    for a, *others in zip(*on_threads(lambda: run(chosen, "auto")), strict=True):
        assert all(torch.equal(a, b) for b in others)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_tangents_are_linear(impl: str, need: Callable[[str], None]) -> None:
    need(impl)
    (v, x, t), (tv, tx, tt) = inputs(device="cpu")

    def tangents(factor: float) -> tuple[Tensor, ...]:
        moved = [factor * a for a in (tv, tx, tt)]
        return (
            *tk.flow_input_jvp(x, t, *moved[1:], impl=impl)[2:],
            tk.flow_output_jvp(v, x, t, *moved, impl=impl)[1],
        )

    for one, four, zero in zip(*map(tangents, (1.0, 4.0, 0.0)), strict=True):
        assert torch.equal(four, 4 * one) and not zero.any()


def test_gradcheck_with_and_through_the_tangent() -> None:
    (v, x, t), tangents = inputs(torch.float64)
    t = t.clamp(0.1, 1.4)
    leaves = [a.clone().requires_grad_() for a in (v, x, t, *tangents)]
    torch.autograd.gradcheck(tk.flow_output_jvp, leaves)
    torch.autograd.gradcheck(tk.flow_input_jvp, (*leaves[1:3], *leaves[4:]))
    torch.autograd.gradcheck(tk.flow_output, leaves[:3])
    torch.autograd.gradcheck(tk.flow_input, leaves[1:3])
    torch.autograd.gradgradcheck(lambda v: tk.flow_output(v, x, t), leaves[:1])
    torch.autograd.gradgradcheck(lambda x: tk.flow_input(x, t)[0], leaves[1:2])
    guidance = t.clone()
    torch.autograd.gradcheck(
        lambda out: tk.trajectory_step(x, out, t, 0.5 * t, guidance, impl="reference"),
        torch.randn(8, 3, 5, dtype=torch.float64, requires_grad=True),
    )


def test_gradients_of_every_subset() -> None:
    """Frozen inputs take other paths: the kernel for v alone, the reference for what else."""
    primals, _ = inputs()
    for chosen in range(1, 8):
        wanted = [i for i in range(3) if chosen >> i & 1]
        found = []
        for dtype in (torch.float32, torch.float64):
            leaves = [p.to(dtype).requires_grad_(i in wanted) for i, p in enumerate(primals)]
            function = wrapped if dtype == torch.float32 else plain
            loss = function(*leaves).square().sum()
            found.append(torch.autograd.grad(loss, [leaves[i] for i in wanted]))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_t", [torch.float64, torch.bfloat16])
def test_results_have_the_dtypes_of_the_inputs(of_x: torch.dtype, of_t: torch.dtype) -> None:
    (_, x, t), (_, tx, tt) = inputs()
    x, tx, t, tt = x.to(of_x), tx.to(of_x), t.to(of_t), tt.to(of_t)
    found = tk.flow_input_jvp(x, t, tx, tt)
    assert [a.dtype for a in found] == [of_x, of_t, of_x, of_t]


def test_training_saves_nothing_but_the_time() -> None:
    (v, x, t), (tv, tx, tt) = inputs()
    saved: list[Tensor] = []
    with (
        tk.stop_tangent_gradient(),
        torch.autograd.graph.saved_tensors_hooks(lambda a: saved.append(a) or a, lambda a: a),
    ):
        out, tout = tk.flow_output_jvp(v.requires_grad_(), x, t, tv, tx, tt)
    assert [a.data_ptr() for a in saved] == [t.data_ptr()]
    assert out.requires_grad and not tout.requires_grad


# Ways to lose a tangent.


def test_func_jvp() -> None:
    primals, tangents = inputs()
    agrees(torch.func.jvp(wrapped, tuple(primals), tuple(tangents)))


def test_dual_level() -> None:
    primals, tangents = inputs()
    with fwAD.dual_level():
        pair = fwAD.unpack_dual(wrapped(*map(fwAD.make_dual, primals, tangents)))
    agrees(pair)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("stop", [False, True])
def test_compile_fullgraph_forward_and_backward(backend: str, stop: bool) -> None:
    torch._dynamo.reset()
    primals, tangents = inputs()
    leaves = [p.requires_grad_() for p in primals]

    def both(*values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(wrapped, values[:3], values[3:])

    def gradients(function: Callable) -> list[Tensor]:
        value, tangent = function(*leaves, *tangents)
        assert tangent.requires_grad is not stop
        loss = value.square().sum() + (0 if stop else tangent.square().sum())
        return [value, tangent, *torch.autograd.grad(loss, leaves)]

    def compare() -> None:
        compiled = torch.compile(both, fullgraph=True, backend=backend)
        for a, b in zip(gradients(compiled), gradients(both), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    if stop:
        with tk.stop_tangent_gradient():
            compare()
    else:
        compare()


def test_compiled_step() -> None:
    torch._dynamo.reset()
    chosen = case("trajectory_step")
    compiled = torch.compile(tk.trajectory_step, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        compiled(*chosen.primals), tk.trajectory_step(*chosen.primals), strict=True
    ):  # fmt: skip
        assert torch.equal(a, b)


def test_compiled_function_inside_dual_level_raises() -> None:
    torch._dynamo.reset()
    primals, tangents = inputs()
    compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*primals), wrapped(*primals))
    with fwAD.dual_level(), pytest.raises(Exception, match=r"dual_level|dual tensor"):
        compiled(*map(fwAD.make_dual, primals, tangents))


def test_vmap_over_tangents() -> None:
    primals, _ = inputs()
    lanes = [torch.randn(2, *p.shape) for p in primals]

    def along(*tangents: Tensor) -> Tensor:
        return torch.func.jvp(wrapped, tuple(primals), tangents)[1]

    got = torch.func.vmap(along)(*lanes)
    torch.testing.assert_close(got, torch.stack([along(*t) for t in zip(*lanes, strict=True)]))


def test_checkpoint_of_explicit_pairs() -> None:
    (v, x, t), tangents = inputs()
    leaf = v.requires_grad_()

    def pair(v: Tensor) -> Tensor:
        out, tout = tk.flow_output_jvp(v, x, t, *tangents)
        return (out * tout).sum()

    kept = torch.utils.checkpoint.checkpoint(pair, leaf, use_reentrant=False)
    assert torch.equal(*(torch.autograd.grad(y, leaf)[0] for y in (kept, pair(leaf))))


def test_levels_that_are_refused() -> None:
    (v, x, t), (tv, _, _) = inputs()
    along = lambda f: lambda v: torch.func.jvp(f, (v,), (tv,))[1]  # noqa: E731
    for function in (lambda v: tk.flow_output(v, x, t), lambda x: tk.flow_input(x, t)[0]):
        with pytest.raises(RuntimeError, match="one level of forward mode"):
            along(along(function))(v)
        with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad"):
            torch.func.grad(lambda v, f=function: f(v).sum())(v)
    for explicit in (
        lambda v: tk.flow_output_jvp(v, x, t)[0], lambda x: tk.flow_input_jvp(x, t)[0],
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="is a forward-AD dual"):
            along(explicit)(v)


def test_step_refuses_derivatives() -> None:
    x, out, t = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([1.0, 0.5])
    call = lambda x: tk.trajectory_step(x, out, t, 0 * t, t)[1]  # noqa: E731
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"trajectory_step has no derivative.*no_grad"):
        call(leaf)
    with pytest.raises(RuntimeError, match="has no derivative"):
        torch.func.jvp(call, (x,), (x,))
    with pytest.raises(RuntimeError, match="has no derivative"):
        torch.func.grad(lambda x: call(x).sum())(x)
    with torch.no_grad():
        assert not call(leaf).requires_grad
    arguments = [x, out, t, t / 2, t]
    for i, a in enumerate(arguments):
        leaves = [*arguments[:i], a.clone().requires_grad_(), *arguments[i + 1 :]]
        with pytest.raises(RuntimeError, match="has no derivative"):
            tk.trajectory_step(*leaves)


def test_opcheck() -> None:
    (v, x, t), (tv, tx, tt) = inputs()
    for moves in (False, True):
        tangents = (tv, tx, tt) if moves else (None,) * 3
        leaves = [a.clone().requires_grad_() for a in (v, x, t)]
        for through in {False, moves}:
            torch.library.opcheck(
                autograd.flow_output_op.op, (*leaves, *tangents, through, "reference")
            )
            torch.library.opcheck(
                autograd.flow_input_op.op, (*leaves[1:], *tangents[1:], through, "reference")
            )
    step = (x, torch.cat([v, x]), t, 0 * t, t, 0.5, "reference")
    torch.library.opcheck(autograd.trajectory_step_op.op, step)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, x, t: tk.flow_input(x, t[:2]), r"flow_input: t must be floating \[B\] = \[4\]"),
        (lambda v, x, t: tk.flow_output(v[:, :2], x, t), "v must be floating, of x's shape"),
        (lambda v, x, t: tk.flow_output(v.long(), x, t), "v must be floating"),
        (lambda v, x, t: tk.flow_input(x.long(), t), r"x must be \[B, ...\] and floating"),
        (lambda v, x, t: tk.flow_output_jvp(v, x, t, tx=x[:1]), "tx must match x"),
        (lambda v, x, t: tk.trajectory_step(x, v, t, t, t), r"out must be \[2P, ...\]"),
        (lambda v, x, t: tk.trajectory_step(x, torch.cat([v, v]) + 0j, t, t, t), "floating, on"),
        (lambda v, x, t: tk.flow_input(x, t, impl="fast"), "impl must be one of"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable, message: str) -> None:
    primals, _ = inputs()
    with pytest.raises(ValueError, match=message):
        call(*primals)


def test_inputs_are_never_written_and_outputs_are_new() -> None:
    for chosen in (c for c in cases("trigflow", torch.float32) if c.name.startswith("slices")):
        before = [v.clone() for v in chosen.primals]
        outputs = run(chosen, "auto")
        assert all(torch.equal(a, b) for a, b in zip(before, chosen.primals, strict=True))
        theirs = {v.untyped_storage().data_ptr() for v in chosen.primals}
        assert theirs.isdisjoint(o.untyped_storage().data_ptr() for o in outputs if o is not None)
