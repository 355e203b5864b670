"""The Triton kernels compile for every GPU generation, with nothing spilled, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import audit as table
from tbcm_kernels.testing import audit
from tbcm_kernels.testing.audit import Report

KNOWN = Path(__file__).parents[1] / "bench/results/audit.jsonl"
# The widest and the most used configs; `make audit` compiles all that changed.
PATTERN = (
    r"bf16 C=(1152|2240)( full)? |^attention bf16 D=72 (forward|keys|queries) tangent q "
    r"|linear_attention bf16 D=32 |(tangent_loss|trigflow) (bf16|fp32 loss)"
)


def audited(*arguments: str | Path) -> tuple[list[dict], str]:
    """In a process of its own: the interpreter, which these tests choose, compiles nothing."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "tbcm_kernels.testing.audit", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()], run.stderr


def test_no_spills() -> None:
    """As they are now: of what `make audit` has compiled before, what it found then."""
    reports, _ = audited(PATTERN, "--known", KNOWN)
    assert {r["architecture"] for r in reports} == {80, 90, 100}
    ops = {r["name"].split()[0] for r in reports}
    assert ops >= {
        "adaln", "attention", "linear_attention", "rms_norm", "tangent_loss", "trigflow",
    }  # fmt: skip
    assert [r for r in reports if r["spilled"]] == []


def test_what_is_known_is_not_compiled_again(tmp_path: Path) -> None:
    """A row of another source, options or Triton has another key."""
    known, pattern = tmp_path / "audit.jsonl", "rms_norm bf16 C=1152 backward"
    rows, _ = audited(pattern)
    assert len(rows) == len({row["key"] for row in rows}) == 3
    told = [row | {"registers": 1} for row in rows[:2]]  # not what a compiler would say
    known.write_text("\n".join(json.dumps(row) for row in [*told, rows[2] | {"key": "0"}]))
    again, said = audited(pattern, "--known", known)
    assert [row["registers"] for row in again] == [1, 1, rows[2]["registers"]]
    assert again[2]["key"] == rows[2]["key"] and "1 configs are not in" in said


def test_what_fails_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A spill, a product without its tensor cores, too much shared memory; each alone."""
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "0")  # so that what main() sets does not stay
    tensor = SimpleNamespace(hgmma=True, may_spill=0)
    good = Report("k", 90, 64, 0, 1024, 8, 0, 4, 0.1)
    bad = {
        "spills": Report("k", 90, 255, 16, 1024, 8, 0, 4, 0.1),
        "does not use wgmma": Report("k", 90, 64, 0, 1024, 0, 8, 4, 0.1),
        "needs more shared memory than there is": Report("k", 80, 64, 0, 165 * 1024, 0, 8, 4, 0.1),
    }
    assert good.failure(tensor) is None
    assert bad["spills"].failure(SimpleNamespace(hgmma=True, may_spill=16)) is None
    for failure, report in bad.items():
        assert report.failure(tensor) == failure
        found = [(good, None), (report, failure)]
        monkeypatch.setattr(audit, "reports", lambda pattern, found=found: iter(found))
        assert table.main([]) == 1
        assert failure.upper() in capsys.readouterr().out
    monkeypatch.setattr(audit, "reports", lambda pattern: iter([(good, None)]))
    assert table.main([]) == 0
    monkeypatch.setattr(audit, "reports", lambda pattern: iter([]))
    assert table.main(["no such kernel"]) == 1


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "bound"),
    [(64, 0, 4, 32), (32, 0, 4, 64), (255, 0, 8, 8), (32, 100 * 1024, 4, 8), (32, 0, 1, 32)],
)
def test_occupancy_by_hand(registers: int, shared: int, warps: int, bound: int) -> None:
    """65536 registers, 228 KiB and 32 blocks on one multiprocessor of an H100."""
    assert Report("k", 90, registers, 0, shared, 0, 0, warps).occupancy() == bound
