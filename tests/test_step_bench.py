"""The benchmark of a step: it refuses what is wrong and reports medians of what is right."""

from __future__ import annotations

import pytest

from tbcm.errors import UserError
from tbcm.step_bench import PHASES, check_agreement, report

ROW = {"step": 1, "loss": 1.0, "g_norm": 2.0, "grad_norm": 3.0}


@pytest.mark.parametrize("key", ["loss", "g_norm", "grad_norm"])
@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_modes_that_disagree_are_not_timed(key: str, wrong: float):
    check_agreement({"eager": [ROW], "fused": [{**ROW, key: ROW[key] * 1.0001}]})
    with pytest.raises(UserError, match=f"{key} of step 1"):
        check_agreement({"eager": [ROW], "fused": [{**ROW, key: ROW[key] * wrong}]})


def test_report_has_medians_and_their_ratio():
    phases = dict.fromkeys(PHASES, 0.001)
    rows = {
        "eager": [{"step": s, **phases} for s in (0.020, 0.030, 0.040, 0.030)],
        "fused": [{"step": s, **phases} for s in (0.010, 0.010, 0.090, 0.010)],
    }
    result = report(rows, {"eager": 600.0, "fused": 500.0})
    assert result["eager"]["ms"] == pytest.approx(30) and result["fused"]["peak_mb"] == 500.0
    assert result["speedup"] == pytest.approx(3) and result["steps"] == 4
    assert result["eager"]["phases"] == pytest.approx(dict.fromkeys(PHASES, 1.0))
