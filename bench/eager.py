"""The ops in plain PyTorch, as their users write them, and their tangents by `torch.func.jvp`.

tbcm's own plain forms where those are to be had without diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tbcm import objective
from tbcm.rollout import trajectory_step  # noqa: F401 - one of the ops
from tbcm.trigflow import flow_time, like, wrapped


def adaln(x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Any:
    """As diffusers writes it, with the modulations in x's dtype."""
    gate, scale, shift = (m.to(x.dtype) for m in (gate, scale, shift))
    out = x + gate * h
    return out, F.layer_norm(out, out.shape[-1:], eps=1e-6) * (1 + scale) + shift


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's own."""
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), 1e-5)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own, in the one form that has a forward derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def conv_glu(a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GLUMBConv between its 1×1 convolutions, on the memory it has there: tokens seen as NCHW."""
    side = math.isqrt(a.shape[1])
    pixels = a.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    weight, bias = weight.to(a.dtype), bias.to(a.dtype)
    values, gates = F.conv2d(F.silu(pixels), weight, bias, padding=1, groups=len(bias)).chunk(2, 1)
    return values * F.silu(gates)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *norms: Tensor) -> Tensor:
    """As diffusers' processor: fp32, tokens last, and a row of ones that sums the weights."""
    dtype = q.dtype
    if norms:
        q, k = (_norm_of_heads(x, w) for x, w in zip((q, k), norms, strict=True))
    q, k, v = F.relu(q).mT.float(), F.relu(k).float(), v.mT.float()
    o = F.pad(v, (0, 0, 0, 1), value=1.0) @ k @ q
    return (o[:, :, :-1] / (o[:, :, -1:] + 1e-15)).mT.to(dtype)


def _norm_of_heads(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over all heads, on tokens [B, N, C] as the model has them."""
    rows = x.transpose(1, 2)
    return rms_norm(rows.flatten(2), weight).view(rows.shape).transpose(1, 2)


def flow_input(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """SANA-Sprint's way into a flow-matching network: t_FM, and x scaled by λ."""
    t_fm = flow_time(t)
    s = like(t_fm, x)
    return x * torch.sqrt(s * s + (1 - s) ** 2), t_fm


def flow_output(v: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """And out of it: F = [(1 − 2 t_FM) x_FM + λ² v] / λ."""
    return wrapped(lambda *_: v, x, t)


def tangent_loss(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """sCM's objective at r = 0.7 and c = 0.1, and ‖g‖."""
    return objective.tangent_loss(*tensors[:5], 0.7, 0.1, *tensors[5:])


def jvp_of(plain: Callable[..., Any], moving: list[int]) -> Callable[..., Any]:
    """`torch.func.jvp` along the arguments that move, as a function of (*primals, *tangents)."""

    def jvp(*both: Tensor | None) -> Any:
        primals, tangents = both[: len(both) // 2], both[len(both) // 2 :]

        def of_moving(*values: Tensor) -> Any:
            inputs = list(primals)
            for i, v in zip(moving, values, strict=True):
                inputs[i] = v
            return plain(*inputs)

        return torch.func.jvp(
            of_moving, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving)
        )

    return jvp
