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


def ops(rows: list[dict[str, Any]]) -> list[str]:
    """Our kernels against the fastest way in PyTorch; of rows measured again the last counts."""
    last = {(r["op"], r["shape"], r["batch"], r["pass"], r["variant"]): r for r in rows}
    lines = [
        f"Ops in {rows[0]['dtype']} on {rows[0]['threads']} CPU threads, in turns with "
        f"PyTorch's fastest (`python -m bench`); memory is what a first call takes, its outputs "
        f"included, but not the scratch that our threads keep, at most 8 MiB each:",
        "",
        "| op | shape | pass | PyTorch | ours | | MiB, PyTorch's and ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for (op, shape, batch, what, variant), row in last.items():
        if variant != "cpu":
            continue
        other = last[op, shape, batch, what, row["baseline"]]
        eager = "math" if op == "attention" else "eager"
        name = {"sdpa": "flash", "eager": eager, "compile": "compiled"}[row["baseline"]]
        lines.append(
            f"| `{op}` | {shape}, B = {batch} | {PASSES[what]} | {other['us'] / 1e3:.1f} ms "
            f"({name}) | {row['us'] / 1e3:.1f} ms | **{row['speedup']:.2f}×** | "
            f"{other['peak_mb']:.0f}, {row['peak_mb']:.0f} |"
        )
    return lines


def models(rows: list[dict[str, Any]]) -> list[str]:
    """Whole models, fused against stock; of rows measured again the last counts."""
    last = {(r["model"], r["layers"], r["latent"], r["batch"]): r for r in rows}
    lines = [
        f"SANA's transformer at reduced depth in {rows[0]['dtype']} on {rows[0]['threads']} CPU "
        f"threads, stock → fused in turns (`python -m bench.model`). A step is a tangent and a "
        f"gradient; what it saves for backward is in tensors of the residual stream:",
        "",
        "| model | value | value and tangent | of the value's time | step | | "
        "MiB in a step | saved for each block |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (model, layers, latent, batch), row in last.items():
        lines.append(f"| {model}, {layers} layers, {latent}², B = {batch} | {_cells(row)} |")
    return lines


def _cells(row: dict[str, Any]) -> str:
    """Stock and fused in each cell."""
    stock, fused = row["stock"], row["fused"]
    value, pair, step = (
        f"{stock[what]['us'] / 1e3:.0f} → {fused[what]['us'] / 1e3:.0f} ms"
        for what in ("forward", "jvp", "step")
    )
    share = " → ".join(f"{row['jvp_over_forward'][m]:.2f}×" for m in ("stock", "fused"))
    memory = f"{stock['step']['peak_mb']:.0f} → {fused['step']['peak_mb']:.0f}"
    saved = f"{stock['saved_u_per_block']:.0f} → {fused['saved_u_per_block']:.0f}"
    cells = (value, pair, share, step, f"**{row['step_speedup']:.2f}×**", memory, saved)
    return " | ".join(cells)


def measured() -> list[dict[str, Any]]:
    """The rows in fp32, without those that failed their check."""
    lines = [x for file in sorted(ROWS.glob("*.jsonl")) for x in file.read_text().splitlines()]
    rows = [json.loads(x) for x in lines]
    return [r for r in rows if r["dtype"] == "float32" and "faults" not in r]


def main() -> None:
    """Replace what stands between the two marks in README.md."""
    read = {
        name: json.loads((ROWS / f"digits-{name}.json").read_text()) for name in ("eval", "step")
    }
    lines = [*quality(read["eval"]), "", *speed(read["step"])]
    for table, kind in ((ops, "op"), (models, "model")):
        if rows := [r for r in measured() if kind in r]:
            lines += ["", *table(rows)]
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text("\n".join([before + BEGIN, *lines, END + after]))


if __name__ == "__main__":
    main()
