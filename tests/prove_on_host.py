"""Prove CUDA kernels that were compiled for the host: prove_on_host.py LIBRARY DTYPE...

In a process of its own, where the library takes the place of the compiled extension.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

sys.modules["tbcm_kernels._C"] = extension = ModuleType("tbcm_kernels._C")
extension.cuda = "adaln:0 adaln_next:0 conv_glu:0 conv_glu_next:0 rms_norm:0"

from tbcm_kernels import _dispatch  # noqa: E402
from tbcm_kernels.testing import cases  # noqa: E402
from tbcm_kernels.testing.prove import prove  # noqa: E402

torch.ops.load_library(sys.argv[1])
_dispatch._DEVICES |= dict.fromkeys(_dispatch.CUDA, "cpu")
# What the shipped cases are too small for: several tiles and strips, the widest row, the narrowest.
cases.OPS["conv_glu"][0].extend([(1, 34, 36, 24), (1, 3, 65, 5), (2, 33, 9, 16), (1, 1, 32, 160)])
cases.ROWS.extend([(1, 3, 4096), (1, 17, 1), (1, 2, 4095), (2, 17, 1152), (1, 3, 1284)])

for op, kernels in _dispatch.OPS.items():
    for impl in _dispatch.CUDA:
        for dtype in sys.argv[2:] if impl in kernels else ():
            proof = prove(op, impl, "cpu", getattr(torch, dtype))
            print(proof, *proof.faults, sep="\n")
