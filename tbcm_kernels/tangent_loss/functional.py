"""Public function of the loss of continuous-time consistency."""

from __future__ import annotations

from torch import Tensor

from tbcm_kernels import _dispatch, _dual
from tbcm_kernels.tangent_loss import reference
from tbcm_kernels.tangent_loss.autograd import tangent_loss_op


def tangent_loss(
    out: Tensor,
    jvp: Tensor,
    velocity: Tensor,
    x: Tensor,
    t: Tensor,
    r: float,
    c: float = 0.1,
    keep: Tensor | None = None,
    weight: Tensor | None = None,
    log_variance: Tensor | None = None,
    sigma_data: float = 0.5,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The loss of continuous-time consistency (sCM, SANA-Sprint, TBCM) from a student's F and J.

        g = −cos²t (σ_d F⁻ − V) − r (cos t sin t · x + σ_d J),   n = ‖g‖,   ĝ = g / (n + c)
        loss = mean_B[ keep · (w e^{−lv} mean_D (F − F⁻ − ĝ)² + lv) ]

    Args:
        out: F(x/σ_d, t) [B, ...], fp32, bf16, fp16 or fp64; the loss has a gradient to it.
        jvp: J = cos t sin t · dF/dt along the trajectory [B, ...].
        velocity: V = dx/dt [B, ...].
        x: state x_t [B, ...].
        t: times [B].
        r: weight of the part of g that holds the tangent, from 0 to 1 during a warm-up.
        c: what keeps ĝ finite where g vanishes.
        keep: 1 for the samples that count, 0 for the others [B]; None is 1.
        weight: w of each sample [B]; None is 1.
        log_variance: lv of each sample [B], to which the loss has a gradient; None is 0.
        sigma_data: σ_d.
        impl: "auto", "cpu", "triton" or "reference" (plain PyTorch, differentiable to any order).

    Where not said, dtypes are any floating ones, and what has no gradient is taken as a constant.

    Returns:
        (loss, n): a number and a detached [B], in fp32, or fp64 for an fp64 F. A sample whose n is
        not finite adds nothing to loss and gradients, which are still means over B; its n says so.
        Where no sample is finite the loss is NaN, so that a run that has diverged stops.

    Raises:
        ValueError: a shape or device that does not fit, or an `impl` that cannot run here.
        RuntimeError: a forward-AD dual, torch.func.grad, or a double backward, each but with
            impl="reference".

    Precision: fp32 arithmetic (fp64 for an fp64 F); the gradient of F is rounded once.
    Cost: reads F, J, V, x once, and in backward again, where it writes gF: g is not stored. Saves
    F, J, V, x. A sample of zero gradient is not read in backward.
    Source: sCM, arXiv 2410.11081, Algorithm 1; SANA-Sprint, arXiv 2503.09641.
    """
    tensors, numbers = (out, jvp, velocity, x), (t, keep, weight, log_variance)
    _check(*tensors, *numbers)
    constants = _dual.detached(*tensors[1:], *numbers[:3])
    options = {"r": r, "c": c, "sigma_data": sigma_data}
    scalars = [_dual.number("tangent_loss", name, value) for name, value in options.items()]
    if impl == "reference":
        loss, norm = reference.loss(out, *constants, log_variance, *scalars)
        return loss, norm.detach()
    _dual.guard_levels("tangent_loss")
    if _dual.any_dual(*tensors, *numbers):
        raise RuntimeError(
            "tbcm_kernels.tangent_loss has no forward-mode derivative: unpack the student's dual "
            "and pass its value as out and its tangent as jvp."
        )
    chosen = _dispatch.choose("tangent_loss", impl, out)
    loss, norm, _, _ = tangent_loss_op(out, *constants, log_variance, *scalars, chosen)
    return loss, norm


def _check(
    out: Tensor, jvp: Tensor, velocity: Tensor, x: Tensor, t: Tensor, keep: Tensor | None,
    weight: Tensor | None, log_variance: Tensor | None,
) -> None:  # fmt: skip
    tensors = {"out": out, "jvp": jvp, "velocity": velocity, "x": x}
    optional = {"keep": keep, "weight": weight, "log_variance": log_variance}
    _dual.check_tensors("tangent_loss", {**tensors, "t": t}, optional)
    if out.ndim == 0 or out[:1].numel() == 0 < len(out) or not out.is_floating_point():
        raise ValueError(
            f"tangent_loss: out must be [B, ...], floating and not empty in a sample, got "
            f"{_dual.describe(out)}."
        )
    for name, a in {**tensors, "t": t, **optional}.items():
        shape = out.shape if name in tensors else out.shape[:1]
        if a is not None and (a.shape != shape or a.device != out.device or a.is_complex()):
            raise ValueError(
                f"tangent_loss: {name} must be {list(shape)} on {out.device} and real, got "
                f"{_dual.describe(a)}."
            )
