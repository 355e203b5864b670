"""Public functions of the TrigFlow wrap and of a step along the teacher's trajectory."""

from __future__ import annotations

from torch import Tensor

from tbcm_kernels import _dispatch, _dual
from tbcm_kernels._library import or_none
from tbcm_kernels.trigflow import reference
from tbcm_kernels.trigflow.autograd import flow_input_op, flow_output_op, trajectory_step_op


def flow_input(x: Tensor, t: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """What a flow-matching network sees of a TrigFlow state.

        x_FM = λ x,  t_FM = λ sin t,  λ = 1 / (sin t + cos t)

    Args:
        x: x_t/σ_d [B, ...], fp32, bf16, fp16 or fp64.
        t: times [B] in [0, π/2], any floating dtype.
        impl: "auto", "cpu", "triton" or "reference" (plain PyTorch, differentiable to any order).

    Returns:
        (x_FM, t_FM) of the shapes and dtypes of x and t.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an `impl` that cannot run here.
        RuntimeError: nested forward mode or torch.func.grad.

    Precision: arithmetic in fp32 (fp64 for an fp64 x), rounded once at the end.
    Cost: reads x and writes x_FM once. Saves t; where t needs a gradient, x too, and backward
    differentiates the reference.
    Source: SANA-Sprint, arXiv 2503.09641; with t_FM² + (1 − t_FM)² = λ² it is the same map.
    """
    _check("flow_input", x, t=t)
    if impl == "reference":
        x_fm, t_fm, _, _ = reference.flow_input(x, t, None, None)
        return _dual.settled(x_fm), _dual.settled(t_fm)
    _dual.guard_levels("flow_input")
    primals, tangents = _dual.unpack(x, t)
    x_fm, t_fm, tx_fm, tt_fm = _input(*primals, *tangents, impl)
    return _dual.pack(x_fm, tx_fm), _dual.pack(t_fm, tt_fm)


def flow_input_jvp(
    x: Tensor, t: Tensor, tx: Tensor | None = None, tt: Tensor | None = None, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`flow_input` with explicit tangents, value and tangent in one pass.

        tx_FM = λ tx − λ² δ tt x,  tt_FM = λ² tt,  δ = cos t − sin t

    Args: those of `flow_input`, then the tangent of each; None is a zero tangent. With "reference"
        too gradients are of first order.

    Returns:
        (x_FM, t_FM, tx_FM, tt_FM). A tangent is None where every input it depends on has none.
        Under `stop_tangent_gradient()` the tangents do not require grad.

    Raises: as `flow_input`; ValueError for a tangent that does not match its primal, RuntimeError
        for a forward-AD dual among the arguments.

    Cost: reads x, tx and writes x_FM, tx_FM once. Backward through a tangent differentiates the
    reference, and then saves all inputs.
    """
    _check("flow_input_jvp", x, t=t)
    _dual.guard_levels("flow_input")
    _dual.refuse_duals("flow_input_jvp", x, t, tx, tt)
    _dual.check_tangents("flow_input_jvp", x=(x, tx), t=(t, tt))
    return _input(x, t, tx, tt, impl)


def flow_output(v: Tensor, x: Tensor, t: Tensor, *, impl: str = "auto") -> Tensor:
    """The TrigFlow network F(x, t) of a flow-matching network's velocity v(x_FM, t_FM).

        F = λ (δ x + v),  λ = 1 / (sin t + cos t),  δ = cos t − sin t

    Args:
        v: the network's output [B, ...] at `flow_input(x, t)`, any floating dtype.
        x, t, impl: those of `flow_input`.

    Returns:
        F of x's shape and dtype.

    Raises: as `flow_input`.

    Precision: arithmetic in fp32 (fp64 for an fp64 x), rounded once at the end.
    Cost: reads v, x and writes F once; its backward reads gF and writes gv. Saves t; where x or t
    needs a gradient, all inputs, and backward differentiates the reference.
    Source: SANA-Sprint, arXiv 2503.09641; it is [(1−2 t_FM) x_FM + λ² v] / λ.
    """
    _check("flow_output", x, t=t)
    _check_velocity("flow_output", v, x)
    if impl == "reference":
        return _dual.settled(reference.flow_output(v, x, t, None, None, None)[0])
    _dual.guard_levels("flow_output")
    primals, tangents = _dual.unpack(v, x, t)
    return _dual.pack(*_output(*primals, *tangents, impl))


def flow_output_jvp(
    v: Tensor,
    x: Tensor,
    t: Tensor,
    tv: Tensor | None = None,
    tx: Tensor | None = None,
    tt: Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`flow_output` with explicit tangents, value and tangent in one pass.

        tF = λ (δ tx + tv) − λ² tt (2 x + δ v)

    Args: those of `flow_output`, then the tangent of each; None is a zero tangent. With "reference"
        too gradients are of first order.

    Returns:
        (F, tF); tF is None where all tangents are, and does not require grad under
        `stop_tangent_gradient()`.

    Raises: as `flow_input_jvp`.

    Cost: reads v, x, tv, tx and writes F, tF once. Backward through tF differentiates the
    reference, and then saves all inputs.
    """
    _check("flow_output_jvp", x, t=t)
    _check_velocity("flow_output_jvp", v, x)
    _dual.guard_levels("flow_output")
    _dual.refuse_duals("flow_output_jvp", v, x, t, tv, tx, tt)
    _dual.check_tangents("flow_output_jvp", v=(v, tv), x=(x, tx), t=(t, tt))
    return _output(v, x, t, tv, tx, tt, impl)


def trajectory_step(
    x: Tensor,
    out: Tensor,
    t: Tensor,
    s: Tensor,
    guidance: Tensor,
    sigma_data: float = 0.5,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Guided velocity of the teacher, and the first-order step along it from time t to s.

        V  = σ_d (F_∅ + guidance · (F_c − F_∅))
        x' = cos(t − s) x − sin(t − s) V

    Args:
        x: state [P, ...], fp32, bf16, fp16 or fp64.
        out: the teacher's F [2P, ...], first without the prompts and then with them, any floating
            dtype.
        t, s: times [P], or [] for all samples.
        guidance: scale of each sample [P].
        sigma_data: σ_d.
        impl: "auto", "cpu", "triton" or "reference" (plain PyTorch, differentiable).

    Returns:
        (V, x') of x's shape and dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an `impl` that cannot run here.
        RuntimeError: a derivative is asked for, which the op does not have.

    Precision: arithmetic in fp32 (fp64 for an fp64 x), rounded once at the end.
    Cost: reads x, out and writes V, x' once.
    Source: TBCM, arXiv 2511.20410; sCM, arXiv 2410.11081.
    """
    _dual.check_tensors("trajectory_step", {"x": x, "out": out, "t": t, "s": s})
    t, s = (a.expand(x.shape[:1]) if a.ndim == 0 else a for a in (t, s))
    _check("trajectory_step", x, t=t, s=s, guidance=guidance)
    fits = out.shape == (2 * x.shape[0], *x.shape[1:]) and out.device == x.device
    if not (fits and out.is_floating_point()):
        raise ValueError(
            f"trajectory_step: out must be [2P, ...], both branches of guidance, floating, on "
            f"{x.device}, got {_dual.describe(out)} for x {_dual.describe(x)}."
        )
    sigma_data = _dual.number("trajectory_step", "sigma_data", sigma_data)
    if impl == "reference":
        return reference.trajectory_step(x, out, t, s, guidance, sigma_data)
    _dual.refuse_derivatives("trajectory_step", x, out, t, s, guidance)
    chosen = _dispatch.choose("trigflow", impl, x)
    return trajectory_step_op(x, out, t, s, guidance, sigma_data, chosen)


def _input(
    x: Tensor, t: Tensor, tx: Tensor | None, tt: Tensor | None, impl: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    tx, tt = _dual.held(tx, tt)
    through = not _dual.tangent_gradient_stopped()
    chosen = _dispatch.choose("trigflow", impl, x)
    x_fm, t_fm, tx_fm, tt_fm = flow_input_op(x, t, tx, tt, through, chosen)
    return x_fm, t_fm, or_none(tx_fm, _dual.present((tx, tt))), or_none(tt_fm, tt is not None)


def _output(
    v: Tensor, x: Tensor, t: Tensor, tv: Tensor | None, tx: Tensor | None, tt: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    tv, tx, tt = _dual.held(tv, tx, tt)
    through = not _dual.tangent_gradient_stopped()
    chosen = _dispatch.choose("trigflow", impl, x)
    out, tout = flow_output_op(v, x, t, tv, tx, tt, through, chosen)
    return out, or_none(tout, _dual.present((tv, tx, tt)))


def _check(op: str, x: Tensor, **numbers: Tensor) -> None:
    _dual.check_tensors(op, {"x": x, **numbers})
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be [B, ...] and floating, got {_dual.describe(x)}.")
    for name, a in numbers.items():
        if a.shape != x.shape[:1] or a.device != x.device or not a.is_floating_point():
            raise ValueError(
                f"{op}: {name} must be floating [B] = [{x.shape[0]}] on {x.device}, one number a "
                f"sample, got {_dual.describe(a)}."
            )


def _check_velocity(op: str, v: Tensor, x: Tensor) -> None:
    _dual.check_tensors(op, {"v": v})
    if v.shape != x.shape or v.device != x.device or not v.is_floating_point():
        raise ValueError(
            f"{op}: v must be floating, of x's shape and on its device, got {_dual.describe(v)} "
            f"for {_dual.describe(x)}."
        )
