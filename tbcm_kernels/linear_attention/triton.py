"""Triton launches of linear_attention: grids, configs, splits; the kernels are next door."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from tbcm_kernels._triton import AuditCase, device_of
from tbcm_kernels.attention.triton_tiles import Operand, operands
from tbcm_kernels.linear_attention import buffers
from tbcm_kernels.linear_attention.reference import Setting
from tbcm_kernels.linear_attention.triton_kernels import (
    Norm,
    keys_kernel,
    output_kernel,
    queries_kernel,
    state_kernel,
    statistics_kernel,
)
from tbcm_kernels.rms_norm.heads import heads_of_norm

Config = tuple[int, int, int]
"""Tokens of a tile, warps, stages."""
_INTERPRETED = (32, 4, 1)
_WARPS = 2112
"""What gives 16 warps to each of 132 multiprocessors."""


def _config(kernel: Any, width: int, dtype: torch.dtype, exact: bool) -> Config:
    """Chosen by the static audit, for all GPUs: few instructions, and no spill; not yet by timing.

    A sum over tokens holds all tokens of a step in registers. One warp alone reads no tile twice.
    """
    if width > 32:
        return 16, 4 if kernel is queries_kernel else 8, 1
    if kernel is state_kernel:
        return 16, 1 if exact else 4, 2 if dtype == torch.float32 else 3
    return 64 if exact else 32, 4, 1


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, setting: Setting,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """See reference.forward."""
    o, to, state = buffers.outputs(q, v, any(t is not None for t in (tq, tk, tv)))
    tstate = None if tk is None and tv is None else torch.empty_like(state)
    if state.numel():
        with device_of(q):
            norm = _norm(k, k_weight, tk, setting.k_eps)
            _gather((k, v, tk, tv), norm, None, state, tstate, setting)
            _apply(
                output_kernel, q, setting, state=state, tstate=tstate, eps=setting.eps,
                **_norm(q, q_weight, tq, setting.q_eps), **_operands(q=q, tq=tq, o=o, to=to),
            )  # fmt: skip
    return o, to, state


def backward(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    state: Tensor, setting: Setting,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See reference.backward."""
    gq, gk, gv = buffers.gradients(q, k, v)
    gstate = torch.empty_like(state)
    if state.numel():
        with device_of(q):
            norm = _norm(q, q_weight, None, setting.q_eps)
            factors = state.new_empty((*q.shape[:3], 2))
            _apply(
                queries_kernel, q, setting, state=state, factors=factors, eps=setting.eps,
                **norm, **_operands(go=go, q=q, gq=gq),
            )  # fmt: skip
            _gather((q, go, None, None), norm, factors, gstate, None, setting)
            _apply(
                keys_kernel, k, setting, state=gstate,
                **_norm(k, k_weight, None, setting.k_eps), **_operands(k=k, v=v, gk=gk, gv=gv),
            )  # fmt: skip
    return gq, gk, gv


def _norm(x: Tensor, weight: Tensor | None, tx: Tensor | None, eps: float) -> dict[str, Any]:
    """The norm as a kernel takes it; over all heads its scalars are computed first."""
    if weight is None:
        return {"norm": None, "scalars": None}
    batches, heads, rows, width = x.shape
    if heads_of_norm(x, weight) == 1:
        return {"norm": Norm(weight.contiguous(), 0, eps), "scalars": None}
    scalars = torch.empty((batches, rows, 2), dtype=torch.float32, device=x.device)
    if rows:
        options = _rows(heads, width) | ({} if x.is_cuda else {"TOKENS": _INTERPRETED[0]})
        statistics_kernel[(triton.cdiv(batches * rows, options["TOKENS"]),)](
            **_operands(x=x, tx=tx), scalars=scalars, batches=batches, rows=rows, eps=eps, **options
        )
    return {"norm": Norm(weight.contiguous(), width, eps), "scalars": scalars}


def _operands(**tensors: Tensor | None) -> dict[str, Any]:
    found, unit = operands(*tensors.values())
    return dict(zip(tensors, found, strict=True)) | {"UNIT": unit}


def _gather(
    tensors: tuple[Tensor | None, ...], norm: dict[str, Any], factors: Tensor | None, state: Tensor,
    tstate: Tensor | None, setting: Setting,
) -> None:  # fmt: skip
    """A state over all tokens: splits of them make parts, which are then added in their order.

    There are as many as fill a GPU, of four tiles or more.
    """
    batches, heads, rows, _ = tensors[0].shape
    constants = _constants(state_kernel, tensors[0], state, setting)
    tile, blocks = constants["TOKENS"], triton.cdiv(constants["DV"], constants["BV"])
    programs = batches * heads * blocks * constants["num_warps"]
    splits = min(triton.cdiv(_WARPS, programs), triton.cdiv(rows, 4 * tile))
    span = triton.cdiv(max(rows, 1), max(splits, 1) * tile) * tile
    splits = max(triton.cdiv(rows, span), 1)
    sums = [s for s in (state, tstate) if s is not None]
    parts = sums if splits == 1 else [s.new_empty((splits, *s.shape)) for s in sums]
    state_kernel[(batches * heads, splits * blocks)](
        **_operands(**dict(zip(("k", "v", "tk", "tv"), tensors, strict=True))), **norm,
        factors=factors, state=parts[0], tstate=None if tstate is None else parts[1],
        heads=heads, rows=rows, span=span, **constants,
    )  # fmt: skip
    if splits > 1:
        for part, total in zip(parts, sums, strict=True):
            torch.sum(part, 0, out=total)


def _apply(kernel: Any, x: Tensor, setting: Setting, *, state: Tensor, **arguments: Any) -> None:
    """One program for each head and four tiles of tokens of x, which share what it makes of S."""
    batches, heads, rows, _ = x.shape
    constants = _constants(kernel, x, state, setting)
    if rows:
        span = 4 * constants["TOKENS"]
        grid = (batches * heads, triton.cdiv(rows, span))
        kernel[grid](state=state, **arguments, **constants, heads=heads, rows=rows, span=span)


def _constants(kernel: Any, x: Tensor, state: Tensor, setting: Setting) -> dict[str, Any]:
    width, columns = state.shape[2:]
    config, precision, exact = _INTERPRETED, "ieee", _exact(x.dtype, setting.feature_map)
    if x.is_cuda:
        config = _config(kernel, max(width, columns - 1), x.dtype, exact)
        precision = _precision(x.dtype, exact)
    options = dict(zip(("TOKENS", "num_warps", "num_stages"), config, strict=True))
    kinds = {"FEATURE": setting.feature_map, "EXACT": exact, "PRECISION": precision}
    return _widths(width, columns - 1) | kinds | options


def _widths(width: int, v_width: int) -> dict[str, int]:
    """Head dims, and the block of D and columns of v that a kernel takes at once."""
    block, v_block = (max(triton.next_power_of_2(w), 16) for w in (width, v_width))
    columns = min(v_block, 64 if max(block, v_block) <= 64 else 32)
    return {"D": width, "DV": v_width, "BD": block, "BV": columns}


def _rows(heads: int, width: int) -> dict[str, int]:
    """A token a warp, and as many heads at once as make 256 columns, 8 a thread."""
    block = triton.next_power_of_2(width)
    together = min(triton.next_power_of_2(heads), max(256 // block, 1))
    return {"ALL": heads, "D": width, "BD": block, "HEADS": together, "TOKENS": 4, "num_warps": 4}


def _precision(dtype: torch.dtype, exact: bool) -> str:
    """Three products of halves: of bf16, which together have 16 digits, or of TF32, with 22."""
    if exact:
        return "bf16"
    return "tf32x3" if dtype == torch.float32 else "bf16x3"


def _exact(dtype: torch.dtype, feature_map: str) -> bool:
    """Whether a tile's factor keeps its numbers of bf16; see the kernels."""
    return dtype == torch.bfloat16 and feature_map != "elu+1"


_VARIANTS = (
    ("state", state_kernel, ("tk", "tv", "tstate", "factors")),
    ("state tangent", state_kernel, ("factors",)),
    ("state of heads with norms of their own", state_kernel, ("factors", "scalars")),
    ("state gradient", state_kernel, ("tk", "tv", "tstate")),
    ("output", output_kernel, ("tq", "tstate", "to")),
    ("output tangent", output_kernel, ()),
    ("queries", queries_kernel, ()),
    ("keys", keys_kernel, ()),
)
"""Every kernel with the arguments that are absent in a use of it."""


def audit_cases() -> Iterator[AuditCase]:
    """What `impl="auto"` takes, at head dims of every class, with norms over all heads."""
    known = dict.fromkeys(("state", "tstate", "factors", "scalars"), "*fp32") | {"eps": "fp32"}
    known |= dict.fromkeys(("batches", "heads", "rows", "span"), "i32")
    known["norm"] = Norm("*fp32", "i32", "fp32")
    for width in (32, 64, 72, 112, 128):
        for short, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            if width > 32 and dtype == torch.float32:
                continue
            tensor = Operand(f"*{short}", "i32", "i32", "i32", "i32")
            for tangent in (None, tensor):
                types = {n: known.get(n, tensor) for n in _names(statistics_kernel)}
                constants = {n: c for n, c in _rows(36, width).items() if n.isupper()}
                constants |= {"UNIT": 8}
                name = f"linear_attention {short} D={width} statistics{' tangent' * bool(tangent)}"
                yield AuditCase(name, statistics_kernel, types | {"tx": tangent}, constants, 4)
            for name, kernel, absent in _VARIANTS:
                types = {n: None if n in absent else known.get(n, tensor) for n in _names(kernel)}
                exact = _exact(dtype, "relu")
                tokens, warps, stages = _config(kernel, width, dtype, exact)
                constants = _widths(width, width) | {"FEATURE": "relu", "UNIT": 8, "EXACT": exact}
                constants |= {"PRECISION": _precision(dtype, exact), "TOKENS": tokens}
                name = f"linear_attention {short} D={width} {name}"
                yield AuditCase(name, kernel, types, constants, warps, stages)


def _names(kernel: Any) -> list[str]:
    return [n for n in kernel.arg_names if not n.isupper()]
