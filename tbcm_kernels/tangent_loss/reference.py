"""The loss of continuous-time consistency in plain PyTorch: the definition of correct.

    g = −cos²t (σ F⁻ − V) − r (cos t sin t x + σ J),   n = ‖g‖ per sample,   ĝ = g / (n + c)
    loss = mean_B[ keep (w e^{−lv} mean_D(F − F⁻ − ĝ)² + lv) ]

`loss` is that, for PyTorch to differentiate; `forward` and `backward` are what the kernels compute.
A sample whose n is not finite adds nothing, and where all samples are such the loss is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels._library import per_sample


def loss(
    out: Tensor, jvp: Tensor, velocity: Tensor, x: Tensor, t: Tensor, keep: Tensor | None,
    weight: Tensor | None, log_variance: Tensor | None, r: float, c: float, sigma_data: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, and n [B]."""
    g = direction(out.detach(), jvp, velocity, x, t, r, sigma_data)
    norm, finite, keep, weight, lv = _samples(g, keep, weight, log_variance)
    residual = out.to(g.dtype) - out.detach().to(g.dtype) - g / per_sample(norm + c, g)
    residual = torch.where(per_sample(finite, g).bool(), residual, 0)
    terms = weight * torch.exp(-lv) * _flat(residual).square().mean(1) + lv
    return _mean(keep * terms, finite), norm


def forward(
    out: Tensor, jvp: Tensor, velocity: Tensor, x: Tensor, t: Tensor, keep: Tensor | None,
    weight: Tensor | None, log_variance: Tensor | None, r: float, c: float, sigma_data: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, n, the slope k and dL/dlv, all three [B]; dL/dF = k g."""
    g = direction(out, jvp, velocity, x, t, r, sigma_data)
    norm, finite, keep, weight, lv = _samples(g, keep, weight, log_variance)
    weight, width = keep * weight * torch.exp(-lv), g[0:1].numel()
    square = weight * (norm / (norm + c)).square() / width
    slope = -2 * weight / ((norm + c) * width * len(norm))
    glv = (keep - square) / len(norm)
    mean = _mean(square + keep * lv, finite)
    return mean, norm, torch.where(finite, slope, 0), torch.where(finite, glv, 0)


def backward(
    gloss: Tensor, slope: Tensor, out: Tensor, jvp: Tensor, velocity: Tensor, x: Tensor, t: Tensor,
    r: float, sigma_data: float,
) -> Tensor:  # fmt: skip
    """gF = gloss k g, and 0 where k is 0."""
    g = direction(out, jvp, velocity, x, t, r, sigma_data)
    slope = per_sample(slope, g)
    return torch.where(slope == 0, 0, gloss * slope * g).to(out.dtype)


def direction(
    out: Tensor, jvp: Tensor, velocity: Tensor, x: Tensor, t: Tensor, r: float, sigma_data: float
) -> Tensor:
    """g, in fp32, or fp64 for an fp64 F."""
    dtype = torch.promote_types(out.dtype, torch.float32)
    out, jvp, velocity, x = (a.to(dtype) for a in (out, jvp, velocity, x))
    t = per_sample(t, x)
    sin, cos = t.sin(), t.cos()
    rest = cos * sin * x + sigma_data * jvp
    return -cos.square() * (sigma_data * out - velocity) - r * rest


def _samples(g: Tensor, *numbers: Tensor | None) -> tuple[Tensor, ...]:
    """n, whether it is finite, and keep, w, lv in g's dtype, which are 1, 1, 0 by default."""
    norm = _flat(g).square().sum(1).sqrt()
    defaults = torch.ones_like(norm), torch.ones_like(norm), torch.zeros_like(norm)
    filled = (d if a is None else a.to(norm.dtype) for a, d in zip(numbers, defaults, strict=True))
    return norm, norm.isfinite(), *filled


def _flat(x: Tensor) -> Tensor:
    """[B, ...] as [B, M], also where ... is nothing."""
    return x.unsqueeze(-1).flatten(1)


def _mean(terms: Tensor, finite: Tensor) -> Tensor:
    """Mean over all samples, to which only finite ones add; NaN without any."""
    total = torch.where(finite, terms, 0).sum() / len(terms)
    return torch.where(finite.any(), total, torch.nan)
