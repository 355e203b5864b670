"""Other libraries that compute attention with its tangent, where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tbcm_kernels.testing.cases import Case

NAME = "jvp_flash_attention"
Functions = tuple[Callable[..., Any], Callable[..., Any] | None]


def absent(case: Case, device: str) -> str | None:
    """Why the peer cannot take part in a case, in one clause; None where it can.

    Its limits are those of release 0.14, which asserts some of them and miscomputes beyond others.
    """
    if find_spec(NAME) is None:
        return "it is not installed (pip install --no-build-isolation '.[peers]', in the checkout)"
    if device != "cuda":
        return "it runs on CUDA only"
    q, k = case.primals[:2]
    if q.shape[-1] not in (16, 32, 64, 128, 256):
        return f"it has no head dim of {q.shape[-1]}"
    if q.shape[2] != k.shape[2] or q.shape[2] % 32:
        return f"it takes equal lengths in 32s, not {q.shape[2]} queries on {k.shape[2]} keys"
    return "it takes all tangents or none" if None in case.tangents[:3] else None


def functions() -> Functions:
    """Its attention, and its value with tangent under `torch.func.jvp`."""
    from jvp_flash_attention.jvp_attention import JVPAttn

    def pair(*both: Tensor) -> Any:
        return torch.func.jvp(lambda *p: JVPAttn.fwd_dual(*p), both[:3], both[3:])

    return JVPAttn.fwd, pair


def label() -> str:
    """Its name and release, as a row has it."""
    return f"{NAME} {version(NAME)}"
