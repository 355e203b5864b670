"""Prove the implementations that this machine can run, on all shipped cases."""

from __future__ import annotations

import itertools
import multiprocessing
import platform
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from tbcm_kernels import _dispatch, adaln_jvp, stop_tangent_gradient
from tbcm_kernels.linear_attention.functional import why_not_cuda
from tbcm_kernels.testing.cases import Case, cases
from tbcm_kernels.testing.check import check, run

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""In the order of their use on GPUs; Triton's exact fp32 takes longest to compile."""
GPU_KERNELS = ("triton", "cuda")


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
        """What is recorded of it; the source is that of GPU kernels."""
        gpu = self.device == "cuda"
        return {
            "op": self.op, "impl": self.impl,
            "source": _dispatch.source(self.op, self.impl) if self.impl in GPU_KERNELS else None,
            "device": torch.cuda.get_device_name() if gpu else f"cpu {platform.machine()}",
            "capability": _dispatch.capability() if gpu else None,
            "dtype": str(self.dtype).removeprefix("torch."), "cases": self.cases,
            "faults": self.faults, "torch": torch.__version__,
        }  # fmt: skip


def proofs(
    only: str | None = None, few: bool = False, device: str | None = None, jobs: int = 1
) -> Iterator[Proof]:
    """Proofs of every op that has a kernel, in each implementation, device and dtype found here.

    Args:
        only: the one implementation to prove.
        few: on few shapes.
        device: the one device to prove on, "cpu" or "cuda".
        jobs: processes that share the cases of each proof.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    work = [
        (op, impl, place, dtype)
        for dtype in DTYPES
        for op, kernels in _dispatch.OPS.items()
        for impl in ((*kernels, "reference") if kernels else ())
        for place in devices
        if only in (None, impl) and device in (None, place) and _runs(op, impl, place, dtype)
    ]
    if jobs == 1:
        yield from (prove(*what, few) for what in work)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin) as pool:
        shares = ((*what, few, (i, jobs)) for what in work for i in range(jobs))
        parts = pool.map(prove, *zip(*shares, strict=True))
        for _ in work:
            first, *others = itertools.islice(parts, jobs)
            count = first.cases + sum(part.cases for part in others)
            faults = sum((part.faults for part in others), first.faults)
            yield replace(first, cases=count, faults=faults)


def _begin() -> None:
    """In a process that shares the machine with others like it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def prove(
    op: str, impl: str, device: str, dtype: torch.dtype, few: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Proof:  # fmt: skip
    """Run all shipped cases: the error policy of `compare.py`, and the same bits twice.

    Args:
        op: name of an op that has a kernel, such as "adaln".
        impl: "cpu", "cuda", "triton" or "reference".
        device: "cpu" or "cuda".
        dtype: of the op's main inputs.
        few: on few shapes.
        share: i and n take the i-th of every n cases.

    Returns:
        The proof; its `faults` is empty where all cases pass.
    """
    fitting = (case for case in cases(op, dtype, device, few) if _fits(case, impl))
    tried = list(itertools.islice(fitting, share[0], None, share[1]))
    found = [fault for case in tried for fault in _faults(case, impl)]
    if op == "adaln" and dtype == torch.float32 and share[0] == 0:
        found += mixed_faults(impl, device)
    return Proof(op, impl, device, dtype, len(tried), found)


def mixed_faults(impl: str, device: str) -> list[str]:
    """adaln with h and y in 16 bits beside x in fp32: what rounding leaves of the same in fp32."""
    faults = []
    for shape in ((2, 17, 1152), (1, 3, 1284), (2, 5, 31)):
        generator = torch.Generator().manual_seed(0)
        small = (shape[0], 1, shape[2])
        drawn = [
            torch.randn(s, generator=generator).bfloat16().to(device)
            for s in (shape, shape, small, small, small) * 2 + (shape, shape)
        ]
        exact = _mixed(drawn, torch.float32, impl)
        for dtype in (torch.bfloat16, torch.float16):
            for name, got, want in zip(_MIXED, _mixed(drawn, dtype, impl), exact, strict=True):
                close = 4 * torch.finfo(got.dtype).eps
                if not torch.allclose(got.float(), want.to(got.dtype).float(), close, close):
                    faults.append(f"adaln[{dtype} beside fp32, {shape}] {impl}: {name}")
    return faults


_MIXED = (
    "x'", "y", "tx'", "ty", *(f"gradient of {n}" for n in ("x", "h", "gate", "scale", "shift")),
)  # fmt: skip


def _mixed(drawn: list[torch.Tensor], dtype: torch.dtype, impl: str) -> list[torch.Tensor]:
    x, h, *small, tx, th, tgate, tscale, tshift, gout, gy = drawn
    leaves = [x.float(), h.to(dtype), *(s.float() for s in small)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    tangents = [tx.float(), th.to(dtype), *(t.float() for t in (tgate, tscale, tshift))]
    with stop_tangent_gradient():
        outputs = adaln_jvp(*leaves, *tangents, dtype=dtype, impl=impl)
    cotangents = [gout.float(), gy.to(dtype)]
    return [*outputs, *torch.autograd.grad(outputs[:2], leaves, cotangents)]


def _fits(case: Case, impl: str) -> bool:
    """Whether an implementation takes the shapes and options of a case."""
    if (case.op, impl) != ("linear_attention", "cuda"):
        return True
    q, _, v, *_ = case.primals
    return why_not_cuda(q, v, case.options["feature_map"]) is None


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
