"""Triton kernels of rms_norm: one program holds one row (forward) or walks a chunk (backward)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tbcm_kernels._library import fresh, unit_stride
from tbcm_kernels._triton import AuditCase, device_of, row_config


@triton.jit
def _row(pointer, row, stride, columns, mask):
    return tl.load(pointer + row * stride + columns, mask, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(x, weight, tx, tweight, y, ty, xs, txs, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < width
    v = _row(x, row, xs, c, mask)
    r = tl.rsqrt(tl.sum(v * v, 0) / width + eps)
    w = tl.full((BLOCK,), 1.0, tl.float32)
    if weight is not None:
        w = _row(weight, 0, 0, c, mask)
    tl.store(y + row * width + c, (w * v * r).to(y.dtype.element_ty), mask)
    if ty is not None:
        value = tl.zeros((BLOCK,), tl.float32)
        if tx is not None:
            tv = _row(tx, row, txs, c, mask)
            value += w * r * (tv - v * r * r * (tl.sum(v * tv, 0) / width))
        if tweight is not None:
            value += _row(tweight, 0, 0, c, mask) * v * r
        tl.store(ty + row * width + c, value.to(ty.dtype.element_ty), mask)


@triton.jit
def backward_kernel(gy, x, weight, gx, gw, gys, xs, rows, width, chunk, eps, BLOCK: tl.constexpr):
    part = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < width
    w = tl.full((BLOCK,), 1.0, tl.float32)
    if weight is not None:
        w = _row(weight, 0, 0, c, mask)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(part * chunk, tl.minimum((part + 1) * chunk, rows)):
        v, g = _row(x, row, xs, c, mask), _row(gy, row, gys, c, mask)
        r = tl.rsqrt(tl.sum(v * v, 0) / width + eps)
        total += g * v * r
        g *= w
        grad = r * (g - v * r * r * (tl.sum(v * g, 0) / width))
        tl.store(gx + row * width + c, grad.to(gx.dtype.element_ty), mask)
    if gw is not None:
        tl.store(gw + part * width + c, total, mask)


def forward(
    x: Tensor, weight: Tensor | None, tx: Tensor | None, tweight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """See reference.forward."""
    y = fresh(x)
    ty = None if tx is None and tweight is None else fresh(x)
    if x.numel():
        x, tx = _rows(x), _rows(tx)
        block, warps = row_config(x.shape[1])
        with device_of(x):
            forward_kernel[(x.shape[0],)](
                x, _flat(weight), tx, _flat(tweight), y, ty, x.stride(0),
                0 if tx is None else tx.stride(0), x.shape[1], eps, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return y, ty


def backward(
    gy: Tensor, x: Tensor, weight: Tensor | None, needs_weight: bool, chunk: int, eps: float
) -> tuple[Tensor, Tensor | None]:
    """See reference.backward."""
    gx = fresh(x)
    gy, x = _rows(gy), _rows(x)
    rows, width = x.shape
    chunks = triton.cdiv(rows, chunk)
    gw = None
    if needs_weight:
        gw = torch.empty(chunks, width, dtype=torch.float32, device=x.device)
    if x.numel():
        block, warps = row_config(width)
        with device_of(x):
            backward_kernel[(chunks,)](
                gy, x, _flat(weight), gx, gw, gy.stride(0), x.stride(0), rows, width, chunk, eps,
                BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return gx, gw


def _rows(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    return unit_stride(x.reshape(-1, x.shape[-1]))


def _flat(w: Tensor | None) -> Tensor | None:
    return None if w is None else w.contiguous()


def audit_cases() -> Iterator[AuditCase]:
    """The shipped configs, at the widths of the built-in case and of SANA."""
    for width in (128, 1152, 2240):
        block, warps = row_config(width)
        for dtype in ("fp32", "bf16"):
            pointers = dict.fromkeys(("x", "tx", "y", "ty", "gy", "gx"), f"*{dtype}")
            pointers |= {"weight": "*fp32", "tweight": None, "gw": "*fp32", "eps": "fp32"}
            for kernel, part in ((forward_kernel, "forward"), (backward_kernel, "backward")):
                types = {n: pointers.get(n, "i64") for n in kernel.arg_names[:-1]}
                name = f"rms_norm {dtype} C={width} {part}"
                yield AuditCase(name, kernel, types, {"BLOCK": block}, warps)
