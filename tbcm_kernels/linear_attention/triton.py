"""Triton launches of linear_attention: grids, configs, splits; the kernels are next door."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tbcm_kernels._dispatch import may_use_tf32
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
    sum_kernel,
)
from tbcm_kernels.rms_norm.heads import heads_of_norm


class Config(NamedTuple):
    """What a kernel is compiled with, and how many tiles a program of it takes."""

    tokens: int
    """Of a tile."""
    warps: int
    stages: int
    tiles: int = 4
    """Of a program; of S at least."""
    copies: int = 8
    """Columns that a vector makes in a product; see the kernels' _along."""
    registers: int | None = None
    """What a thread may have, where that lets a multiprocessor hold more programs."""
    waves: int = 1
    """Of a state: how many times as many programs as a GPU holds at once."""


_INTERPRETED = Config(32, 4, 1)
_MULTIPROCESSORS = 132
_HOPPER = {
    "state": Config(16, 1, 3, registers=136),
    "state tangent": Config(16, 1, 3, registers=224, waves=2),
    "state gradient": Config(16, 1, 3),
    "output": Config(32, 2, 3, 8),
    "output tangent": Config(32, 2, 3, 8),
    "queries": Config(64, 4, 3, registers=128),
    "keys": Config(32, 2, 3, registers=144),
}
"""Of each kind of kernel, for heads up to 32 wide whose numbers of bf16 are exact in products."""


def _config(kind: str, width: int, dtype: torch.dtype, exact: bool, hopper: bool) -> Config:
    """Chosen by the static audit: few instructions, no spill; on Hopper by timing on an H200.

    A sum over tokens holds all tokens of a step in registers. One warp alone reads no tile twice.
    """
    if width > 32 and dtype == torch.bfloat16:
        return Config(16, 4 if kind == "queries" else 8, 1)
    if width > 32:  # ptxas spills a value's state rather than give it more than 80
        return Config(16, 8, 1, registers=128 if kind == "state" else None)
    if exact and hopper:
        return _HOPPER[kind]
    if kind.startswith("state"):
        return Config(16, 1 if exact else 4, 2 if dtype == torch.float32 and kind != "state" else 3)
    return Config(64 if exact else 32, 4, 1)


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
                output_kernel, "output" if to is None else "output tangent", q, setting,
                state=state, tstate=tstate, eps=setting.eps,
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
                queries_kernel, "queries", q, setting, state=state, factors=factors,
                eps=setting.eps, **norm, **_operands(go=go, q=q, gq=gq),
            )  # fmt: skip
            _gather((q, go, None, None), norm, factors, gstate, None, setting)
            _apply(
                keys_kernel, "keys", k, setting, state=gstate,
                **_norm(k, k_weight, None, setting.k_eps), **_operands(k=k, v=v, gk=gk, gv=gv),
            )  # fmt: skip
    return gq, gk, gv


def _norm(x: Tensor, weight: Tensor | None, tx: Tensor | None, eps: float) -> dict[str, Any]:
    """The norm as a kernel takes it; over all heads its scalars are computed first."""
    if weight is None:
        return {"norm": None, "scalars": None}
    batches, heads, rows, width = x.shape
    if heads_of_norm(x, weight) == 1:
        eps = max(eps, 1e-38)  # for the zeros of rows beyond the last
        return {"norm": Norm(weight.contiguous(), 0, eps), "scalars": None}
    scalars = torch.empty((batches, rows, 2), dtype=torch.float32, device=x.device)
    if rows:
        options = _rows(heads, width) | ({} if x.is_cuda else {"TOKENS": _INTERPRETED.tokens})
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

    There are as many as a GPU holds at once, of a few tiles or more: those that would have to wait
    for others to end would have it for themselves.
    """
    batches, heads, rows, _ = tensors[0].shape
    kind = "state" if tstate is None else "state tangent"
    config, constants = _constants(
        state_kernel, kind if factors is None else "state gradient", tensors[0], state, setting
    )
    tile, blocks = config.tokens, triton.cdiv(constants["DV"], constants["BV"])
    held = 2**16 // (32 * config.warps * (config.registers or 128))
    splits = config.waves * _MULTIPROCESSORS * held // (batches * heads * blocks)
    splits = max(min(splits, triton.cdiv(rows, config.tiles * tile)), 1)
    span = triton.cdiv(max(rows, 1), splits * tile) * tile
    splits = max(triton.cdiv(rows, span), 1)
    sums = [s for s in (state, tstate) if s is not None]
    parts = sums if splits == 1 else [s.new_empty((splits, *s.shape)) for s in sums]
    state_kernel[(batches * heads * splits, blocks)](
        **_operands(**dict(zip(("k", "v", "tk", "tv"), tensors, strict=True))), **norm,
        factors=factors, state=parts[0], tstate=None if tstate is None else parts[1],
        states=batches * heads, heads=heads, rows=rows, span=span, **constants,
    )  # fmt: skip
    if splits > 1:
        options = _sum(splits)
        sum_kernel[(triton.cdiv(state.numel(), options["BLOCK"]), len(sums))](
            parts[0], sums[0], parts[-1], sums[-1], splits, state.numel(), **options
        )


def _apply(
    kernel: Any, kind: str, x: Tensor, setting: Setting, *, state: Tensor, **arguments: Any
) -> None:
    """One program for each head and a few tiles of tokens of x, which share what it makes of S."""
    batches, heads, rows, _ = x.shape
    config, constants = _constants(kernel, kind, x, state, setting)
    if rows:
        span = config.tiles * config.tokens
        programs = batches * heads * triton.cdiv(rows, span)
        kernel[(programs,)](
            state=state, **arguments, **constants, heads=heads, rows=rows, span=span
        )


def _constants(
    kernel: Any, kind: str, x: Tensor, state: Tensor, setting: Setting
) -> tuple[Config, dict[str, Any]]:
    width, columns = state.shape[2:]
    config, precision, exact = _INTERPRETED, "ieee", _exact(x.dtype, setting.feature_map)
    if x.is_cuda:
        hopper = torch.cuda.get_device_capability(x.device) == (9, 0)
        widest = max(width, columns - 1)
        config = _config(kind, widest, x.dtype, exact, hopper)
        precision = _precision(x.dtype, exact, widest)
    options = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.registers}
    kinds = {"FEATURE": setting.feature_map, "EXACT": exact, "PRECISION": precision}
    sizes = _widths(width, columns - 1, kind, precision)
    return config, sizes | kinds | _tile(kernel, config) | options


def _tile(kernel: Any, config: Config) -> dict[str, int]:
    sizes = {"TOKENS": config.tokens, "COPIES": config.copies}
    return {name: size for name, size in sizes.items() if name in kernel.arg_names}


def _widths(width: int, v_width: int, kind: str, precision: str) -> dict[str, int]:
    """Head dims, and the block of D and columns of v that a kernel takes at once.

    Without tensor cores a thread has all of a wide head's row, and room for few columns beside it.
    """
    block, v_block = (max(triton.next_power_of_2(w), 16) for w in (width, v_width))
    columns = min(v_block, 64 if max(block, v_block) <= 64 else 32)
    if max(block, v_block) > 32 and precision == "ieee" and not kind.startswith("state"):
        columns = 16
    return {"D": width, "DV": v_width, "BD": block, "BV": columns}


def _rows(heads: int, width: int) -> dict[str, int]:
    """A token a warp, two for wide heads, and as many heads at once as make 8 columns a thread."""
    block = triton.next_power_of_2(width)
    warps = 4 if block <= 64 else 8
    together = min(triton.next_power_of_2(heads), max(warps * 64 // block, 1))
    sizes = {"HEADS": together, "TOKENS": 4, "num_warps": warps}
    return {"ALL": heads, "D": width, "BD": block} | sizes


def _sum(splits: int) -> dict[str, int]:
    """Parts and elements that a program reads at once, 16 numbers a thread."""
    parts = triton.next_power_of_2(splits)
    return {"SPLITS": parts, "BLOCK": max(2048 // parts, 128), "num_warps": 4}


def _precision(dtype: torch.dtype, exact: bool, width: int) -> str:
    """Three products of halves: of bf16, which together have 16 digits, or of TF32, with 22.

    Tensor cores cut off what they add, so fp32 does without, as PyTorch's products then do. Wide
    heads have no registers for halves of TF32.
    """
    if dtype == torch.bfloat16:
        return "bf16" if exact else "bf16x3"
    if width > 32 or (dtype == torch.float32 and not may_use_tf32()):
        return "ieee"
    return "tf32x3"


def _exact(dtype: torch.dtype, feature_map: str) -> bool:
    """Whether a tile's factor keeps its numbers of bf16; see the kernels."""
    return dtype == torch.bfloat16 and feature_map != "elu+1"


_VARIANTS = (
    ("state", state_kernel, ("tk", "tv", "tstate", "factors")),
    ("state tangent", state_kernel, ("factors",)),
    ("state tangent, heads with norms of their own", state_kernel, ("factors", "scalars")),
    ("state gradient", state_kernel, ("tk", "tv", "tstate")),
    ("output", output_kernel, ("tq", "tstate", "to")),
    ("output tangent", output_kernel, ()),
    ("queries", queries_kernel, ()),
    ("keys", keys_kernel, ()),
)
"""Every kernel with the arguments that are absent in a use of it, whose name says its kind."""


def audit_cases() -> Iterator[AuditCase]:
    """What `impl="auto"` takes, at head dims of every class, with norms over all heads."""
    known = dict.fromkeys(("state", "tstate", "factors", "scalars"), "*fp32") | {"eps": "fp32"}
    known |= dict.fromkeys(("batches", "states", "heads", "rows", "span"), "i32")
    known["norm"] = Norm("*fp32", "i32", "fp32")
    for width in (32, 64, 72, 112, 128):
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        for short, dtype in dtypes.items():
            tensor = Operand(f"*{short}", "i32", "i32", "i32", "i32")
            for tangent in (None, tensor):
                types = {n: known.get(n, tensor) for n in _names(statistics_kernel)}
                constants = _rows(36, width) | {"UNIT": 8}
                warps = constants.pop("num_warps")
                name = f"linear_attention {short} D={width} statistics{' tangent' * bool(tangent)}"
                yield AuditCase(name, statistics_kernel, types | {"tx": tangent}, constants, warps)
            for name, kernel, absent in _VARIANTS:
                types = {n: None if n in absent else known.get(n, tensor) for n in _names(kernel)}
                exact, kind = _exact(dtype, "relu"), name.partition(",")[0]
                precision = _precision(dtype, exact, width)
                constants = _widths(width, width, kind, precision) | {"PRECISION": precision}
                constants |= {"FEATURE": "relu", "UNIT": 8, "EXACT": exact}
                name = f"linear_attention {short} D={width} {name}"
                for hopper, architectures in ((True, (90,)), (False, (80, 100))):
                    config = _config(kind, width, dtype, exact, hopper)
                    yield AuditCase(
                        name, kernel, types, constants | _tile(kernel, config), config.warps,
                        config.stages, architectures, registers=config.registers,
                    )  # fmt: skip
    types = dict.fromkeys(("parts", "total", "tparts", "ttotal"), "*fp32")
    types |= dict.fromkeys(("splits", "size"), "i32")
    options = {name: size for name, size in _sum(4).items() if name.isupper()}
    yield AuditCase("linear_attention sum of splits", sum_kernel, types, options, 4)


def _names(kernel: Any) -> list[str]:
    return [n for n in kernel.arg_names if not n.isupper()]
