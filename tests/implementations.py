"""The implementations, devices and dtypes that the error policy is tested on."""

from __future__ import annotations

import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Without a GPU, Triton's interpreter, which conftest.py makes round to bf16; fp16 needs a GPU.
TRITON_DTYPES = [torch.float32, torch.bfloat16, *([torch.float16] if GPU else [])]
COMBINATIONS = [
    *(
        ("reference", "cpu", d)
        for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    ),
    *(("cpu", "cpu", d) for d in (torch.float32, torch.bfloat16)),
    *(("triton", DEVICE, d) for d in TRITON_DTYPES),
]


def id_of(value: object) -> str:
    """Of a dtype, a function or a word, for the names of tests."""
    return getattr(value, "__name__", str(value)).removeprefix("torch.")
