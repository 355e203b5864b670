"""The benchmark of a step: it refuses what is wrong and reports medians of what is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from tbcm import cost
from tbcm.cli import main
from tbcm.errors import UserError
from tbcm.step_bench import (
    MODES,
    PHASES,
    STEPPED,
    TOLERANCE,
    Counts,
    Plan,
    bench_step,
    calls,
    check_agreement,
    lines,
    make_distiller,
    report,
    sana_vae,
    timed,
    vae_work,
)
from tbcm.train import METHODS

ROW = {"step": 1, "loss": 1.0, "g_norm": 2.0, "grad_norm": 3.0}
EAGER, FUSED = ("tbcm", "eager"), ("tbcm", "fused")
TOTALS = {"samples": 15, "launches": 7, "launches_are": "dispatcher calls", "saved_mb": 1.0}
WORK = {"flops": 6e9, "bytes": 1e9}
MACHINE = cost.Machine(copy=2e11, matmul=1e12)
TINY = Plan("sana-0.6b", layers=1, resolution=64, route_steps=3, gpu=False)


@pytest.fixture
def default_device() -> None:
    """None, as in a benchmark's process: under a device context torch.compile captures no jvp."""


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
        ("scm_vae", "fused"): [{"step": 0.040, **phases}] * 4,
    }
    peaks = {EAGER: 600.0, FUSED: 500.0, ("scm", "fused"): 1000.0, ("scm_vae", "fused"): 2000.0}
    totals = {v: {"peak_mb": peak, **TOTALS, **WORK} for v, peak in peaks.items()}
    result = report(rows, totals, MACHINE)
    assert result["eager"]["ms"] == pytest.approx(30) and result["fused"]["peak_mb"] == 500.0
    assert result["speedup"] == pytest.approx(3) and result["steps"] == 4
    assert result["eager"]["phases"] == pytest.approx(dict.fromkeys(PHASES, 1.0))
    assert result["fused"]["samples_s"] == pytest.approx(1500)
    ours = result["against_scm"]
    assert ours["paper"] == {"memory": -0.641, "time": -0.417}
    assert ours["fused"] == pytest.approx({"memory": -0.5, "time": -0.5}) and "eager" not in ours
    encoding = result["against_scm_vae"]
    assert encoding["fused"] == pytest.approx({"memory": -0.75, "time": -0.75})
    # 6 ms of products and 5 ms of copies
    assert result["eager"]["roofline"] == pytest.approx(0.2) and result["copy_gb_s"] == 200
    compiled = {**result["eager"], "ms": 20.0}
    said = "\n".join(lines({**result, "model": "digits", "compile": compiled}))
    for part in (
        "before, fused: memory -50.0%, time -50.0%",
        "step, fused: memory -75.0%",
        "20% of",
        "fused is 3.00 times as fast as eager",
        "fused is 2.00 times as fast as compile",
    ):
        assert part in said


def test_what_was_measured_is_kept_where_a_later_variant_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(TINY, gpu=True)
    monkeypatch.setattr(Plan, "machine", lambda self: MACHINE)

    def measured(variants: list, plan: Plan, steps: int, first: dict) -> tuple:
        if variants == [EAGER]:
            raise UserError("no memory is left")
        steps = [{**ROW, "step": 0.02, **dict.fromkeys(PHASES, 0.001)}] * 2
        return {variants[0]: steps}, {variants[0]: {**TOTALS, **WORK}}

    monkeypatch.setattr("tbcm.step_bench.measured", measured)
    file = tmp_path / "x.json"
    with pytest.raises(UserError, match="no memory is left"):
        bench_step(file, 2, plan, ["tbcm"], ["fused", "eager"])
    assert json.loads(file.read_text())["fused"]["ms"] == pytest.approx(20)


def test_a_baseline_alone_is_compared_with_nothing() -> None:
    rows = {("scm", "eager"): [{"step": 0.02, **dict.fromkeys(PHASES, 0.001)}] * 2}
    result = report(rows, {("scm", "eager"): {"peak_mb": 1.0, **TOTALS, **WORK}}, MACHINE)
    assert result["scm eager"]["ms"] == pytest.approx(20) and "against_scm" not in result


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", METHODS)
def test_random_sana_steps_and_its_counts(method: str) -> None:
    """The smallest model: fused saves less, and asks less of the dispatcher."""
    assert TINY.sizes()["reduced"] and TINY.sizes()["of_layers"] == 28
    counts = {}
    for mode in ("eager", "fused"):
        distiller = make_distiller(method, mode, TINY)
        distiller.train_step()  # the first makes the optimiser's state
        launches = calls(distiller.train_step)
        counts[mode] = Counts(distiller).of_a_step(mode)
        assert distiller.step == 4 and distiller.skipped == 0
        assert counts[mode]["launches"] == launches
    eager, fused = counts["eager"], counts["fused"]
    assert eager["samples"] == fused["samples"] == 2
    assert 0 < fused["launches"] < eager["launches"] and fused["saved_mb"] < eager["saved_mb"]


def test_the_vae_is_sanas() -> None:
    """312 M parameters, 32 pixels to a latent's side; the cost model's FLOPs of an image."""
    with torch.device("meta"):
        vae = sana_vae()
    assert sum(p.numel() for p in vae.parameters()) == 312_250_275
    assert vae.spatial_compression_ratio == 32 and vae.config.latent_channels == 32
    flops, size = vae_work(1, Plan("sana-0.6b", resolution=1024, gpu=True))
    assert flops == pytest.approx(5.2e12, rel=0.01) and size > 2 * 3 * 1024**2


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["scm_vae", "sana_sprint_vae"])
def test_images_are_encoded_once_in_a_step(method: str) -> None:
    distiller = make_distiller(method, "fused", TINY)
    encoded = []

    def load(picks: torch.Tensor, encode: Callable = distiller.latents.load) -> torch.Tensor:
        encoded.append(encode(picks))
        return encoded[-1]

    distiller.latents = distiller.latents._replace(load=load)
    seconds: dict[str, float] = {}
    distiller.images = timed(distiller.images, seconds, "encode")
    assert not distiller.train_step()["skipped"] and seconds["encode"] > 0
    (latents,) = encoded
    assert latents.shape == (2, 32, 2, 2) and latents.isfinite().all() and latents.std() > 0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["tbcm", "sana_sprint"])
def test_a_compiled_step_is_the_eager_one(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher and student are captured whole; to compile their C++ would take a minute."""
    tangents = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        tangents.append(any("make_dual" in node.name for node in graph.graph.nodes))
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    modes = ("eager", "compile")
    first = {(method, m): [make_distiller(method, m, TINY).train_step()] for m in modes}
    check_agreement(first, TOLERANCE["no"])
    assert tangents == [False, True]  # the whole teacher, then both passes of the student
    torch.compiler.reset()


def test_sizes_of_a_gpu_are_the_models_own() -> None:
    sizes = Plan("sana-1.6b", gpu=True).sizes()
    assert not sizes["reduced"] and sizes["layers"] == 20 and sizes["resolution"] == 1024


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--modes fast", f"modes must be some of {', '.join(MODES)}"),
        ("--methods gan", f"methods must be some of {', '.join(STEPPED)}"),
        ("--methods tbcm scm_vae", "digits has no VAE"),
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
