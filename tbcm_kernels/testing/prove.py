"""Prove the implementations that this machine can run, on all shipped cases."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tbcm_kernels import _dispatch
from tbcm_kernels.testing.cases import Case, cases
from tbcm_kernels.testing.check import check, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Proof:
    """What the shipped cases found in one implementation of one op, on one device, in one dtype."""

    op: str
    impl: str
    device: str
    dtype: torch.dtype
    cases: int
    faults: list[str]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        result = f"{len(self.faults)} faults" if self.faults else "passed"
        return (
            f"{self.op:<16} {self.impl:<10} {self.device:<5} {dtype:<9} {self.cases:>3} cases  "
            f"{result}"
        )

    def row(self) -> dict[str, Any]:
        """What is recorded of it; the source is that of a CUDA kernel."""
        gpu = self.device == "cuda"
        return {
            "op": self.op, "impl": self.impl,
            "source": _dispatch.source(self.op) if self.impl == "cuda" else None,
            "device": torch.cuda.get_device_name() if gpu else f"cpu {platform.machine()}",
            "dtype": str(self.dtype).removeprefix("torch."), "cases": self.cases,
            "faults": self.faults, "torch": torch.__version__,
        }  # fmt: skip


def proofs(only: str | None = None, few: bool = False) -> Iterator[Proof]:
    """Proofs of every op that has a kernel, in each implementation, device and dtype found here.

    Args:
        only: the one implementation to prove.
        few: on few shapes.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for op, kernels in _dispatch.OPS.items():
        for impl in (*kernels, "reference") if kernels else ():
            if only not in (None, impl):
                continue
            for device in devices:
                for dtype in DTYPES:
                    if _runs(op, impl, device, dtype):
                        yield prove(op, impl, device, dtype, few)


def prove(op: str, impl: str, device: str, dtype: torch.dtype, few: bool = False) -> Proof:
    """Run all shipped cases: the error policy of `compare.py`, and the same bits twice.

    Args:
        op: name of an op that has a kernel, such as "adaln".
        impl: "cpu", "cuda", "triton" or "reference".
        device: "cpu" or "cuda".
        dtype: of the op's main inputs.
        few: on few shapes.

    Returns:
        The proof; its `faults` is empty where all cases pass.
    """
    tried = list(cases(op, dtype, device, few))
    found = [fault for case in tried for fault in _faults(case, impl)]
    return Proof(op, impl, device, dtype, len(tried), found)


def _runs(op: str, impl: str, device: str, dtype: torch.dtype) -> bool:
    return impl == "reference" or _dispatch.refusal(op, impl, device, dtype) is None


def _faults(case: Case, impl: str) -> list[str]:
    try:
        return check(case, impl) + _unsteady(case, impl)
    except Exception as error:  # a kernel that does not compile or launch is a fault like others
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return [f"{case.op}[{case.name}] {impl}: {reason}"]


def _unsteady(case: Case, impl: str) -> list[str]:
    """The faults of an implementation whose second run differs from its first."""
    pairs = zip(run(case, impl), run(case, impl), strict=True)
    steady = all(a is b or torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in pairs)
    return [] if steady else [f"{case.op}[{case.name}] {impl}: two runs differ"]
