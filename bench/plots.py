"""The plots of docs/img, from the rows of bench/results.

The same rows give the same bytes with the same Matplotlib and fonts.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.cost import of_row
from bench.environment import ROOT, Row
from bench.ops import OPS, PASSES, SHAPES
from tbcm import cost
from tbcm.step_bench import title, variants_of

IMAGES = ROOT / "docs" / "img"
KINDS = ("ops", "roofline", "length", "step", "growth")
OURS = ("cpu", "triton", "cuda", "pair")
BLUE, GREY, ORANGE = "#2b6cb0", "#8a8f98", "#dd8b2d"
COLOURS = {"forward": "#9ecae1", "jvp": "#2b6cb0", "backward": "#b7c9a8", "through": "#5f8f4e",
           "step": "#dd8b2d"}  # fmt: skip
PHASES = {"encode": "#b07aa1", "rollout": "#8a8f98", "dual": "#2b6cb0", "backward": "#5f8f4e",
          "optimizer": "#dd8b2d"}  # fmt: skip


def save(figure: Figure, name: str) -> str:
    """Write docs/img/NAME.svg without a date; its Markdown path from docs/."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
    return f"img/{name}.svg"


def blank(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure with light axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="both", color="#e6e8eb", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
    return figure, axes


def last(rows: Iterable[Row]) -> dict[tuple, Row]:
    """The rows by case and variant, sorted; of rows measured again the last counts."""
    found = {(r["op"], r["shape"], r["batch"], r["pass"], r["variant"]): r for r in rows}
    rank = {name: i for i, name in enumerate((*OPS, *SHAPES, *PASSES))}

    def place(key: tuple) -> tuple:
        op, shape, batch, what, variant = key
        return rank.get(op, -1), rank.get(shape, -1), batch, rank.get(what, -1), variant

    return {key: found[key] for key in sorted(found, key=place)}


def speedups(rows: list[Row], name: str) -> str:
    """Each op and pass against PyTorch's fastest, those that we lose too."""
    ours = [r for r in last(rows).values() if r["variant"] in OURS]
    cases = sorted({(r["op"], r["shape"]) for r in ours}, reverse=True)
    figure, axes = blank(8, 0.9 + 0.14 * len(ours) + 0.15 * len(cases))
    axis, ticks, y = axes[0][0], [], 0.0
    for op, shape in cases:
        bars = [r for r in ours if (r["op"], r["shape"]) == (op, shape)]
        bars.sort(key=lambda r: list(PASSES).index(r["pass"]), reverse=True)
        ticks.append((y + (len(bars) - 1) / 2, f"{op}\n{shape}"))
        for r in bars:
            axis.barh(y, r["speedup"] - 1, left=1, height=0.85, color=COLOURS[r["pass"]])
            ha = "left" if r["speedup"] >= 1 else "right"
            axis.annotate(f"{r['speedup']:.2f}", (r["speedup"], y), (3 if ha == "left" else -3, 0),
                          textcoords="offset points", ha=ha, va="center", fontsize=7)  # fmt: skip
            y += 1
        y += 1.1
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log", base=2)
    ratios = [r["speedup"] for r in ours]
    axis.set_xlim(0.75 * min(1, *ratios), 1.3 * max(ratios))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axis.set_yticks(*zip(*ticks, strict=True))
    axis.set_ylim(-1, y)
    axis.grid(False, axis="y")
    axis.set_xlabel("times as fast as PyTorch's fastest, in turns")
    handles = [matplotlib.patches.Patch(color=COLOURS[p], label=PASSES[p]) for p in PASSES]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return save(figure, name)


def roofline(rows: list[Row], name: str) -> str:
    """How much of its time each case would need at the measured peaks: ours and PyTorch's best."""
    table = last(rows)
    ours = [r for r in table.values() if r["variant"] in OURS]
    ours.sort(key=lambda r: (r["op"], r["shape"], list(PASSES).index(r["pass"])), reverse=True)
    figure, axes = blank(8, 0.8 + 0.17 * len(ours))
    axis = axes[0][0]
    for y, r in enumerate(ours):
        other = table[r["op"], r["shape"], r["batch"], r["pass"], r["baseline"]]
        ends = [100 * x["roofline"] for x in (other, r)]
        axis.plot(ends, [y, y], color="#c5cad1", linewidth=1.5, zorder=1)
        axis.scatter(ends[0], y, s=22, color=GREY, zorder=2)
        axis.scatter(ends[1], y, s=30, color=BLUE, marker="o" if r["bound"] == "memory" else "s",
                     zorder=3)  # fmt: skip
    names = [f"{r['op']}, {r['shape']}: {PASSES[r['pass']]}" for r in ours]
    axis.set_yticks(range(len(ours)), names, fontsize=7)
    axis.set_ylim(-0.8, len(ours) - 0.2)
    axis.set_xlim(0)
    axis.set_xlabel("% of the roofline that was measured in the same run")
    line = matplotlib.lines.Line2D
    handles = [
        line([], [], color=c, marker=m, linestyle="", label=label)
        for c, m, label in ((GREY, "o", "PyTorch's fastest"), (BLUE, "o", "ours, bound by memory"),
                            (BLUE, "s", "ours, bound by compute"))
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return save(figure, name)


def length(rows: list[Row], name: str) -> str:
    """Attention's time and memory against its length, with each peer that was timed."""
    table = {(r["pass"], r["variant"], r["tokens"]): r for r in rows}
    lines = {
        ("jvp", "eager"): (GREY, "-", "value and tangent, math SDPA"),
        ("step", "two-pass"): (GREY, "--", "step, two passes"),
        ("forward", "sdpa"): (ORANGE, "-", "value alone, flash SDPA"),
    }
    mine = next(r["variant"] for r in rows if r["variant"] in OURS)
    lines |= {("jvp", mine): (BLUE, "-", "value and tangent, ours"),
              ("step", mine): (BLUE, "--", "step, ours")}  # fmt: skip
    for peer in sorted({v for _, v, _ in table if v.split()[0] == "jvp_flash_attention"}):
        lines["jvp", peer] = ("#5f8f4e", "-", f"value and tangent, {peer}")
    figure, axes = blank(9, 3.4, 1, 2)
    for axis, key, label in zip(axes[0], ("us", "peak_mb"), ("ms", "MiB at the peak"), strict=True):
        for (what, variant), (colour, style, says) in lines.items():
            found = sorted((n, r) for (p, v, n), r in table.items() if (p, v) == (what, variant))
            values = [r[key] / (1e3 if key == "us" else 1) for _, r in found]
            axis.plot([n for n, _ in found], values, style, color=colour, marker="o",
                      markersize=4, label=says)  # fmt: skip
        _logarithmic(axis, "tokens", label)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return save(figure, name)


def _logarithmic(axis: Axes, x: str, y: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axis.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)


def breakdown(steps: list[Row], name: str) -> str:
    """Where a step's time goes, by phase; one panel for each model."""
    figure, axes = blank(8, 0.9 + 0.85 * len(steps), len(steps), 1)
    for axis, step in zip(axes[:, 0], steps, strict=True):
        variants = list(variants_of(step))[::-1]
        for y, variant in enumerate(variants):
            row, left = step[variant], 0.0
            rest = row["ms"] - sum(row["phases"].values())
            for phase, ms in {**row["phases"], "rest": max(0.0, rest)}.items():
                axis.barh(y, ms, left=left, height=0.7, color=PHASES.get(phase, "#e6e8eb"))
                left += ms
            axis.annotate(f"{row['ms']:.0f} ms", (left, y), (4, 0), textcoords="offset points",
                          va="center", fontsize=8)  # fmt: skip
        axis.set_yticks(range(len(variants)), variants)
        axis.set_xlim(0, 1.12 * max(step[v]["ms"] for v in variants))
        axis.grid(False, axis="y")
        axis.set_title(title(step), fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("ms a step")
    handles = [matplotlib.patches.Patch(color=PHASES[p], label=p) for p in phases_of(steps)]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return save(figure, name)


def phases_of(steps: list[Row]) -> list[str]:
    """The phases that any variant has, in their order."""
    found = {p for step in steps for row in variants_of(step).values() for p in row["phases"]}
    return [phase for phase in PHASES if phase in found]


GROWTH = ("tokens", "batch", "layers", "width")


def growth(rows: list[Row], name: str) -> str:
    """A student's step as the cost model predicts it, and as it was measured.

    The first row is the model of which the others vary one size.
    """
    measured = [(*of_row(row), row) for row in rows]
    machine = cost.Machine(*(
        statistics.median(getattr(m, k) for _, m, _ in measured) for k in ("copy", "matmul")
    ))  # fmt: skip
    base = measured[0][0]
    figure, axes = blank(13, 5, 2, len(GROWTH) + 1)
    for column, size in enumerate(GROWTH):
        alike = [(m, r) for m, _, r in measured if _same(m, base, size)]
        sizes = [getattr(m, size) for m, _ in alike]
        xs = sorted(set(sizes))
        for mode, colour in (("stock", GREY), ("fused", BLUE)):
            curve = [xs[0] * (xs[-1] / xs[0]) ** (i / 20) for i in range(21)]
            curve = sorted({round(x) for x in curve})
            models = [replace(base, **{size: x}) for x in curve]
            predicted = (
                [cost.seconds(m, mode, "step", machine) for m in models],
                [cost.step_memory(m, mode) / 2**20 for m in models],
            )
            got = (
                [r[mode]["step"]["us"] / 1e6 for _, r in alike],
                [r[mode]["step"]["peak_mb"] for _, r in alike],
            )
            for axis, line, points in zip(axes[:, column], predicted, got, strict=True):
                axis.plot(curve, line, color=colour, label=f"{mode}, predicted")
                axis.plot(sizes, points, "o", color=colour, label=f"{mode}, measured")
        for axis, label in zip(axes[:, column], ("s", "MiB beyond weights"), strict=True):
            _logarithmic(axis, size, label if column == 0 else "")
            axis.xaxis.set_minor_formatter(lambda v, _: "")
            axis.set_xticks(xs, [f"{x:g}" for x in xs])
    _gpus(axes[:, -1])
    for axis in axes.flat:
        axis.yaxis.set_minor_formatter(lambda v, _: f"{v:g}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return save(figure, name)


def _same(m: cost.Sana, base: cost.Sana, but: str) -> bool:
    """Whether a model has the base's sizes but for one."""
    return all(getattr(m, k) == getattr(base, k) for k in GROWTH if k != but)


ASSUMED = cost.Machine(copy=3e12, matmul=4e14, link=5e10)
"""A GPU of the model's own, for the panel that nothing here can measure."""


def _gpus(axes: Any) -> None:
    """480 samples of a whole SANA 0.6B step shared by GPUs: the model alone."""
    whole = cost.Sana(1152, 28, 1024, itemsize=2)
    counts = [1, 2, 4, 8, 16, 32]  # of 32 prompts
    for mode, colour in (("stock", GREY), ("fused", BLUE)):
        shares = [replace(whole, batch=480 // n) for n in counts]
        steps = [
            cost.training_step(m, mode, ASSUMED, gpus=n)
            for m, n in zip(shares, counts, strict=True)
        ]
        memory = [cost.training_memory(m, mode) / 2**20 for m in shares]
        for axis, values in zip(axes, (steps, memory), strict=True):
            axis.plot(counts, values, color=colour, linestyle="--")
    for axis in axes:
        _logarithmic(axis, "GPUs (not measured)", "")
        axis.xaxis.set_minor_formatter(lambda v, _: "")
        axis.set_xticks(counts, [str(n) for n in counts])
    axes[0].set_title("0.6B, 1024 px, 480 samples", fontsize=8)


def clean(names: Iterable[str]) -> None:
    """Remove plots of machines whose rows are gone."""
    for file in set(IMAGES.glob("*.svg")) - {IMAGES / name for name in names}:
        file.unlink()
