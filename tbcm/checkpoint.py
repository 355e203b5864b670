"""Checkpoints written whole or not at all, and the rules for starting and resuming a run.

A checkpoint is `DIR/checkpoints/step-000123/state.pt`. Its folder is filled under a temporary name,
flushed to disc and renamed, so that a name without `.tmp` is a finished checkpoint.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from tbcm.config import MAY_CHANGE, TrainConfig, changed_fields, read_config
from tbcm.errors import UserError
from tbcm.files import GO_ON, TMP, can_make, is_part, remove, whole_folder, write_whole, writing

KEYS = {
    "step", "skipped", "skipped_in_row", "config", "made_from", "student", "log_variance",
    "optimizer", "ema", "generator", "torch_rng", "cuda_rng",
}  # fmt: skip
"""What a checkpoint has at least."""
LOCK = ".lock"
"""Held by the process of a run; a folder with it and parts of files alone counts as empty."""


class Unopened(UserError):
    """A checkpoint that may be whole and cannot be opened now."""


def exists(run: Path) -> bool:
    """Whether a folder holds a run, or what is left of one."""
    return any((run / name).exists() for name in ("config.yaml", "checkpoints"))


def checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob("step-*")
    return sorted((path for path in found if path.name[5:].isdigit()), key=step_of)


def step_of(path: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(path.name[5:])


def save(run: Path, step: int, state: dict[str, Any], limit: int | None) -> None:
    """Write a checkpoint; only then remove the oldest beyond the limit."""
    path = run / "checkpoints" / f"step-{step:06d}"
    # Through a Python file, whose error tells why a write failed.
    with whole_folder(path, GO_ON) as folder, (folder / "state.pt").open("wb") as file:
        torch.save(state, file)
    for old in checkpoints(run)[: -limit if limit else 0]:
        with writing(old, GO_ON):
            remove(old)


def read(path: Path, whole: bool = False) -> dict[str, Any]:
    """The state in a checkpoint folder, and its path.

    Raises UserError if it cannot be read, Unopened where what is in the file may be whole.

    `whole` reads all of the file first and compares its checksums, which mmap does not.
    """
    try:
        if whole:
            with zipfile.ZipFile(path / "state.pt") as file:
                if bad := file.testzip():
                    raise ValueError(bad)
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=True)
        if missing := KEYS - state.keys():
            raise ValueError(missing)
        return {**state, "path": str(path)}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"Cannot read the checkpoint {path}: it is missing; give another, or latest."
        ) from error
    except (OSError, MemoryError) as error:
        why = getattr(error, "strerror", None) or "no memory is left"
        raise Unopened(
            f"Cannot read {path / 'state.pt'}: {why}; mend that and give the command again."
        ) from error
    except Exception as error:  # a damaged archive raises half a dozen types
        raise UserError(
            f"Cannot read the checkpoint {path}: it is half-written or damaged; give another, or "
            "latest."
        ) from error


def latest(run: Path) -> dict[str, Any] | None:
    """The newest readable state; None if the run was stopped before its first checkpoint.

    Raises UserError if there is no run, or a run whose checkpoints are gone or cannot be opened.
    """
    for half in (run / "checkpoints").glob(f"step-*{TMP}"):
        print(f"Skipping {half}: a checkpoint that was not finished.")
    for path in reversed(checkpoints(run)):
        try:
            return read(path, whole=True)
        except Unopened:
            raise
        except UserError:
            print(f"Skipping {path}: it is half-written or damaged.")
    if not exists(run):
        raise UserError(
            f"There is no run in output_dir {run} yet; leave out --resume_from_checkpoint to start "
            "one, or give the folder of another."
        )
    if _stopped_early(run):
        print(f"{run} was stopped before its first checkpoint: starting again from step 0.")
        return None
    raise UserError(
        f"There is no checkpoint in {run / 'checkpoints'} that is whole; start a new run in "
        "another output_dir, without --resume_from_checkpoint."
    )


def _stopped_early(run: Path) -> bool:
    """True if the run had not yet come to its first checkpoint."""
    config, metrics = run / "config.yaml", run / "metrics.jsonl"
    if checkpoints(run) or not config.exists():
        return False
    steps = metrics.read_text(errors="replace").count("\n") if metrics.exists() else 0
    # The first checkpoint follows the metrics of its step.
    return steps <= read_config(run).checkpointing_steps


def find_start(config: TrainConfig) -> Path | None:
    """The checkpoint that a run is to continue from, None for a start at step 0; nothing is made.

    Raises:
        UserError: a new run's folder is not empty; or there is no such checkpoint, it is of another
            run or past max_train_steps, or metrics.jsonl lacks its steps.
    """
    run = Path(config.output_dir)
    if not config.resume_from_checkpoint:
        check_free(run)
        return None
    state = _resumed_state(run, config.resume_from_checkpoint)
    if state is None:
        _check_same_run(vars(read_config(run)), config)
        return None
    if state["step"] > config.max_train_steps:
        raise UserError(
            f"The checkpoint {state['path']} is past max_train_steps {config.max_train_steps}; "
            "raise it, or resume from an earlier checkpoint."
        )
    _check_same_run(state["config"], config)
    kept_metrics(run / "metrics.jsonl", state["step"])
    return Path(state["path"])


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """Within, a run is this process's own.

    Raises UserError if another process is at it, or its folder cannot be written.
    """
    try:
        held = FileLock(run / LOCK, timeout=0).acquire()
    except Timeout as error:
        raise UserError(
            f"Another process is at the run in output_dir {run}; let it end, or stop it."
        ) from error
    except OSError as error:
        raise _unwritable(run, error.strerror) from error
    with held:
        yield


def check_free(run: Path) -> None:
    """Learn before long work, and without making it, whether a new run can have the folder.

    Raises UserError if there is something in it, or it cannot be made or written.
    """
    try:
        there = run.iterdir() if run.exists() else ()
        free = all(path.name == LOCK or is_part(path) for path in there)
    except OSError as error:
        raise _unwritable(run, error.strerror) from error
    if not free:
        raise UserError(
            f"output_dir {run} is not empty; choose another folder, or continue the run that it "
            "holds with --resume_from_checkpoint latest."
        )
    if not can_make(run):
        raise _unwritable(run, "it, or what is to hold it, is no folder that can be written")


def claim(run: Path) -> None:
    """Make the folder of a new run; nothing that is there already is touched.

    Raises UserError if it cannot be made or written, or is not empty.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(run, error.strerror) from error
    check_free(run)


def _unwritable(run: Path, reason: str | None) -> UserError:
    return UserError(f"Cannot write to output_dir {run}: {reason}; choose another folder.")


def _resumed_state(run: Path, name: str) -> dict[str, Any] | None:
    if name == "latest":
        return latest(run)
    own = run / "checkpoints"
    path = own / name if (own / name).exists() else Path(name)
    state = read(path, whole=True)
    if own.resolve() not in (path.parent.resolve(), path.resolve().parent):
        raise UserError(
            f"The checkpoint {path} is not of the run in output_dir {run}; give that run's own "
            "folder as --output_dir."
        )
    return state


def _check_same_run(old: dict[str, Any], config: TrainConfig) -> None:
    """Changed settings are said; those that would make it another run are refused."""
    changed = changed_fields(old, config)
    for name, (before, now) in changed.items():
        if name not in MAY_CHANGE:
            raise UserError(
                f"The checkpoint was made with {name} = {before}, not {now}; give the same value "
                f"(--config {Path(config.output_dir) / 'config.yaml'} gives all of them)."
            )
    for name, (before, now) in changed.items():
        if name not in ("output_dir", "resume_from_checkpoint"):
            print(f"Resuming with {name} = {now}; it was {before}.")


def set_aside_newer(run: Path, step: int) -> None:
    """After going back to an older checkpoint, `latest` must not find the abandoned future.

    Moved back, with the metrics.jsonl that is put into it, it could go on.
    """
    for path in checkpoints(run):
        if step_of(path) > step:
            write_whole(path / "metrics.jsonl", (run / "metrics.jsonl").read_bytes())
            set_aside(path, f"newer than step {step}")


def set_aside(folder: Path, why: str) -> None:
    """Rename a folder that no longer counts; what was set aside before it under its name goes."""
    aside = folder.with_name(folder.name + ".replaced")
    if os.path.lexists(aside):
        remove(aside)
    folder.rename(aside)
    print(f"Set aside {folder}, {why}, as {aside.name}.")


def kept_metrics(path: Path, step: int) -> list[str]:
    """The lines of metrics.jsonl up to a step, in order; a torn last line is dropped.

    Raises UserError if a step is missing: the file and the checkpoint do not belong together.
    """
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    kept = lines[:step]
    try:
        complete = [json.loads(line)["step"] for line in kept] == list(range(1, step + 1))
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(
            f"{path} does not hold every step up to {step}, where the checkpoint stands; put it "
            "back, or resume from an earlier checkpoint."
        )
    return kept
