"""The error policy itself: what it lets pass, and how little more it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tbcm_kernels.testing.compare import faults

DTYPES = (torch.float32, torch.bfloat16)


def values(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The truth [256, 64], a baseline's error of four units in the last place, and another's."""
    generator = torch.Generator().manual_seed(0)
    truth, error, other = torch.randn(3, 256, 64, generator=generator, dtype=torch.float64)
    unit = 4 * torch.finfo(dtype).eps
    return truth, unit * error, unit * other


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("harm", "found"),
    [("none", []), ("all", ["RMS"]), ("one", ["largest"]), ("row", ["1 rows too far off, row 5"])],
)
def test_an_error_a_little_above_the_baselines_is_a_fault(
    harm: str, found: list[str], dtype: torch.dtype
):
    truth, error, other = values(dtype)
    if harm == "all":
        other *= 1.5
    elif harm == "one":
        other[5, 7] = 2.3 * error.abs().max()
    elif harm == "row":
        other[5] = 3.5 * error[5].square().mean().sqrt() * other[5].sign()
    said = faults("y", truth + other, truth, truth + error, dtype)
    assert len(said) == len(found) and all(part in s for part, s in zip(found, said, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exact_baseline_grants_a_part_of_a_unit(dtype: torch.dtype):
    truth, error, _ = values(dtype)
    for units, passes in ((0.5 if dtype == torch.float32 else 0.15, True), (0.8, False)):
        scaled = units / 4 * error
        assert (not faults("y", truth + scaled, truth, truth, dtype)) == passes


def test_other_shapes_and_numbers_that_are_not_finite_are_faults():
    truth, error, _ = values(torch.float32)
    (shape,) = faults("y", truth[1:], truth, truth + error, torch.float32)
    assert "shape [255, 64], expected [256, 64]" in shape
    lost = truth.clone()
    lost[0, 0] = torch.nan
    hidden = truth.clone()
    hidden[0, 0] = -torch.inf  # as the log-sum-exp of a query that sees nothing
    for actual, want in ((lost, truth), (truth, lost), (lost, hidden)):
        (finite,) = faults("y", actual, want, want + error, torch.float32)
        assert "not finite in other places" in finite
