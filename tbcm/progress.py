"""What a run shows while it works, and the metrics it leaves: one JSON line per step."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    track,
)  # fmt: skip

from tbcm.checkpoint import kept_metrics
from tbcm.config import TrainConfig
from tbcm.errors import UserError, reason
from tbcm.files import GO_ON, flush, write_whole, writing


def tracked(items: Iterable[Any], name: str, **options: Any) -> Iterable[Any]:
    """rich's `track` where there is a terminal; elsewhere it would print an empty line."""
    return track(items, name, disable=not Console().is_terminal, **options)


def peak_memory_mb() -> float:
    """Peak memory of this process in MiB: of the GPU if it has been used, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class Metrics:
    """metrics.jsonl: every step once, in order, also after a kill and a resume."""

    def __init__(self, path: Path, step: int):
        """Keep the lines up to the step that the run continues from."""
        self.path = path
        write_whole(path, "".join(f"{line}\n" for line in kept_metrics(path, step)).encode())
        self.file = path.open("a", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        """Append a line; a number that is not finite becomes null, as JSON has no NaN."""
        safe = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        with writing(self.path, GO_ON):
            self.file.write(json.dumps(safe) + "\n")

    def flush(self) -> None:
        """On disc before the checkpoint that counts on it."""
        with writing(self.path, GO_ON):
            flush(self.path)


SCALARS = (bool, int, float, str)


class Display:
    """A progress bar on a terminal, one plain line every `every` steps elsewhere."""

    def __init__(self, start: int, config: TrainConfig):
        self.start, self.total, self.every = start, config.max_train_steps, config.logging_steps
        self.data = "prompts" if config.method == "tbcm" else "images"
        self.began = time.monotonic()
        self.bar = Progress(
            BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[says]}"),
            TextColumn("ETA"), TimeRemainingColumn(), console=Console(),
        )  # fmt: skip
        self.live = self.bar.console.is_terminal
        self.task: TaskID = self.bar.add_task("", total=self.total, completed=start, says="")

    def __enter__(self) -> Display:
        if self.live:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.bar.stop()

    def show(self, record: dict[str, Any]) -> None:
        """One step's record."""
        says = (
            f"loss {record['loss']:.5f}  ‖g‖ {record['g_norm']:.3f}  r {record['r']:.2f}  "
            f"{record['prompts_per_s']:.1f} {self.data}/s  {peak_memory_mb():.0f} MiB"
        )
        step = record["step"]
        if self.live:
            self.bar.update(self.task, completed=step, says=says)
        elif step % self.every == 0 or step == self.total:
            left = (time.monotonic() - self.began) / (step - self.start) * (self.total - step)
            print(f"step {step}/{self.total}  {says}  ETA {left:.0f} s", flush=True)


class Log:
    """Where a run's records go on the main process: its file, the display and a tracker."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, step: int):
        """Continue after a step."""
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self.tracker = config.report_to
        if self.tracker:
            scalars = {k: v if isinstance(v, SCALARS) else str(v) for k, v in vars(config).items()}
            with self.tracking():
                accelerator.init_trackers("tbcm", scalars, self.going_on(config, step))
        if self.main:
            self.metrics = Metrics(Path(config.output_dir) / "metrics.jsonl", step)
            self.display = Display(step, config)

    def going_on(self, config: TrainConfig, step: int) -> dict[str, dict[str, Any]]:
        """What tells each tracker that the run goes on, for it to show one and not two."""
        name = Path(config.output_dir) / "wandb.id"
        if self.main and self.tracker == "wandb" and not name.exists():
            write_whole(name, uuid.uuid4().hex.encode())
        told = {"id": name.read_text(), "resume": "allow"} if name.exists() else {}
        return {
            "tensorboard": {"purge_step": step + 1},  # steps that come anew
            "wandb": {"dir": config.output_dir, **told},
        }

    def __enter__(self) -> Log:
        if self.main:
            self.display.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.main:
            self.display.__exit__(*error)

    def write(self, record: dict[str, Any]) -> None:
        """One step's record."""
        if self.main:
            self.metrics.write(record)
            self.display.show(record)
            with self.tracking():
                self.accelerator.log(record, record["step"])

    def flush(self) -> None:
        """On disc before the checkpoint that counts on it."""
        if self.main:
            self.metrics.flush()

    def picture(self, path: Path, step: int) -> None:
        """A PNG, for the tracker."""
        pixels = np.asarray(Image.open(path).convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            with self.tracking():
                tracker.log_images({"samples": pixels}, step, **layout)

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """Turns whatever a tracker's package raises into a UserError."""
        try:
            yield
        except Exception as error:
            raise UserError(
                f"report_to {self.tracker} failed ({reason(error)}); mend that, or leave it out, "
                f"and {GO_ON}."
            ) from error
