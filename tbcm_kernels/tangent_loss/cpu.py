"""The C++ CPU kernels of tangent_loss (csrc/tangent_loss_cpu.cpp): allocates and calls them."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels import _C  # noqa: F401  (loading it registers the kernels)
from tbcm_kernels._library import flat_samples, floats, fresh, in_one_dtype


def forward(
    out: Tensor, jvp: Tensor, velocity: Tensor, x: Tensor, t: Tensor, keep: Tensor | None,
    weight: Tensor | None, log_variance: Tensor | None, r: float, c: float, sigma_data: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See reference.forward."""
    loss = out.new_empty((), dtype=torch.float32)
    norm, slope, glv = (out.new_empty(len(t), dtype=torch.float32) for _ in range(3))
    torch.ops.tbcm_cpu.tangent_loss_forward(
        *_flat(out, jvp, velocity, x), *map(floats, (t, keep, weight, log_variance)),
        loss, norm, slope, glv, r, c, sigma_data,
    )  # fmt: skip
    return loss, norm, slope, glv


def backward(
    gloss: Tensor, slope: Tensor, out: Tensor, jvp: Tensor, velocity: Tensor, x: Tensor, t: Tensor,
    r: float, sigma_data: float,
) -> Tensor:  # fmt: skip
    """See reference.backward."""
    rows = _flat(out, jvp, velocity, x)
    gout = fresh(rows[0])
    torch.ops.tbcm_cpu.tangent_loss_backward(
        floats(gloss), slope, *rows, floats(t), gout, r, sigma_data
    )
    return gout.to(out.dtype).reshape(out.shape)


def _flat(*tensors: Tensor) -> list[Tensor]:
    return [flat_samples(x) for x in in_one_dtype(*tensors)]
