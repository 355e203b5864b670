"""A run of `tbcm train`: its folder, its loop, and what it leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate import Accelerator

from tbcm import checkpoint, plots
from tbcm.config import TrainConfig, unused
from tbcm.distiller import Distiller
from tbcm.distributed import check_alike, make_accelerator, on_main
from tbcm.errors import UserError
from tbcm.files import GO_ON, remove_parts, whole_folder, write_whole
from tbcm.models import Teacher, teacher_of
from tbcm.progress import Log, peak_memory_mb
from tbcm.sampling import grid
from tbcm.scm import ScmDistiller
from tbcm.sprint import SprintDistiller
from tbcm.text import load_prompts

METHODS = {"tbcm": Distiller, "scm": ScmDistiller, "sana_sprint": SprintDistiller}


def train(config: TrainConfig) -> None:
    """Run `tbcm train`. Raises UserError for whatever the user can mend, and when told to stop."""
    accelerator = make_accelerator(config)
    with ExitStack() as held:
        start = find_start(config, accelerator, held)
        prompts = load_prompts(config)
        teacher = teacher_of(config)
        check_vae(teacher, accelerator)
        distiller = METHODS[config.method](config, teacher, prompts)
        check_alike({**distiller.made_from(), f"view of {start}": not start or start.exists()})
        open_run(distiller, start, held)
        if distiller.main:
            announce(distiller)
        with Log(config, distiller.accelerator, distiller.step) as log, stop_signals() as told:
            if start and not on_main(accelerator, grid_path(distiller).exists):
                due_grid(distiller, log)  # it stopped between a checkpoint and its grid
            while distiller.step < config.max_train_steps:
                if told():
                    accelerator.set_trigger()
                if accelerator.check_trigger():  # in any process
                    raise stopped(distiller, log)
                log.write(distiller.train_step())
                if due(distiller.step, config.checkpointing_steps, config):
                    save_checkpoint(distiller, log)
                due_grid(distiller, log)
        finish(distiller)
        with log.tracking():
            distiller.accelerator.end_training()


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields whether SIGTERM or SIGUSR1 came, by which schedulers tell that a run will be killed.

    Python hears signals in its main thread alone; in another they do what they did before.
    """
    told = threading.Event()
    here = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGTERM, signal.SIGUSR1) if here else ()
    before = [signal.signal(number, lambda *_: told.set()) for number in signals]
    try:
        yield told.is_set
    finally:
        for number, handler in zip(signals, before, strict=True):
            if handler is not None:  # C code's, which Python cannot put back
                signal.signal(number, handler)


def stopped(distiller: Distiller, log: Log) -> UserError:
    """What a run that is told to stop says; its step is saved then."""
    step, config = distiller.step, distiller.config
    if not step:
        return UserError(f"Told to stop before the first step; {GO_ON}.")
    if not due(step, config.checkpointing_steps, config):
        save_checkpoint(distiller, log)
    return UserError(f"Told to stop: step {step} is saved; {GO_ON}.")


def announce(distiller: Distiller) -> None:
    """Print what cannot be read off the settings alone."""
    c, processes = distiller.config, distiller.accelerator.num_processes
    parts = processes * c.gradient_accumulation_steps
    if parts > 1:
        print(
            f"A step is {c.train_batch_size} of train_batch_size: {processes} processes × "
            f"{c.gradient_accumulation_steps} in turn × {c.train_batch_size // parts} at a time."
        )
    for name, choice in unused(c).items():
        print(f"{name} is not used with --{choice}.")
    if c.lr_warmup_steps >= c.max_train_steps:
        print(
            f"The learning rate never reaches its peak: lr_warmup_steps {c.lr_warmup_steps}, "
            f"max_train_steps {c.max_train_steps}."
        )
    if not distiller.teacher.drawable:
        path = distiller.teacher.path
        print(f"{path} holds no vae/ to draw its latents with, so no grids are drawn.")


def find_start(config: TrainConfig, accelerator: Accelerator, held: ExitStack) -> Path | None:
    """The checkpoint to continue from, found before any long work; its run is held from here on."""

    def find() -> Path | None:
        run = Path(config.output_dir)
        if config.resume_from_checkpoint and checkpoint.exists(run):
            held.enter_context(checkpoint.alone(run))
        return checkpoint.find_start(config)

    return on_main(accelerator, find)


def check_vae(teacher: Teacher, accelerator: Accelerator) -> None:
    """Raises UserError for a VAE that cannot be read, hours before the first grid would."""

    def load() -> None:
        if teacher.has_vae:
            _ = teacher.vae
            teacher.free("vae")

    on_main(accelerator, load)


def open_run(distiller: Distiller, start: Path | None, held: ExitStack) -> None:
    """Start or continue the run in its folder, which the main process alone writes to."""
    config, run = distiller.config, Path(distiller.config.output_dir)

    def claim() -> None:
        checkpoint.claim(run)
        held.enter_context(checkpoint.alone(run))

    if not config.resume_from_checkpoint:
        on_main(distiller.accelerator, claim)
    if start:
        distiller.load_state(checkpoint.read(start))
    if distiller.main:
        for folder in (run, run / "samples"):
            remove_parts(folder)
        checkpoint.set_aside_newer(run, distiller.step)
        if distiller.step < config.max_train_steps and (run / "student").exists():
            checkpoint.set_aside(run / "student", "of an earlier end of this run")
        write_whole(run / "config.yaml", config.dump().encode())


def save_checkpoint(distiller: Distiller, log: Log) -> None:
    """All processes gather the state, one writes it, after the metrics that it counts on."""
    log.flush()
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
    with whole_folder(run / "student", GO_ON) as folder:
        student.save_pretrained(folder)
    plots.loss_plot(run / "metrics.jsonl", run / "loss.png")
    print(
        f"{run / 'student'}: the student after {distiller.step} steps, {distiller.skipped} of them "
        f"skipped as not finite; peak memory {peak_memory_mb():.0f} MiB."
    )


def grid_path(distiller: Distiller) -> Path:
    """Where the grid of this step belongs."""
    return Path(distiller.config.output_dir) / "samples" / f"step-{distiller.step:06d}.png"


def due_grid(distiller: Distiller, log: Log) -> None:
    """Images of the validation prompts from fixed noise, where a step has them."""
    c = distiller.config
    if not (distiller.teacher.drawable and due(distiller.step, c.validation_steps, c)):
        return
    latents = distiller.sample(c.validation_samples, c.sample_steps)
    if distiller.main:
        pictures = distiller.teacher.images(latents)
        distiller.teacher.free("vae")
        grid(pictures, grid_path(distiller))
        log.picture(grid_path(distiller), distiller.step)
