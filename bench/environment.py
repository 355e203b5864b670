"""What a figure depends on besides the shape: machine, versions, source."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from tbcm import info, peaks

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]


def environment(device: str, dtype: torch.dtype) -> Row:
    """What a figure depends on besides the code."""
    return {
        **info.environment(device),
        "copy_gb_s": peaks.copy_bandwidth(device) / 1e9,
        "matmul_tflop_s": peaks.matmul_peak(device, dtype) / 1e12,
    }


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, *sizes: str) -> None:
    """Fill in the device, before anything is measured.

    Ends with a sentence where there is no such device, or one of the sizes is none.
    """
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here")
    for name in sizes:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")


def check_rows(path: Path | None) -> None:
    """Make the file of --json, if one was named; ends with a sentence where that cannot be."""
    if path:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise SystemExit(f"--json {path}: {error.strerror}; name another file") from error


def append(row: Row, path: Path | None) -> None:
    """A JSON line more in the file of --json, if one was named."""
    if path:
        with path.open("a") as file:
            print(json.dumps(row), file=file)


def machine(device: str) -> str:
    """The folder of this machine's rows in bench/results."""
    if device == "cuda":
        return torch.cuda.get_device_name().replace(" ", "-")
    return f"cpu-{torch.get_num_threads()}-cores"
