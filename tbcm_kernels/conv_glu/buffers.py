"""What the compiled kernels of conv_glu read."""

from __future__ import annotations

import torch
from torch import Tensor


def parameters(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The taps [2K, 1, 3, 3] as fp32 rows [9, 2K], and the bias in fp32."""
    taps = weight.flatten(1).to(torch.float32).t().contiguous()
    return taps, None if bias is None else bias.to(torch.float32).contiguous()
