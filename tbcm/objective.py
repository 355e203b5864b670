"""The objective of continuous-time consistency: tangent direction, normalisation, loss.

f(x, t) = cos t · x − sin t · σ_d F(x/σ_d, t) must stay constant along the teacher's trajectory
dx/dt = V. Sources: sCM (arXiv 2410.11081) Algorithm 1, SANA-Sprint (2503.09641), TBCM (2511.20410).
Networks are any callable net(x/σ_d, t, text, mask, guidance) → F.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from tbcm.trigflow import SIGMA_DATA, like

Net = Callable[..., Tensor]


def tangent_weight(
    step: int, warmup: int, calm_start: int, calm_steps: int, calm_value: float
) -> float:
    """r at a 0-based step: 0 → 1 over the warm-up; from calm_start on, 1 → calm_value."""
    rise = min(1.0, step / warmup) if warmup else 1.0
    past = step - calm_start
    fall = min(max(past, 0) / calm_steps, 1.0) if calm_steps else float(past >= 0)
    return rise * (1 - (1 - calm_value) * fall)


def tangents(t: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """Tangents of (x/σ_d, t) that make the JVP cos t sin t · dF/dt: no overflow at either end."""
    speed = torch.cos(t) * torch.sin(t)
    return like(speed, velocity) * velocity / SIGMA_DATA, speed


def no_graph(net: Net, x: Tensor, t: Tensor, velocity: Tensor, *condition: Tensor):
    """F and J = cos t sin t · dF/dt from a JVP without a graph."""
    # SDPA's other backends have no forward-mode derivative.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(
            lambda x, t: net(x, t, *condition), (x / SIGMA_DATA, t), tangents(t, velocity)
        )  # fmt: skip


def two_passes(net: Net, x: Tensor, t: Tensor, velocity: Tensor, *condition: Tensor):
    """F with its graph, and J from a pass of its own."""
    _, jvp = no_graph(net, x, t, velocity, *condition)
    return net(x / SIGMA_DATA, t, *condition), jvp


def one_pass(net: Net, x: Tensor, t: Tensor, velocity: Tensor, *condition: Tensor):
    """F with its graph and J from one dual pass of a network that `tbcm_kernels.fuse` treated."""
    import tbcm_kernels

    tx, tt = tangents(t, velocity)
    with tbcm_kernels.stop_tangent_gradient(), forward_ad.dual_level():
        dual_x = forward_ad.make_dual(x / SIGMA_DATA, tx)
        dual_t = forward_ad.make_dual(t, tt)
        out, jvp = forward_ad.unpack_dual(net(dual_x, dual_t, *condition))
        if jvp is None:
            raise RuntimeError("The tangent of the student was lost on its way.")
        return out, jvp.detach()


def tangent_direction(
    x: Tensor, t: Tensor, velocity: Tensor, out: Tensor, jvp: Tensor, r: float
) -> Tensor:
    """g = −cos²t (σ_d F⁻ − V) − r (cos t sin t · x + σ_d J); at r = 1 it is cos t · df/dt."""
    cos, sin = like(torch.cos(t), x), like(torch.sin(t), x)
    rest = cos * sin * x + SIGMA_DATA * jvp
    return -(cos**2) * (SIGMA_DATA * out.detach() - velocity) - r * rest


def normalised(g: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """ĝ = g / (‖g‖ + c) and ‖g‖ [B], per sample over all other dimensions."""
    norm = g.flatten(1).norm(dim=1)
    return g / like(norm + c, g), norm


def time_weight(t: Tensor) -> Tensor:
    """w(t) = 1 / (σ_d tan t)."""
    return 1 / (SIGMA_DATA * torch.tan(t))


def consistency_loss(
    out: Tensor, g_hat: Tensor, keep: Tensor, weight: Tensor, log_variance: Tensor
) -> Tensor:
    """mean[ keep · (w e^{−lv} mean_d (F − F⁻ − ĝ)² + lv) ].

    keep, weight w and log_variance lv are [B]. In value F − F⁻ = 0, so dL/dF = −2 w e^{−lv} ĝ / D.
    """
    square = (out - out.detach() - g_hat).square().flatten(1).mean(1)
    return (keep * (weight * torch.exp(-log_variance) * square + log_variance)).mean()


def tangent_loss(
    out: Tensor, jvp: Tensor, velocity: Tensor, x: Tensor, t: Tensor, r: float, c: float,
    keep: Tensor, weight: Tensor, log_variance: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss and ‖g‖ [B]; `tbcm_kernels.tangent_loss` computes them in two passes.

    Here a sample that is not finite makes the loss so; there it alone is left out.
    """
    g = tangent_direction(x, t, velocity, out, jvp, r)
    g_hat, norm = normalised(g, c)
    return consistency_loss(out, g_hat, keep, weight, log_variance), norm


class LogVariance(nn.Module):
    """lv(t): one Linear on a sinusoidal embedding of the time; it starts at 0."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(128, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        """t [B] in [0, π/2] → [B]; the times are stretched to the range the sinusoids resolve."""
        from diffusers.models.embeddings import get_timestep_embedding

        return self.linear(get_timestep_embedding(1000 * t, self.linear.in_features))[:, 0]
