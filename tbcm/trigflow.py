"""TrigFlow: the time axis of continuous-time consistency, and the wrap of a flow-matching network.

x_t = cos t · x0 + sin t · z with t in [0, π/2], std(x0) = σ_d and z ~ N(0, σ_d² I). The network
sees x/σ_d; σ_d F(x/σ_d, t) is the velocity dx/dt. Sources: sCM (arXiv 2410.11081) §3, SANA-Sprint
(arXiv 2503.09641) §3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SIGMA_DATA = 0.5
HALF_PI = math.pi / 2


def like(t: Tensor, x: Tensor) -> Tensor:
    """Per-sample times t [B] shaped to broadcast over x [B, ...]."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def flow_time(t: Tensor) -> Tensor:
    """TrigFlow time to flow-matching time: t_FM = sin t / (sin t + cos t)."""
    return torch.sin(t) / (torch.sin(t) + torch.cos(t))


def trig_time(t_fm: Tensor) -> Tensor:
    """Flow-matching time in [0, 1] to TrigFlow time: t = arctan(t_FM / (1 − t_FM))."""
    return torch.atan2(t_fm, 1 - t_fm)


def wrapped(v: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    """F = [(1−2 t_FM) x_FM + λ² v(x_FM, t_FM)] / λ with λ = sqrt(t_FM² + (1−t_FM)²), x_FM = x λ."""
    t_fm = flow_time(t)
    s = like(t_fm, x)
    norm = torch.sqrt(s * s + (1 - s) ** 2)
    x_fm = x * norm
    return ((1 - 2 * s) * x_fm + norm * norm * v(x_fm, t_fm)) / norm


def fused_wrapped(v: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    """`wrapped` by one kernel before v and one after it, each for value and tangent."""
    import tbcm_kernels

    return tbcm_kernels.flow_output(v(*tbcm_kernels.flow_input(x, t)), x, t)


class TrigFlow(nn.Module):
    """A flow-matching transformer v(x_FM, t_FM) seen as a TrigFlow network F(x/σ_d, t).

    The wrap is lossless and differentiable in x and t, so teacher and student share it, and
    `torch.func.jvp` passes through it. The transformer receives t_FM in [0, 1] as its timestep, as
    SANA-Sprint's does.
    """

    def __init__(self, transformer: Callable[..., Any], fused: bool = False):
        super().__init__()
        self.transformer = transformer
        self.wrap = fused_wrapped if fused else wrapped

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """F(x, t): x = x_t/σ_d [B, C, H, W], t [B], text [B, S, D], mask [B, S], guidance [B]."""
        condition = {} if guidance is None else {"guidance": guidance}

        def v(x_fm: Tensor, t_fm: Tensor) -> Tensor:
            return self.transformer(
                x_fm, encoder_hidden_states=text, timestep=t_fm, encoder_attention_mask=mask,
                return_dict=False, **condition,
            )[0]  # fmt: skip

        return self.wrap(v, x, t)


def to_time(x: Tensor, velocity: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """First-order step from time t to s: x_s = cos(t−s) x − sin(t−s) V, with V = σ_d F = dx/dt."""
    d = like(t - s, x)
    return torch.cos(d) * x - torch.sin(d) * velocity


def shift(u: Tensor, flow_shift: float) -> Tensor:
    """The flow shift S u / (1 + (S−1) u)."""
    return flow_shift * u / (1 + (flow_shift - 1) * u)


def route(n: int, flow_shift: float) -> Tensor:
    """The reference route of n times, R_0 = π/2 down to R_{n−1} > 0 (tbcm's σ_i through arctan)."""
    u = torch.linspace(1, shift(torch.tensor(1 / 1000), flow_shift).item(), n, dtype=torch.float64)
    return trig_time(shift(u, flow_shift))


def jittered(times: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Stratified jitter: t_0 = R_0 and t_{i+1} ~ U(R_{i+1}, R_i)."""
    u = torch.rand(len(times) - 1, generator=generator, dtype=times.dtype)
    return torch.cat([times[:1], times[1:] + u * (times[:-1] - times[1:])])


SAMPLE_TIMES: dict[int, Sequence[float]] = {
    1: (HALF_PI,),
    2: (HALF_PI, 1.0),
    4: (1.56830, 1.3, 1.1, 0.6),
}
"""Times of the 1-, 2- and 4-step consistency sampler (SANA-Sprint; TBCM for 2 steps)."""
