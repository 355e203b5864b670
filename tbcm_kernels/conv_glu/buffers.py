"""What the compiled kernels of conv_glu read and fill."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels._library import floats, fresh


def parameters(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The taps [2K, 1, 3, 3] as fp32 rows [9, 2K], and the bias in fp32."""
    taps = weight.flatten(1).to(torch.float32).t().contiguous()
    return taps, floats(bias)


def outputs(a: Tensor, ta: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """y, and its tangent where a moves."""
    y = a.new_empty((*a.shape[:2], a.shape[2] // 2))
    return y, None if ta is None else fresh(y)
