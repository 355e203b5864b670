"""Images from a student in a few steps.

Source of the sampler: sCM (arXiv 2410.11081) §3 and SANA-Sprint (arXiv 2503.09641).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from tbcm import digits
from tbcm.config import TrainConfig, check_seed, read_config
from tbcm.errors import UserError
from tbcm.files import check_writable, content, write_whole
from tbcm.models import Teacher, load_transformer, teacher_of
from tbcm.text import load_prompts, read_prompts
from tbcm.trigflow import SAMPLE_TIMES, SIGMA_DATA, TrigFlow, to_time

GRID_COLUMNS = 10
GRID_ZOOM = 8
"""Enlarges images of fewer than 64 pixels."""
DRAW_BATCH = 16


def consistency_sample(
    net: TrigFlow,
    noise: Tensor,
    text: Tensor,
    mask: Tensor,
    guidance: Tensor | None,
    steps: int,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """x0/σ_d by x0 = cos t·x − sin t·σ_d F, with fresh noise between the steps.

    Args:
        net: student, or a teacher to be judged undistilled.
        noise: [B, C, H, W] of std σ_d, the state at the first time.
        text: [B, S, D].
        mask: [B, S].
        guidance: [B], already times the student's guidance_embeds_scale; None for a teacher.
        steps: a key of SAMPLE_TIMES.
        generator: draws the fresh noise; a list has one for each image.

    Raises:
        UserError: no times are known for this number of steps.
    """
    check_steps(steps)
    x, x0, end = noise, None, noise.new_zeros(len(noise))
    for t in SAMPLE_TIMES[steps]:
        now = torch.full_like(end, t)
        if x0 is not None:
            fresh = SIGMA_DATA * randn_tensor(x.shape, generator, x.device, x.dtype)
            x = to_time(x0, fresh, end, now)
        x0 = to_time(x, SIGMA_DATA * net(x / SIGMA_DATA, now, text, mask, guidance), now, end)
    return x0 / SIGMA_DATA


def check_steps(steps: int) -> None:
    """Raises UserError if no times are known for this number of steps."""
    if steps not in SAMPLE_TIMES:
        raise UserError(f"There is no {steps}-step sampler; steps is one of {[*SAMPLE_TIMES]}.")


def grid(images: Tensor, path: str | Path) -> None:
    """Saves images [n, 1 or 3, H, W] in [−1, 1] in one PNG, GRID_COLUMNS to a row."""
    tiles = pad(images.clamp(-1, 1), (0, 1, 0, 1))  # a grey line between the images
    n, c, h, w = tiles.shape
    columns = min(n, GRID_COLUMNS)
    rows = -(-n // columns)
    sheet = tiles.new_zeros(rows * columns, c, h, w)
    sheet[:n] = tiles
    sheet = sheet.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    save_image(sheet.reshape(c, rows * h, columns * w), path, GRID_ZOOM if w <= 64 else 1)


def save_image(image: Tensor, path: str | Path, zoom: int = 1) -> None:
    """Saves an image [1 or 3, H, W] in [−1, 1] as PNG, every pixel `zoom` times each way."""
    values = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).squeeze(2)
    picture = Image.fromarray(values.cpu().numpy())
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_whole(path, buffer.getvalue())


@dataclass
class Run:
    """A finished training: the teacher, the student, and the run's middle guidance scale."""

    teacher: Teacher
    student: TrigFlow
    config: TrainConfig
    scale: float
    device: torch.device

    def guidance(self, n: int) -> Tensor:
        """The student's guidance input [n]: guidance_embeds_scale × scale."""
        scale = self.student.transformer.config.guidance_embeds_scale * self.scale
        return torch.full((n,), scale, device=self.device)


def student_folder(run_dir: str | Path) -> Path:
    """Where a run has its student. Raises UserError if it has none yet."""
    folder = Path(run_dir) / "student"
    if not folder.is_dir():
        raise UserError(f"The run {run_dir} holds no student yet; let `tbcm train` finish it.")
    return folder


def load_run(run_dir: str | Path, device: str = "cpu") -> Run:
    """Opens `config.yaml` and `student/` of a run, and the teacher that the config names.

    Raises:
        UserError: a part is missing or unreadable.
    """
    config = read_config(run_dir)
    student, teacher = load_transformer(student_folder(run_dir)), teacher_of(config)
    teacher.check_student(student, run_dir)
    student = TrigFlow(student.to(device))
    scale = median_high(config.scm_cfg_scale)
    return Run(teacher, student, config, scale, torch.device(device))


def drawn_by(run: Run, run_dir: str | Path) -> dict[str, Any]:
    """What images depend on beside their prompts, seeds and steps."""
    teacher, config = run.teacher, run.config
    return {
        "student": content(student_folder(run_dir)),
        "teacher": content(*teacher.files("tokenizer", "text_encoder", "vae")),
        "variant": teacher.variant, "latent_shape": list(teacher.latent_shape),
        "complex_human_instruction": teacher.instruct, "scm_cfg_scale": run.scale,
        "mixed_precision": config.mixed_precision,
    }  # fmt: skip


def load_drawing_run(run_dir: str | Path, steps: int, seed: int = 0) -> Run:
    """`load_run` on the GPU, if there is one.

    Raises UserError for steps or a seed out of range, or latents that no VAE makes images of.
    """
    check_steps(steps)
    check_seed(seed)
    run = load_run(run_dir, "cuda" if torch.cuda.is_available() else "cpu")
    if not run.teacher.drawable:
        raise UserError(
            f"{run.teacher.path} holds no vae/ to draw the latents of {run_dir} with; save the "
            "whole pipeline there."
        )
    return run


@torch.no_grad()
def draw_images(run: Run, prompts: list[str], seeds: list[int], steps: int) -> Tensor:
    """Images [n, 1 or 3, h, w] in [−1, 1], each of its own prompt and seed, on the CPU.

    SanaSprintPipeline draws the same ones with `generator=[torch.Generator().manual_seed(s), ...]`
    and the times of `tbcm.trigflow.SAMPLE_TIMES`.
    """
    text = run.teacher.text
    text.model.to(run.device)
    bf16 = run.config.mixed_precision == "bf16"
    images = []
    for batch in range(0, len(prompts), DRAW_BATCH):
        rows = slice(batch, batch + DRAW_BATCH)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
        shape = (len(generators), *run.teacher.latent_shape)
        noise = SIGMA_DATA * randn_tensor(shape, generators, run.device, torch.float32)
        condition = (*text.encode(prompts[rows]), run.guidance(len(noise)))
        with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
            latents = consistency_sample(run.student, noise, *condition, steps, generators)
        images.append(run.teacher.images(latents.float()).clamp(-1, 1).cpu())
    return torch.cat(images)


def draw_missing(
    run: Run, prompts: list[str], seeds: list[int], steps: int, paths: list[Path]
) -> None:
    """The images whose PNGs are not there yet, each of its own prompt and seed."""
    todo = [i for i, path in enumerate(paths) if not path.exists()]
    if todo:
        found = draw_images(run, [prompts[i] for i in todo], [seeds[i] for i in todo], steps)
        for i, image in zip(todo, found, strict=True):
            save_image(image, paths[i])


def sample_run(
    run_dir: str | Path, steps: int, out: str | Path, prompts_file: str | Path | None, seed: int
) -> None:
    """`tbcm sample`: one image per prompt in a grid; without a file, the first of the run's own.

    Image i has the seed `seed` + i.

    Raises:
        UserError: an unreadable run or prompts file, or latents that need a VAE to become images.
    """
    if Path(out).suffix.lower() != ".png":
        raise UserError(f"out is a PNG, not {out}; end its name in .png.")
    check_writable(out)
    run = load_drawing_run(run_dir, steps, seed)
    if prompts_file:
        prompts = read_prompts(prompts_file)
    else:
        prompts = load_prompts(run.config)[: len(digits.prompts())]
    run.teacher.text.check(prompts)
    grid(draw_images(run, prompts, [seed + i for i in range(len(prompts))], steps), out)
