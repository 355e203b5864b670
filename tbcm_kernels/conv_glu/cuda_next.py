"""The next CUDA kernels of conv_glu (csrc/conv_glu_next.cu), called as those of cuda.py are."""

from __future__ import annotations

from functools import partial

import torch

from tbcm_kernels.conv_glu import cuda

forward = partial(cuda.forward, ops=torch.ops.tbcm_cuda_next)
backward = partial(cuda.backward, ops=torch.ops.tbcm_cuda_next)
