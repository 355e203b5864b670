"""SANA-Sprint, the baseline that adds a GAN to sCM: L = L_sCM + λ L_adv.

The discriminator is small heads on features of the frozen teacher (LADD, arXiv 2403.12015), trained
by the hinge loss. Source: SANA-Sprint (arXiv 2503.09641) §3.3.
Differs from its released code: student and discriminator both move in every step, with the same
guidance scales, and the heads' norms are of each image, where it has eight in common, so that a
step is the same on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import leaky_relu, relu
from torch.nn.utils.parametrizations import spectral_norm

from tbcm.config import TrainConfig
from tbcm.errors import UserError
from tbcm.models import Teacher
from tbcm.optimizer import make_optimizer
from tbcm.rollout import Samples, Text
from tbcm.scm import ScmDistiller, noised, normal_times
from tbcm.trigflow import HALF_PI, SIGMA_DATA, TrigFlow, to_time

HEAD_BLOCKS = (2, 8, 14, 19)


class Head(nn.Module):
    """Logits [B, N] of a block's tokens [B, N, C]; they see 9 neighbours in a row, a ring."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix = spectral_norm(nn.Conv1d(channels, channels, 1))
        self.near = spectral_norm(
            nn.Conv1d(channels, channels, 9, padding=4, padding_mode="circular")
        )
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(32, channels), channels) for _ in range(2))
        self.logit = spectral_norm(nn.Conv1d(channels, 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Without the prompt: the teacher's features know it."""
        x = leaky_relu(self.norms[0](self.mix(tokens.transpose(1, 2))), 0.2)
        x = (x + leaky_relu(self.norms[1](self.near(x)), 0.2)) / 2**0.5
        return self.logit(x)[:, 0]


class Heads(nn.ModuleList):
    """A head for each list entry. Spectral norms are renewed by `renew` alone, once a step."""

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits of all heads [B, heads·N]."""
        return torch.cat([head(f.float()) for head, f in zip(self, features, strict=True)], 1)

    @torch.no_grad()
    def renew(self) -> None:
        """One power iteration for every weight, so that it does not depend on the passes."""
        self.train()
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                module.weight  # noqa: B018 - reading it iterates
        self.eval()


class Features:
    """Tokens [B, N, C] after some blocks of a transformer, by its stock forward."""

    def __init__(self, transformer: nn.Module, blocks: Sequence[int]):
        self.blocks = [transformer.transformer_blocks[i] for i in blocks]
        # Whether `tbcm_kernels.fuse` has replaced it or not; its blocks run their hooks.
        self.net = TrigFlow(partial(type(transformer).forward, transformer))

    def __call__(self, x: Tensor, t: Tensor, text: Text) -> list[Tensor]:
        """Of x_t [B, C, H, W] at t [B], with gradients with respect to x."""
        with kept_outputs(self.blocks) as found:
            self.net(x / SIGMA_DATA, t, *text)
        return found


@contextmanager
def kept_outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects what the blocks return within; a fused forward would refuse hooks that stay."""
    found: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda *call: found.append(call[-1])) for b in blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class SprintDraw(NamedTuple):
    """sCM's draw, and the GAN's for P images: times [P] and noises [P, C, H, W] of std σ_d.

    `gan_*` make what the student denoises; the others are added for the heads to see. `other_rows`
    [P] are of the image before each, which goes with its caption in a misaligned pair.
    """

    rows: Tensor
    guidance: Tensor
    noise: Tensor
    times: Tensor
    uniform: Tensor
    gan_t: Tensor
    gan_noise: Tensor
    fake_t: Tensor
    fake_noise: Tensor
    real_t: Tensor
    real_noise: Tensor
    other_rows: Tensor
    other_t: Tensor
    other_noise: Tensor


class SprintSamples(NamedTuple):
    """sCM's samples, the images x0 [P, C, H, W] that they were made of, others, and the draw."""

    x: Tensor
    t: Tensor
    velocity: Tensor
    text: Text
    guidance: Tensor
    keep: Tensor
    x0: Tensor
    other: Tensor | None
    draw: SprintDraw


class SprintDistiller(ScmDistiller):
    """sCM's step, in which the student also fools the heads and the heads learn to tell.

    Both are updated in every step. The heads learn from the images by which the student learns, so
    a step costs one teacher pass with gradients and one without more than sCM's, and one student
    pass: less than turns with images of their own.
    """

    def __init__(self, config: TrainConfig, teacher: Teacher, prompts: list[str]):
        blocks = head_blocks(config, teacher.transformer)
        super().__init__(config, teacher, prompts)
        self.features = Features(self.transformer, blocks)
        self.heads = Heads(Head(_width(self.transformer)) for _ in blocks).to(self.device).eval()
        self.heads_optimizer = make_optimizer(list(self.heads.parameters()), config)
        self.judged: list[Tensor] = []

    def draw(self) -> SprintDraw:
        """sCM's draw, then the GAN's."""
        first, gen, c = super().draw(), self.generator, self.config
        n = len(first.rows)
        t = normal_times(n, c.logit_mean, c.logit_std, gen)
        largest = torch.rand(n, generator=gen) < c.largest_timestep_prob
        seen = [
            normal_times(n, c.logit_mean_discriminator, c.logit_std_discriminator, gen)
            for _ in range(3)
        ]
        noises = SIGMA_DATA * torch.randn(4, *first.noise.shape, generator=gen)
        t, other_rows = torch.where(largest, HALF_PI, t), first.rows.roll(1)
        return SprintDraw(
            *first, t, noises[0], seen[0], noises[1], seen[1], noises[2],
            other_rows, seen[2], noises[3],
        )  # fmt: skip

    def harvest(self, draw: SprintDraw) -> SprintSamples:
        """sCM's samples, with what the GAN needs beside them."""
        c, x0, other = self.config, self.images(draw.rows), None
        if c.misaligned_pairs_D and c.train_batch_size > 1:
            first = draw.other_rows[:1]  # of another share, where the batch is split
            first = x0[-1:] if first == draw.rows[-1] else self.images(first)
            other = torch.cat([first, x0[:-1]])
        on_device = SprintDraw(*(a.to(self.device) for a in draw))
        return SprintSamples(*self.samples(draw, x0), x0, other, on_device)

    def forward(self, samples: SprintSamples, r: float) -> tuple[Tensor, Tensor]:
        """The student's loss and ‖g‖; its gradient holds the heads' too."""
        loss, norms = super().forward(Samples(*samples[:6]), r)
        with self.autocast():
            fake, real = self.fake_features(samples), self.image_features(samples)
        constant = {name: p.detach() for name, p in self.heads.named_parameters()}
        adversarial = -functional_call(self.heads, constant, (fake,)).mean()
        right, *misaligned = self.heads(real).split(len(samples.x0))
        wrong = torch.cat([self.heads([f.detach() for f in fake]), *misaligned])
        hinge = 0.5 * (relu(1 + wrong).mean() + relu(1 - right).mean())
        self.judged.append(torch.stack([adversarial, hinge]).detach())
        # One backward serves both: the heads' loss adds its gradient, which ends at the heads, but
        # not its value.
        return loss + self.config.adv_lambda * adversarial + hinge - hinge.detach(), norms

    def fake_features(self, samples: SprintSamples) -> list[Tensor]:
        """Of images that the student makes in one step from images with noise."""
        draw = samples.draw
        x = noised(samples.x0, draw.gan_noise, draw.gan_t)
        out = self.student_net(x / SIGMA_DATA, draw.gan_t, *samples.text, samples.guidance)
        made = to_time(x, SIGMA_DATA * out, draw.gan_t, torch.zeros_like(draw.gan_t))
        return self.features(noised(made, draw.fake_noise, draw.fake_t), draw.fake_t, samples.text)

    @torch.no_grad()
    def image_features(self, samples: SprintSamples) -> list[Tensor]:
        """Of the images themselves, then of the others beside their captions, if there are any."""
        draw, other, text = samples.draw, samples.other, samples.text
        x, t = noised(samples.x0, draw.real_noise, draw.real_t), draw.real_t
        if other is not None:
            x = torch.cat([x, noised(other, draw.other_noise, draw.other_t)])
            t, text = torch.cat([t, draw.other_t]), Text(*(torch.cat([a, a]) for a in text))
        return self.features(x, t, text)

    def update(self, loss: Tensor) -> tuple[float, bool]:
        """Apply the gradients of the student, then the heads'."""
        norm, applied = super().update(loss)
        if applied:
            parameters = list(self.heads.parameters())
            for p in parameters:
                p.grad = self.accelerator.reduce(p.grad, "mean")
            torch.nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip)
            self.heads_optimizer.step()
            self.heads.renew()
        self.heads_optimizer.zero_grad()
        return norm, applied

    def train_step(self) -> dict[str, Any]:
        """The record has the adversarial loss and the heads' hinge loss besides."""
        self.judged.clear()
        record = super().train_step()
        both = self.accelerator.reduce(torch.stack(self.judged).mean(0), "mean")
        return record | dict(zip(("adv_loss", "hinge_loss"), both.tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """With the heads and their optimiser."""
        own = {
            "heads": self.heads.state_dict(),
            "heads_optimizer": self.heads_optimizer.state_dict(),
        }
        return super().state() | own

    def load_state(self, state: dict[str, Any]) -> None:
        """With the heads and their optimiser."""
        super().load_state(state)
        self.heads.load_state_dict(state["heads"])
        self.heads_optimizer.load_state_dict(state["heads_optimizer"])


def head_blocks(config: TrainConfig, transformer: nn.Module) -> list[int]:
    """The blocks to judge by. Raises UserError if the teacher lacks one that was asked for."""
    count, asked = len(transformer.transformer_blocks), config.head_block_ids or HEAD_BLOCKS
    found = [i for i in asked if i < count]
    if not found or (config.head_block_ids and found != asked):
        raise UserError(
            f"The teacher has {count} blocks, from 0 to {count - 1}, not {asked}; give others as "
            "head_block_ids."
        )
    return found


def _width(transformer: nn.Module) -> int:
    return transformer.config.num_attention_heads * transformer.config.attention_head_dim
