"""What the adapters of the CUDA kernels share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tbcm_kernels import _C  # noqa: F401  (loading it registers the kernels)


def scratch_for(results: Sequence[Tensor | None], parts: int) -> Tensor | None:
    """Room for so many parts of each result that is there, which the kernels then add."""
    there = [r for r in results if r is not None]
    return there[0].new_empty(parts * sum(r.numel() for r in there)) if there else None


@contextlib.contextmanager
def stream_of(x: Tensor) -> Iterator[int]:
    """The current stream of the tensor's device, which is the current device meanwhile."""
    with torch.cuda.device(x.device):
        yield torch.cuda.current_stream().cuda_stream
