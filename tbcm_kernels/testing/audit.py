"""Static audit of the GPU kernels: compile every shipped config without a GPU, read its cubin.

`python -m tbcm_kernels.testing.audit [PATTERN]` prints a JSON line for each config whose name
matches and each architecture that it ships for, and exits 1 where one spills, asks for more shared
memory than there is or misses the tensor cores that it is made for, or where none matches. Names
of the CUDA C++ kernels, which need nvcc and a checkout, start with "cuda".
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tbcm_kernels.testing import audit_cuda

if TYPE_CHECKING:
    from tbcm_kernels._triton import AuditCase

ARCHITECTURES = (80, 90, 100)
_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block can have."""


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case."""

    name: str
    architecture: int
    registers: int
    spilled: int
    """Bytes of stack plus local-memory loads and stores."""
    shared: int
    hgmma: int
    """Instructions of Hopper's asynchronous tensor cores."""

    def failure(self, case: AuditCase) -> str | None:
        if self.spilled:
            return "spills"
        if self.shared > _SHARED[self.architecture]:
            return "needs more shared memory than there is"
        if case.hgmma and self.architecture == 90 and not self.hgmma:
            return "does not use wgmma"
        return None


def cases() -> Iterator[AuditCase]:
    """Every kernel of every op at the widths of SANA and of the built-in case."""
    from tbcm_kernels.adaln import triton as adaln
    from tbcm_kernels.attention import triton as attention
    from tbcm_kernels.linear_attention import triton as linear_attention
    from tbcm_kernels.rms_norm import triton as rms_norm
    from tbcm_kernels.tangent_loss import triton as tangent_loss
    from tbcm_kernels.trigflow import triton as trigflow

    for module in (adaln, rms_norm, attention, linear_attention, tangent_loss, trigflow):
        yield from module.audit_cases()


def compile_case(case: AuditCase, architecture: int) -> Report:
    """Compile for one GPU generation and count registers, spills and shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {k: None for k, v in case.arguments.items() if v is None} | case.constants
    signature = {k: v or "constexpr" for k, v in case.arguments.items()}
    signature |= dict.fromkeys(case.constants, "constexpr")
    # The pointer of an operand with strides is aligned, as PyTorch allocates it.
    aligned = [["tt.divisibility", 16]]
    attributes = {(i, 0): aligned for i, v in enumerate(signature.values()) if type(v) is not str}
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    compiled = triton.compile(source, target=target, options=options)
    usage = _cuobjdump(compiled.asm["cubin"], "--dump-resource-usage")
    sass = _cuobjdump(compiled.asm["cubin"], "--dump-sass")
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    spilled = int(numbers["STACK"]) + int(numbers.get("LOCAL", 0)) + local
    hgmma = len(re.findall(r"\bHGMMA\b", sass))
    shared = compiled.metadata.shared
    return Report(case.name, architecture, int(numbers["REG"]), spilled, shared, hgmma)


def _cuobjdump(cubin: bytes, what: str) -> str:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, what, file.name], check=True, capture_output=True, text=True
        ).stdout


def main(pattern: str = "") -> int:
    """Audit the configs whose name matches a pattern; 1 where one fails or none matches."""
    import triton

    if triton.knobs.runtime.interpret:
        raise SystemExit("The interpreter compiles nothing: set TRITON_INTERPRET=0.")
    work = [
        (case.name, architecture)
        for case in cases()
        if re.search(pattern, case.name)
        for architecture in case.architectures or ARCHITECTURES
    ]
    reports = _cuda_reports(pattern)
    failed = not work and not reports
    for report in reports:
        print(json.dumps(asdict(report)), flush=True)
        failed |= report.spilled > 0
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for report, failure in pool.map(_audit, work):
            print(json.dumps(asdict(report)), flush=True)
            if failure:
                failed = True
                print(f"{report.name} on sm_{report.architecture}: {failure}", file=sys.stderr)
    return int(failed)


def _cuda_reports(pattern: str) -> list[Report]:
    """Reports of the CUDA C++ kernels whose name matches; compiled only where one can."""
    if not re.search(pattern, "cuda") and "cuda" not in pattern:
        return []
    if reason := audit_cuda.missing():
        print(f"no CUDA C++ kernels: {reason}", file=sys.stderr)
        return []
    reports = (Report(**row) for row in audit_cuda.compile_sources())
    return [report for report in reports if re.search(pattern, report.name)]


def _audit(work: tuple[str, int]) -> tuple[Report, str | None]:
    """A kernel does not travel between processes; its name does."""
    name, architecture = work
    case = next(
        c for c in cases() if c.name == name and architecture in (c.architectures or ARCHITECTURES)
    )
    report = compile_case(case, architecture)
    return report, report.failure(case)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:2]))
