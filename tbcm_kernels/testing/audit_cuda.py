"""Static audit of the CUDA C++ kernels: what nvcc makes of csrc/*.cu, without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = ("80", "90a")
_TYPES = {"float": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def missing() -> str | None:
    """Why the sources cannot be compiled here; None where they can."""
    if not SOURCES.is_dir():
        return "an installed package has no CUDA sources"
    return None if shutil.which("nvcc") else "nvcc is not on PATH"


def cuobjdump(file: str | Path, what: str) -> str:
    """What the `cuobjdump` that comes with Triton says of a binary."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    return subprocess.run([tool, what, file], check=True, capture_output=True, text=True).stdout


def compile_sources() -> Iterator[dict[str, str | int | float]]:
    """A row for each kernel and architecture: registers, bytes spilled or on a stack, shared."""
    start, logs = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as directory:
        running = [
            subprocess.Popen(
                _command(source, Path(directory, source.stem)), stderr=subprocess.PIPE,
                text=True,
            )
            for source in sorted(SOURCES.glob("*.cu"))
        ]  # fmt: skip
        ended = [(process.communicate()[1], time.perf_counter() - start) for process in running]
        for process, (log, seconds) in zip(running, ended, strict=True):
            if process.returncode:
                raise RuntimeError(f"{' '.join(process.args)} failed:\n{log}")
            logs.append((log, _warps(process.args[-1]), seconds))
    for log, warps, seconds in logs:
        for row in _rows(log):
            name = row["name"]
            yield row | {"name": _brief(name), "warps": warps.get(name), "seconds": seconds}


def _command(source: Path, made: Path) -> list[str]:
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    flags = ["-std=c++20", "-O3", "-Xptxas", "-v", "-t", str(len(targets))]
    return ["nvcc", *flags, *targets, "-fatbin", str(source), "-o", str(made)]


def _demangled(text: str) -> str:
    return subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout


def _warps(fatbin: str) -> dict[str, int]:
    """Warps of a block of each kernel at most, where it has launch bounds."""
    section = (
        r"^\.nv\.info\.(_Z\w+)\n(?:(?!\.nv\.info).*\n)*?.*EIATTR_MAX_THREADS\n.*\n[^x]*0x(\w+)"
    )
    found = re.findall(section, cuobjdump(fatbin, "--dump-elf"), re.M)
    names = _demangled("\n".join(name for name, _ in found)).splitlines()
    return {n: int(threads, 16) // 32 for n, (_, threads) in zip(names, found, strict=True)}


def _rows(log: str) -> Iterator[dict[str, str | int]]:
    """What ptxas says of each kernel, in three or four lines."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>.*)' for 'sm_(?P<architecture>\d+)a?'\n"
        r".*\n *(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads\n.* (?P<registers>\d+) registers(?P<rest>.*)"
    )
    for found in pattern.finditer(_demangled(log)):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        yield {
            "name": found["name"],
            "architecture": int(found["architecture"]),
            "registers": int(found["registers"]),
            "spilled": sum(int(found[k]) for k in ("stack", "stores", "loads")),
            "shared": int(shared[1]) if shared else 0,
            "hgmma": 0,
        }


def _brief(name: str) -> str:
    """Such as "cuda adaln forward tangent bf16 8,true" of a demangled kernel."""
    op, kernel = re.search(r"tbcm::(?:(\w+)::.*?)?(\w+)_kernel<", name).groups()
    arguments = re.sub(r"tbcm::| ", "", name.split("_kernel<", 1)[1])
    dtype, *others = arguments[: arguments.index(">(")].split(",")
    tangent = " tangent" if "true" in others else ""
    words = "cuda", op, kernel + tangent, _TYPES.get(dtype, dtype), ",".join(others)
    return " ".join(word for word in words if word)
