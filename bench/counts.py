"""Bytes and FLOPs of a call, by count: every input read once, every output written once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tbcm_kernels.testing.cases import Case


def traffic(case: Case, what: str, saved: str, leaves: str) -> int:
    """Bytes of a pass; backward reads cotangents and what was saved and writes gradients."""
    if what == "step":
        return traffic(case, "jvp", saved, leaves) + traffic(case, "backward", saved, leaves)
    if case.op == "attention":
        return _attention_traffic(case, what)
    first = case.primals[0].nbytes
    outputs = {"adaln": 2, "conv_glu": 0.5, "trajectory_step": 2, "tangent_loss": 0}
    written = int(first * outputs.get(case.op, 1))
    if what == "backward":
        named = dict(zip(case.arguments, case.primals, strict=True))
        kept, gradients = ([named[a] for a in names.split()] for names in (saved, leaves))
        return written + _size(kept) + _size(gradients)
    pair = written + _size(case.tangents) if what == "jvp" else 0
    return _size(case.primals) + written + pair


def _attention_traffic(case: Case, what: str) -> int:
    """q, k, v, o and, where they move, their tangents; twice in backward, with the gradients."""
    values = [*case.primals[:3], case.primals[0]]
    if what in ("jvp", "through"):
        values += [t for t in case.tangents if t is not None] + case.primals[:1]
    return _size(values) * (2 if what in ("backward", "through") else 1)


def operations(case: Case, what: str) -> int:
    """FLOPs of the matrix products; 0 for an op without."""
    if what == "step":
        return operations(case, "jvp") + operations(case, "backward")
    if case.op == "attention":
        q, k = case.primals[:2]
        alone = case.tangents[1] is None
        jvp, through = (4, 10) if alone else (6, 15)
        products = {"forward": 2, "jvp": jvp, "backward": 5, "through": through}
        return 2 * q.numel() * k.shape[2] * products[what]
    if case.op == "linear_attention":  # of a state [D, Dv + 1] with queries or keys and values
        q, v = case.primals[0], case.primals[2]
        return 2 * q.numel() * (v.shape[-1] + 1) * {"forward": 2, "jvp": 6, "backward": 4}[what]
    if case.op != "linear":
        return 0
    x, weight, _ = case.primals
    return 2 * x.numel() * weight.shape[0] * (1 if what == "forward" else 2)


def _size(values: Sequence[Tensor | None]) -> int:
    return sum(v.nbytes for v in values if v is not None)
