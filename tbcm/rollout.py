"""The teacher's trajectory: prompts and noise in, student samples out, no image anywhere.

Source: TBCM (arXiv 2511.20410) and its released code; tbcm.trigflow has the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tbcm.objective import Net
from tbcm.trigflow import SIGMA_DATA, like, to_time


class Text(NamedTuple):
    """Encoded prompts: embeds [P, S, D] and mask [P, S]."""

    embeds: Tensor
    mask: Tensor

    def each(self, n: int) -> Text:
        """Every prompt n times in a row, [P·n, ...]."""
        return Text(*(a.repeat_interleave(n, 0) for a in self))

    def to(self, device: torch.device) -> Text:
        """The same prompts on a device."""
        return Text(*(a.to(device) for a in self))


class Draw(NamedTuple):
    """The random choices for P prompts of a step, on the CPU.

    rows [P] of the prompts, guidance scale [P], noise [P, C, H, W] of std σ_d, times [P, N] and a
    uniform number [P].
    """

    rows: Tensor
    guidance: Tensor
    noise: Tensor
    times: Tensor
    uniform: Tensor


class Trajectory(NamedTuple):
    """Points x and velocities V [N, P, ...] at times t [N] or [N, P], and the end x0 [P, ...]."""

    x: Tensor
    t: Tensor
    velocity: Tensor
    x0: Tensor


class Samples(NamedTuple):
    """A student batch of B = P·(N − 1) points, one prompt's points in a row, and the P prompts."""

    x: Tensor
    t: Tensor
    velocity: Tensor
    text: Text
    guidance: Tensor
    keep: Tensor


def with_null(text: Text, null: Text) -> Text:
    """Both branches of guidance in one batch [2P, ...]: the empty prompt P times, then the text."""
    return Text(*(torch.cat([n.expand_as(c), c]) for n, c in zip(null, text, strict=True)))


def branches(teacher: Net, x: Tensor, t: Tensor, both: Text) -> Tensor:
    """F [2P, ...] without the prompts and with them, of x [P, ...] at time t, one or [P]."""
    twice = x.repeat(2, *[1] * (x.ndim - 1)) / SIGMA_DATA
    return teacher(twice, t.expand(len(x)).repeat(2), *both)


def trajectory_step(
    x: Tensor, out: Tensor, t: Tensor, s: Tensor, guidance: Tensor
) -> tuple[Tensor, Tensor]:
    """V = σ_d [F_∅ + γ (F_c − F_∅)] for F of `branches` and guidance γ [P], and x at time s."""
    unconditional, conditional = out.chunk(2)
    velocity = SIGMA_DATA * (unconditional + like(guidance, x) * (conditional - unconditional))
    return velocity, to_time(x, velocity, t, s)


@torch.no_grad()
def rollout(
    teacher: Net, noise: Tensor, times: Tensor, both: Text, guidance: Tensor,
    step: Callable[..., tuple[Tensor, Tensor]] = trajectory_step,
) -> Trajectory:  # fmt: skip
    """Follow dx/dt = V from x = noise [P, ...] ~ N(0, σ_d²) along times and on to t = 0.

    The times are [N], or [N, P] where each prompt has its own.

    `step` is `trajectory_step`, or that of tbcm_kernels, which is one kernel.
    """
    x, points, velocities = noise, [], []
    ends = torch.cat([times[1:], torch.zeros_like(times[:1])])
    for t, s in zip(times, ends, strict=True):
        points.append(x)
        velocity, x = step(x, branches(teacher, x, t, both), t, s, guidance)
        velocities.append(velocity)
    return Trajectory(torch.stack(points), times, torch.stack(velocities), x)


def keep_mask(x0: Tensor, degenerate: Tensor, uniform: Tensor) -> Tensor:
    """1 for the trajectories to keep [P]: one near the degenerate latent goes with P = 1 − mse.

    x0 [P, C, H, W] in units of σ_d, degenerate [C, H, W] = x0/σ_d of a failed image, uniform [P].
    """
    mse = (x0 / SIGMA_DATA - degenerate).square().flatten(1).mean(1)
    return (uniform < mse).to(x0.dtype)


def student_samples(path: Trajectory, text: Text, guidance: Tensor, keep: Tensor) -> Samples:
    """All points but the first, which is pure noise: there cos t = 0 and nothing can be learnt."""
    n, prompts = path.x.shape[0] - 1, path.x.shape[1]
    times = path.t[1:].reshape(n, -1).expand(n, prompts)
    return Samples(
        path.x[1:].transpose(0, 1).flatten(0, 1), times.T.flatten(),
        path.velocity[1:].transpose(0, 1).flatten(0, 1), text, guidance.repeat_interleave(n),
        keep.repeat_interleave(n),
    )  # fmt: skip


def by_points(samples: Samples, points: int) -> list[Samples]:
    """The batch in parts that have up to `points` points of every prompt."""
    x, t, velocity, text, guidance, keep = samples
    prompts = len(text.mask)
    parts = [
        a.unflatten(0, (prompts, -1)).split(points, 1) for a in (x, t, velocity, guidance, keep)
    ]
    return [
        Samples(x.flatten(0, 1), t.flatten(), v.flatten(0, 1), text, g.flatten(), k.flatten())
        for x, t, v, g, k in zip(*parts, strict=True)
    ]
