"""The error policy itself: what it lets pass, and how little more it does not."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tbcm_kernels import _dispatch
from tbcm_kernels.testing import check as harness
from tbcm_kernels.testing.cases import attention_case, cases
from tbcm_kernels.testing.check import check
from tbcm_kernels.testing.compare import faults, signs, spread, unit
from tbcm_kernels.testing.prove import Proof, proofs, prove

DTYPES = (torch.float32, torch.bfloat16)
proving = importlib.import_module("tbcm_kernels.testing.prove")  # whose name is a function's


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


def test_a_row_of_few_draws_has_more_room():
    truth, error, other = values(torch.float32)
    other[5] = 4 * error[5].square().mean().sqrt() * other[5].sign()
    for rank, count in ((None, 1), (64, 1), (1, 0)):
        said = faults("y", truth + other, truth, truth + error, torch.float32, rank=rank)
        assert len(said) == count


def test_noise_is_the_rms_of_what_disturbed_draws_move():
    two, absent = spread([torch.zeros(3), None], lambda: [torch.full((3,), -2.0), None])
    assert two.tolist() == [2, 2, 2] and absent is None
    drawn = signs(torch.empty(1000), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {-1, 1} and abs(drawn.sum()) < 200
    for dtype, width, eps in ((torch.float32, 100, 2.9), (torch.float32, 4, 1), (torch.half, 4, 2)):
        q = torch.empty(1, 1, 1, width, dtype=dtype)
        assert unit(q) == pytest.approx(eps * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(("lost", "says"), [(True, "missing"), (False, "there")])
def test_an_output_that_is_missing_or_not_asked_for_is_a_fault(
    lost: bool, says: str, monkeypatch: pytest.MonkeyPatch
):
    name = "shape (2, 3, 4)" if lost else "tangents of none"
    case = next(c for c in cases("rms_norm", torch.float32) if c.name == name)
    right = harness.run(case, "reference")
    (which,) = (i for i, n in enumerate(harness._names(case)) if n == "ty")
    wrong = [*right[:which], None if lost else right[0], *right[which + 1 :]]
    monkeypatch.setattr(harness, "run", lambda *_: wrong)
    assert [f"ty: is {says} and should not be" in f for f in check(case, "reference")] == [True]


def test_factors_are_rounded_for_triton_alone(monkeypatch: pytest.MonkeyPatch):
    third = torch.tensor(1 / 3, dtype=torch.float64)
    for impl, dtype, rounds in (
        ("cpu", torch.bfloat16, False), ("triton", torch.bfloat16, True),
        ("triton", torch.float32, False),
    ):  # fmt: skip
        monkeypatch.setattr(harness._dispatch, "choose", lambda op, impl, x: impl)
        case = attention_case("a", dtype, sizes=(1, 1, 1, 2, 2, 8, 8))
        assert (harness._operand(case, impl)(third) != third) == rounds


@pytest.mark.parametrize(
    ("share", "largest", "found"),
    [(0.65, 0.65, []), (0.8, 0.8, ["RMS"]), (0.1, 2.15, []), (0.1, 2.4, ["largest"])],
)
def test_noise_is_a_part_of_the_yardstick(share: float, largest: float, found: list[str]):
    """Half of it in RMS, all of it in the largest error, beside a baseline that is exact."""
    truth, error, _ = values(torch.float32)
    noise = torch.full_like(truth, 1e-3)
    off = share * 1e-3 * error.sign()
    off[5, 7] = largest * 1e-3
    said = faults("y", truth + off, truth, truth, torch.float32, noise)
    assert len(said) == len(found) and all(part in s for part, s in zip(found, said, strict=True))


def test_a_proof_of_adaln_has_the_mixed_dtypes_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proving, "mixed_faults", lambda impl, device: ["mixed"])
    monkeypatch.setattr(proving, "_faults", lambda case, impl: [])
    found = [
        prove("adaln", "reference", "cpu", torch.float32, share=(i, 2)).faults for i in range(2)
    ]
    assert found == [["mixed"], []]


def test_mixed_dtypes_that_are_off_are_faults(monkeypatch: pytest.MonkeyPatch):
    right = proving._mixed

    def off(drawn: list[Tensor], dtype: torch.dtype, impl: str) -> list[Tensor]:
        return [x * (1.0 if dtype == torch.float32 else 1.05) for x in right(drawn, dtype, impl)]

    monkeypatch.setattr(proving, "_mixed", off)
    found = " ".join(proving.mixed_faults("reference", "cpu"))
    for dtype in (torch.bfloat16, torch.float16):
        for name in ("y", "ty"):
            assert f"{dtype} beside fp32, (2, 17, 1152)] reference: {name}" in found


def test_every_dtype_and_shape_is_proved_and_a_crash_is_a_fault(monkeypatch: pytest.MonkeyPatch):
    def crash(case: object, impl: str) -> list[str]:
        raise RuntimeError("no launch\nmore")

    monkeypatch.setattr(_dispatch, "OPS", {"rms_norm": _dispatch.OPS["rms_norm"]})
    monkeypatch.setattr(proving, "check", crash)
    found = list(proofs("reference", device="cpu"))
    assert {p.impl for p in found} == {"reference"}
    assert {p.dtype for p in found} == {torch.float32, torch.bfloat16, torch.float16}
    for proof in found:
        assert len(proof.faults) == proof.cases >= 28 and len(proof.row()["faults"]) == proof.cases
        assert proof.faults[0] == "rms_norm[shape (2, 3, 4)] reference: RuntimeError: no launch"


def test_faults_and_cases_of_every_process_are_in_the_proof(monkeypatch: pytest.MonkeyPatch):
    def proved(*what: object) -> Proof:
        *what, _, (part, parts) = what
        return Proof(*what, 10 + part, [f"{part} of {parts}"] if part else [])

    monkeypatch.setattr(proving, "prove", proved)
    monkeypatch.setattr(proving, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(_dispatch, "OPS", {"rms_norm": _dispatch.OPS["rms_norm"]})
    found = list(proofs("reference", device="cpu", jobs=3))
    assert [p.dtype for p in found] == list(proving.DTYPES)
    for proof in found:
        assert proof.cases == 33 and proof.faults == ["1 of 3", "2 of 3"]


def test_cases_hold_what_their_names_say():
    """NaN around slices and at hidden keys, queries that see nothing, both ends of time."""
    of_adaln = {c.name: c for c in cases("adaln", torch.float32)}
    x = of_adaln["slices of larger buffers"].primals[0]
    around = torch.tensor([]).set_(x.untyped_storage())
    assert x.isfinite().all() and around.isnan().sum() == around.numel() - x.numel()
    of_attention = {c.name: c for c in cases("attention", torch.float32)}
    masked = of_attention["key mask"]
    hidden = ~masked.options["key_mask"][:, None, :, None]
    assert hidden[-1].all() and not hidden[0].all()
    for keys in (*masked.primals[1:3], *masked.tangents[1:3]):
        assert torch.equal(keys.isnan(), hidden.expand_as(keys))
    assert not of_attention["mask bool NS"].options["attn_mask"][0].any()
    assert of_attention["mask holes BHNS"].options["attn_mask"][:, :, 0].isneginf().all()
    (ends,) = (
        c for c in cases("trigflow", torch.float32)
        if c.op == "flow_input" and c.name == "ends of the time axis"
    )  # fmt: skip
    assert {round(t, 4) for t in ends.primals[1].tolist()} == {0.0, 1.5708}
