"""The cases that every implementation of an op is checked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each argument, in the order of the op's arguments."""
ACTIVATIONS = {"x", "h", "a"}


@dataclass
class Case:
    """Inputs of one call in the order of the op's arguments; None where an input is absent."""

    op: str
    name: str
    arguments: list[str]
    primals: list[Tensor | None]
    tangents: list[Tensor | None]
    options: dict[str, Any]


def cases(op: str, dtype: torch.dtype, device: str = "cpu", few: bool = False) -> Iterator[Case]:
    """All cases of one op; `few` leaves out most shapes, for slow implementations."""
    torch.manual_seed(0)
    for name, layout, options, change in _plans(op, dtype, few):
        yield _draw(op, name, layout, options, device, **change)


def _plans(op: str, dtype: torch.dtype, few: bool) -> Iterator[tuple[str, Layout, dict, dict]]:
    shapes, layout_of, subsets = OPS[op]
    for shape in shapes[2:5] + shapes[-1:] if few else shapes:
        layout, options = layout_of(shape, dtype)
        yield f"shape {shape}", layout, options, {}
    shape = shapes[1]
    layout, options = layout_of(shape, dtype)
    for factor in (1e-2, 1e2):
        yield f"tangents at {factor}", layout, options, {"tangent_scale": factor}
    yield "values at 30", layout, options, {"value_scale": 30.0}
    yield "slices of larger buffers", layout, options, {"sliced": True}
    yield "tangents of none", layout, options, {"moving": ()}
    for moving in layout:
        yield f"tangent of {moving}", layout, options, {"moving": (moving,)}
    yield from subsets(layout, options, dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _adaln_layout(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Layout, dict]:
    small = ((shape[0], 1, shape[2]), _wide(dtype))
    layout = {"x": (shape, dtype), "h": (shape, dtype)}
    return layout | {"gate": small, "scale": small, "shift": small}, {"eps": 1e-6}


def _adaln_subsets(
    layout: Layout, options: dict, dtype: torch.dtype
) -> Iterator[tuple[str, Layout, dict, dict]]:
    shape = layout["x"][0]
    variants = {"per token": (shape, _wide(dtype)), "shared": (shape[-1:], _wide(dtype))}
    variants["narrow"] = ((shape[0], 1, shape[2]), dtype)
    for name, small in variants.items():
        changed = layout | dict.fromkeys(("gate", "scale", "shift"), small)
        yield f"{name} modulation", changed, options, {}
    mixed = {"gate": (shape, _wide(dtype)), "shift": (shape[-1:], _wide(dtype))}
    yield "mixed modulation", layout | mixed, options, {}
    for names in ("x", "x h", "x h gate", "x scale shift", "x h scale shift", "x scale", "x shift"):
        change = {"present": names.split(), "moving": names.split()}
        yield f"inputs {names}", layout, options, change
    for names in ("scale shift", "x h", "gate scale shift"):
        yield f"tangents of {names}", layout, options, {"moving": names.split()}


def _rms_norm_layout(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Layout, dict]:
    return {"x": (shape, dtype), "weight": (shape[-1:], _wide(dtype))}, {"eps": 1e-5}


def _rms_norm_subsets(
    layout: Layout, options: dict, dtype: torch.dtype
) -> Iterator[tuple[str, Layout, dict, dict]]:
    yield "no weight", layout, options, {"present": ["x"], "moving": ["x"]}


def _conv_glu_layout(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Layout, dict]:
    batch, height, width, channels = shape
    layout = {
        "a": ((batch, height * width, 2 * channels), dtype),
        "weight": ((2 * channels, 1, 3, 3), _wide(dtype)),
        "bias": ((2 * channels,), _wide(dtype)),
    }
    return layout, {"height": height, "width": width}


def _conv_glu_subsets(
    layout: Layout, options: dict, dtype: torch.dtype
) -> Iterator[tuple[str, Layout, dict, dict]]:
    change = {"present": ["a", "weight"], "moving": ["a"]}
    yield "no bias", layout, options, change


ROWS = [
    (2, 3, 4), (2, 5, 48), (2, 15, 127), (1, 16, 128), (2, 17, 129), (1, 33, 320), (1, 2, 1152),
    (1, 2, 2240), (2, 150, 320), (3, 7, 31), (1, 1, 8), (2, 0, 16), (0, 4, 16),
]  # fmt: skip
"""One tile, one less, one more, SANA's widths, enough for several threads, primes, nothing."""
GRIDS = [
    (1, 1, 1, 4), (2, 3, 5, 24), (1, 4, 4, 16), (2, 5, 3, 15), (1, 2, 7, 17), (1, 4, 4, 320),
    (2, 8, 8, 33), (2, 16, 16, 40), (1, 1, 6, 8), (0, 2, 2, 4),
]  # fmt: skip
"""Square and not, narrower than the stencil, around a block, for several threads, nothing."""
OPS: dict[str, tuple[list[tuple[int, ...]], Callable, Callable]] = {
    "adaln": (ROWS, _adaln_layout, _adaln_subsets),
    "rms_norm": (ROWS, _rms_norm_layout, _rms_norm_subsets),
    "conv_glu": (GRIDS, _conv_glu_layout, _conv_glu_subsets),
}


def _draw(
    op: str, name: str, layout: Layout, options: dict, device: str, *,
    present: list[str] | None = None, moving: list[str] | None = None, sliced: bool = False,
    tangent_scale: float = 1.0, value_scale: float = 1.0,
) -> Case:  # fmt: skip
    present = list(layout) if present is None else present
    moving = present if moving is None else moving

    def tensors(names: list[str], factor: Callable[[str], float]) -> list[Tensor | None]:
        return [
            _random(shape, dtype, device, factor(n), sliced and n in ACTIVATIONS)
            if n in names
            else None
            for n, (shape, dtype) in layout.items()
        ]

    primals = tensors(present, lambda n: value_scale if n in ACTIVATIONS else 1.0)
    tangents = tensors(moving, lambda _: tangent_scale)
    return Case(op, name, list(layout), primals, tangents, options)


def _random(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, factor: float, sliced: bool
) -> Tensor:
    """Normal values; as a slice of a larger buffer whose other elements are NaN where asked."""
    x = (factor * torch.randn(shape, dtype=torch.float64)).to(device, dtype)
    if not sliced:
        return x
    buffer = torch.full([s + 3 for s in shape], float("nan"), dtype=dtype, device=device)
    window = buffer[tuple(slice(1, s + 1) for s in shape)]
    return window.copy_(x)
