"""`python -m bench.figures`: writes every figure of the README, docs/benchmarks.md and the plots.

All of it comes from the rows in bench/results; of rows measured again the last counts.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import cost, plots
from bench.environment import ROOT, Row
from bench.ops import OPS, PASSES
from tbcm.evaluate import DECIMALS, contestants
from tbcm.files import write_whole
from tbcm.step_bench import AGAINST, MODES, PAPER, title, variants_of

SIZES = ("model", "layers", "latent", "side", "batch")
RESULTS = ROOT / "bench" / "results"
HOME = RESULTS / "cpu-2-cores"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
INTRODUCTION = """\
# Benchmarks

Made by `make figures` from the rows in bench/results; nothing here is typed by hand. An
implementation that fails its check against fp64 is not timed; the check has at most two samples,
and of attention one head and 512 tokens. Variants take turns, the median counts, and several input
sets keep caches from serving repeats. "PyTorch" is the fastest of eager under `torch.func.jvp`,
`torch.compile` of that (`--compile`: on the CPU, not yet on a GPU), SDPA, and, for a step, the two
passes that people train with. Rows that we lose are here too; those of ops and models name
processor, versions and commit. docs/GPU.md says which kernels have changed since a GPU ran them.
`python -m bench list` names ops and shapes, `python -m bench --save` adds rows, and `python -m
bench --against bench/results/MACHINE` compares speed-ups with those of the same `--shape`,
`--batch` and `--compile`, never times.
"""
WHOLE_STEPS = (
    "Whole training steps (`tbcm bench step`). Launches are GPU kernels, or on a CPU calls of the "
    "dispatcher. scm and sana_sprint learn from latents that were encoded before, as in `tbcm "
    "train`; scm_vae and sana_sprint_vae encode their images with a DC-AE in each step, as the "
    "paper's do."
)
ROOFLINE = (
    " The roofline is the share of the time that the FLOPs or the bytes of a fused step "
    "(tbcm/cost.py) take at the peaks measured in the same run."
)


def quality(report: dict[str, Any]) -> list[str]:
    """The table of `tbcm eval`."""
    lines = [
        f"`make train`: {report['samples']} images, mean of {len(report['seeds'])} noise seeds.",
        "",
        f"| | {' | '.join(DECIMALS)} |",
        "|---|---|---|---|---|",
    ]
    for name, row in contestants(report).items():
        cells = (f"{row[k]:.{d}f}" if k in row else "" for k, d in DECIMALS.items())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def speed(step: dict[str, Any]) -> list[str]:
    """The sentence of `tbcm bench step`."""
    eager, fused = step["eager"], step["fused"]
    compiled = f"{step['compile']['ms']:.0f} with torch.compile, " if "compile" in step else ""
    return [
        f"One step of it, in turns on {step['threads']} CPU threads: {eager['ms']:.0f} ms plain, "
        f"{compiled}{fused['ms']:.0f} fused, **{step['speedup']:.2f} times as fast**; peak memory "
        f"{eager['peak_mb']:.0f} and {fused['peak_mb']:.0f} MiB (`tbcm bench step`)."
    ]


def best(rows: list[Row]) -> list[str]:
    """The README's sentence on a machine's ops: the ranges of speed-ups, and the rows we lose."""
    last = plots.last(rows)
    ours: dict[tuple, Row] = {}
    for (*case, variant), row in last.items():
        known = ours.get(tuple(case))
        if variant in plots.OURS and (known is None or row["us"] < known["us"]):
            ours[tuple(case)] = row
    there = [op for op in OPS if any(r["op"] == op for r in ours.values())]
    names = "All ops" if len(there) == len(OPS) else ", ".join(f"`{op}`" for op in there)
    device = rows[0]["device"]
    where = f"{rows[0]['threads']} CPU threads" if device.startswith("cpu") else f"an {device}"
    sentences = []
    rivals = {"eager PyTorch, or SDPA where that is faster": ("eager", "two-pass", "sdpa")}
    if any(key[-1] == "compile" for key in last):
        rivals["`torch.compile` of that"] = ("compile",)
    for rival, variants in rivals.items():
        against = []
        for case, row in ours.items():
            times = [last[key]["us"] for v in variants if (key := (*case, v)) in last]
            if times:
                against.append((case[-1], min(times) / row["us"]))
        found = []
        for what in ("jvp", "step"):
            ratios = [ratio for name, ratio in against if name == what]
            if ratios:
                found.append(f"{PASSES[what]} {min(ratios):.1f} to {max(ratios):.1f} times as fast")
        lost = sum(ratio < 1 for _, ratio in against)
        sentences.append(
            f"against {rival}: {'; '.join(found)}; of {len(against)} rows we lose {lost}"
        )
    first, *rest = sentences
    rest = [f"{s[0].upper()}{s[1:]}." for s in rest or ["`torch.compile` was not timed there"]]
    return [
        f"{names} in {rows[0]['dtype']} on {where}, {first}. {' '.join(rest)} All are in "
        "[docs/benchmarks.md](docs/benchmarks.md), with memory and rooflines."
    ]


def ops(rows: list[Row]) -> list[str]:
    """Our kernels against the fastest way in PyTorch."""
    last = plots.last(rows)
    kernels = Counter(key[:-1] for key in last if key[-1] in plots.OURS)
    lines = [
        f"Ops in {rows[0]['dtype']} on {rows[0]['device']}, in turns with PyTorch's fastest "
        f"(`python -m bench`); memory is what a call takes, its outputs included, but not "
        f"the scratch that CPU threads keep, at most 8 MiB each:",
        "",
        "| op | shape | pass | PyTorch | ours | | MiB, PyTorch's and ours | roofline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (op, shape, batch, what, variant), row in last.items():
        if variant not in plots.OURS:
            continue
        other = last[op, shape, batch, what, row["baseline"]]
        eager = "math" if op == "attention" else "eager"
        names = {"sdpa": "flash", "eager": eager, "compile": "compiled"}
        which = f" ({variant})" if kernels[op, shape, batch, what] > 1 else ""
        share = f"{100 * row['roofline']:.0f}% of {row['bound']}" if "roofline" in row else ""
        lines.append(
            f"| `{op}` | {shape}, B = {batch} | {PASSES[what]} | "
            f"{_time(row['us'] * row['speedup'])} "
            f"({names.get(row['baseline'], row['baseline'])}) | "
            f"{_time(row['us'])}{which} | **{row['speedup']:.2f}×** | {_memory(other)}, "
            f"{_memory(row)} | {share} |"
        )
    return lines


def _time(us: float) -> str:
    return f"{us / 1e3:.1f} ms" if us >= 1e3 else f"{us:.0f} µs"


def _memory(row: Row) -> str:
    compiling = row.get("variant") == "compile" and not row.get("warm")  # in the call measured
    return "?" if compiling or row["peak_mb"] is None else f"{row['peak_mb']:.0f}"


PASSES_OF_A_MODEL = [
    "",
    "| model | value | value and tangent | of the value's time | step | | "
    "MiB in a step | saved, per block with its share of the ends |",
    "|---|---|---|---|---|---|---|---|",
]


def models(rows: list[Row]) -> list[str]:
    """SANA as a whole, fused against stock."""
    lines = [
        f"SANA's transformer at reduced depth in {rows[0]['dtype']} on {rows[0]['threads']} CPU "
        f"threads, stock → fused in turns (`python -m bench.model`). A step is a tangent and a "
        f"gradient; what it saves for backward is in tensors of the residual stream:",
        *PASSES_OF_A_MODEL,
    ]
    for row in rows:
        size = f"{row['layers']} layers, {row['latent']}², B = {row['batch']}"
        lines.append(f"| {row['model']}, {size} | {_cells(row)} |")
    return lines


def others(rows: list[Row]) -> list[str]:
    """Models whose attention, linear layers and norms are fused, against stock."""
    lines = [
        "The same of models in which `fuse` replaces attention, linear layers and norms, with "
        "one block, Flux one of either sort (`python -m bench.others`):",
        *PASSES_OF_A_MODEL,
    ]
    for row in rows:
        size = f"{row['side']}² tokens, B = {row['batch']}"
        lines.append(f"| {row['model']}, {size} | {_cells(row)} |")
    return lines


def _cells(row: dict[str, Any]) -> str:
    """Stock and fused in each cell."""
    stock, fused = row["stock"], row["fused"]
    value, pair, step = (
        f"{stock[what]['us'] / 1e3:.0f} → {fused[what]['us'] / 1e3:.0f} ms"
        for what in ("forward", "jvp", "step")
    )
    share = " → ".join(f"{row['jvp_over_forward'][m]:.2f}×" for m in ("stock", "fused"))
    memory = f"{_memory(stock['step'])} → {_memory(fused['step'])}"
    saved = f"{stock['saved_u_per_block']:.0f} → {fused['saved_u_per_block']:.0f}"
    cells = (value, pair, share, step, f"**{row['step_speedup']:.2f}×**", memory, saved)
    return " | ".join(cells)


def steps(rows: list[Row]) -> list[str]:
    """The variants of whole training steps, by phase, and TBCM against sCM beside the paper."""
    phases = plots.phases_of(rows)
    keys = {key for step in rows for row in variants_of(step).values() for key in row}
    counted = [column for column in COUNTED if column[1] in keys]
    head = ["step", "variant", "ms", *phases, *(name for name, *_ in counted)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for step in rows:
        for name, row in variants_of(step).items():
            times = [f"{row['phases'][p]:.0f}" if p in row["phases"] else "" for p in phases]
            rest = [form(row[key]) if row.get(key) else "" for _, key, form in counted]
            cells = [title(step), name, f"{row['ms']:.0f}", *times, *rest]
            lines.append(f"| {' | '.join(cells)} |")
    return lines + against_scm(rows)


COUNTED: list[tuple[str, str, Callable[[float], str]]] = [
    ("samples/s", "samples_s", "{:.3g}".format),
    ("peak MiB", "peak_mb", "{:.0f}".format),
    ("saved MiB", "saved_mb", "{:.0f}".format),
    ("launches", "launches", str),
    ("TFLOP", "flops", lambda n: f"{n / 1e12:.2f}"),
    ("GB", "bytes", lambda n: f"{n / 1e9:.1f}"),
    ("roofline", "roofline", "{:.0%}".format),
]
"""Columns of `steps`: the head, the key of a row, and how it is written."""


def against_scm(rows: list[Row]) -> list[str]:
    """TBCM's savings beside those of the paper."""
    found = [("the paper's, full size on GPUs", AGAINST["against_scm_vae"], "", PAPER)]
    for step in rows:
        for key, images in AGAINST.items():
            for mode in (mode for mode in MODES if mode in step.get(key, {})):
                found.append((title(step), images, mode, step[key][mode]))
    head = ["TBCM against sCM in the same mode:", "", "| step | sCM | mode | memory | time |"]
    cells = [
        f"| {step} | {images} | {mode} | {saved['memory']:+.1%} | {saved['time']:+.1%} |"
        for step, images, mode, saved in found
    ]
    return ["", *head, "|---|---|---|---|---|", *cells] if found[1:] else []


def growth(rows: list[Row]) -> list[str]:
    """How far the cost model is from what was measured."""
    found = cost.check(rows)
    lines = []
    for quantity, what in (("s", "time"), ("MiB", "memory of a step")):
        middle, most, _ = cost.off(found, quantity)
        lines.append(f"{what} off by {middle:.0%} in the median and {most:.0%} at most")
    return [
        f"The cost model (tbcm/cost.py) against {len(rows)} models of other sizes, one layer of "
        f"SANA 0.6B at 512 px where not said: {'; '.join(lines)}. Lines are predicted, dots "
        f"measured."
    ]


def read(path: Path) -> list[Row]:
    """The timed rows of a machine's file, in its own dtype: fp32 on a CPU, bf16 on a GPU."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    dtype = "float32" if path.parent.name.startswith("cpu") else "bfloat16"
    return [r for r in rows if not {"faults", "skipped"} & r.keys() and r["dtype"] == dtype]


def of_models(path: Path) -> list[Row]:
    """The rows of whole models, of each size the last."""
    return list({tuple(map(row.get, SIZES)): row for row in read(path)}.values())


def ops_of(folder: Path) -> list[Row]:
    """A machine's rows of ops."""
    return [r for name in ("attention", "ops") for r in read(folder / f"{name}.jsonl")]


def machine(folder: Path) -> list[str]:
    """Tables and plots of one machine."""
    lines, name = [f"## {folder.name}"], folder.name
    if rows := ops_of(folder):
        lines += ["", *ops(rows), "", f"![speed-ups]({plots.speedups(rows, f'ops-{name}')})"]
        if shares := [r for r in rows if "roofline" in r]:
            lines += ["", f"![roofline]({plots.roofline(shares, f'roofline-{name}')})"]
    if rows := read(folder / "length.jsonl"):
        about = f"Attention of {rows[0]['shape']} at other lengths:"
        lines += ["", about, "", f"![length]({plots.length(rows, f'length-{name}')})"]
    if rows := of_models(folder / "model.jsonl"):
        lines += ["", *models(rows)]
    if rows := of_models(folder / "others.jsonl"):
        lines += ["", *others(rows)]
    files = sorted(folder.glob("*step*.json"))
    if found := [json.loads(file.read_text()) for file in files]:
        about = WHOLE_STEPS + (ROOFLINE if any("copy_gb_s" in step for step in found) else "")
        lines += ["", about, "", *steps(found)]
        lines += ["", f"![step]({plots.breakdown(found, f'step-{name}')})"]
    if rows := of_models(folder / "growth.jsonl"):
        lines += ["", *growth(rows), "", f"![growth]({plots.growth(rows, f'growth-{name}')})"]
    return lines


def readme() -> list[str]:
    """What stands between the marks of the README."""
    found = [json.loads((HOME / f"digits-{name}.json").read_text()) for name in ("eval", "step")]
    lines = [*quality(found[0]), "", *speed(found[1]), "", *best(ops_of(HOME)), ""]
    lines += [f"![speed-ups of the ops](docs/img/ops-{HOME.name}.svg)"]
    if rows := of_models(HOME / "model.jsonl"):
        lines += ["", *models(rows)]
    if rows := of_models(HOME / "others.jsonl"):
        lines += ["", *others(rows)]
    for folder in sorted(RESULTS.iterdir()):
        if folder != HOME and (rows := ops_of(folder)):
            lines += ["", *best(rows), "", f"![speed-ups](docs/img/ops-{folder.name}.svg)"]
    return lines


def main() -> None:
    """Write docs/benchmarks.md with its plots, and the README between its marks."""
    folders = [f for f in sorted(RESULTS.iterdir()) if ops_of(f)]
    page = [INTRODUCTION, *("\n".join([*machine(folder), ""]) for folder in folders)]
    write_whole(ROOT / "docs" / "benchmarks.md", "\n".join(page).encode())
    plots.clean(f"{kind}-{f.name}.svg" for f in folders for kind in plots.KINDS)
    path = ROOT / "README.md"
    before, _, rest = path.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    write_whole(path, "\n".join([before + BEGIN, *readme(), END + after]).encode())


if __name__ == "__main__":
    argparse.ArgumentParser("python -m bench.figures", description=__doc__).parse_args()
    main()
