"""`python -m bench.cost FILE...`: tbcm/cost.py held against the rows of `python -m bench.model`."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from bench.environment import Row
from bench.shapes import SHAPES
from tbcm.cost import STREAMS, Machine, Sana, seconds, step_memory


def of_row(row: Row) -> tuple[Sana, Machine]:
    """The model and the machine of a row of `python -m bench.model`."""
    shape = next(s for name, s in SHAPES.items() if name.startswith(row["model"]))
    size = 2 if row["dtype"] == "bfloat16" else 4
    tokens, batch, text = row["latent"] ** 2, row["batch"], row["text"]
    m = Sana(shape.width, row["layers"], tokens, batch, text, size, shape.heads)
    return m, Machine(row["copy_gb_s"] * 1e9, row["matmul_tflop_s"] * 1e12)


def check(rows: list[Row]) -> list[Row]:
    """Each measured pass, predicted: seconds, and MiB of a step where memory was measured."""
    found = []
    for row in rows:
        m, machine = of_row(row)
        sizes = {k: row[k] for k in ("model", "layers", "latent", "batch")}
        for mode in STREAMS:
            for what in ("forward", "jvp", "step"):
                measured, predicted = row[mode][what]["us"] / 1e6, seconds(m, mode, what, machine)
                made = {"quantity": "s", "measured": measured, "predicted": predicted}
                found.append({**sizes, "mode": mode, "pass": what, **made})
            if (peak := row[mode]["step"]["peak_mb"]) is not None:
                made = {"measured": peak, "predicted": step_memory(m, mode) / 2**20}
                found.append({**sizes, "mode": mode, "pass": "step", "quantity": "MiB", **made})
    return found


def main(argv: list[str] | None = None) -> int:
    """Print each prediction beside its measurement."""
    parser = argparse.ArgumentParser("python -m bench.cost", description=main.__doc__)
    parser.add_argument("rows", type=Path, nargs="+", help="files of `python -m bench.model`")
    args = parser.parse_args(argv)
    if missing := [path for path in args.rows if not path.is_file()]:
        parser.error(f"there is no file {missing[0]}")
    found = []
    for path in args.rows:
        try:
            rows = map(json.loads, path.read_text("utf-8").splitlines())
            found += check([row for row in rows if "faults" not in row])
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            parser.error(f"{path} does not hold rows of `python -m bench.model` ({error!r})")
    for row in found:
        sizes = f"{row['model']} L={row['layers']} latent={row['latent']} B={row['batch']}"
        print(
            f"{sizes:<36} {row['mode']:<6} {row['pass']:<8} measured {row['measured']:>8.3f} "
            f"predicted {row['predicted']:>8.3f} {row['quantity']:<4} "
            f"x{row['predicted'] / row['measured']:.2f}"
        )
    for quantity in sorted({row["quantity"] for row in found}):
        middle, most, points = off(found, quantity)
        print(f"{quantity}: off by {middle:.0%}, at most {most:.0%}, in {points} points")
    return 0


def off(found: list[dict], quantity: str) -> tuple[float, float, int]:
    """How far predictions are from measurements: in the median, at most, and in how many."""
    ratios = [abs(r["predicted"] / r["measured"] - 1) for r in found if r["quantity"] == quantity]
    return statistics.median(ratios), max(ratios), len(ratios)


if __name__ == "__main__":
    raise SystemExit(main())
