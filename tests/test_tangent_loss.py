"""The fused loss: policy, the trainer's plain loss, finite differences, samples of NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from implementations import COMBINATIONS, DEVICE, GPU, id_of
from torch import Tensor

import tbcm_kernels as tk
from tbcm import objective
from tbcm.trigflow import SIGMA_DATA, like, to_time
from tbcm_kernels.tangent_loss import autograd
from tbcm_kernels.testing import check as harness
from tbcm_kernels.testing.cases import Case, cases
from tbcm_kernels.testing.check import check, run

pytestmark = pytest.mark.kernels
IMPLEMENTATIONS = [("cpu", "cpu"), ("triton", DEVICE), ("reference", "cpu")]
R, C = 0.7, 0.1


def case(name: str = "shape (2, 4, 32, 32)") -> Case:
    return next(c for c in cases("tangent_loss", torch.float32) if c.name == name)


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """F, J, V, x, t, keep, w, lv of six samples; one is not kept."""
    gen = torch.Generator().manual_seed(0)
    tensors = torch.randn(4, 6, 2, 3, 5, generator=gen, dtype=torch.float64, device="cpu")
    t = torch.linspace(0.1, 1.5, 6, dtype=torch.float64, device="cpu")
    keep = torch.tensor([1.0, 1, 0, 1, 1, 1], device="cpu")
    numbers = t, keep, objective.time_weight(t), torch.linspace(-1, 1, 6, device="cpu")
    return [a.to(device, dtype) for a in (*tensors, *numbers)]


def loss_and_gradients(function: Callable, values: list[Tensor]) -> list[Tensor]:
    """Loss, ‖g‖, and gradients of F and lv."""
    out, *rest, lv = values
    out, lv = out.clone().requires_grad_(), lv.clone().requires_grad_()
    loss, norm = function(out, *rest[:4], R, C, *rest[4:], lv)
    return [loss.detach(), norm, *torch.autograd.grad(loss, [out, lv])]


def fused(impl: str = "auto") -> Callable:
    return lambda *values: tk.tangent_loss(*values, impl=impl)


@pytest.mark.parametrize(("impl", "device", "dtype"), COMBINATIONS, ids=id_of)
def test_policy(impl: str, device: str, dtype: torch.dtype, need: Callable[[str], None]) -> None:
    need(impl)
    tried = list(cases("tangent_loss", dtype, device, impl == "triton" and not GPU))
    assert len(tried) > 16
    assert [f for c in tried for f in check(c, impl)] == []


def _scaled(values: list) -> None:
    values[2].mul_(1.01)


def _last_element(values: list) -> None:
    values[2].view(-1)[-1] = 0


def _neighbours_norm(values: list) -> None:
    values[1].copy_(values[1].roll(1))


def _a_little_more(values: list) -> None:
    values[0].mul_(1.0001)


def _sum_over_samples(values: list) -> None:
    values[3].mul_(len(values[3]))


def _not_a_number(values: list) -> None:
    values[2].view(-1)[0] = float("nan")


@pytest.mark.parametrize(
    "mutant",
    [
        _scaled, _last_element, _neighbours_norm, _a_little_more, _sum_over_samples, _not_a_number,
    ],
)  # fmt: skip
def test_planted_faults_fail(
    mutant: Callable[[list], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> list:
        values = [v.clone() for v in run(*arguments)]
        mutant(values)
        return values

    assert check(case(), "auto") == []
    monkeypatch.setattr(harness, "run", broken)
    assert check(case(), "auto") != []


@pytest.mark.parametrize("term", range(4))
def test_a_missing_term_of_g_fails(term: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(whole: Case, impl: str) -> list:
        before = whole.primals[term]
        whole.primals[term] = torch.zeros_like(before)
        values = run(whole, impl)
        whole.primals[term] = before
        return values

    monkeypatch.setattr(harness, "run", broken)
    assert check(case(), "auto") != []


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_it_is_the_plain_loss_of_the_trainer(impl: str) -> None:
    """In fp64, where nothing hides, with the gradient of the definition by autograd."""
    values = inputs(torch.float64)
    got = loss_and_gradients(fused(impl), values)
    want = loss_and_gradients(objective.tangent_loss, values)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("impl", "device"), IMPLEMENTATIONS)
def test_kernels_give_the_plain_loss(
    impl: str, device: str, need: Callable[[str], None]
) -> None:  # fmt: skip
    need(impl)
    got = loss_and_gradients(fused(impl), inputs(device=device))
    want = loss_and_gradients(objective.tangent_loss, inputs(torch.float64))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=2e-6, atol=1e-8)


def network(x: Tensor, t: Tensor) -> Tensor:
    """A smooth F(x/σ_d, t) that mixes all pixels."""
    mixed = torch.tanh(x.flatten(1).cumsum(1).reshape(x.shape) * like(torch.sin(2 * t), x))
    return mixed + like(torch.cos(3 * t), x) * x**2


def test_gradient_follows_the_derivative_of_f_along_the_path() -> None:
    """At r = 1, g = cos t · df/dt of f = cos t x − sin t σ_d F by finite differences."""
    _, _, velocity, x, t, *_ = inputs(torch.float64)
    out, jvp = objective.two_passes(network, x, t, velocity)

    def consistency(h: float) -> Tensor:
        state, time = x + h * velocity, t + h
        f = SIGMA_DATA * network(state / SIGMA_DATA, time)
        return to_time(state, f, time, torch.zeros_like(t))

    h = 1e-5
    g = like(torch.cos(t), x) * (consistency(h) - consistency(-h)) / (2 * h)
    out = out.detach().requires_grad_()
    loss, norm = tk.tangent_loss(out, jvp, velocity, x, t, 1.0, C)
    torch.testing.assert_close(norm, g.flatten(1).norm(dim=1), rtol=1e-8, atol=0)
    expected = -2 * g / like(norm + C, g) / out.numel()
    torch.testing.assert_close(torch.autograd.grad(loss, out)[0], expected, rtol=0, atol=1e-9)


def test_gradient_is_that_of_the_loss_with_a_frozen_target() -> None:
    """Of what F − F⁻ − ĝ means: F⁻ and ĝ stay, F moves. lv moves truly."""
    out, jvp, velocity, x, t, keep, weight, lv = inputs(torch.float64)
    g = objective.tangent_direction(x, t, velocity, out, jvp, R)
    target = out + objective.normalised(g, C)[0]

    def frozen(out: Tensor, lv: Tensor) -> Tensor:
        square = (out - target).square().flatten(1).mean(1)
        return (keep * (weight * torch.exp(-lv) * square + lv)).mean()

    leaves = out.requires_grad_(), lv.requires_grad_()
    loss, _ = tk.tangent_loss(out, jvp, velocity, x, t, R, C, keep, weight, lv)
    pairs = zip(*(torch.autograd.grad(y, leaves) for y in (loss, frozen(*leaves))), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    torch.autograd.gradcheck(
        lambda lv: tk.tangent_loss(out, jvp, velocity, x, t, R, C, keep, weight, lv)[0], leaves[1]
    )


@pytest.mark.parametrize(("impl", "device"), IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_bad_sample_is_flagged_and_not_spread(
    impl: str, device: str, bad: float, need: Callable[[str], None]
) -> None:
    """The others are as if it had not been kept; 1e30 has a square that fp32 cannot hold."""
    need(impl)
    values = inputs(device=device)
    without = [v.clone() for v in values]
    without[5][3] = 0
    values[1][3, 0, 0, 0] = bad
    loss, norm, gout, glv = loss_and_gradients(fused(impl), values)
    assert (~norm.isfinite()).nonzero().flatten().tolist() == [3]
    assert norm[3].isnan() if math.isnan(bad) else norm[3] == math.inf
    assert not gout[3].any() and glv[3] == 0
    want = loss_and_gradients(fused(impl), without)
    torch.testing.assert_close([loss, gout, glv], [want[0], *want[2:]])


@pytest.mark.parametrize(("impl", "device"), IMPLEMENTATIONS)
def test_without_a_finite_sample_the_loss_is_nan(
    impl: str, device: str, need: Callable[[str], None]
) -> None:
    """Zero would look like a run that has converged."""
    need(impl)
    values = inputs(device=device)
    values[3].fill_(math.nan)
    loss, norm, gout, glv = loss_and_gradients(fused(impl), values)
    assert loss.isnan() and norm.isnan().all()
    assert not gout.any() and not glv.any()


@pytest.mark.parametrize(("impl", "device"), IMPLEMENTATIONS)
def test_a_bad_weight_is_not_hidden(
    impl: str, device: str, need: Callable[[str], None]
) -> None:  # fmt: skip
    """Only the norm is judged; a head or weight that is broken must stop the run."""
    need(impl)
    for broken in (6, 7):
        values = inputs(device=device)
        values[broken][1] = math.nan
        loss, _, gout, _ = loss_and_gradients(fused(impl), values)
        assert loss.isnan() and gout[1].isnan().all() and gout[0].isfinite().all()


def test_deterministic_whatever_the_threads(on_threads: Callable) -> None:
    chosen = case("shape (2, 3, 37, 101)")
    for a, *others in zip(*on_threads(lambda: run(chosen, "auto")), strict=True):
        assert all(torch.equal(a, b) for b in others)


def test_only_f_and_the_log_variance_have_gradients() -> None:
    leaves = [a.requires_grad_() for a in inputs()]
    loss, norm = tk.tangent_loss(*leaves[:5], R, C, *leaves[5:])
    assert not norm.requires_grad
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert [g is not None for g in grads] == [True, *[False] * 6, True]


def test_the_reference_takes_the_tangent_as_a_constant_too() -> None:
    x, velocity = torch.randn(2, 4, 3)
    theta, t = torch.randn(4, 3, requires_grad=True), torch.rand(4)
    grads = []
    for impl in ("auto", "reference"):
        loss, _ = tk.tangent_loss(theta.sin(), theta * theta, velocity, x, t, 1.0, impl=impl)
        grads += torch.autograd.grad(loss, theta)
    torch.testing.assert_close(*grads)


def test_f_alone_and_log_variance_alone() -> None:
    values = inputs()
    whole = loss_and_gradients(fused(), values)[2:]
    for i, want in ((0, whole[0]), (7, whole[1])):
        leaves = [v.clone().requires_grad_(j == i) for j, v in enumerate(values)]
        loss, _ = tk.tangent_loss(*leaves[:5], R, C, *leaves[5:])
        assert torch.equal(torch.autograd.grad(loss, leaves[i])[0], want)


def test_incoming_gradient_scales_the_result() -> None:
    one = loss_and_gradients(fused(), inputs())
    scaled = loss_and_gradients(lambda *v: (4 * fused()(*v)[0], torch.zeros(6)), inputs())
    for a, b in zip(one[2:], scaled[2:], strict=True):
        assert torch.equal(4 * a, b)


def test_every_number_reaches_the_reference() -> None:
    out, jvp, velocity, x, t, *rest = inputs()
    found = [
        tk.tangent_loss(out, jvp, velocity, x, t, 0.4, 0.3, *rest, sigma_data=0.8, impl=impl)
        for impl in ("auto", "reference")
    ]
    torch.testing.assert_close(*found)


def test_defaults_are_those_of_scm() -> None:
    out, jvp, velocity, x, t, *_ = inputs()
    got = tk.tangent_loss(out, jvp, velocity, x, t, R)
    want = tk.tangent_loss(out, jvp, velocity, x, t, R, 0.1, sigma_data=0.5)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_grad_and_empty_batch() -> None:
    with torch.no_grad():
        assert not tk.tangent_loss(*inputs()[:5], R)[0].requires_grad
    loss, norm = tk.tangent_loss(*(a[:0] for a in inputs()[:5]), R)
    assert loss.isnan() and norm.shape == (0,)


def test_one_number_a_sample() -> None:
    out, jvp, velocity, x, t = torch.rand(5, 4)
    losses = [tk.tangent_loss(out, jvp, velocity, x, t, R, impl=i) for i in ("auto", "reference")]
    for got, want in zip(*losses, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_fullgraph_forward_and_backward(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fused(), fullgraph=True, backend=backend)
    pairs = zip(
        loss_and_gradients(compiled, inputs()), loss_and_gradients(fused(), inputs()), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_vmap() -> None:
    lanes = [torch.stack([a, a.flip(0)]) for a in inputs()]

    def along(out: Tensor, jvp: Tensor, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return tk.tangent_loss(out, jvp, velocity, x, t, R, C)[0]

    got = torch.func.vmap(along)(*lanes[:5])
    want = torch.stack([along(*lane) for lane in zip(*lanes[:5], strict=True)])
    torch.testing.assert_close(got, want)


def test_derivatives_that_are_refused() -> None:
    out, *rest = inputs()
    call = lambda out: tk.tangent_loss(out, *rest[:4], R)[0]  # noqa: E731
    with pytest.raises(RuntimeError, match="has no forward-mode derivative: unpack"):
        torch.func.jvp(call, (out,), (out,))
    with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad"):
        torch.func.grad(call)(out)
    for i in range(8):
        given = [out, *rest[:4], R, C, *rest[4:]]
        place = i if i < 5 else i + 2
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            torch.func.jvp(
                lambda v: tk.tangent_loss(*given[:place], v, *given[place + 1 :])[0],  # noqa: B023
                (given[place],), (given[place],),
            )  # fmt: skip
    lv = rest[6].requires_grad_()
    loss, _ = tk.tangent_loss(out.requires_grad_(), *rest[:4], R, C, *rest[4:])
    for leaf in (out, lv):
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            first.sum().backward()


def test_opcheck() -> None:
    out, *rest = inputs()
    lv = rest[6].requires_grad_()
    for numbers in ((None, None, None), (rest[4], rest[5], lv)):
        arguments = (out.clone().requires_grad_(), *rest[:4], *numbers, R, C, 0.5, "reference")
        torch.library.opcheck(autograd.tangent_loss_op.op, arguments)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (1, lambda a: a[:3], r"jvp must be \[6, 2, 3, 5\]"),
        (4, lambda a: a[:3], r"t must be \[6\] on"),
        (7, lambda a: a[:, None], r"log_variance must be \[6\] on"),
        (0, lambda a: a.long(), "out must be .* floating"),
        (0, lambda a: a[..., :0], "out must be .* not empty in a sample"),
    ],
)
def test_what_does_not_fit_is_named(place: int, change: Callable, message: str) -> None:
    values = inputs()
    values[place] = change(values[place])
    with pytest.raises(ValueError, match=f"tangent_loss: {message}"):
        tk.tangent_loss(*values[:5], R, C, *values[5:])


def test_inputs_are_never_written() -> None:
    chosen = case("slices of larger buffers")
    before = [v.clone() for v in chosen.primals]
    run(chosen, "auto")
    assert all(torch.equal(a, b) for a, b in zip(before, chosen.primals, strict=True))
