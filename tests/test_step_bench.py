"""The benchmark of a step: it refuses what is wrong and reports medians of what is right."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from tbcm import cost, step_bench
from tbcm.cli import main
from tbcm.errors import UserError
from tbcm.images import Latents
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


def test_small_losses_of_modes_have_to_agree_too():
    small = {key: value / 1e4 for key, value in ROW.items() if key != "step"} | {"step": 1}
    for tolerance in TOLERANCE.values():
        wrong = {**small, "loss": (1 + 2 * tolerance) * small["loss"]}
        with pytest.raises(UserError, match="loss of step 1 of tbcm"):
            check_agreement({EAGER: [small], FUSED: [wrong]}, tolerance)
    assert TOLERANCE == {"no": 1e-3, "bf16": 5e-2}


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


def test_variants_take_turns_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(pipe: str, steps: int) -> list:
        asked.append(f"{pipe}{steps}")
        return [ROW] * steps

    process = SimpleNamespace(kill=lambda: None, join=lambda: None)
    monkeypatch.setattr(step_bench, "start_worker", lambda v, plan: (process, v[1][0]))
    monkeypatch.setattr(step_bench, "ask", ask)
    rows, _ = step_bench.measured([EAGER, FUSED], TINY, 10, {})
    assert " ".join(asked) == "e3 f3 e4 f4 f4 e4 e2 f2 e0 f0"
    assert [len(timings) for timings in rows.values()] == [10, 10]


def test_the_roofs_are_the_better_of_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = iter([cost.Machine(copy=1e9, matmul=4e12), cost.Machine(copy=2e9, matmul=3e12)])
    monkeypatch.setattr(Plan, "machine", lambda self: next(machines))
    rows = {EAGER: [{**ROW, "step": 0.02, **dict.fromkeys(PHASES, 0.001)}] * 2}
    found = (rows, {EAGER: {"peak_mb": 1.0, **TOTALS, **WORK}})
    monkeypatch.setattr(step_bench, "measured", lambda *_: found)
    result = bench_step(tmp_path / "x.json", 2, TINY, modes=["eager"])
    assert (result["copy_gb_s"], result["matmul_tflop_s"]) == (2, 4)
    assert json.loads((tmp_path / "x.json").read_text()) == result


def test_a_phase_adds_up_and_leaves_the_encoding_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is one second."""
    clock = iter(range(100))
    monkeypatch.setattr(step_bench.time, "perf_counter", lambda: next(clock))

    class Fake:
        def images(self) -> None: ...

        def harvest(self) -> None:
            self.images()  # two looks more

        def forward(self) -> None: ...

        def backward(self) -> None: ...

        def update(self) -> None: ...

        def train_step(self) -> dict:
            for phase in (self.harvest, self.forward, self.backward, self.backward, self.update):
                phase()
            return {}

    counts = SimpleNamespace(of_a_step=lambda mode: {"samples": 3})
    for name, found in (("make_distiller", Fake()), ("Counts", counts), ("work_of", (1, 20))):
        monkeypatch.setattr(step_bench, name, lambda *_, found=found: found)
    monkeypatch.setattr(step_bench.signal, "signal", lambda *_: None)
    monkeypatch.setattr(step_bench, "vae_work", lambda images, plan: (300 * images, 4000))
    asked, sent = iter([1, 0]), []
    pipe = SimpleNamespace(recv=lambda: next(asked), send=sent.append)
    step_bench.work(("scm_vae", "eager"), TINY, pipe)
    (row,), totals = sent
    assert row == {
        "encode": 1, "rollout": 2, "dual": 1, "backward": 2, "optimizer": 1, "step": 13,
    }  # fmt: skip
    assert (totals["flops"], totals["bytes"], totals["samples"]) == (901, 4020, 3)


def test_quantiles_stand_around_the_median_and_a_dead_process_is_said() -> None:
    rows = {EAGER: [{"step": s / 1e3, **dict.fromkeys(PHASES, 0.001)} for s in (1, 2, 3, 4, 9)]}
    found = report(rows, {EAGER: {"peak_mb": 1.0, **TOTALS, **WORK}}, MACHINE)["eager"]
    assert [found[k] for k in ("p20", "ms", "p80")] == pytest.approx([1.8, 3.0, 5.0])
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    theirs.close()
    with pytest.raises(UserError, match="A benchmark process died"):
        step_bench.ask(ours, 3)


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


def test_sizes_of_a_cpu_are_its_share() -> None:
    sizes = Plan("sana-0.6b", gpu=False).sizes()
    assert sizes == {
        "model": "sana-0.6b", "layers": 2, "of_layers": 28, "resolution": 512, "route_steps": 4,
        "batch": 1, "reduced": True,
    }  # fmt: skip
    assert Plan("sana-0.6b", gpu=True).sizes()["route_steps"] == 16


def test_bytes_of_a_step_are_those_of_its_precision() -> None:
    wide, half = (Plan("sana-0.6b", resolution=64, gpu=gpu) for gpu in (False, True))
    assert vae_work(2, wide)[1] == 2 * vae_work(2, half)[1]
    config = SimpleNamespace(
        mixed_precision="no", method="tbcm", route_steps=3, misaligned_pairs_D=False
    )
    net = step_bench.sana((2, 1, 64), 1, 2, guidance=True)
    distiller = SimpleNamespace(
        config=config, student=net, teacher=SimpleNamespace(latent_shape=(32, 2, 2)),
        null=SimpleNamespace(mask=torch.ones(1, 300)),
    )  # fmt: skip
    bytes_of_fp32 = step_bench.work_of(distiller, 2)[1]
    config.mixed_precision = "bf16"
    assert step_bench.work_of(distiller, 2)[1] < bytes_of_fp32


def test_weights_and_storages_seen_twice_are_not_counted_as_saved() -> None:
    x, w = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7, requires_grad=True)
    _, size = step_bench.saved_bytes(lambda: x @ w + x[:, :1] @ w[:1], [w])
    assert size == x.nbytes


def test_images_are_scaled_as_latents_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Vae(torch.nn.Module):
        config = SimpleNamespace(scaling_factor=0.25)

        def encode(self, images: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(latent=images)

    monkeypatch.setattr(step_bench, "sana_vae", Vae)
    own = Latents(torch.zeros(1, dtype=torch.long), lambda picks: None, "random")
    distiller = SimpleNamespace(
        latents=own, config=SimpleNamespace(train_batch_size=3), device=torch.device("cpu")
    )
    latents = step_bench.encoded_latents(distiller, TINY).load(torch.arange(2))
    assert latents.shape == (2, 3, 64, 64) and latents.std().item() == pytest.approx(0.25, rel=0.05)


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
