"""Static audit of the CUDA C++ kernels: what nvcc made of them in the extension, without a GPU."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

_TYPES = {"float": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def cuobjdump(file: str | Path, what: str) -> str:
    """What the `cuobjdump` that comes with Triton says of a binary."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    return subprocess.run([tool, what, file], check=True, capture_output=True, text=True).stdout


def built() -> Iterator[dict[str, str | int | None]]:
    """A row for each kernel and architecture: registers, bytes on a stack, static shared memory."""
    extension = importlib.import_module("tbcm_kernels._C").__file__
    warps = _warps(extension)
    usage = _demangled(cuobjdump(extension, "--dump-resource-usage"))
    binaries = re.findall(r"^arch = sm_(\d+)a?\n((?:(?!^arch).*\n)*)", usage, re.M)
    for architecture, kernels in binaries:
        for name, numbers in re.findall(r"Function (.+):\n +(REG:.+)", kernels):
            use = {k: int(n) for k, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", numbers)}
            yield {
                "name": _brief(name), "architecture": int(architecture), "registers": use["REG"],
                "spilled": use["STACK"] + use["LOCAL"], "shared": use["SHARED"],
                "warps": warps.get(name),
            }  # fmt: skip


def _demangled(text: str) -> str:
    return subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout


def _warps(extension: str) -> dict[str, int]:
    """Warps of a block of each kernel at most, where it has launch bounds."""
    section = (
        r"^\.nv\.info\.(_Z\w+)\n(?:(?!\.nv\.info).*\n)*?.*EIATTR_MAX_THREADS\n.*\n[^x]*0x(\w+)"
    )
    found = re.findall(section, cuobjdump(extension, "--dump-elf"), re.M)
    names = _demangled("\n".join(name for name, _ in found)).splitlines()
    return {n: int(threads, 16) // 32 for n, (_, threads) in zip(names, found, strict=True)}


def _brief(name: str) -> str:
    """Such as "cuda adaln forward tangent bf16 8,true" of a demangled kernel."""
    op, kernel = re.search(r"tbcm::(?:(\w+)::.*?)?(\w+)_kernel<", name).groups()
    arguments = re.sub(r"tbcm::| ", "", name.split("_kernel<", 1)[1])
    dtype, *others = arguments[: arguments.index(">(")].split(",")
    tangent = " tangent" if "true" in others else ""
    words = "cuda", op, kernel + tangent, _TYPES.get(dtype, dtype), ",".join(others)
    return " ".join(word for word in words if word)
