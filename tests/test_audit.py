"""The Triton kernels compile for every GPU generation, with nothing spilled, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# The widest and the most used configs; `python -m tbcm_kernels.testing.audit` compiles all.
PATTERN = (
    r"bf16 C=(1152|2240)( full)? |^attention bf16 D=72 (forward|keys|queries) tangent q "
    r"|linear_attention bf16 D=32 |(tangent_loss|trigflow) (bf16|fp32 loss)"
)


def test_no_spills() -> None:
    """In a process of its own: the interpreter, which these tests choose, compiles nothing."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "tbcm_kernels.testing.audit", PATTERN],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert {r["architecture"] for r in reports} == {80, 90, 100}
    ops = {r["name"].split()[0] for r in reports}
    assert ops >= {
        "adaln", "attention", "linear_attention", "rms_norm", "tangent_loss", "trigflow",
    }  # fmt: skip
    assert [r for r in reports if r["spilled"]] == []
