"""Static audit of the GPU kernels: compile every shipped config without a GPU, read its cubin.

`python -m tbcm_kernels.testing.audit [PATTERN] [--known FILE]` prints a JSON line for each config
whose name matches and each architecture that it ships for, and exits 1 where one spills more than
it may, asks for more shared memory than there is or misses the tensor cores that it is made for, or
where none matches. FILE has lines of an earlier audit: a config that is there, of the same source,
options and Triton, is not compiled again. Names of the CUDA C++ kernels, which are read from the
installed extension, start with "cuda".
"""

from __future__ import annotations

import argparse
import hashlib
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbcm_kernels._dispatch import missing
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
    hgmma: int | None = None
    """Instructions of Hopper's asynchronous tensor cores; None where they were not counted."""
    hmma: int | None = None
    """Instructions of the other tensor cores: those a warp waits for, and Blackwell's UTCHMMA."""
    warps: int | None = None
    """Warps of a program, at most for a kernel in CUDA C++; None where nothing says."""
    seconds: float | None = None
    """How long it took to compile, or to find in Triton's cache; None of CUDA C++."""
    key: str | None = None
    """Changes with what was compiled and with Triton; None of CUDA C++."""

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
    from tbcm_kernels.attention import audit as attention
    from tbcm_kernels.linear_attention import triton as linear_attention
    from tbcm_kernels.rms_norm import triton as rms_norm
    from tbcm_kernels.tangent_loss import triton as tangent_loss
    from tbcm_kernels.trigflow import triton as trigflow

    for module in (adaln, rms_norm, attention, linear_attention, tangent_loss, trigflow):
        yield from module.audit_cases()


def _given(case: AuditCase, architecture: int) -> dict[str, Any]:
    """What Triton's compiler is given."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {k: None for k, v in case.arguments.items() if v is None} | case.constants
    signature = {k: v or "constexpr" for k, v in case.arguments.items()}
    signature |= dict.fromkeys(case.constants, "constexpr")
    # The pointer of an operand with strides is aligned, as PyTorch allocates it.
    aligned = [["tt.divisibility", 16]]
    attributes = {(i, 0): aligned for i, v in enumerate(signature.values()) if type(v) is not str}
    return {
        "src": ASTSource(case.kernel, signature, constexprs=constants, attrs=attributes),
        "target": GPUTarget("cuda", architecture, 32),
        "options": {
            "num_warps": case.warps, "num_stages": case.stages, "maxnreg": case.registers,
        },
    }  # fmt: skip


def _key(case: AuditCase, architecture: int) -> str:
    """Twelve digits of a hash of a config, the kernel's source and all it calls, and of Triton."""
    import triton

    given = _given(case, architecture)
    told = triton.__version__, given["src"].hash(), architecture, given["options"]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


def compile_case(case: AuditCase, architecture: int, whole: bool = True) -> Report:
    """Compile for one GPU generation and count registers, spills and shared memory.

    Not `whole`: instructions are counted only where `failure` could depend on them, for without a
    stack there is no local memory to load from. Small kernels take longer to read than to compile.
    """
    import triton

    given = _given(case, architecture)
    start = time.perf_counter()
    compiled = triton.compile(**given)
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
        hmma, case.warps, round(seconds, 1), _key(case, architecture),
    )  # fmt: skip


def _cuobjdump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return audit_cuda.cuobjdump(file.name, what)


def reports(
    pattern: str = "", whole: bool = True, known: dict[str | None, Report] | None = None
) -> Iterator[tuple[Report, str | None]]:
    """What the compilers make of the configs whose name matches, and what is wrong with it.

    Not `whole`: without counts that say nothing about that. `known` are reports by their keys, of
    configs that need no compiling. Raises SystemExit under Triton's interpreter.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise SystemExit("The interpreter compiles nothing: set TRITON_INTERPRET=0.")
    work = []
    for report in _cuda_reports(pattern):
        yield report, "spills" if report.spilled else None
    for case in cases():
        for architecture in case.architectures or ARCHITECTURES:
            if not re.search(pattern, case.name):
                continue
            if known and (report := known.get(_key(case, architecture))):
                yield report, report.failure(case)
            else:
                work.append((case.name, architecture, whole))
    if known is not None:
        print(f"{len(work)} configs are not in the earlier audit", file=sys.stderr)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_audit, work)


def _earlier(path: str) -> dict[str | None, Report]:
    """Reports of an earlier audit by their keys."""
    try:
        found = [Report(**json.loads(line)) for line in Path(path).read_text().splitlines()]
    except (OSError, TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path} has no lines of an audit ({error}).") from error
    return {report.key: report for report in found}


def main(argv: list[str] | None = None) -> int:
    """Audit the configs whose name matches a pattern; 1 where one fails or none matches."""
    parser = argparse.ArgumentParser("python -m tbcm_kernels.testing.audit", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="names to match, all by default")
    parser.add_argument("--known", type=_earlier, metavar="FILE", help="lines of an earlier audit")
    args = parser.parse_args(argv)
    failed, none = False, True
    for report, failure in reports(args.pattern, whole=False, known=args.known):
        none = False
        print(json.dumps(asdict(report)), flush=True)
        if failure:
            failed = True
            print(f"{report.name} on sm_{report.architecture}: {failure}", file=sys.stderr)
    return int(failed or none)


def _cuda_reports(pattern: str) -> list[Report]:
    """Reports of the CUDA C++ kernels whose name matches, where the extension has them."""
    if reason := missing("cuda"):
        print(f"no CUDA C++ kernels: {reason}", file=sys.stderr)
        return []
    reports = (Report(**row) for row in audit_cuda.built())
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
    raise SystemExit(main())
