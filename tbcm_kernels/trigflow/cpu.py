"""The C++ CPU kernels of trigflow (csrc/trigflow_cpu.cpp): allocates the outputs and calls them."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels import _C  # noqa: F401  (loading it registers the kernels)
from tbcm_kernels._dual import present
from tbcm_kernels._library import cast, flat_samples, floats, fresh, in_one_dtype


def flow_input(
    x: Tensor, t: Tensor, tx: Tensor | None, tt: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See reference.flow_input."""
    x_fm, t_fm = fresh(x), fresh(t, torch.float32)
    tx_fm = fresh(x) if present((tx, tt)) else None
    tt_fm = None if tt is None else fresh(t_fm)
    torch.ops.tbcm_cpu.trigflow_input(
        flat_samples(x), floats(t), flat_samples(tx), floats(tt), flat_samples(x_fm), t_fm,
        flat_samples(tx_fm), tt_fm,
    )  # fmt: skip
    return x_fm, t_fm.to(t.dtype), tx_fm, cast(tt_fm, t.dtype)


def flow_output(
    v: Tensor, x: Tensor, t: Tensor, tv: Tensor | None, tx: Tensor | None, tt: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """See reference.flow_output."""
    dtype = x.dtype
    v, x, tv, tx = in_one_dtype(v, x, tv, tx)
    out = fresh(x)
    tout = fresh(x) if present((tv, tx, tt)) else None
    torch.ops.tbcm_cpu.trigflow_output(
        flat_samples(v), flat_samples(x), floats(t), flat_samples(tv), flat_samples(tx),
        floats(tt), flat_samples(out), flat_samples(tout),
    )  # fmt: skip
    return out.to(dtype), cast(tout, dtype)


def trajectory_step(
    x: Tensor, out: Tensor, t: Tensor, s: Tensor, guidance: Tensor, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """See reference.trajectory_step."""
    dtype = x.dtype
    x, out = in_one_dtype(x, out)
    velocity, moved = fresh(x), fresh(x)
    torch.ops.tbcm_cpu.trigflow_step(
        flat_samples(x), flat_samples(out), floats(t), floats(s), floats(guidance),
        flat_samples(velocity), flat_samples(moved), sigma_data,
    )  # fmt: skip
    return velocity.to(dtype), moved.to(dtype)
