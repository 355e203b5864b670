"""sCM, the baseline that learns from images: noise is added to them, nothing is rolled out.

Source: sCM (arXiv 2410.11081), with the times of SANA-Sprint (2503.09641), whose code has no
calm-down of the tangent's weight: tangent_calm_value: 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm.config import TrainConfig
from tbcm.distiller import Distiller
from tbcm.distributed import make_accelerator
from tbcm.images import open_latents
from tbcm.models import Teacher
from tbcm.rollout import Draw, Samples, Text, branches
from tbcm.student import GUIDANCE_SCALE
from tbcm.trigflow import SIGMA_DATA, to_time


def normal_times(n: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """t = arctan(e^τ/σ_d) [n] with τ ~ N(mean, std²)."""
    return torch.atan(torch.exp(mean + std * torch.randn(n, generator=generator)) / SIGMA_DATA)


def noised(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = cos t · x0 + sin t · z, for z [B, ...] of std σ_d."""
    return to_time(x0, noise, torch.zeros_like(t), t)


class ScmDistiller(Distiller):
    """The baseline's own two parts of a step: what is drawn, and where x and V come from.

    train_batch_size counts images, each of which is one student sample.
    """

    def __init__(self, config: TrainConfig, teacher: Teacher, prompts: list[str]):
        # Text encoder and VAE have gone before the student comes, the quicker first.
        accelerator = make_accelerator(config)
        self.embed(teacher, prompts, accelerator.device)
        self.latents = open_latents(config, teacher, prompts, accelerator)
        super().__init__(config, teacher, prompts)

    @property
    def choices(self) -> int:
        """Rows are of images."""
        return len(self.latents.rows)

    def times(self, n: int) -> Tensor:
        """One time for each image [n, 1]."""
        c = self.config
        return normal_times(n, c.logit_mean, c.logit_std, self.generator)[:, None]

    def images(self, rows: Tensor) -> Tensor:
        """x0 [P, C, H, W] of the images of these rows."""
        return SIGMA_DATA * self.latents.load(rows).to(self.device)

    def harvest(self, draw: Draw) -> Samples:
        """Noise on the images, and the guided teacher's velocity there."""
        return self.samples(draw, self.images(draw.rows))

    def samples(self, draw: Draw, x0: Tensor) -> Samples:
        """The same of images x0 [P, C, H, W]."""
        text: Text = self.text(self.latents.rows[draw.rows].tolist())
        guidance, noise, t = (
            a.to(self.device) for a in (draw.guidance, draw.noise, draw.times[:, 0])
        )
        x = noised(x0, noise, t)
        with torch.no_grad(), self.autocast():
            out = branches(self.teacher_net, x, t, self.guided(text))
            velocity, _ = self.trajectory_step(x, out, t, t, guidance)
        return Samples(x, t, velocity, text, GUIDANCE_SCALE * guidance, torch.ones_like(guidance))

    def made_from(self) -> dict[str, str]:
        """With the images, as the VAE has encoded them."""
        return super().made_from() | {
            "images (contents, number, order of names) or the VAE": self.latents.digest
        }
