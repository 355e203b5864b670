"""The C++ CPU kernel of adaln (csrc/adaln_cpu.cpp): allocates the outputs and calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbcm_kernels import _C  # noqa: F401  (loading it registers the kernels)
from tbcm_kernels.adaln.buffers import gradients, outputs, rows


def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
    """See reference.forward."""
    *operands, eps = arguments
    found = outputs(*operands)
    torch.ops.tbcm_cpu.adaln_forward(*rows(*operands[:5]), *rows(*operands[5:]), *found, eps)
    return found


def backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    """See reference.backward."""
    gout, gy, *kept = arguments[:6]
    found = gradients(*arguments[:-1])
    torch.ops.tbcm_cpu.adaln_backward(*rows(gout, gy), *rows(*kept), *found, *arguments[-2:])
    return found
