"""Inputs of the tests of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbcm_kernels.testing.cases import Case, attention_case


def draw(name: str, dtype: torch.dtype = torch.float32, **plan: Any) -> Case:
    torch.manual_seed(0)
    return attention_case(name, dtype, **{"sizes": (2, 4, 2, 9, 13, 16, 8), **plan})


def heads(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]
