"""Static audit of the CUDA C++ kernels: what nvcc makes of csrc/*.cu, without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = ("80", "90a")
_TYPES = {"float": "fp32", "tbcm::bfloat16": "bf16", "tbcm::float16": "fp16"}


def missing() -> str | None:
    """Why the sources cannot be compiled here; None where they can."""
    if not SOURCES.is_dir():
        return "an installed package has no CUDA sources"
    return None if shutil.which("nvcc") else "nvcc is not on PATH"


def compile_sources() -> Iterator[dict[str, str | int]]:
    """A row for each kernel and architecture: registers, bytes spilled or on a stack, shared."""
    with tempfile.TemporaryDirectory() as directory:
        running = [
            subprocess.Popen(
                _command(source, Path(directory, source.stem)), stderr=subprocess.PIPE,
                text=True,
            )
            for source in sorted(SOURCES.glob("*.cu"))
        ]  # fmt: skip
        logs = [process.communicate()[1] for process in running]
    for process, log in zip(running, logs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{' '.join(process.args)} failed:\n{log}")
        names = subprocess.run(["c++filt"], input=log, capture_output=True, text=True, check=True)
        yield from _rows(names.stdout)


def _command(source: Path, made: Path) -> list[str]:
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    flags = ["-std=c++20", "-O3", "-Xptxas", "-v", "-t", str(len(targets))]
    return ["nvcc", *flags, *targets, "-fatbin", str(source), "-o", str(made)]


def _rows(log: str) -> Iterator[dict[str, str | int]]:
    """What ptxas says of each kernel, in three or four lines."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>.*)' for 'sm_(?P<architecture>\d+)a?'\n"
        r".*\n *(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads\n.* (?P<registers>\d+) registers(?P<rest>.*)"
    )
    for found in pattern.finditer(log):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        yield {
            "name": _brief(found["name"]),
            "architecture": int(found["architecture"]),
            "registers": int(found["registers"]),
            "spilled": sum(int(found[k]) for k in ("stack", "stores", "loads")),
            "shared": int(shared[1]) if shared else 0,
            "hgmma": 0,
        }


def _brief(name: str) -> str:
    """Such as "cuda adaln forward bf16 V=8" of a demangled kernel."""
    op, kernel, arguments = re.search(r"tbcm::(\w+)::.*?(\w+)_kernel<(.*?)>\(", name).groups()
    dtype, *rest = (re.sub(r"\(\w+\)", "", a.strip()) for a in arguments.split(","))
    access = f" V={rest[0]}" if rest else ""
    tangent = " tangent" if rest[1:] and rest[1] in ("true", "1") else ""
    return f"cuda {op} {kernel}{tangent} {_TYPES[dtype]}{access}"
