"""Public functions of RMSNorm."""

from __future__ import annotations

from torch import Tensor

from tbcm_kernels import _dispatch, _dual
from tbcm_kernels._library import or_none
from tbcm_kernels.rms_norm import reference
from tbcm_kernels.rms_norm.autograd import rms_norm_op


def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, impl: str = "auto"
) -> Tensor:
    """RMSNorm over the last dimension.

        y = weight · x · (mean x² + eps)^−½

    Args:
        x: [..., C], fp32, bf16, fp16 or fp64.
        weight: [C], any floating dtype; None is 1.
        eps: added to the mean square.
        impl: "auto", "cpu", "cuda", "triton" or "reference" (plain PyTorch, differentiable to any
            order).

    Returns:
        y of x's shape and dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an `impl` that cannot run here.
        RuntimeError: nested forward mode, torch.func.grad, or a double backward.

    Precision: arithmetic in fp32 (fp64 for fp64), rounded once at the end; `torch.nn.RMSNorm` in
    bf16 rounds before it multiplies by the weight.
    Cost: reads x and writes y once. Saves x for backward.
    Source: arXiv 1910.07467.
    """
    _check("rms_norm", x, weight)
    eps = _dual.number("rms_norm", "eps", eps)
    if impl == "reference":
        return _dual.settled(reference.forward(x, weight, None, None, eps)[0])
    _dual.guard_levels("rms_norm")
    primals, tangents = _dual.unpack(x, weight)
    return _dual.pack(*_pair(*primals, *tangents, eps, impl))


def rms_norm_jvp(
    x: Tensor,
    weight: Tensor | None = None,
    tx: Tensor | None = None,
    tweight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`rms_norm` with explicit tangents, value and tangent in one pass.

        ty = weight · r · (tx − x r² mean(x tx)) + tweight · x · r

    Args: those of `rms_norm`, then the tangent of each; None is a zero tangent. With "reference"
        too gradients are of first order.

    Returns:
        (y, ty); ty is None where both tangents are, and does not require grad under
        `stop_tangent_gradient()`.

    Raises: as `rms_norm`; ValueError for a tangent that does not match its primal, RuntimeError
        for a forward-AD dual among the arguments.

    Cost: reads x, tx and writes y, ty once. Backward through ty is exact, by differentiating the
    reference, and then saves all inputs.
    """
    _check("rms_norm_jvp", x, weight)
    eps = _dual.number("rms_norm_jvp", "eps", eps)
    _dual.guard_levels("rms_norm")
    _dual.refuse_duals("rms_norm_jvp", x, weight, tx, tweight)
    _dual.check_tangents("rms_norm_jvp", x=(x, tx), weight=(weight, tweight))
    return _pair(x, weight, tx, tweight, eps, impl)


def _pair(
    x: Tensor, weight: Tensor | None, tx: Tensor | None, tweight: Tensor | None, eps: float,
    impl: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    tx, tweight = _dual.held(tx, tweight)
    through = not _dual.tangent_gradient_stopped()
    chosen = _dispatch.choose_for_rows("rms_norm", impl, x)
    y, ty = rms_norm_op(x, weight, tx, tweight, eps, through, chosen)
    return y, or_none(ty, _dual.present((tx, tweight)))


def _check(op: str, x: Tensor, weight: Tensor | None) -> None:
    _dual.check_tensors(op, {"x": x}, {"weight": weight})
    if x.ndim == 0 or x.shape[-1] == 0 or not x.dtype.is_floating_point:
        raise ValueError(
            f"{op}: x must be [..., C] with C > 0 and floating, got {_dual.describe(x)}."
        )
    if weight is None:
        return
    fits = weight.shape == x.shape[-1:] and weight.device == x.device
    if not (fits and weight.is_floating_point()):
        raise ValueError(
            f"{op}: weight must be floating [C] = [{x.shape[-1]}] on {x.device}, got "
            f"{_dual.describe(weight)}."
        )
