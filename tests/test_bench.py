"""The benchmarks: rows are whole, and what fails its check is named and not timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel

import tbcm_kernels
from bench import __main__ as bench
from bench import configs, figures, guard, model, ops, others, peers, plots, timing
from bench import cost as bench_cost
from tbcm import peaks
from tbcm.step_bench import PAPER


def run(path: Path, *argv: str, main: Callable = bench.main) -> tuple[int, list[dict]]:
    """Exit code and rows of the smallest run."""
    smallest = ["--device", "cpu", "--dtype", "float32", "--batch", "1", "--seconds", "0"]
    code = main([*smallest, *argv, "--json", str(path)])
    return code, [json.loads(line) for line in path.read_text().splitlines()]


def run_model(path: Path) -> tuple[int, list[dict]]:
    """The same of the smallest model."""
    sizes = ["--layers", "2", "--latent", "4", "--text", "8"]
    return run(path, "--model", "digits", *sizes, main=model.main)


COPY = partial(peaks.copy_bandwidth, "cpu")
MATMUL = partial(peaks.matmul_peak, "cpu", torch.float32)


def off(function: Callable) -> Callable:
    """A function of value and tangent with the tangent a hundredth too large."""

    def wrong(*args, **options):
        value, tangent = function(*args, **options)
        return value, None if tangent is None else 1.01 * tangent

    return wrong


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Sizes for a test: few input sets and rounds, no large copy, one thread."""
    monkeypatch.setattr(timing, "beyond_cache", lambda device: 1)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)
    monkeypatch.setattr(timing, "WARM_UP", 1)
    monkeypatch.setattr(peaks, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(peaks, "matmul_peak", lambda device, dtype: 1e12)


def test_a_time_is_that_of_one_call_and_its_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", lambda call, device: 6.0)
    watch, graph = timing.stopwatch([lambda: 1, lambda: 2], "cpu")
    assert watch() == 3 and not graph
    found = timing.summary([1.0, 2.0, 3.0, 4.0, 100.0])
    assert found == pytest.approx({"us": 3e6, "p20_us": 1.8e6, "p80_us": 23.2e6})


def test_the_order_of_variants_turns_round() -> None:
    turns: list[str] = []
    samples = timing.interleave({n: lambda n=n: turns.append(n) or 1.0 for n in "abc"}, 0.0)
    assert "".join(turns) == "abccba" and samples == {n: [1.0, 1.0] for n in "abc"}


def test_memory_of_a_call_is_counted_in_mib() -> None:
    found = timing.peak_memory(lambda: torch.ones(2**24), "cpu")
    assert found is None or found == pytest.approx(64, rel=0.04)


def test_the_fastest_baseline_is_the_one_that_counts(tmp_path: Path) -> None:
    argv = ["--op", "attention", "--impl", "reference", "--pass", "backward"]
    rows = [row for row in run(tmp_path / "rows.jsonl", *argv)[1] if "us" in row]
    times = {row["variant"]: row["us"] for row in rows if row["variant"] in bench.BASELINES}
    assert len(times) == 2 and {r["baseline"] for r in rows} == {min(times, key=times.get)}


@pytest.mark.parametrize(("fits", "sets"), [(1, 1), (2, 2), (9, 5)])
def test_input_sets_are_as_many_as_no_cache_holds(
    fits: int, sets: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = ops.draw("rms_norm", replace(ops.SHAPES["digits"], batch=1), torch.float32, "cpu")
    size = ops.traffic(case, "forward")
    monkeypatch.setattr(timing, "beyond_cache", lambda device: fits * size)
    argv = ["--op", "rms_norm", "--impl", "reference", "--pass", "forward", "--sets", "5"]
    assert {row["sets"] for row in run(tmp_path / "rows.jsonl", *argv)[1]} == {sets}


def test_peaks_count_reads_and_writes_and_both_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest of the rounds after the warm-up counts."""
    times = [0.1] * peaks.WARM_UP + [4.0, 2.0, *[3.0] * (peaks.ROUNDS - 2)]
    for measure, work in ((COPY, 2 * 4 * 2**25), (MATMUL, 2 * 2048**3)):
        left = iter(times)
        monkeypatch.setattr(peaks, "seconds", lambda call, device, left=left: next(left))
        assert measure() == work / 2 and not list(left)


@pytest.mark.parametrize("op", ops.OPS)
def test_rows_of_every_pass_and_variant(op: str, tmp_path: Path) -> None:
    code, rows = run(tmp_path / "rows.jsonl", "--op", op)
    assert code == 0
    kernels = ops.implementations(op, "cpu", torch.float32)
    plain = {p: {"eager"} for p in ops.OPS[op].passes} | {"step": {"two-pass"}}
    if op == "attention":
        plain["forward"], plain["backward"] = {"eager", "sdpa"}, {"eager", "sdpa"}
        skipped = rows.pop(0)
        assert skipped["variant"] == peers.NAME and "us" not in skipped
    pairs = {(p, v) for p in ops.OPS[op].passes for v in {*kernels, *plain[p]}}
    assert {(r["pass"], r["variant"]) for r in rows} == pairs
    for row in rows:
        assert row["p20_us"] <= row["us"] <= row["p80_us"] and row["rounds"] == 2
        assert row["baseline"] in plain[row["pass"]]
        assert row["bytes"] > 0
        assert row["variant"] != row["baseline"] or row["speedup"] == 1
        floor = {"memory": row["bytes"] / 1e9, "compute": row["flops"] / 1e12}
        assert row["roofline"] * row["us"] == pytest.approx(1e6 * max(floor.values()))
        assert floor[row["bound"]] == max(floor.values())


@pytest.mark.parametrize("what", ["backward", "step"])
@pytest.mark.parametrize("op", [o for o in ops.OPS if "step" in ops.OPS[o].passes])
def test_a_pass_of_ours_gives_what_pytorch_gives(
    op: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)  # cotangents of any memory order
    case = ops.checked(op, ops.SHAPES["digits"], torch.float64, "cpu")
    impl = "pair" if op == "linear" else "reference"
    variants = ops.ours(case, impl), ops.baselines(case, False)["two-pass"]
    gradients = len(ops.OPS[op].gradients.split())
    ours, theirs = (ops.tensors(ops.call(v, what, case)())[:gradients] for v in variants)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # stock casts to fp32


def test_two_passes_make_no_graph_of_the_tangent_and_take_the_fastest_value() -> None:
    """Ours in one pass makes one of the value alone."""
    case = ops.checked("attention", ops.SHAPES["digits"], torch.float32, "cpu")
    two = ops.baselines(case, False)["two-pass"]
    assert two.value is torch.nn.functional.scaled_dot_product_attention
    for variant in (two, ops.ours(case, "reference")):
        _, pair = ops.call(variant, "step", case)()
        assert not pair[-1].requires_grad


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--shape flux-1024 --op conv_glu", "flux-1024 has no conv_glu"),
        ("--tokens 250 --op conv_glu", "square of tokens, not 250"),
        ("--batch 0", "--batch must be at least 1"),
        ("--save --json rows.jsonl", "not both"),
        ("--json bench", "--json bench: Is a directory; name another file"),
        ("--json rows.jsonl --against nowhere", "there is no nowhere"),
        ("--against README.md", "does not hold rows of"),
        ("--save --tokens 64", "--save is for shapes as they are"),
        ("--margin nan", "margin: must be from 0 to below 1"),
        ("--seconds nan", "seconds: must be from 0 to below inf"),
        ("--op rms_norm --op adaln --pass through", "rms_norm has no through"),
    ],
)
def test_bad_input_ends_in_a_sentence(
    argv: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(figures.ROOT)
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--device", "cpu", *argv.split()])
    assert says in f"{stopped.value} {capsys.readouterr().err}"
    assert not Path("rows.jsonl").exists()


@pytest.mark.parametrize("command", [model.main, others.main])
def test_models_of_no_size_or_device_end_in_a_sentence(
    command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for argv, says in (("--layers 0", "--layers must be at least 1"), ("--device tpu", "'tpu'")):
        with pytest.raises(SystemExit):
            command(argv.split())
        assert says in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            command(["--device", "cuda"])
        assert "sees no GPU" in capsys.readouterr().err


def test_list_names_every_op_and_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [*ops.OPS, *ops.SHAPES]
    dit = ops.SHAPES["dit-xl-512"]
    assert dit.width // dit.heads == 72


@pytest.mark.parametrize(("then", "code"), [(1e-9, 0), (1e9, 1)])
def test_speedups_are_held_against_earlier_rows(
    then: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only speed-ups count: the times of the earlier rows are made absurd."""
    earlier = tmp_path / "earlier.jsonl"
    reference = ["--impl", "reference", "--pass", "jvp"]
    _, rows = run(earlier, "--op", "rms_norm", *reference)
    for row in rows:
        row["us"] *= 1e6
        row["speedup"] = 1.0 if row["variant"] == row["baseline"] else then
    earlier.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert run(tmp_path / "now.jsonl", *reference, "--against", str(tmp_path))[0] == code
    out = capsys.readouterr().out
    assert ("FELL" in out) == bool(code) and "1 speed-ups compared" in out


def test_rows_of_another_case_are_no_comparison(tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.jsonl"
    argv = ["--impl", "reference", "--pass", "jvp", "--op"]
    run(earlier, *argv, "rms_norm")
    assert run(tmp_path / "now.jsonl", *argv, "adaln", "--against", str(earlier))[0] == 1
    with pytest.raises(SystemExit, match="there is no"):
        run(earlier, "--against", str(tmp_path / "nothing.jsonl"))


def test_rows_of_what_is_gone_or_has_no_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "earlier.jsonl"
    argv = ["--impl", "reference", "--pass", "jvp"]
    _, rows = run(earlier, *argv, "--op", "rms_norm")
    rows += [{**row, "op": "gone"} for row in rows] + [{**row, "shape": "old"} for row in rows]
    earlier.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bench.main(["--device", "cpu", *argv, "--seconds", "0", "--against", str(earlier)])
    said = capsys.readouterr().out
    assert "there is no gone at digits any more" in said and "no rms_norm at old any more" in said
    assert "1 speed-ups compared" in said
    earlier.write_text(json.dumps({**rows[0], "op": "conv_glu", "shape": "dit-b-512"}))
    with pytest.raises(SystemExit, match="dit-b-512 has no conv_glu; see bench list"):
        bench.main(["--device", "cpu", "--against", str(earlier)])
    earlier.write_text(json.dumps({k: v for k, v in rows[0].items() if k != "baseline"}))
    with pytest.raises(SystemExit, match=r"does not hold rows of .*'baseline'"):
        bench.main(["--device", "cpu", "--against", str(earlier)])


def kept(**change: object) -> dict:
    """A row as `--against` reads it."""
    case = {"op": "adaln", "shape": "digits", "batch": 1, "tokens": 16, "dtype": "float32"}
    about = {"pass": "jvp", "device": "cpu of a kind", "variant": "cpu", "us": 1.0}
    return {**case, **about, "baseline": "eager", "speedup": 2.0, **change}


@pytest.mark.parametrize(("now", "fell"), [(1.55, True), (1.65, False), (2.5, False)])
def test_a_speedup_may_fall_by_the_margin_and_no_more(now: float, fell: bool) -> None:
    made = [kept(), kept(variant="eager", us=now)]
    assert guard.report(made, [kept()], 0.2) == fell


def test_a_speedup_is_held_against_the_last_row_of_its_own_case(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = ("op", "shape", "batch", "tokens", "dtype", "pass")
    earlier = [kept(speedup=9.0), kept(), *(kept(**{k: 0}, speedup=9.0) for k in sizes)]
    assert not guard.report([kept(), kept(variant="eager", us=2.0)], earlier, 0.2)
    assert "1 speed-ups compared" in capsys.readouterr().out


def test_rows_of_another_device_or_dtype_are_left_out(tmp_path: Path) -> None:
    rows = [kept(), kept(device="NVIDIA H200"), kept(dtype="bfloat16")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert guard.read(file, "cpu", "float32") == [rows[0]]
    assert guard.read(file, "cuda", "float32") == [rows[1]]


def test_the_cost_model_is_asked_about_the_size_that_was_measured() -> None:
    times = {what: {"us": 2e6, "peak_mb": 3.0} for what in model.PASSES}
    row = {"model": "sana-0.6b", "layers": 2, "latent": 16, "batch": 3, "text": 7}
    row |= {"dtype": "bfloat16", "copy_gb_s": 10, "matmul_tflop_s": 1}
    sana, machine = bench_cost.of_row(row)
    assert (sana.tokens, sana.batch, sana.text, sana.itemsize) == (256, 3, 7, 2)
    assert bench_cost.of_row(row | {"dtype": "float32"})[0].itemsize == 4
    found = bench_cost.check([row | {"stock": times, "fused": times}])
    assert {r["measured"] for r in found} == {2.0, 3.0}
    assert found[0]["predicted"] == bench_cost.seconds(sana, "stock", "forward", machine)
    pairs = ((1, 2), (10, 5), (10, 9))
    made = [{"quantity": "s", "measured": m, "predicted": p} for m, p in pairs]
    assert bench_cost.off(made, "s") == pytest.approx((0.5, 1.0, 3))


def test_the_cost_model_is_held_against_rows_of_models_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ('{"op": "adaln"}', "# words", "3"):
        (tmp_path / "rows").write_text(text)
        with pytest.raises(SystemExit):
            bench_cost.main([str(tmp_path / "rows")])
        assert "does not hold rows of `python -m bench.model`" in capsys.readouterr().err


def test_a_peer_takes_part_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the peer, which runs on CUDA only."""
    stock = ops.eager(ops.draw("attention", ops.SHAPES["digits"], torch.float32, "cpu"))
    monkeypatch.setattr(peers, "absent", lambda case, device: None)
    monkeypatch.setattr(peers, "label", lambda: "peer 1.0")
    monkeypatch.setattr(peers, "functions", lambda: (stock.value, stock.pair))
    argv = ["--op", "attention", "--impl", "reference", "--pass", "jvp"]
    _, rows = run(tmp_path / "rows.jsonl", *argv, "--pass", "step")
    assert {r["pass"] for r in rows if r["variant"] == "peer 1.0"} == {"jvp", "step"}
    monkeypatch.setattr(peers, "functions", lambda: (stock.value, off(stock.pair)))
    code, rows = run(tmp_path / "wrong.jsonl", *argv)
    assert "its tangent is off by 0.01" in rows[0]["skipped"] and code == 0


def test_limits_of_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: object())

    def reason(shape: ops.Shape) -> str | None:
        return peers.absent(ops.draw("attention", shape, torch.float32, "cpu"), "cuda")

    assert reason(ops.Shape(1, 64, 128, 2)) is None
    assert "head dim of 72" in reason(ops.Shape(1, 64, 144, 2))
    assert "64 queries on 300 keys" in reason(ops.Shape(1, 64, 128, 2, 300))


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
    assert {r["variant"] for r in rows[1:]} == {"eager", "two-pass"}


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


def test_others_are_compared_with_their_stock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(layers: int) -> PixArtTransformer2DModel:
        return PixArtTransformer2DModel(
            num_layers=layers, num_attention_heads=2, attention_head_dim=16, out_channels=4,
            cross_attention_dim=32, caption_channels=8, use_additional_conditions=False,
        )  # fmt: skip

    tiny = others.Kind(make, 32, 8, others.KINDS["pixart"].latent)
    monkeypatch.setitem(others.KINDS, "pixart", tiny)
    argv = ["--model", "pixart", "--side", "4", "--text", "5"]
    code, (row,) = run(tmp_path / "rows.jsonl", *argv, main=others.main)
    assert code == 0 and row["step_speedup"] > 0
    assert row["fused"]["saved_u_per_block"] < row["stock"]["saved_u_per_block"]
    assert "| pixart, 4² tokens, B = 1 |" in figures.others([row])[-1]
    monkeypatch.setattr(others.objective, "one_pass", off(others.objective.one_pass))
    code, (row,) = run(tmp_path / "wrong.jsonl", *argv, main=others.main)
    assert code == 1 and row["faults"][0].startswith("tangent: off by 0.01")


def test_a_wrong_model_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.objective, "one_pass", off(model.objective.one_pass))
    code, (row,) = run_model(tmp_path / "rows.jsonl")
    assert code == 1
    assert len(row["faults"]) == 1 and row["faults"][0].startswith("tangent: off by 0.01")
    assert "fused" not in row


def test_what_is_off_in_one_draw_alone_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a gradient is where a ReLU opens in one model alone."""
    right, calls = model.objective.one_pass, []

    def off_once(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(args)
        return (off(right) if len(calls) == 1 else right)(*args)

    monkeypatch.setattr(model.objective, "one_pass", off_once)
    code, (row,) = run_model(tmp_path / "rows.jsonl")
    assert code == 0 and row["step_speedup"] > 0


def test_the_figures_are_those_of_the_rows() -> None:
    """`make figures` would leave the README and the page as they are."""
    text = (figures.ROOT / "README.md").read_text()
    between = text.partition(figures.BEGIN)[2].partition(figures.END)[0]
    assert between.strip("\n") == "\n".join(figures.readme())
    page = (figures.ROOT / "docs" / "benchmarks.md").read_text()
    for line in figures.ops(figures.ops_of(figures.HOME)):
        assert line in page


def test_steps_with_and_without_the_new_columns() -> None:
    """Rows from before have no roofline and no encoder; each ratio stands beside the paper's."""
    phases = {"rollout": 2.0, "dual": 3.0, "backward": 4.0, "optimizer": 1.0}
    old = {"model": "digits", "eager": {"ms": 10.0, "phases": phases}}
    head, _, cells = figures.steps([old])
    assert "encode" not in head and "roofline" not in head and cells.endswith("| 2 | 3 | 4 | 1 |")
    work = {"flops": 2e12, "bytes": 3e9, "roofline": 0.5}
    encoding = {"ms": 20.0, "phases": {"encode": 7.0, **phases}, **work}
    ratios = {"against_scm": {"paper": PAPER, "eager": {"memory": -0.1, "time": 0.2}}}
    ratios |= {"against_scm_vae": {"paper": PAPER, "eager": {"memory": -0.5, "time": -0.25}}}
    new = {"model": "sana", "eager": old["eager"] | work, "scm_vae eager": encoding, **ratios}
    lines = figures.steps([old, new])
    assert "| encode | rollout |" in lines[0] and "| TFLOP | GB | roofline |" in lines[0]
    assert lines[2].count("|") == lines[0].count("|")
    assert "| scm_vae eager | 20 | 7 | 2 | 3 | 4 | 1 | 2.00 | 3.0 | 50% |" in lines[4]
    for part in ("| -64.1% | -41.7% |", "| -10.0% | +20.0% |", "| -50.0% | -25.0% |"):
        assert sum(part in line for line in lines) == 1


def test_plots_of_the_same_rows_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And hold every row, those that are lost too."""
    _, rows = run(tmp_path / "rows.jsonl", "--op", "attention", "--impl", "reference")
    timed = [r | {"variant": r["variant"].replace("reference", "cpu")} for r in rows if "us" in r]
    timed[0]["speedup"] = 0.5
    _, (whole,) = run_model(tmp_path / "model.jsonl")
    step = {"eager": {"ms": 9.0, "phases": dict.fromkeys(plots.PHASES, 2.0)}, "model": "digits"}
    made = []
    for folder in ("a", "b"):
        monkeypatch.setattr(plots, "IMAGES", tmp_path / folder)
        plots.speedups(timed, "ops-x")
        plots.roofline(timed, "roofline-x")
        plots.length(timed, "length-x")
        plots.breakdown([step], "step-x")
        plots.growth([whole], "growth-x")
        made.append({f.name: f.read_bytes() for f in (tmp_path / folder).iterdir()})
    assert made[0] == made[1] and {n.split("-")[0] for n in made[0]} == set(plots.KINDS)
    assert b"0.50" in made[0]["ops-x.svg"]
    plots.clean(["ops-x.svg"])
    assert [f.name for f in (tmp_path / "b").iterdir()] == ["ops-x.svg"]


def test_configs_are_timed_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch of attention's passes with each candidate; a wrong one has no time."""
    monkeypatch.setitem(ops.SHAPES, "tiny", ops.Shape(1, 16, 64, 2))
    few = {kind: [(16, 16, 4, 1), (32, 16, 4, 1)] for kind in configs.CANDIDATES}
    monkeypatch.setattr(configs, "CANDIDATES", few)
    monkeypatch.setattr(timing, "stopwatch", lambda calls, device: (lambda: 1e-6, False))
    work = list(configs.work(["tiny"], "cpu"))
    assert {what["kind"] for what, *_ in work} == set(few) and len(work) == 12
    rows = [configs.timed(launch, config, "cpu") for _, launch, config in work[:4]]
    assert rows == [{"us": 1.0}] * 4
    repeated = configs.repeated

    def broken(launch: configs.Launch, config: configs.Config) -> Callable[[], None]:
        run, good = repeated(launch, config), config == few["forward"][0]
        return lambda: (run(), good or configs.written(launch)[-1].add_(1))

    def idle(launch: configs.Launch, config: configs.Config) -> Callable[[], None]:
        run, good = repeated(launch, config), config == few["forward"][0]
        return lambda: run() if good else None

    for wrong in (broken, idle):
        monkeypatch.setattr(configs, "repeated", wrong)
        assert configs.timed(*work[1][1:], "cpu") == {"refused": "gives another result"}


def test_a_wrong_linear_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ops.checked("linear", ops.SHAPES["digits"], torch.float32, "cpu")
    assert ops.wrong(case, "pair") == []
    monkeypatch.setattr(tbcm_kernels, "linear_jvp", off(tbcm_kernels.linear_jvp))
    assert ops.wrong(case, "pair")[0].startswith("ty: RMS error")


def test_a_peer_may_be_a_little_worse_than_eager_pytorch() -> None:
    case = ops.draw("attention", ops.SHAPES["digits"], torch.float32, "cpu")
    stock = ops.eager(case)

    def slightly(*both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, tangent = stock.pair(*both)
        return value, (1 + 4e-6) * tangent

    assert ops.off(case, stock) is None
    assert "its tangent is off by 4" in ops.off(case, replace(stock, pair=slightly))
