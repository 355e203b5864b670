"""Prove CUDA kernels that were compiled for the host: prove_on_host.py LIBRARY all|few DTYPE...

In a process of its own, where the library takes the place of the compiled extension.
"""

from __future__ import annotations

import itertools
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType

import torch

sys.modules["tbcm_kernels._C"] = extension = ModuleType("tbcm_kernels._C")
extension.cuda = "adaln:0 conv_glu:0 linear_attention:0 rms_norm:0"

from tbcm_kernels import _cuda, _dispatch  # noqa: E402
from tbcm_kernels.testing.cases import cases  # noqa: E402
from tbcm_kernels.testing.check import run  # noqa: E402
from tbcm_kernels.testing.prove import prove  # noqa: E402

torch.ops.load_library(sys.argv[1])
_dispatch._DEVICES["cuda"] = "cpu"
extension.sources = _dispatch._sources()
_cuda.stream_of = lambda x: nullcontext(0)  # before the adapters are imported

SPREADING = [
    ("rms_norm", "x weight", "weight"), ("adaln", "x scale shift", "shift"),
    ("adaln", "x scale shift", "scale"), ("adaln", "x h gate", "x"), ("conv_glu", "a bias", "a"),
    ("linear_attention", "q k v", "v"), ("linear_attention", "q k v", "q"),
]  # fmt: skip
"""Arguments of ops, and those that move, where infinity could meet a zero in place of nothing."""
SMALL = {"conv_glu": "shape (1, 2, 7, 17)", "linear_attention": "shape (2, 3, 21, 35, 32, 32)"}


def spread(op: str, present: str, moving: str, dtype: torch.dtype) -> list[str]:
    """Where infinities and NaNs in an argument reach results that the reference keeps finite."""
    faults, impl = [], "cuda"
    case = next(c for c in cases(op, dtype) if c.name == SMALL.get(op, "shape (2, 5, 48)"))
    there = [*present.split(), *(["weight"] if op == "conv_glu" else [])]
    pairs = [
        [v if a in names else None for a, v in zip(case.arguments, values, strict=True)]
        for names, values in ((there, case.primals), ([moving], case.tangents))
    ]
    for name, value in itertools.product(present.split(), (math.inf, math.nan)):
        primals = [None if p is None else p.clone() for p in pairs[0]]
        tensor = primals[case.arguments.index(name)]
        tensor[torch.unravel_index(torch.tensor(3), tensor.shape)] = value
        spoilt = replace(case, primals=primals, tangents=pairs[1])
        for k, (got, want) in enumerate(
            zip(run(spoilt, impl), run(spoilt, "reference"), strict=True)
        ):
            if want is not None and bool((want.isfinite() & ~got.isfinite()).any()):
                faults.append(f"{op}[{value} in {name}, {moving} moves] {impl}: result {k}")
    return faults


def takes(op: str, dtype: torch.dtype) -> bool:
    """Whether an op has a CUDA kernel of this dtype."""
    return _dispatch.refusal(op, "cuda", "cpu", dtype) is None


few = sys.argv[2] == "few"
for dtype in (getattr(torch, name) for name in sys.argv[3:]):
    for op in _dispatch.OPS:
        if takes(op, dtype):
            proof = prove(op, "cuda", "cpu", dtype, few)
            print(proof, *proof.faults, sep="\n")
    for what in SPREADING:
        if not few and takes(what[0], dtype):
            for fault in spread(*what, dtype):
                print(fault)
