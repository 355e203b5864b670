"""`python -m bench.figures`: writes the README's figures from the rows in bench/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FIGURES = {"fd_teacher": 2, "pair_rmse": 3}
ROWS = Path(__file__).parent / "results" / "cpu-2-cores"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


def quality(report: dict[str, Any]) -> list[str]:
    """The table of `tbcm eval`."""
    lines = [
        f"`make train`: {report['samples']} images, mean of {len(report['seeds'])} noise seeds.",
        "",
        "| | accuracy | fd | fd_teacher | pair_rmse |",
        "|---|---|---|---|---|",
    ]
    rows = {"teacher, 20 steps": report["teacher"], "undistilled, 1 step": report["undistilled"]}
    rows |= {f"student, {n} step{'s'[: n != '1']}": s for n, s in report["student"].items()}
    for name, row in rows.items():
        cells = [f"{row['accuracy']:.3f}", f"{row['fd']:.2f}"]
        cells += [f"{row[k]:.{d}f}" if k in row else "" for k, d in FIGURES.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def speed(step: dict[str, Any]) -> list[str]:
    """The sentence of `tbcm bench step`."""
    eager, fused = step["eager"], step["fused"]
    return [
        f"One step of it, in turns on {step['threads']} CPU threads: {eager['ms']:.0f} ms plain, "
        f"{fused['ms']:.0f} ms fused, **{step['speedup']:.2f} times faster**; peak memory "
        f"{eager['peak_mb']:.0f} and {fused['peak_mb']:.0f} MB (`tbcm bench step`)."
    ]


PASSES = {
    "forward": "value", "jvp": "value and tangent", "backward": "gradient of the value",
    "through": "gradient of both",
}  # fmt: skip


def attention(rows: list[dict[str, Any]]) -> list[str]:
    """Attention against the fastest way in PyTorch; of rows measured again the last counts."""
    last = {(r["shape"], r["batch"], r["pass"], r["variant"]): r for r in rows}
    first = rows[0]
    lines = [
        f"`attention` in {first['dtype']} on {first['threads']} CPU threads, in turns with "
        f"PyTorch's fastest (`python -m bench --op attention`); memory is what a first call takes, "
        f"its outputs included, but not the scratch that our threads keep, at most 8 MiB each:",
        "",
        "| shape | pass | PyTorch | ours | | MiB, PyTorch's and ours |",
        "|---|---|---|---|---|---|",
    ]
    for (shape, batch, what, variant), row in last.items():
        if variant != "cpu":
            continue
        other = last[shape, batch, what, row["baseline"]]
        name = {"sdpa": "flash", "eager": "math"}[row["baseline"]]
        lines.append(
            f"| {shape}, B = {batch} | {PASSES[what]} | {other['us'] / 1e3:.1f} ms ({name}) | "
            f"{row['us'] / 1e3:.1f} ms | **{row['speedup']:.2f}×** | "
            f"{other['peak_mb']:.0f}, {row['peak_mb']:.0f} |"
        )
    return lines


def main() -> None:
    """Replace what stands between the two marks in README.md."""
    read = {
        name: json.loads((ROWS / f"digits-{name}.json").read_text()) for name in ("eval", "step")
    }
    rows = [json.loads(line) for line in (ROWS / "attention.jsonl").read_text().splitlines()]
    lines = [*quality(read["eval"]), "", *speed(read["step"]), "", *attention(rows)]
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text("\n".join([before + BEGIN, *lines, END + after]))


if __name__ == "__main__":
    main()
