"""What the Triton launchers of row-wise ops share."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from tbcm_kernels._library import unit_stride

MAX_WIDTH = 8192


@dataclass(frozen=True)
class AuditCase:
    """One kernel to compile: the type of each argument, None for one that is absent."""

    name: str
    kernel: Any
    arguments: dict[str, str | tuple[str, ...] | None]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    architectures: tuple[int, ...] = ()
    """The GPU generations that it ships for; none named: all."""
    hgmma: bool = False
    """Whether its products are large enough for Hopper's asynchronous tensor cores."""
    may_spill: int = 0
    """What costs less on a GPU than each config that spills nothing, in the bytes of a `Report`."""
    registers: int | None = None
    """What a thread may have; None leaves it to the compiler."""


def row_config(width: int) -> tuple[int, int]:
    """Block of columns and number of warps for one row per program, 8 columns a thread.

    Raises:
        ValueError: a row too wide for the registers of one program.
    """
    if width > MAX_WIDTH:
        raise ValueError(
            f"the Triton row kernels take widths up to {MAX_WIDTH}, got {width}; "
            f'pass impl="reference".'
        )
    block = triton.next_power_of_2(width)
    return block, min(max(block // 256, 1), 16)


def unit_rows(x: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The operand as [B, N, C] with unit stride along C; broadcasting is a stride of 0."""
    if x is None:
        return None
    return unit_stride(x).expand(shape)


def strides(operands: Sequence[Tensor | None]) -> list[int]:
    """Strides of batch and token of each operand, 0 for one that is not there."""
    pairs = [(0, 0) if x is None else (x.stride(0), x.stride(1)) for x in operands]
    return [stride for pair in pairs for stride in pair]


def device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """The tensor's CUDA device as the current one; nothing to do under the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
