"""`tbcm info`: versions, device, and which implementation of each op runs here and why."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import tbcm_kernels
from tbcm import __version__

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate")


def show() -> None:
    """Print both tables."""
    console = Console()
    console.print(versions_table(), implementations_table())


def versions_table() -> Table:
    """Versions and the device."""
    table = Table("what", "version")
    table.add_row("tbcm", __version__)
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        table.add_row(package, installed(package))
    gpu = torch.cuda.is_available()
    threads = f"CPU, {torch.get_num_threads()} threads"
    table.add_row("device", torch.cuda.get_device_name() if gpu else threads)
    return table


def implementations_table() -> Table:
    """One row per op of tbcm_kernels: what runs on this machine, and why."""
    table = Table("op", "in float32", "reason")
    for row in tbcm_kernels.implementations():
        table.add_row(*map(str, row))
    return table


def environment(device: str) -> dict[str, Any]:
    """What a figure depends on besides the code: the machine, versions and the commit."""
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"cpu {platform.machine()}",
        "cpu": cpu(), "driver": driver() if cuda else None, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "triton": installed("triton"), "commit": commit(),
    }  # fmt: skip


def cpu() -> str | None:
    """The processor and its second-level cache, as Linux names them."""
    found, cache = Path("/proc/cpuinfo"), Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    if not (found.exists() and cache.exists()):
        return None
    lines = (line for line in found.read_text().splitlines() if line.startswith("model name"))
    name = next(lines, ":").partition(":")[2].strip()
    return f"{name}, L2 {cache.read_text().strip()}"


def installed(package: str) -> str:
    """The version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def commit() -> str | None:
    """The commit of the checkout that this is run from, marked where it has other changes.

    New rows in bench/results are none: a benchmark writes them as it goes.
    """
    root = Path(__file__).parents[1]
    if shutil.which("git") is None or not (root / ".git").exists():
        return None

    def git(*command: str) -> str:
        run = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True)
        return run.stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!bench/results")
    return head + ("-dirty" if changed else "") if head else None


def driver() -> str | None:
    """The version of the GPU's driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0] or None
