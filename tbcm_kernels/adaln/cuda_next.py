"""The next CUDA kernels of adaln (csrc/adaln_next.cu), called as those of cuda.py are."""

from __future__ import annotations

from functools import partial

import torch

from tbcm_kernels.adaln import cuda

MIXED = True
"""They take h, and give y, in 16 bits beside an x in fp32."""
forward = partial(cuda.forward, ops=torch.ops.tbcm_cuda_next)
backward = partial(cuda.backward, ops=torch.ops.tbcm_cuda_next)
