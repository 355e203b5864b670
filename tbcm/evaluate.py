"""`tbcm eval`: how well the student imitates its teacher, and both the real digits.

For the teacher at TEACHER_STEPS with CFG, the undistilled teacher in one step without CFG, and the
student in 1, 2 and 4 steps:

- accuracy: share of images that an independent classifier reads as the digit asked for;
- fd: Fréchet distance of the classifier's features to the 360 held-out digits;
- fd_teacher: the same to the teacher's samples **from another seed**. Samples from the same noise
  would share their finite-sample deviations, and the distance would fall below what two honest
  draws of one distribution give; the price is a floor above zero, which is reported;
- pair_rmse: root mean square difference, in image units [−1, 1], to the end of the teacher's
  trajectory **from the same noise**: what a consistency model must learn.

The teacher's samples of each seed serve both of the last two.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tbcm import digits
from tbcm.classifier import accuracy, trained_classifier
from tbcm.errors import UserError
from tbcm.files import check_writable, write_whole
from tbcm.info import environment
from tbcm.progress import tracked
from tbcm.rollout import Text, rollout, with_null
from tbcm.sampling import Run, consistency_sample, load_run
from tbcm.teacher import FLOW_SHIFT
from tbcm.text import TextEncoder
from tbcm.trigflow import SIGMA_DATA, TrigFlow, route

TEACHER_STEPS = 20
STUDENT_STEPS = (1, 2, 4)
CHUNK = 250
SEEDS = (0, 1, 2)
"""Two or more: fd_teacher compares each seed with the one before it."""

DECIMALS = {"accuracy": 3, "fd": 2, "fd_teacher": 2, "pair_rmse": 3}
"""The figures of a table, and how many decimals each has."""

Scores = dict[str, float]


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to a [n, d] and b [m, d], in fp64.

    |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½). It falls as n grows: compare at equal n.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    offset = (a.mean(0) - b.mean(0)).square().sum()
    return (offset + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def pair_rmse(a: Tensor, b: Tensor) -> float:
    """Root mean square difference of two batches of images."""
    return (a - b).square().mean().sqrt().item()


@dataclass
class Prompts:
    """The built-in prompts in turn, n of them, each distinct one encoded once."""

    text: Tensor
    mask: Tensor
    rows: Tensor

    @classmethod
    def of(cls, encoder: TextEncoder, n: int) -> Prompts:
        """n prompts, with the null prompt's embedding kept in the last row of text and mask."""
        names = digits.prompts()
        text, mask = encoder.encode([*names, ""])
        longest = int(mask.sum(1).max())  # beyond it all is padding: cost without effect
        return cls(text[:, :longest], mask[:, :longest], torch.arange(n) % len(names))

    @property
    def labels(self) -> Tensor:
        """The digit that each prompt asks for [n]."""
        return self.rows % len(digits.WORDS)


def draw(
    sampler: Callable[[Tensor, Tensor, Tensor], Tensor], noise: Tensor, prompts: Prompts, name: str
) -> Tensor:
    """sampler(noise, text, mask) over all prompts, CHUNK images at a time."""
    chunks = list(zip(noise.split(CHUNK), prompts.rows.split(CHUNK), strict=True))
    progress = tracked(chunks, f"{name:>24}", transient=True)
    return torch.cat([sampler(z, prompts.text[r], prompts.mask[r]) for z, r in progress])


def teacher_images(
    net: TrigFlow, noise: Tensor, prompts: Prompts, scale: float, name: str = "teacher"
) -> Tensor:
    """The ends of the teacher's fine trajectories from `noise` under CFG `scale`."""
    null = Text(prompts.text[-1:], prompts.mask[-1:])
    times = route(TEACHER_STEPS, FLOW_SHIFT).to(noise)

    def sampler(z: Tensor, *text: Tensor) -> Tensor:
        both, guidance = with_null(Text(*text), null), z.new_full((len(z),), scale)
        return rollout(net, z, times, both, guidance).x0 / SIGMA_DATA

    return draw(sampler, noise, prompts, name)


def images_of_seed(run: Run, teacher: TrigFlow, prompts: Prompts, seed: int) -> dict[str, Tensor]:
    """Images of every contestant from the same noise: teacher, undistilled, and student steps."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(prompts.rows), *run.teacher.latent_shape)
    noise = SIGMA_DATA * torch.randn(shape, generator=generator)

    def few(net: TrigFlow, guidance: Callable[[int], Tensor] | None, steps: int) -> Tensor:
        # Noise between steps comes after the first, in the same way for all.
        again = generator.clone_state()

        def sampler(z: Tensor, *text: Tensor) -> Tensor:
            return consistency_sample(net, z, *text, guidance and guidance(len(z)), steps, again)

        return draw(sampler, noise, prompts, f"seed {seed}, {steps} step{'s'[: steps > 1]}")

    images = {
        "teacher": teacher_images(teacher, noise, prompts, run.scale, f"seed {seed}, teacher"),
        "undistilled": few(teacher, None, 1),
    }
    return images | {str(n): few(run.student, run.guidance, n) for n in STUDENT_STEPS}


def scores_of_seed(
    images: dict[str, Tensor], labels: Tensor, other_teacher: Tensor
) -> dict[str, Scores]:
    """The four figures of every contestant; the teacher's own fd_teacher is that figure's floor."""
    judge = trained_classifier()
    _, (real, _) = digits.load_digits()
    real_features, teacher_features = judge.features(real), judge.features(other_teacher)
    scores = {}
    for name, batch in images.items():
        features = judge.features(batch)
        scores[name] = {
            "accuracy": accuracy(judge, batch, labels),
            "fd": frechet(features, real_features),
            "fd_teacher": frechet(features, teacher_features),
            "pair_rmse": pair_rmse(batch, images["teacher"]),
        }
    return scores


def summary(per_seed: list[dict[str, Scores]], reduce: Callable[[list[float]], float]) -> dict:
    """The seeds' scores reduced to one figure each, nested as in the JSON file."""
    flat = {
        name: {key: reduce([seed[name][key] for seed in per_seed]) for key in per_seed[0][name]}
        for name in per_seed[0]
    }
    return {
        "teacher": {key: flat["teacher"][key] for key in ("accuracy", "fd")},
        "undistilled": flat["undistilled"],
        "student": {str(n): flat[str(n)] for n in STUDENT_STEPS},
    }


def floors(per_seed: list[dict[str, Scores]]) -> Scores:
    """What a perfect model would score: real training digits, and a second draw of the teacher."""
    (train, _), (held_out, _) = digits.load_digits()
    judge = trained_classifier()
    return {
        "fd": frechet(judge.features(train), judge.features(held_out)),
        "fd_teacher": mean(seed["teacher"]["fd_teacher"] for seed in per_seed),
    }


def open_run(run_dir: Path) -> tuple[Run, TrigFlow]:
    """The run and its teacher's network, both fused; refuses a run on other data."""
    run = load_run(run_dir)
    if run.teacher.latent_shape != (1, 8, 8):
        raise UserError(
            f"The run {run_dir} is not on the built-in digits; give --images, a folder of real "
            "images and their prompts, to score it by."
        )
    teacher = TrigFlow(run.teacher.transformer)
    from tbcm_kernels import fuse

    fuse(teacher.transformer)
    fuse(run.student.transformer)
    return run, teacher


@torch.no_grad()
def evaluate_run(run_dir: Path, json_path: Path, samples: int = 2000) -> dict:
    """Scores a run, prints the table, and writes the JSON file whole or not at all.

    Args:
        run_dir: a run of `tbcm train` on the built-in digits.
        json_path: file for the figures.
        samples: images per contestant and seed, two or more.

    Returns:
        {"teacher": {"accuracy", "fd"}, "undistilled": {"accuracy", "fd", "fd_teacher",
        "pair_rmse"}, "student": {"1": {the same four}, "2": …, "4": …}}, means over the seeds;
        "spread" has the same shape and holds their standard deviations. Beside them are "floor",
        what the figures are of, and the machine and versions that they were made with.

    Raises:
        UserError: fewer than two samples, an unreadable run, or an unwritable file.
    """
    if samples < 2:
        raise UserError(f"samples must be at least 2, not {samples}.")
    check_writable(json_path)
    run, teacher = open_run(run_dir)
    prompts = Prompts.of(run.teacher.text, samples)
    images = [images_of_seed(run, teacher, prompts, seed) for seed in SEEDS]
    per_seed = [
        scores_of_seed(images[i], prompts.labels, images[i - 1]["teacher"])
        for i in range(len(SEEDS))
    ]
    report = report_of(per_seed) | {"samples": samples, "seeds": list(SEEDS)}
    report |= environment("cpu")
    show(report)
    write_whole(json_path, json.dumps(report, indent=2).encode())
    return report


def report_of(per_seed: list[dict[str, Scores]]) -> dict:
    """The figures of the JSON file, without what they are of."""
    _, held_out = digits.load_digits()
    return summary(per_seed, mean) | {
        "spread": summary(per_seed, stdev),
        "floor": floors(per_seed),
        "classifier_accuracy": accuracy(trained_classifier(), *held_out),
    }


def contestants(report: dict) -> dict[str, Scores]:
    """The rows of a table, by what each contestant is called there."""
    return {
        f"teacher, {TEACHER_STEPS} steps": report["teacher"],
        "undistilled, 1 step": report["undistilled"],
        **{f"student, {n} step{'s'[: n != '1']}": s for n, s in report["student"].items()},
    }


def show(report: dict) -> None:
    """Prints the table: mean ± standard deviation over the seeds."""
    table = Table(
        box=box.SIMPLE,  # 80 columns hold it whole
        padding=0,
        title=f"{report['samples']} images, mean ± spread of {len(report['seeds'])} seeds",
        caption=f"classifier on held-out digits {report['classifier_accuracy']:.3f}, "
        f"floor: fd {report['floor']['fd']:.2f}, fd_teacher {report['floor']['fd_teacher']:.2f}",
    )
    for column in ("", *DECIMALS):
        table.add_column(column, justify="right", no_wrap=True)
    spread = contestants(report["spread"])
    for name, scores in contestants(report).items():
        cells = (
            f"{scores[k]:.{d}f} ± {spread[name][k]:.{d}f}" if k in scores else ""
            for k, d in DECIMALS.items()
        )
        table.add_row(name, *cells)
    Console().print(table)
