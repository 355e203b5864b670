"""The loss curve of a run."""

from __future__ import annotations

import io
import json
from pathlib import Path

from tbcm.files import write_whole


def loss_plot(metrics: Path, out: Path) -> None:
    """Loss and ‖g‖ against the step, from metrics.jsonl to a PNG; what is not finite is a gap."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, key, label in zip(axes, ("loss", "g_norm"), ("loss", "‖g‖"), strict=True):
        values = [float("nan") if row[key] is None else row[key] for row in rows]
        axis.plot([row["step"] for row in rows], values, linewidth=0.8)
        axis.set_ylabel(label)
    axes[-1].set_xlabel("step")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_whole(out, png.getvalue())
