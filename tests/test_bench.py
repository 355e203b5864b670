"""The benchmark of the ops: rows are whole, and what fails its check is named and not timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench import ops


def run(path: Path, op: str) -> tuple[int, list[dict]]:
    """Exit code and rows of the smallest run."""
    argv = ["--op", op, "--device", "cpu", "--dtype", "float32", "--batch", "1"]
    code = bench.main([*argv, "--seconds", "0", "--json", str(path)])
    return code, [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes for a test: few input sets, no large copy."""
    monkeypatch.setattr(bench.timing, "beyond_cache", lambda device: 1)
    monkeypatch.setattr(bench.timing, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(bench.timing, "matmul_peak", lambda device, dtype: 1e12)


@pytest.mark.parametrize("op", ops.OPS)
def test_rows_of_every_pass_and_variant(op: str, tmp_path: Path) -> None:
    code, rows = run(tmp_path / "rows.jsonl", op)
    assert code == 0
    variants = ["eager", *ops.implementations(op, "cpu", bench.torch.float32)]
    pairs = {(p, v) for p in ops.passes(op) for v in variants}
    if op == "attention":
        pairs |= {("forward", "sdpa"), ("backward", "sdpa")}
    assert {(r["pass"], r["variant"]) for r in rows} == pairs
    for row in rows:
        assert row["p20_us"] <= row["us"] <= row["p80_us"] and row["rounds"] >= 7
        assert (
            row["baseline"] in ("eager", "sdpa") and row["bytes"] > 0 and len(row["source"]) == 12
        )
        assert row["variant"] != row["baseline"] or row["speedup"] == 1


def test_bytes_are_those_of_the_readme() -> None:
    case = ops.draw("rms_norm", ops.Shape(2, 3, 64, 1), bench.torch.bfloat16, "cpu")
    tensor, weight = 2 * 3 * 64 * 2, 64 * 4
    assert ops.traffic(case, "forward") == 2 * tensor + weight
    assert ops.traffic(case, "jvp") == 4 * tensor + weight
    assert ops.traffic(case, "backward") == 3 * tensor + 2 * weight


def test_what_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "implementations", lambda *_: ["reference"])
    monkeypatch.setattr(ops, "check", lambda case, impl: [f"{impl} is off"])
    code, rows = run(tmp_path / "rows.jsonl", "rms_norm")
    assert code == 1
    assert rows[0]["faults"] == ["reference is off"] and "us" not in rows[0]
    assert {r["variant"] for r in rows[1:]} == {"eager"}
