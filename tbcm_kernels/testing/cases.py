"""The cases that every implementation of an op is checked on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Case:
    """Inputs of one call in the order of the op's arguments; None where an input is absent."""

    op: str
    name: str
    primals: list[Tensor | None]
    tangents: list[Tensor | None]
    eps: float = 1e-6
    arguments: list[str] = field(default_factory=list)


SHAPES = [
    (1, 1, 8), (2, 3, 4), (2, 15, 127), (1, 16, 128), (2, 17, 129), (1, 33, 320), (1, 2, 1152),
    (1, 2, 2240), (3, 7, 31), (0, 4, 16), (2, 0, 16),
]  # fmt: skip
"""One tile, one less, one more, primes, SANA's widths, nothing."""


def cases(op: str, dtype: torch.dtype, device: str = "cpu", few: bool = False) -> Iterator[Case]:
    """All cases of one op; `few` leaves out most shapes, for slow implementations."""
    torch.manual_seed(0)
    make = {"adaln": _adaln, "rms_norm": _rms_norm}[op]
    shapes = SHAPES[2:5] + SHAPES[-2:] if few else SHAPES
    for shape in shapes:
        yield make(f"shape {shape}", shape, dtype, device)
    shape = (2, 5, 48)
    for scale in (1e-2, 1e2):
        yield make(f"tangents at {scale}", shape, dtype, device, tangent_scale=scale)
    yield make("values at 30", shape, dtype, device, value_scale=30.0)
    yield make("slices of larger buffers", shape, dtype, device, sliced=True)
    yield from _subsets(op, shape, dtype, device)


def _subsets(op: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Iterator[Case]:
    if op == "rms_norm":
        yield _rms_norm("no weight", shape, dtype, device, present="x", moving="x")
        for moving in ("x", "w", ""):
            yield _rms_norm(f"tangents of {moving or 'none'}", shape, dtype, device, moving=moving)
        return
    yield _adaln("per token", shape, dtype, device, modulation=(2, 5, 48))
    yield _adaln("shared modulation", shape, dtype, device, modulation=(48,))
    yield _adaln("narrow modulation", shape, dtype, device, modulation_dtype=dtype)
    for present in ("x", "xh", "xcs", "xhg", "xhcs", "xc", "xs"):
        yield _adaln(f"inputs {present}", shape, dtype, device, present=present, moving=present)
    for moving in ("", "x", "h", "g", "c", "s", "cs", "xh", "gcs"):
        yield _adaln(f"tangents of {moving or 'none'}", shape, dtype, device, moving=moving)


def _adaln(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str, *, present: str = "xhgcs",
    moving: str = "xhgcs", modulation: tuple[int, ...] | None = None, sliced: bool = False,
    modulation_dtype: torch.dtype = torch.float32, tangent_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Case:  # fmt: skip
    small = modulation or (shape[0], 1, shape[2])
    if dtype == torch.float64:
        modulation_dtype = dtype

    def draw(letters: str, factor: float) -> list[Tensor | None]:
        return [
            _random(shape if n in "xh" else small, dtype if n in "xh" else modulation_dtype, device,
                    factor if n in "xh" or factor != value_scale else 1.0, sliced)
            if n in letters and n in present else None
            for n in "xhgcs"
        ]  # fmt: skip

    names = ["x", "h", "gate", "scale", "shift"]
    return Case(
        "adaln", name, draw(present, value_scale), draw(moving, tangent_scale), 1e-6, names
    )


def _rms_norm(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str, *, present: str = "xw",
    moving: str = "xw", sliced: bool = False, tangent_scale: float = 1.0, value_scale: float = 1.0,
) -> Case:  # fmt: skip
    def draw(letters: str, factor: float) -> list[Tensor | None]:
        weight = torch.float64 if dtype == torch.float64 else torch.float32
        return [
            _random(s, d, device, factor, sliced and n == "x") if n in letters and n in present else None
            for n, s, d in (("x", shape, dtype), ("w", shape[-1:], weight))
        ]

    return Case(
        "rms_norm", name, draw(present, value_scale), draw(moving, tangent_scale), 1e-5, ["x", "weight"]
    )


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
