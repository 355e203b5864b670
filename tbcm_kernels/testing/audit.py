"""Static audit of the Triton kernels: compile every shipped config without a GPU, read its cubin.

`python -m tbcm_kernels.testing.audit [PATTERN]` prints a JSON line for each config whose name
matches and each architecture, and exits 1 where one spills or none matches.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tbcm_kernels._triton import AuditCase

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case."""

    name: str
    architecture: int
    registers: int
    spilled: int
    """Bytes of stack plus local-memory loads and stores."""
    shared: int


def cases() -> Iterator[AuditCase]:
    """Every kernel of every op at the widths of SANA and of the built-in case."""
    from tbcm_kernels.adaln import triton as adaln
    from tbcm_kernels.rms_norm import triton as rms_norm

    for module in (adaln, rms_norm):
        yield from module.audit_cases()


def compile_case(case: AuditCase, architecture: int) -> Report:
    """Compile for one GPU generation and count registers, spills and shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {k: None for k, v in case.arguments.items() if v is None} | case.constants
    signature = {k: v or "constexpr" for k, v in case.arguments.items()}
    signature |= dict.fromkeys(case.constants, "constexpr")
    source = ASTSource(case.kernel, signature, constexprs=constants)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": case.warps})
    usage = _cuobjdump(compiled.asm["cubin"], "--dump-resource-usage")
    sass = _cuobjdump(compiled.asm["cubin"], "--dump-sass")
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    spilled = int(numbers["STACK"]) + int(numbers.get("LOCAL", 0)) + local
    return Report(case.name, architecture, int(numbers["REG"]), spilled, compiled.metadata.shared)


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
    """Audit the configs whose name matches a pattern; 1 where one spills or none matches."""
    import triton

    if triton.knobs.runtime.interpret:
        raise SystemExit("The interpreter compiles nothing: set TRITON_INTERPRET=0.")
    reports = (
        compile_case(case, architecture)
        for case in cases()
        if re.search(pattern, case.name)
        for architecture in ARCHITECTURES
    )
    spilled = []
    for report in reports:
        print(json.dumps(asdict(report)), flush=True)
        spilled.append(report.spilled > 0)
    return int(any(spilled) or not spilled)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:2]))
