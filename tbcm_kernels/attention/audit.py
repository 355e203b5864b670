"""What the static audit compiles of attention's Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tbcm_kernels._triton import AuditCase
from tbcm_kernels.attention import triton as kernels
from tbcm_kernels.attention.triton_backward import keys_kernel, queries_kernel, rows_kernel
from tbcm_kernels.attention.triton_tiles import Mask, Operand, chunks_of

_MAY_SPILL = {((9, 0), "keys tangent"): 256}
"""A third stage of loads takes 18% off its time, spills and all."""
_MASKED_MAY_SPILL = 2048
"""A tile of an attn_mask has 64-bit addresses, which cost registers; to fit is what counts."""
_AUDITED = {
    "forward": (kernels.forward_kernel, ("none", "none causal", "none masked")),
    "forward tangent": (kernels.forward_kernel, ("q", "all", "all causal", "all masked")),
    "forward lanes": (kernels.forward_kernel, ("all",)),
    "keys": (keys_kernel, ("none", "none causal", "none masked")),
    "keys tangent": (keys_kernel, ("q", "all", "all causal", "all masked")),
    "queries": (queries_kernel, ("none", "none causal", "none masked")),
    "queries tangent": (queries_kernel, ("q", "all", "all causal", "all masked")),
}
"""The kernel of each kind, and the tangents and masks that it is compiled with."""


def audit_cases() -> Iterator[AuditCase]:
    """The pinned configs at head dims of every width class; 72 and 112 are SANA's.

    Not fp32, and not the backward through the tangent at head dims above 128: both spill.
    """
    yield from _other_audits()
    for width in (64, 72, 112, 128, 256):
        for kind, (_, parts) in _AUDITED.items():
            if width > 128 and kind in ("keys tangent", "queries tangent"):
                continue
            if width > 64 and kind == "forward lanes":
                continue
            for part in parts:
                if "masked" in part and width in (72, 112):  # 64 and 128 have as large tiles
                    continue
                for gpu in kernels._PINNED:
                    yield from _audits(kind, part, width, gpu)


def _other_audits() -> Iterator[AuditCase]:
    """Norms of SANA's 16 heads of 72, of one lane of tangents and of several, and row scalars."""
    tensor = Operand("*bf16", "i32", "i32", "i32", "i32")
    types = {"weight": "*fp32", "eps": "fp32"} | dict.fromkeys(("heads", "rows", "queries"), "i32")
    types |= dict.fromkeys(("glse", "gmu", "a", "d"), "*fp32")
    shape = {"WIDTH": 72, "BLOCK": 128}
    for name, kernel, constants, warps in (
        ("norm each", kernels.norm_kernel, shape | {"ACROSS": False, "HEADS": 8}, 4),
        ("norm all", kernels.norm_kernel, shape | {"ACROSS": True, "HEADS": 16, "lanes": 1}, 8),
        ("rows", rows_kernel, {"DV": 72, "V_CHUNKS": chunks_of(72), "UNIT": 8, "BM": 32}, 4),
    ):
        names = (n for n in kernel.arg_names if n not in constants)
        arguments = {n: "i32" if n == "lanes" else types.get(n, tensor) for n in names}
        yield AuditCase(f"attention bf16 {name}", kernel, arguments, constants, warps)


def _audits(kind: str, part: str, width: int, capability: tuple[int, int]) -> Iterator[AuditCase]:
    """One config of bf16 in each of its launches, with the tangents "none", "q" or "all".

    It may be causal, or masked in fp32, whose tiles are the largest.
    """
    kernel, dtype = _AUDITED[kind][0], torch.bfloat16
    absent = {"key_mask"}
    absent |= {n for n, word in (("causal", "causal"), ("mask", "masked")) if word not in part}
    if "none" in part:
        absent |= {"tq", "tk", "tv", "to", "gto", "gtq", "gtk", "gtv", "mu", "a"}
    elif "q" in part:
        absent |= {"tk", "tv", "gtk", "gtv"}
    arguments: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in absent:
            arguments[name] = None
        elif name in ("lse", "mu", "a", "d"):
            arguments[name] = "*fp32"
        elif name == "mask":
            arguments[name] = Mask("*fp32", "i32", "i32", "i32", "i32")
        elif name in ("heads", "groups", "queries", "keys", "causal", "bucket"):
            arguments[name] = "i32"
        elif name == "scale":
            arguments[name] = "fp32"
        elif not name.isupper():
            arguments[name] = Operand("*bf16", "i32", "i32", "i32", "i32")
    config = kernels._pinned(capability, kind, "causal" in part, width, dtype, "masked" in part)
    blocks = dict(zip(("BM", "BN"), config, strict=False))
    constants = kernels._widths(width, width) | {"UNIT": 8, "PRECISION": "ieee"}
    constants |= blocks
    if kernel is kernels.forward_kernel:
        constants["LANES"] = ("forward", "forward tangent", "forward lanes").index(kind)
    if kernel is keys_kernel:
        constants["SHARE"] = 1
    rows = blocks["BN" if kernel is keys_kernel else "BM"]
    outputs = [n for n in ("gk", "gv", "gtk", "gtv", "gq", "gtq") if n in arguments]
    for made in kernels._parts(kind, width, dtype, outputs) if outputs else [()]:
        others = dict.fromkeys(set(outputs) - set(made))
        names = " ".join(n for n in made if n and arguments[n])
        may_spill = _MASKED_MAY_SPILL if "masked" in part else _MAY_SPILL.get((capability, kind), 0)
        if names or not outputs:
            yield AuditCase(
                f"attention bf16 D={width} {kind} {part} {names}".rstrip(), kernel,
                arguments | others, constants, *config[2:], (10 * capability[0] + capability[1],),
                hgmma=rows >= 64, may_spill=may_spill,
            )  # fmt: skip
