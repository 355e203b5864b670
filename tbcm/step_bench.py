"""`tbcm bench step`: one digits step, fused against plain, in two processes that take turns.

Both processes stay alive and only one computes at a time, in blocks of a few steps, so that drift
of the machine falls on both alike and each has a peak memory of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import yaml

from tbcm.config import PRESETS, TrainConfig
from tbcm.errors import UserError
from tbcm.models import load_teacher
from tbcm.progress import peak_memory_mb
from tbcm.sampling import write_whole
from tbcm.train import Distiller, load_prompts

MODES = ("eager", "fused")
PHASES = {"rollout": "harvest", "dual": "forward", "backward": "backward", "optimizer": "update"}
BLOCK, WARM_UP = 4, 3
TOLERANCE = 1e-3
Timings = dict[str, float]


def bench_step(json_path: str | Path, steps: int = 40) -> dict[str, Any]:
    """Time `steps` steps of each mode and write the figures as JSON.

    Raises UserError if the two modes disagree on loss or ‖g‖: what is wrong is not timed.
    """
    workers = {mode: start_worker(mode) for mode in MODES}
    try:
        check_agreement({mode: ask(pipe, WARM_UP) for mode, (_, pipe) in workers.items()})
        rows: dict[str, list[Timings]] = {mode: [] for mode in MODES}
        for block in range(-(-steps // BLOCK)):
            for mode in MODES if block % 2 == 0 else reversed(MODES):
                rows[mode] += ask(workers[mode][1], BLOCK)
        peaks = {mode: ask(pipe, 0) for mode, (_, pipe) in workers.items()}
    finally:
        for process, _ in workers.values():
            process.kill()
            process.join()
    result = report(rows, peaks)
    write_whole(json_path, (json.dumps(result, indent=2) + "\n").encode())
    return result


def start_worker(mode: str) -> tuple[Any, Connection]:
    """A process of its own that runs steps on demand, and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(mode == "fused", theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def ask(pipe: Connection, steps: int) -> Any:
    """The timings of that many steps; the peak memory in MB for 0."""
    try:
        pipe.send(steps)
        return pipe.recv()
    except (EOFError, BrokenPipeError) as error:
        raise UserError("A benchmark process died; its message is above.") from error


def work(fused: bool, pipe: Connection) -> None:
    """The process: a distiller, stepped when asked."""
    preset = yaml.safe_load((PRESETS / "digits.yaml").read_text())
    # r = 1 from the start, so that the check of the losses sees the whole tangent.
    settings = {**preset, "tangent_warmup_steps": 0, "fused": fused, "output_dir": "unused"}
    config = TrainConfig(**settings)
    distiller = Distiller(config, load_teacher("digits"), load_prompts(config))
    seconds: Timings = {}
    for phase, method in PHASES.items():
        setattr(distiller, method, timed(getattr(distiller, method), seconds, phase))
    step = timed(distiller.train_step, seconds, "step")
    while steps := pipe.recv():
        pipe.send([{**step(), **seconds} for _ in range(steps)])
    pipe.send(peak_memory_mb())


def timed(call: Callable, seconds: Timings, phase: str) -> Callable:
    """The same call, leaving its duration in seconds[phase]."""

    def run(*args: Any) -> Any:
        synchronize()
        start = time.perf_counter()
        result = call(*args)
        synchronize()
        seconds[phase] = time.perf_counter() - start
        return result

    return run


def synchronize() -> None:
    """Wait for the GPU, if one is used."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check_agreement(first: dict[str, list[Timings]]) -> None:
    """Same seed, same losses. Raises UserError where the modes differ by more than TOLERANCE."""
    for eager, fused in zip(*(first[mode] for mode in MODES), strict=True):
        for key in ("loss", "g_norm", "grad_norm"):
            if not abs(eager[key] - fused[key]) <= TOLERANCE * abs(eager[key]):
                raise UserError(
                    f"{key} of step {eager['step']} is {eager[key]} eager and {fused[key]} fused: "
                    "the fused step is wrong here and is not timed."
                )


def report(rows: dict[str, list[Timings]], peaks: dict[str, float]) -> dict[str, Any]:
    """Medians with p20 and p80 of both modes, by phase too, and their ratio."""
    result: dict[str, Any] = {}
    for mode in MODES:
        ms = [1000 * row["step"] for row in rows[mode]]
        low, *_, high = statistics.quantiles(ms, n=5)
        phases = {p: statistics.median(1000 * row[p] for row in rows[mode]) for p in PHASES}
        result[mode] = {
            "ms": statistics.median(ms), "p20": low, "p80": high, "peak_mb": peaks[mode],
            "phases": phases,
        }  # fmt: skip
    result["speedup"] = result["eager"]["ms"] / result["fused"]["ms"]
    gpu = torch.cuda.is_available()
    return result | {
        "steps": len(rows["eager"]), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "device": torch.cuda.get_device_name() if gpu else "cpu",
    }  # fmt: skip
