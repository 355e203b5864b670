"""A training step and a sample of TBCM against the method's equations, written here once more.

Of the trainer only its networks are used, F(x/σ_d, t), and what it has drawn.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_train import distiller, settings
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tbcm.distiller import Distiller
from tbcm.rollout import Draw

SIGMA, R, C, CLIP, LR, DECAY, AVERAGE = 0.5, 0.6, 0.07, 0.02, 1e-3, 0.3, 0.1


def _run(out: Path, **changes: object) -> Distiller:
    plan = {
        "scm_cfg_scale": [1.5, 3.0, 4.0], "tangent_warmup_steps": 0, "tangent_calm_start": 0,
        "tangent_calm_steps": 0, "tangent_calm_value": R, "tangent_norm_constant": C,
        "gradient_clip": CLIP, "learning_rate": LR, "adam_weight_decay": DECAY,
        "ema_decay": AVERAGE, "time_weighting": True, "seed": 3,
    }  # fmt: skip
    return distiller(settings(out, **plan | changes))


def _teachers_path(run: Distiller, draw: Draw, p: int) -> tuple[list[tuple], Tensor]:
    """(x, t, V) at the route's times for prompt p of the draw, and where the path ends."""
    x, times = draw.noise[p : p + 1], [*draw.times[p].tolist(), 0.0]
    null, text = run.null, run.text([int(draw.rows[p])])
    points = []
    for t, s in pairwise(times):
        at = torch.tensor([t])
        without, given = (
            run.teacher_net(x / SIGMA, at, *(e.expand(1, *e.shape[1:]) for e in prompt))
            for prompt in (null, text)
        )
        velocity = SIGMA * (without + draw.guidance[p] * (given - without))
        points.append((x, at, velocity))
        x = math.cos(t - s) * x - math.sin(t - s) * velocity
    return points, x


def _loss(run: Distiller, draw: Draw, degenerate: Tensor | None) -> tuple[Tensor, list[float]]:
    """mean over samples of keep · w(t) · mean (F − F⁻ − ĝ)², and ‖g‖ of each."""
    losses, norms = [], []
    for p in range(len(draw.rows)):
        with torch.no_grad():
            points, end = _teachers_path(run, draw, p)
        keep = 1.0
        if degenerate is not None:
            keep = float(draw.uniform[p] < (end / SIGMA - degenerate).square().mean())
        text, guidance = run.text([int(draw.rows[p])]), 0.1 * draw.guidance[p : p + 1]
        for x, t, velocity in points[1:]:  # the first is pure noise

            def student(x: Tensor, t: Tensor, text=text, guidance=guidance) -> Tensor:
                return run.student_net(x, t, *text, guidance)

            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                one = (velocity / SIGMA, torch.ones(1))
                frozen, rate = torch.func.jvp(student, (x / SIGMA, t), one)
            cos, sin = math.cos(t), math.sin(t)
            g = -(cos**2) * (SIGMA * frozen - velocity) - R * cos * sin * (x + SIGMA * rate)
            norms.append(g.norm().item())
            square = (student(x / SIGMA, t) - frozen - g / (norms[-1] + C)).square().mean()
            losses.append(keep / (SIGMA * math.tan(t)) * square)
    return torch.stack(losses).mean(), norms


@pytest.mark.parametrize("fused", [False, True])
def test_a_step(fused: bool, tmp_path: Path):
    """With a filter that leaves out one of two prompts, clipping, AdamW's first step, averages."""
    run = _run(tmp_path, fused=fused)
    hand = _run(tmp_path)
    draw = run.draw()._replace(uniform=torch.full((2,), 0.01))
    run.draw = lambda: draw
    assert len(set(draw.guidance.tolist())) == 2  # of the scales, by this seed
    _, end = _teachers_path(hand, draw, 0)
    run.filter_latent = (end / SIGMA)[0].detach()  # where the first prompt ends, so mse is 0
    loss, norms = _loss(hand, draw, run.filter_latent)
    before = [w.detach().clone() for w in hand.learning]
    grads = torch.autograd.grad(loss, hand.learning)
    norm = torch.stack([g.norm() for g in grads]).norm()
    assert norm > 2 * CLIP
    row = run.train_step()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["g_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert (row["r"], row["lr"], row["skipped"], row["bad_samples"]) == (R, LR, False, 0)
    for w, old, g in zip(run.learning, before, grads, strict=True):
        clipped = g * CLIP / norm
        clear = clipped.abs() > 1e-4 * clipped.abs().max()  # the others' sign is rounding
        want = old * (1 - LR * DECAY) - LR * clipped / (clipped.abs() + 1e-8)
        torch.testing.assert_close(w.detach()[clear], want[clear], rtol=1e-4, atol=0.02 * LR)
    middle = [w.detach().clone() for w in run.learning]
    run.train_step()
    for average, a, b in zip(run.ema.shadow_params, middle, run.learning, strict=True):
        torch.testing.assert_close(average, AVERAGE * a + (1 - AVERAGE) * b.detach())


def test_a_sample_has_averaged_weights_and_leaves_the_others(tmp_path: Path):
    run = _run(tmp_path)
    weights = [w.detach().clone() for w in run.learning]
    averages = [a.mul_(1.1).add_(0.01).clone() for a in run.ema.shadow_params]
    found = {steps: run.sample(3, steps) for steps in (1, 2, 4)}
    for w, old in zip(run.learning, weights, strict=True):
        assert torch.equal(w, old)
        w.data.copy_(averages.pop(0))
    times = {1: [math.pi / 2], 2: [math.pi / 2, 1.0], 4: [1.5683, 1.3, 1.1, 0.6]}
    text = run.text([0, 1, 2])
    for steps, images in found.items():
        generator = torch.Generator().manual_seed(3)
        x0 = torch.zeros(3, *run.teacher.latent_shape)
        for t in times[steps]:
            noise = SIGMA * torch.randn(x0.shape, generator=generator)
            x = math.cos(t) * x0 + math.sin(t) * noise if t is not times[steps][0] else noise
            with torch.no_grad():
                out = run.student_net(x / SIGMA, torch.full((3,), t), *text, torch.full((3,), 0.3))
            x0 = math.cos(t) * x - math.sin(t) * SIGMA * out
        torch.testing.assert_close(images, x0 / SIGMA, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["tbcm", "scm"])
def test_bf16_is_autocast_of_both_networks(method: str, tmp_path: Path):
    run = _run(tmp_path, mixed_precision="bf16", method=method)
    found = {}
    for name in ("teacher_net", "student_net"):
        net = getattr(run, name)

        def told(module: torch.nn.Module, inputs: object, name: str = name) -> None:
            found.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))

        net.register_forward_pre_hook(told)
    run.train_step()
    assert found == {"teacher_net": {True}, "student_net": {True}}


def test_samples_in_bf16_are_drawn_under_autocast(tmp_path: Path):
    run, found = _run(tmp_path, mixed_precision="bf16"), []
    hook = run.student_net.register_forward_pre_hook
    hook(lambda *_: found.append(torch.is_autocast_enabled("cpu")))
    run.sample(2, 2)
    assert found == [True, True]
