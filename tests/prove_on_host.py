"""Prove CUDA kernels that were compiled for the host: prove_on_host.py LIBRARY DTYPE...

In a process of its own, where the library takes the place of the compiled extension.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

sys.modules["tbcm_kernels._C"] = extension = ModuleType("tbcm_kernels._C")
extension.cuda = "adaln:0 conv_glu:0"

from tbcm_kernels import _dispatch  # noqa: E402
from tbcm_kernels.testing import cases  # noqa: E402
from tbcm_kernels.testing.prove import prove  # noqa: E402

torch.ops.load_library(sys.argv[1])
_dispatch._DEVICES["cuda"] = "cpu"
# What the shipped cases are too small for: several tiles and strips, the widest row, the narrowest.
cases.OPS["conv_glu"][0].extend([(1, 34, 36, 24), (1, 3, 65, 5), (2, 33, 9, 16), (1, 1, 32, 160)])
cases.OPS["adaln"][0].extend([(1, 3, 4096), (1, 17, 1), (1, 2, 4095)])

for op in ("adaln", "conv_glu"):
    for dtype in sys.argv[2:]:
        proof = prove(op, "cuda", "cpu", getattr(torch, dtype))
        print(proof, *proof.faults, sep="\n")
