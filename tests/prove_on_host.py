"""Prove CUDA kernels that were compiled for the host: prove_on_host.py LIBRARY DTYPE...

In a process of its own, where the library takes the place of the compiled extension.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from types import ModuleType

import torch

sys.modules["tbcm_kernels._C"] = extension = ModuleType("tbcm_kernels._C")
extension.cuda = "adaln:0 conv_glu:0 rms_norm:0"

from tbcm_kernels import _dispatch  # noqa: E402
from tbcm_kernels.testing.cases import cases  # noqa: E402
from tbcm_kernels.testing.check import run  # noqa: E402
from tbcm_kernels.testing.prove import prove  # noqa: E402

torch.ops.load_library(sys.argv[1])
_dispatch._DEVICES["cuda"] = "cpu"

SPREADING = [
    ("rms_norm", "x weight", "weight"), ("adaln", "x scale shift", "shift"),
    ("adaln", "x scale shift", "scale"), ("adaln", "x h gate", "x"), ("conv_glu", "a bias", "a"),
]  # fmt: skip
"""Arguments of ops, and those that move, where infinity could meet a zero in place of nothing."""


def spread(op: str, present: str, moving: str, dtype: torch.dtype) -> list[str]:
    """Where infinities and NaNs in an argument reach results that the reference keeps finite."""
    faults, impl = [], "cuda"
    small = "shape (1, 2, 7, 17)" if op == "conv_glu" else "shape (2, 5, 48)"
    case = next(c for c in cases(op, dtype) if c.name == small)
    there = [*present.split(), *(["weight"] if op == "conv_glu" else [])]
    pairs = [
        [v if a in names else None for a, v in zip(case.arguments, values, strict=True)]
        for names, values in ((there, case.primals), ([moving], case.tangents))
    ]
    for name, value in itertools.product(present.split(), (math.inf, math.nan)):
        primals = [None if p is None else p.clone() for p in pairs[0]]
        primals[case.arguments.index(name)].view(-1)[3] = value
        spoilt = replace(case, primals=primals, tangents=pairs[1])
        for k, (got, want) in enumerate(
            zip(run(spoilt, impl), run(spoilt, "reference"), strict=True)
        ):
            if want is not None and bool((want.isfinite() & ~got.isfinite()).any()):
                faults.append(f"{op}[{value} in {name}, {moving} moves] {impl}: result {k}")
    return faults


for op, kernels in _dispatch.OPS.items():
    for dtype in sys.argv[2:] if "cuda" in kernels else ():
        proof = prove(op, "cuda", "cpu", getattr(torch, dtype))
        print(proof, *proof.faults, sep="\n")

for dtype in sys.argv[2:]:
    for what in SPREADING:
        for fault in spread(*what, getattr(torch, dtype)):
            print(fault)
