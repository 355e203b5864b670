"""The benchmark of a step: it refuses what is wrong and reports medians of what is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tbcm.cli import main
from tbcm.errors import UserError
from tbcm.step_bench import (
    MODES,
    PHASES,
    Counts,
    Plan,
    check_agreement,
    lines,
    make_distiller,
    report,
)
from tbcm.train import METHODS

ROW = {"step": 1, "loss": 1.0, "g_norm": 2.0, "grad_norm": 3.0}
EAGER, FUSED = ("tbcm", "eager"), ("tbcm", "fused")
TOTALS = {"samples": 15, "launches": 7, "launches_are": "dispatcher calls", "saved_mb": 1.0}


@pytest.mark.parametrize("key", ["loss", "g_norm", "grad_norm"])
@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_modes_that_disagree_are_not_timed(key: str, wrong: float):
    check_agreement({EAGER: [ROW], FUSED: [{**ROW, key: ROW[key] * 1.0001}]}, 1e-3)
    with pytest.raises(UserError, match=f"{key} of step 1 of tbcm"):
        check_agreement({EAGER: [ROW], FUSED: [{**ROW, key: ROW[key] * wrong}]}, 1e-3)


def test_methods_are_not_compared_with_each_other():
    other = {key: 2 * value for key, value in ROW.items()}
    check_agreement({EAGER: [ROW], ("scm", "eager"): [other], FUSED: [ROW]}, 1e-3)


def test_report_has_medians_and_their_ratios():
    phases = dict.fromkeys(PHASES, 0.001)
    rows = {
        EAGER: [{"step": s, **phases} for s in (0.020, 0.030, 0.040, 0.030)],
        FUSED: [{"step": s, **phases} for s in (0.010, 0.010, 0.090, 0.010)],
        ("scm", "fused"): [{"step": s, **phases} for s in (0.020, 0.020)] * 2,
    }
    peaks = {EAGER: 600.0, FUSED: 500.0, ("scm", "fused"): 1000.0}
    result = report(rows, {v: {"peak_mb": peak, **TOTALS} for v, peak in peaks.items()})
    assert result["eager"]["ms"] == pytest.approx(30) and result["fused"]["peak_mb"] == 500.0
    assert result["speedup"] == pytest.approx(3) and result["steps"] == 4
    assert result["eager"]["phases"] == pytest.approx(dict.fromkeys(PHASES, 1.0))
    assert result["fused"]["samples_s"] == pytest.approx(1500)
    ours = result["against_scm"]
    assert ours["paper"] == {"memory": -0.641, "time": -0.417}
    assert ours["fused"] == pytest.approx({"memory": -0.5, "time": -0.5}) and "eager" not in ours
    assert "fused: memory -50.0%, time -50.0%" in "\n".join(lines({**result, "model": "digits"}))


@pytest.mark.parametrize("method", METHODS)
def test_random_sana_steps_and_its_counts(method: str) -> None:
    """The smallest model: fused saves less, and asks less of the dispatcher."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plan = Plan("sana-0.6b", layers=1, resolution=64, route_steps=3, gpu=False)
    assert plan.sizes()["reduced"] and plan.sizes()["of_layers"] == 28
    counts = {}
    for mode in ("eager", "fused"):
        distiller = make_distiller(method, mode, plan)
        counts[mode] = Counts(distiller).of_a_step(mode)
        assert distiller.step == 1 and distiller.skipped == 0
    torch.set_num_threads(threads)
    eager, fused = counts["eager"], counts["fused"]
    assert eager["samples"] == fused["samples"] == 2
    assert 0 < fused["launches"] < eager["launches"] and fused["saved_mb"] < eager["saved_mb"]


def test_sizes_of_a_gpu_are_the_models_own() -> None:
    sizes = Plan("sana-1.6b", gpu=True).sizes()
    assert not sizes["reduced"] and sizes["layers"] == 20 and sizes["resolution"] == 1024


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--modes fast", f"modes must be some of {', '.join(MODES)}"),
        ("--methods gan", f"methods must be some of {', '.join(METHODS)}"),
        ("--modes fused fused", "each once"),
        ("--steps 1", "steps must be at least 2"),
        ("--layers 3", "layers is for the SANA models"),
        ("--model sana-0.6b --resolution 500", "multiple of 32, not 500"),
    ],
)
def test_what_cannot_be_stepped_is_refused(
    argv: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "step.json"
    assert main(["bench", "step", "--json", str(out), *argv.split()]) == 2
    assert says in capsys.readouterr().err and not out.exists()


def test_the_committed_row_of_digits_reads() -> None:
    """The figures read these keys."""
    rows = Path(__file__).parents[1] / "bench" / "results" / "cpu-2-cores" / "digits-step.json"
    row = json.loads(rows.read_text())
    assert row["speedup"] == row["eager"]["ms"] / row["fused"]["ms"]
