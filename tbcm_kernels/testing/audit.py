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
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
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
    hgmma: int | None
    """Instructions of Hopper's asynchronous tensor cores; None where they were not counted."""
    hmma: int | None = 0
    """Instructions of the other tensor cores: those a warp waits for, and Blackwell's UTCHMMA."""
    warps: int | None = None
    """Warps of a program, at most for a kernel in CUDA C++; None where nothing says."""
    seconds: float | None = None
    """How long it took to compile, or to find in Triton's cache; of CUDA C++ the whole file."""

    def occupancy(self) -> int | None:
        """The most warps of 64 that one multiprocessor holds, by registers and shared memory.

        Registers are given to warps in 256s, and a block's shared memory has 1 KiB of its own.
        """
        if self.warps is None:
            return None
        by_registers = 65536 // (-(-self.registers * 32 // 256) * 256) // self.warps
        by_shared = (_SHARED[self.architecture] + 1024) // (self.shared + 1024)
        return self.warps * min(64 // self.warps, 32, by_registers, by_shared)

    def failure(self, case: AuditCase) -> str | None:
        if self.spilled > case.may_spill:
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


def compile_case(case: AuditCase, architecture: int, whole: bool = True) -> Report:
    """Compile for one GPU generation and count registers, spills and shared memory.

    Not `whole`: instructions are counted only where `failure` could depend on them, for without a
    stack there is no local memory to load from. Small kernels take longer to read than to compile.
    """
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
    options = {"num_warps": case.warps, "num_stages": case.stages, "maxnreg": case.registers}
    start = time.perf_counter()
    compiled = triton.compile(source, target=target, options=options)
    seconds = time.perf_counter() - start
    usage = _cuobjdump(compiled.asm["cubin"], "--dump-resource-usage")
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    spilled = int(numbers["STACK"]) + int(numbers.get("LOCAL", 0))
    hgmma = hmma = None
    if whole or spilled or (case.hgmma and architecture == 90):
        sass = _cuobjdump(compiled.asm["cubin"], "--dump-sass")
        spilled += len(re.findall(r"\b(?:LDL|STL)\b", sass))
        hgmma, hmma = (len(re.findall(rf"\b{n}\b", sass)) for n in ("HGMMA", "(?:UTC)?HMMA"))
    return Report(
        case.name, architecture, int(numbers["REG"]), spilled, compiled.metadata.shared, hgmma,
        hmma, case.warps, seconds,
    )  # fmt: skip


def _cuobjdump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return audit_cuda.cuobjdump(file.name, what)


def reports(pattern: str = "", whole: bool = True) -> Iterator[tuple[Report, str | None]]:
    """What the compilers make of the configs whose name matches, and what is wrong with it.

    Not `whole`: without counts that say nothing about that. Raises SystemExit under Triton's
    interpreter.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise SystemExit("The interpreter compiles nothing: set TRITON_INTERPRET=0.")
    work = [
        (case.name, architecture, whole)
        for case in cases()
        if re.search(pattern, case.name)
        for architecture in case.architectures or ARCHITECTURES
    ]
    for report in _cuda_reports(pattern):
        yield report, "spills" if report.spilled else None
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_audit, work)


def main(pattern: str = "") -> int:
    """Audit the configs whose name matches a pattern; 1 where one fails or none matches."""
    failed, none = False, True
    for report, failure in reports(pattern, whole=False):
        none = False
        print(json.dumps(asdict(report)), flush=True)
        if failure:
            failed = True
            print(f"{report.name} on sm_{report.architecture}: {failure}", file=sys.stderr)
    return int(failed or none)


def _cuda_reports(pattern: str) -> list[Report]:
    """Reports of the CUDA C++ kernels whose name matches; compiled only where one can."""
    if not re.search(pattern, "cuda adaln") and not re.match("cuda", pattern):
        return []
    if reason := audit_cuda.missing():
        print(f"no CUDA C++ kernels: {reason}", file=sys.stderr)
        return []
    reports = (Report(**row) for row in audit_cuda.compile_sources())
    return [report for report in reports if re.search(pattern, report.name)]


def _audit(work: tuple[str, int, bool]) -> tuple[Report, str | None]:
    """A kernel does not travel between processes; its name does."""
    name, architecture, whole = work
    case = next(
        c for c in cases() if c.name == name and architecture in (c.architectures or ARCHITECTURES)
    )
    report = compile_case(case, architecture, whole)
    return report, report.failure(case)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:2]))
