"""The rollout: guidance, what is stored, and a law that Gaussian data must obey."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tbcm_kernels
from tbcm.rollout import (
    Text,
    branches,
    by_points,
    keep_mask,
    rollout,
    student_samples,
    trajectory_step,
    with_null,
)
from tbcm.trigflow import HALF_PI, SIGMA_DATA, like, route

N, P = 6, 3


def prompts() -> tuple[Text, Text]:
    """Three prompts with their own masks, and a null prompt with one of its own."""
    text = Text(torch.arange(P * 2.0).reshape(P, 2, 1), torch.tensor([[1.0, 1], [1, 0], [1, 1]]))
    return text, Text(torch.full((1, 2, 1), -1.0), torch.tensor([[1.0, 0]]))


def teacher(x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """A velocity that depends on everything it is given."""
    return like(torch.sin(t) + (text[..., 0] * mask).sum(1), x) * torch.tanh(x)


def path(guidance: Tensor, step: Callable = trajectory_step):
    noise = SIGMA_DATA * torch.randn(P, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    text, null = prompts()
    return rollout(
        teacher, noise, route(N, 2.5).float(), with_null(text, null), guidance, step
    ), text


def test_null_prompt_keeps_its_own_mask():
    seen: list[Tensor] = []

    def spy(x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        seen.append(mask)
        return teacher(x, t, text, mask)

    text, null = prompts()
    branches(spy, torch.zeros(P, 1, 2, 2), torch.tensor(1.0), with_null(text, null))
    assert torch.equal(seen[0], torch.cat([null.mask.expand(P, -1), text.mask]))


@pytest.mark.parametrize("step", [trajectory_step, tbcm_kernels.trajectory_step])
def test_guidance_is_linear_between_the_branches(step: Callable):
    text, null = prompts()
    x, t = torch.ones(P, 1, 2, 2), torch.tensor(0.7)
    s = torch.tensor([0.0, 1.0, 4.5])
    v, _ = step(x, branches(teacher, x, t, with_null(text, null)), t, t, s)
    empty = [a.expand_as(b) for a, b in zip(null, text, strict=True)]
    without = SIGMA_DATA * teacher(x / SIGMA_DATA, t, *empty)
    with_text = SIGMA_DATA * teacher(x / SIGMA_DATA, t, *text)
    torch.testing.assert_close(v, without + like(s, x) * (with_text - without))


@pytest.mark.parametrize("step", [trajectory_step, tbcm_kernels.trajectory_step])
def test_path_follows_its_own_velocities_to_zero_in_fp32(step: Callable):
    trajectory, _ = path(torch.full((P,), 1.5), step)
    ends = torch.cat([trajectory.t[1:], torch.zeros(1)])
    following = torch.cat([trajectory.x[1:], trajectory.x0[None]])
    d = (trajectory.t - ends).reshape(N, 1, 1, 1, 1)
    stepped = torch.cos(d) * trajectory.x - torch.sin(d) * trajectory.velocity
    torch.testing.assert_close(following, stepped)
    assert {a.dtype for a in trajectory} == {torch.float32}


def test_samples_drop_pure_noise_and_keep_each_prompt_with_its_point():
    guidance = torch.tensor([1.0, 2.0, 3.0])
    trajectory, text = path(guidance)
    samples = student_samples(trajectory, text, 0.1 * guidance, torch.tensor([1.0, 0, 1]))
    assert len(samples.x) == (N - 1) * P
    assert samples.t.max() < trajectory.t[0]
    for i, p in ((1, 0), (3, 2), (5, 1)):
        row = p * (N - 1) + i - 1
        assert torch.equal(samples.x[row], trajectory.x[i, p])
        assert torch.equal(samples.velocity[row], trajectory.velocity[i, p])
        for every, own in zip(samples.text.each(N - 1), text, strict=True):
            assert torch.equal(every[row], own[p])
        assert samples.t[row] == trajectory.t[i]
        assert samples.guidance[row] == 0.1 * guidance[p]
        assert samples.keep[row] == (0 if p == 1 else 1)
    assert samples.guidance.dtype == torch.float32


def test_passes_of_a_few_points_hold_all_that_belongs_to_each():
    trajectory, text = path(torch.tensor([1.0, 2.0, 3.0]))
    samples = student_samples(trajectory, text, torch.arange(3.0), torch.tensor([1.0, 0, 1]))
    passes = by_points(samples, 2)
    assert sum(len(part.x) for part in passes) == len(samples.x)
    for part in passes:
        for row, x in enumerate(part.x):
            (own,) = (i for i, other in enumerate(samples.x) if torch.equal(x, other))
            for name in ("t", "velocity", "guidance", "keep"):
                assert torch.equal(getattr(part, name)[row], getattr(samples, name)[own])


def test_filter_drops_what_ends_near_the_degenerate_latent():
    black = torch.zeros(1, 2, 2)
    x0 = SIGMA_DATA * torch.stack([black, black + 0.5, black + 2])  # mse 0, 0.25, 4
    for uniform, kept in ((0.2, [0, 1, 1]), (0.3, [0, 0, 1]), (0.999, [0, 0, 1])):
        assert keep_mask(x0, black, torch.full((3,), uniform)).tolist() == kept


def test_gaussian_data_gives_equivalent_noise_of_std_tan_half_t():
    """For data of std σ_d, E[dx/dt | x] = 0: the posterior means of data and noise cancel."""
    noise = SIGMA_DATA * torch.randn(100, 1, 1, 1, generator=torch.Generator().manual_seed(0))

    def gaussian(x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        x0, z = like(torch.cos(t), x) * x, like(torch.sin(t), x) * x
        return like(torch.cos(t), x) * z - like(torch.sin(t), x) * x0

    text = Text(torch.zeros(100, 1, 1), torch.ones(100, 1))
    null = Text(torch.zeros(1, 1, 1), torch.ones(1, 1))
    times = torch.linspace(HALF_PI, 0, 1001)[:-1]
    trajectory = rollout(gaussian, noise, times, with_null(text, null), torch.ones(100))
    for x, t in zip(trajectory.x[1::100], times[1::100], strict=True):
        z = (x - torch.cos(t) * trajectory.x0) / torch.sin(t)
        ratio = (z.std() / trajectory.x0.std()).item()
        assert abs(ratio - torch.tan(t / 2).item()) < 0.005
