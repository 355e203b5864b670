"""A run of `tbcm train`: its folder, its loop, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tbcm import checkpoint, digits, images, plots
from tbcm.config import TrainConfig
from tbcm.distiller import Distiller
from tbcm.distributed import check_device, on_main
from tbcm.errors import UserError
from tbcm.models import Teacher, load_teacher
from tbcm.progress import Log, peak_memory_mb
from tbcm.sampling import grid, write_whole
from tbcm.scm import ScmDistiller
from tbcm.sprint import SprintDistiller
from tbcm.text import read_prompts

METHODS = {"tbcm": Distiller, "scm": ScmDistiller, "sana_sprint": SprintDistiller}


def train(config: TrainConfig) -> None:
    """Run `tbcm train`. Raises UserError for whatever the user can mend."""
    check_device(config)
    teacher = load_teacher(config.teacher_source)
    distiller = METHODS[config.method](config, teacher, load_prompts(config))
    open_run(distiller)
    if distiller.main and not drawable(teacher):
        print("These latents need a VAE to become images, so no sample grids are drawn.")
    with Log(config, distiller.accelerator, distiller.step) as log:
        while distiller.step < config.max_train_steps:
            log.write(distiller.train_step())
            if due(distiller.step, config.checkpointing_steps, config):
                log.flush()
                save_checkpoint(distiller)
            if due(distiller.step, config.validation_steps, config):
                save_grid(distiller, log)
    finish(distiller)
    distiller.accelerator.end_training()


def open_run(distiller: Distiller) -> None:
    """Start or continue the run in its folder, which the main process alone writes to."""
    config = distiller.config
    found: dict[str, Any] = {}

    def claim() -> str | None:
        found.update(checkpoint.open_run(config) or {})
        return found.get("path")

    path = on_main(distiller.accelerator, claim)
    if path:
        distiller.load_state(found or checkpoint.read(Path(path)))
    if distiller.main:
        write_whole(Path(config.output_dir) / "config.yaml", config.dump().encode())


def save_checkpoint(distiller: Distiller) -> None:
    """All processes gather the state, one writes it."""
    state, c = distiller.state(), distiller.config
    if distiller.main:
        checkpoint.save(Path(c.output_dir), distiller.step, state, c.checkpoints_total_limit)


def due(step: int, every: int, config: TrainConfig) -> bool:
    """True at every multiple of a positive interval and at the last step."""
    return step == config.max_train_steps or (every > 0 and step % every == 0)


def finish(distiller: Distiller) -> None:
    """Write the student and the loss curve, and say what was made."""
    student, run = distiller.whole_student(), Path(distiller.config.output_dir)
    if not distiller.main:
        return
    with checkpoint.whole_folder(run / "student") as folder:
        student.save_pretrained(folder)
    plots.loss_plot(run / "metrics.jsonl", run / "loss.png")
    print(
        f"{run / 'student'}: the student after {distiller.step} steps, {distiller.skipped} of them "
        f"skipped as not finite; peak memory {peak_memory_mb():.0f} MB."
    )


def drawable(teacher: Teacher) -> bool:
    """True if latents are grey or colour images themselves."""
    return teacher.latent_shape[0] in (1, 3)


def save_grid(distiller: Distiller, log: Log) -> None:
    """Images of the validation prompts from fixed noise, where latents are images."""
    if not drawable(distiller.teacher):
        return
    c = distiller.config
    pictures = distiller.sample(c.validation_samples, c.sample_steps)
    if distiller.main:
        path = Path(c.output_dir) / "samples" / f"step-{distiller.step:06d}.png"
        grid(pictures, path)
        log.picture(path, distiller.step)


def load_prompts(config: TrainConfig) -> list[str]:
    """The prompts file, the images' captions, or the built-in teacher's own prompts."""
    if config.images:
        return images.captions(config.images)
    if config.prompts:
        return read_prompts(config.prompts)
    if config.teacher == "digits":
        return [prompt for prompt, _ in digits.prompts()]
    if config.method != "tbcm":
        raise UserError(f"{config.method} learns from images; give --images FOLDER.")
    raise UserError("This teacher has no prompts of its own; give --prompts FILE, one per line.")
