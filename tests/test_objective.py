"""The objective against its definition: derivatives by finite differences, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from test_tangent_loss import network
from torch import Tensor

from tbcm import objective
from tbcm.models import load_teacher
from tbcm.student import build_student
from tbcm.trigflow import SIGMA_DATA, TrigFlow, like, to_time
from tbcm_kernels import _dual, fuse


def consistency(x: Tensor, t: Tensor) -> Tensor:
    """f(x, t) = cos t · x − sin t · σ_d F(x/σ_d, t)."""
    return to_time(x, SIGMA_DATA * network(x / SIGMA_DATA, t), t, torch.zeros_like(t))


@pytest.fixture
def point() -> tuple[Tensor, Tensor, Tensor]:
    """x, t and V of six samples."""
    gen = torch.Generator().manual_seed(0)
    x, velocity = SIGMA_DATA * torch.randn(2, 6, 1, 3, 3, generator=gen, dtype=torch.float64)
    return x, torch.linspace(0.1, 1.5, 6, dtype=torch.float64), velocity


def test_g_is_cos_t_times_the_derivative_of_f_along_the_path(point):
    x, t, velocity = point
    out, jvp = objective.two_passes(network, x, t, velocity)
    g = objective.tangent_direction(x, t, velocity, out, jvp, r=1.0)
    h = 1e-5
    ahead, behind = consistency(x + h * velocity, t + h), consistency(x - h * velocity, t - h)
    slope = (ahead - behind) / (2 * h)
    torch.testing.assert_close(g, like(torch.cos(t), x) * slope, rtol=0, atol=1e-9)


def test_loss_value_is_the_normalised_norm(point):
    x, t, velocity = point
    out, jvp = objective.two_passes(network, x, t, velocity)
    g = objective.tangent_direction(x, t, velocity, out, jvp, r=0.7)
    g_hat, norm = objective.normalised(g, 0.1)
    summed = (out - out.detach() - g_hat).square().flatten(1).sum(1)
    torch.testing.assert_close(summed, (norm / (norm + 0.1)) ** 2, rtol=1e-12, atol=0)
    assert (summed < 1).all()


def test_gradient_of_the_loss_is_the_weighted_tangent():
    gen = torch.Generator().manual_seed(0)
    out = torch.randn(4, 1, 2, 2, generator=gen, dtype=torch.float64, requires_grad=True)
    g_hat = torch.randn(4, 1, 2, 2, generator=gen, dtype=torch.float64)
    t, lv = torch.linspace(0.2, 1.4, 4, dtype=torch.float64), torch.linspace(-1, 1, 4)
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0])
    w = objective.time_weight(t)
    objective.consistency_loss(out, g_hat, keep, w, lv).backward()
    expected = -2 * like(keep * w * torch.exp(-lv), out) * g_hat / g_hat[0].numel() / 4
    torch.testing.assert_close(out.grad, expected)
    assert out.grad[1].abs().max() == 0


def test_time_weight():
    assert objective.time_weight(torch.tensor(math.pi / 4)).item() == pytest.approx(2.0)


def test_log_variance_starts_at_zero_and_tells_times_apart():
    head, t = objective.LogVariance(), torch.tensor([0.3, 1.2])
    assert head(t).tolist() == [0.0, 0.0]
    torch.nn.init.ones_(head.linear.weight)
    angles = [300 * 1e4 ** (-i / 63) for i in range(64)]
    waves = sum(math.sin(a) + math.cos(a) for a in angles)
    assert head(t)[0].item() == pytest.approx(waves, abs=1e-2)
    assert abs(head(t)[0] - head(t)[1]).item() > 0.1


@pytest.mark.parametrize(
    ("step", "r"),
    [(0, 0), (2000, 0.5), (4000, 1), (15000, 1), (16000, 0.875), (17000, 0.75), (99999, 0.75)],
)
def test_r_warms_up_and_calms_down(step: int, r: float):
    assert objective.tangent_weight(step, 4000, 15000, 2000, 0.75) == pytest.approx(r)


def test_r_without_warm_up_is_one_from_the_start():
    assert objective.tangent_weight(0, 0, 15000, 0, 1.0) == 1.0


def test_r_never_exceeds_a_calm_value_that_is_reached_at_once():
    assert [objective.tangent_weight(step, 0, 0, 0, 0.5) for step in (0, 1)] == [0.5, 0.5]
    assert [objective.tangent_weight(step, 0, 2, 0, 0.5) for step in (1, 2)] == [1.0, 0.5]


@pytest.fixture(scope="module")
def sana():
    """Teacher and student of the built-in case, with an input of three samples."""
    teacher = load_teacher("digits")
    gen = torch.Generator().manual_seed(0)
    x, velocity = SIGMA_DATA * torch.randn(2, 3, *teacher.latent_shape, generator=gen)
    text = teacher.text.encode(["a handwritten seven", "the digit 3", "zero"])
    return teacher.transformer, x, torch.tensor([0.3, 0.9, 1.4]), velocity, text


def test_student_starts_as_the_teacher(sana):
    transformer, x, t, _, text = sana
    student = TrigFlow(build_student(transformer))
    for scale in (0.1, 0.45):
        torch.testing.assert_close(
            student(x, t, *text, torch.full((3,), scale)), TrigFlow(transformer)(x, t, *text)
        )


def test_jvp_of_sana_is_its_derivative(sana):
    transformer, x, t, velocity, text = sana
    net = TrigFlow(build_student(transformer).double())
    x, t, velocity, *condition = (
        a.double() for a in (x, t, velocity, *text, torch.full((3,), 0.15))
    )
    out, jvp = objective.two_passes(net, x, t, velocity, *condition)
    tx, tt = objective.tangents(t, velocity)
    h = 1e-3  # diffusers computes linear attention in fp32, whatever the input
    with torch.no_grad():
        ahead = net(x / SIGMA_DATA + h * tx, t + h * tt, *condition)
        behind = net(x / SIGMA_DATA - h * tx, t - h * tt, *condition)
    assert (jvp - (ahead - behind) / (2 * h)).norm() < 1e-3 * jvp.norm()
    assert out.requires_grad and not jvp.requires_grad and jvp.abs().max() > 0.01


def test_fused_pass_gives_the_same_value_tangent_and_gradient(sana):
    transformer, x, t, velocity, text = sana
    student = build_student(transformer).requires_grad_(True)
    call = (x, t, velocity, *text, torch.full((3,), 0.15))
    results = []
    for passes in (objective.two_passes, objective.one_pass):
        fused = passes is objective.one_pass
        handle = fuse(student) if fused else None
        out, jvp = passes(TrigFlow(student, fused), *call)
        student.zero_grad()
        out.square().mean().backward()
        grads = torch.cat([p.grad.flatten() for p in student.parameters()])
        results.append((out.detach(), jvp, grads))
        if handle:
            handle.undo()
    for plain, fused in zip(*results, strict=True):
        assert (plain - fused).norm() < 1e-5 * plain.norm()


def test_one_pass_asks_for_the_gradient_of_the_value_alone(point):
    x, t, velocity = (a.float() for a in point)
    asked = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        asked.append(_dual.tangent_gradient_stopped())
        return network(x, t)

    _, jvp = objective.one_pass(net, x, t, velocity)
    assert asked == [True] and not _dual.tangent_gradient_stopped()
    torch.testing.assert_close(jvp, objective.two_passes(network, x, t, velocity)[1])
    with pytest.raises(RuntimeError, match="tangent of the student was lost"):
        objective.one_pass(lambda x, t: network(x.detach().clone(), t.detach()), x, t, velocity)


def test_the_tangent_of_one_pass_has_no_graph_where_pytorch_ends_it(point):
    x, t, velocity = (a.float() for a in point)
    weight = torch.ones((), requires_grad=True)
    out, jvp = objective.one_pass(lambda x, t: weight * network(x, t), x, t, velocity)
    assert out.requires_grad and not jvp.requires_grad
