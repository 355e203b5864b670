"""A teacher with an exact score: the student must approach the exact consistency function."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tbcm import objective
from tbcm.rollout import Text, rollout, student_samples
from tbcm.trigflow import HALF_PI, SIGMA_DATA, jittered, like, route, to_time

CENTRES = SIGMA_DATA * torch.tensor([[1.2, 0.6], [-1.2, 0.7], [0.1, -1.4]])
SPREAD = 0.5 * SIGMA_DATA


def exact(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
    """F = E[dx/dt | x_t]/σ_d for a mixture of Gaussians; x = x_t/σ_d [B, 2]."""
    x, cos, sin = SIGMA_DATA * x, like(torch.cos(t), x), like(torch.sin(t), x)
    variance = cos**2 * SPREAD**2 + sin**2 * SIGMA_DATA**2
    away = x[:, None] - cos[:, None] * CENTRES
    share = (-away.square().sum(2) / (2 * variance)).softmax(1)[..., None]
    z = sin * SIGMA_DATA**2 / variance * (share * away).sum(1)
    x0 = (share * (CENTRES + (cos * SPREAD**2 / variance)[:, None] * away)).sum(1)
    return (cos * z - sin * x0) / SIGMA_DATA


class Student(nn.Module):
    """The teacher plus a correction that starts at zero."""

    def __init__(self, width: int = 96):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        time = torch.stack([torch.sin(t), torch.cos(t)], 1)
        return exact(x, t) + self.mlp(torch.cat([x, time], 1))


TEXT = Text(torch.zeros(1, 1, 1), torch.ones(1, 1))


def one_step_error(net: nn.Module) -> float:
    """RMSE of the one-step image against the end of the finely integrated path, same noise."""
    noise = SIGMA_DATA * torch.randn(512, 2, generator=torch.Generator().manual_seed(9))
    times = torch.linspace(HALF_PI, 0, 1001)[:-1]
    end = rollout(exact, noise, times, TEXT.each(1024), torch.ones(512)).x0
    t = torch.full((512,), HALF_PI)
    with torch.no_grad():
        image = to_time(noise, SIGMA_DATA * net(noise / SIGMA_DATA, t), t, torch.zeros_like(t))
    return (image - end).square().mean().sqrt().item()


def distil(net: nn.Module, steps: int, prompts: int) -> None:
    """The method's own rollout and objective on a network of another kind."""
    gen = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, steps)
    text, guidance = TEXT.each(2 * prompts), torch.ones(prompts)
    for step in range(steps):
        noise = SIGMA_DATA * torch.randn(prompts, 2, generator=gen)
        times = jittered(route(16, 2.5), gen).float()
        path = rollout(exact, noise, times, text, guidance)
        x, t, velocity, *_, keep = student_samples(path, text, guidance, guidance)
        out, jvp = objective.two_passes(net, x, t, velocity)
        r = objective.tangent_weight(step, 50, steps, 1, 1.0)
        g_hat, _ = objective.normalised(
            objective.tangent_direction(x, t, velocity, out, jvp, r), 0.1
        )
        objective.consistency_loss(out, g_hat, keep, torch.ones_like(t), 0 * t).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def test_student_approaches_the_exact_consistency_function():
    torch.manual_seed(0)
    student = Student()
    before = one_step_error(student)
    distil(student, steps=600, prompts=24)
    after = one_step_error(student)
    assert after < 0.25 * before, (before, after)
