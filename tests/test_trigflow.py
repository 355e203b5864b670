"""The TrigFlow axis against the flow-matching one, and the released route."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tbcm.trigflow import (
    HALF_PI,
    SIGMA_DATA,
    TrigFlow,
    flow_time,
    jittered,
    like,
    route,
    to_time,
    trig_time,
)  # fmt: skip

RELEASED = (
    1.5708, 1.5423, 1.5095, 1.4714, 1.4268, 1.3741, 1.3112, 1.2356,
    1.1440, 1.0331, 0.8997, 0.7425, 0.5642, 0.3734, 0.1832, 0.0063,
)  # fmt: skip


class Velocity(nn.Module):
    """A flow-matching transformer that returns what it was built with."""

    def __init__(self, v: Tensor):
        super().__init__()
        self.v = v
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, *, timestep: Tensor, **_: object) -> tuple[Tensor]:
        self.seen = x, timestep
        return (self.v,)


def pair(batch: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Data x0 and noise z of std σ_d, and times, in fp64."""
    gen = torch.Generator().manual_seed(0)
    x0, z = SIGMA_DATA * torch.randn(2, batch, 2, 3, 3, generator=gen, dtype=torch.float64)
    return x0, z, torch.linspace(0.05, HALF_PI - 0.05, batch, dtype=torch.float64)


@pytest.mark.parametrize("fused", [False, True])
def test_wrap_turns_the_flow_velocity_into_the_trigflow_velocity(fused: bool):
    x0, z, t = pair()
    transformer = Velocity((z - x0) / SIGMA_DATA)
    x = like(torch.cos(t), x0) * x0 + like(torch.sin(t), x0) * z
    out = TrigFlow(transformer, fused)(x / SIGMA_DATA, t, torch.empty(0), torch.empty(0))
    velocity = -like(torch.sin(t), x0) * x0 + like(torch.cos(t), x0) * z
    torch.testing.assert_close(SIGMA_DATA * out, velocity, rtol=1e-13, atol=1e-13)
    x_fm, t_fm = transformer.seen
    s = like(t_fm, x0)
    torch.testing.assert_close(x_fm, ((1 - s) * x0 + s * z) / SIGMA_DATA, rtol=1e-13, atol=1e-13)


def test_step_is_an_euler_step_of_rectified_flow():
    x0, z, t = pair()
    v = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = like(torch.cos(t), x0) * x0 + like(torch.sin(t), x0) * z
    out = TrigFlow(Velocity(v))(x / SIGMA_DATA, t, torch.empty(0), torch.empty(0))
    s = 0.6 * t
    stepped = to_time(x, SIGMA_DATA * out, t, s) / SIGMA_DATA
    a, b = like(flow_time(t), x), like(flow_time(s), x)
    euler = x / SIGMA_DATA * torch.sqrt(a**2 + (1 - a) ** 2) + (b - a) * v
    torch.testing.assert_close(stepped * torch.sqrt(b**2 + (1 - b) ** 2), euler, rtol=0, atol=2e-15)


def test_times_invert():
    t = torch.linspace(0, HALF_PI, 9, dtype=torch.float64)
    torch.testing.assert_close(trig_time(flow_time(t)), t, rtol=0, atol=1e-15)


def test_route_has_the_released_times():
    times = route(16, 2.5)
    assert [round(t, 4) for t in times.tolist()] == list(RELEASED)
    assert times[0].item() <= math.pi / 2


def test_jitter_keeps_each_time_in_its_stratum():
    times = route(16, 2.5)
    draws = torch.stack([jittered(times, torch.Generator().manual_seed(i)) for i in range(200)])
    assert (draws[:, 0] == times[0]).all()
    assert ((times[1:] <= draws[:, 1:]) & (draws[:, 1:] <= times[:-1])).all()
    middle = (times[1:] + times[:-1]) / 2
    spread = (times[:-1] - times[1:]) / math.sqrt(12 * 200)
    assert ((draws[:, 1:].mean(0) - middle).abs() < 5 * spread).all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("t", [0.0, HALF_PI])
def test_wrap_is_finite_with_finite_derivatives_at_both_ends(t: float, fused: bool):
    x = torch.ones(1, 1, 2, 2)
    net = TrigFlow(Velocity(torch.ones(1, 1, 2, 2)), fused)
    time = torch.tensor([t], requires_grad=True)
    out = net(x, time, torch.empty(0), torch.empty(0)).sum()
    (slope,) = torch.autograd.grad(out, time)
    assert out.isfinite() and slope.isfinite()
