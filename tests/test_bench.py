"""The benchmarks: rows are whole, and what fails its check is named and not timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tbcm_kernels
from bench import __main__ as bench
from bench import figures, model, ops


def run(path: Path, *argv: str, main: Callable = bench.main) -> tuple[int, list[dict]]:
    """Exit code and rows of the smallest run."""
    smallest = ["--device", "cpu", "--dtype", "float32", "--batch", "1", "--seconds", "0"]
    code = main([*smallest, *argv, "--json", str(path)])
    return code, [json.loads(line) for line in path.read_text().splitlines()]


def run_model(path: Path) -> tuple[int, list[dict]]:
    """The same of the smallest model."""
    sizes = ["--layers", "2", "--latent", "4", "--text", "8"]
    return run(path, "--model", "digits", *sizes, main=model.main)


def off(function: Callable) -> Callable:
    """A function of value and tangent with the tangent a hundredth too large."""

    def wrong(*args, **options):
        value, tangent = function(*args, **options)
        return value, None if tangent is None else 1.01 * tangent

    return wrong


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes for a test: few input sets, no large copy."""
    monkeypatch.setattr(bench.timing, "beyond_cache", lambda device: 1)
    monkeypatch.setattr(bench.timing, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(bench.timing, "matmul_peak", lambda device, dtype: 1e12)


@pytest.mark.parametrize("op", ops.OPS)
def test_rows_of_every_pass_and_variant(op: str, tmp_path: Path) -> None:
    code, rows = run(tmp_path / "rows.jsonl", "--op", op)
    assert code == 0
    variants = ["eager", *ops.implementations(op, "cpu", torch.float32)]
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
    case = ops.draw("rms_norm", ops.Shape(2, 3, 64, 1), torch.bfloat16, "cpu")
    tensor, weight = 2 * 3 * 64 * 2, 64 * 4
    assert ops.traffic(case, "forward") == 2 * tensor + weight
    assert ops.traffic(case, "jvp") == 4 * tensor + weight
    assert ops.traffic(case, "backward") == 3 * tensor + 2 * weight


def test_bytes_of_values_and_their_tangents() -> None:
    shape = ops.Shape(2, 4, 64, 1)
    tensor = 2 * 4 * 64 * 2
    case = ops.draw("linear_attention", shape, torch.bfloat16, "cpu")
    assert ops.traffic(case, "jvp") == 2 * ops.traffic(case, "forward") == 8 * tensor
    case = ops.draw("conv_glu", shape, torch.bfloat16, "cpu")
    pre, weights = 5 * tensor, 5 * 64 * 10 * 4
    assert ops.traffic(case, "forward") == 1.5 * pre + weights
    assert ops.traffic(case, "jvp") == 3 * pre + weights
    assert ops.traffic(case, "backward") == 2.5 * pre + 2 * weights


@pytest.mark.parametrize("op", ["conv_glu", "linear_attention", "linear_attention+norm"])
def test_eager_is_the_same_maths(op: str) -> None:
    case = ops.checked(op, ops.SHAPES["digits"], torch.float32, "cpu")
    eager = ops.tensors(ops.call(ops.eager(case), "jvp", case)())
    for got, want in zip(ops.call(ops.ours(case, "reference"), "jvp", case)(), eager, strict=True):
        torch.testing.assert_close(got, want.flatten(2).mT if op == "conv_glu" else want)


@pytest.mark.parametrize("op", ["conv_glu", "linear_attention", "linear_attention+norm"])
def test_what_is_wrong_is_not_timed(
    op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{ops.base(op)}_jvp"
    monkeypatch.setattr(tbcm_kernels, name, off(getattr(tbcm_kernels, name)))
    code, rows = run(tmp_path / "rows.jsonl", "--op", op, "--impl", "reference")
    assert code == 1
    assert "ty: RMS error" in rows[0]["faults"][0] and "us" not in rows[0]
    assert {r["variant"] for r in rows[1:]} == {"eager"}


def test_a_kernel_that_is_asked_for_and_not_there_is_a_fault(tmp_path: Path) -> None:
    code, rows = run(tmp_path / "rows.jsonl", "--op", "conv_glu", "--impl", "triton")
    assert code == 1
    assert "cannot run" in rows[0]["faults"][0]


def test_model_report_has_times_memory_and_ratios(tmp_path: Path) -> None:
    code, (row,) = run_model(tmp_path / "rows.jsonl")
    assert code == 0
    stock, fused = row["stock"], row["fused"]
    for name in ("stock", "fused"):
        times = [row[name][what]["us"] for what in model.PASSES]
        assert row["jvp_over_forward"][name] == times[1] / times[0]
        assert row[name]["saved_u_per_block"] > 0
    assert row["step_speedup"] == stock["step"]["us"] / fused["step"]["us"]
    assert fused["saved_u_per_block"] < stock["saved_u_per_block"]
    stock["jvp"]["us"], fused["jvp"]["us"] = 7e3, 5e3
    assert "| 7 → 5 ms |" in figures.models([row])[-1]


def test_a_wrong_model_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.objective, "one_pass", off(model.objective.one_pass))
    code, (row,) = run_model(tmp_path / "rows.jsonl")
    assert code == 1
    assert len(row["faults"]) == 1 and row["faults"][0].startswith("tangent: off by 0.01")
    assert "fused" not in row
