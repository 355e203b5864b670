"""When is a result right? The error of the reference in the documented precision sets the bar.

Truth is the reference in fp64 on the same rounded inputs. The baseline is the reference in the
precision that the op documents: fp32 arithmetic, and rounding at its stores for bf16 and fp16. A
result passes when its error is that of the baseline up to small factors; there are no absolute
tolerances. A baseline of n numbers is itself a random draw whose RMS scatters by about 1/√(2n), so
the factors grow by 2/√n: nothing at real sizes, and enough for tensors of eight elements. Where
all arithmetic rounds (fp32, fp64), a row's statistics are one draw that its elements share: n
counts rows then, and a row, like the largest error, is granted one unit in the last place; where
only stores round, a quarter and a half.

Where an op subtracts nearly equal numbers, a single baseline says little about the next: it then
passes `noise`, which is part of the yardstick, and the `rank` of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Values = list[Tensor | None]
RMS, LARGEST, ROW = 1.25, 2.0, 2.0


def faults(
    name: str, actual: Tensor, truth: Tensor, baseline: Tensor, dtype: torch.dtype,
    noise: Tensor | None = None, rank: int | None = None,
) -> list[str]:  # fmt: skip
    """The sentences that say how `actual` fails the policy; empty where it passes.

    Args:
        actual: the result, of any floating dtype.
        truth, baseline: fp64 tensors of the same shape.
        dtype: the dtype whose rounding the result carries.
        noise: how far the truth moves where what is read is off by a unit in the last place.
        rank: of how many vectors a row is a combination, where that is less than its width: its
            error then is that many draws.
    """
    if actual.shape != truth.shape:
        return [f"{name}: shape {list(actual.shape)}, expected {list(truth.shape)}"]
    truth, baseline = truth.detach(), baseline.detach()
    actual = actual.detach().to("cpu", torch.float64)
    if not all(torch.equal(f(actual), f(truth)) for f in (torch.isfinite, torch.isnan)):
        return [f"{name}: not finite in other places than the truth"]
    if actual.numel() == 0:
        return []
    error, allowed = (torch.nan_to_num(v - truth) for v in (actual, baseline))
    truth = torch.nan_to_num(truth)
    noise = torch.zeros_like(truth) if noise is None else noise
    rows, rows_allowed, rows_truth, rows_noise = (
        v.reshape(-1, v.shape[-1] if v.ndim else 1).square().mean(-1).sqrt()
        for v in (error, allowed, truth, noise)
    )
    # An exact baseline (all errors zero) still grants units in the last place.
    eps, stores_only = torch.finfo(dtype).eps, dtype.itemsize < 4
    of_largest, of_row = (0.5, 0.25) if stores_only else (1.0, 1.0)
    slack = 1 + 2 / (error.numel() if stores_only else _draws(rows_noise)) ** 0.5
    found = []
    limit = RMS * slack * max(_rms(allowed), 0.5 * eps * _rms(truth), 0.5 * _rms(noise))
    if (e := _rms(error)) > limit:
        found.append(f"{name}: RMS error {e:.3g} > {limit:.3g}")
    granted = max(of_largest * eps * _largest(truth), _largest(noise))
    limit = LARGEST * slack * max(_largest(allowed), granted)
    if (e := _largest(error)) > limit:
        found.append(f"{name}: largest error {e:.3g} > {limit:.3g}")
    row_slack = 1 + 2 / min(error.numel() // rows.numel(), rank or error.numel()) ** 0.5
    # Also what a factor of the row loses that underflows.
    granted = of_row * eps * rows_truth + torch.finfo(torch.float32).tiny * _largest(truth)
    if not stores_only:  # a lucky row of the baseline counts as a typical one
        rows_allowed = rows_allowed.clamp_min(_rms(rows_allowed))
    limits = row_slack * (ROW * torch.hypot(rows_allowed, rows_noise) + granted)
    if bool((bad := rows > limits).any()):
        i = int((rows - limits).argmax())
        found.append(
            f"{name}: {int(bad.sum())} rows too far off, row {i} by {float(rows[i]):.3g} "
            f"where {float(limits[i]):.3g} is the limit"
        )
    return found


def spread(
    truth: Sequence[Tensor | None], disturbed: Callable[[], Sequence[Tensor | None]]
) -> Values:
    """The `noise` of each result: its RMS distance from the truth over six disturbed draws."""
    draws = 6
    squares = each(torch.zeros_like, truth)
    for _ in range(draws):
        for total, moved, t in zip(squares, disturbed(), truth, strict=True):
            if total is not None:
                total += torch.nan_to_num(moved.detach() - t).square() / draws
    return each(Tensor.sqrt, squares)


def each(f: Callable[[Tensor], Tensor], values: Iterable[Tensor | None]) -> Values:
    """f of every tensor; what is absent stays so."""
    return [None if x is None else f(x) for x in values]


def exact(x: Tensor) -> Tensor:
    """The tensor in fp64 on the CPU."""
    return x.detach().to("cpu", torch.float64)


def unit(q: Tensor) -> float:
    """How far off fp32 products of rows of queries are: a unit in the last place times 0.29 √D.

    Each step of a sum of D terms rounds it by up to half a unit, in RMS 0.29; at least two units
    for 16-bit inputs, whose products the baseline happens to compute exactly.
    """
    eps = torch.finfo(torch.promote_types(q.dtype, torch.float32)).eps
    return eps * max(2 if q.dtype.itemsize < 4 else 1, 0.29 * q.shape[3] ** 0.5)


def signs(x: Tensor, generator: torch.Generator) -> Tensor:
    """1 or −1 for each element, at random."""
    return torch.randint(2, x.shape, generator=generator) * 2 - 1


def _draws(rows_noise: Tensor) -> float:
    """How many rows a statistic averages over: those whose noise makes up most of all noise."""
    energy = rows_noise.square()
    total = float(energy.sum())
    return total**2 / float(energy.square().sum()) if total else rows_noise.numel()


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
