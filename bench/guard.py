"""The regression guard: speed-ups of this run against those of earlier rows, never times.

A speed-up is taken against the baseline that the earlier row names, so both are ratios of the same
two variants, each timed in turns.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench import ops
from bench.environment import Row

KEY = ("op", "shape", "batch", "tokens", "dtype", "pass")
COMPARED = ("variant", "baseline", "speedup")


def read(path: Path, device: str, dtype: str) -> list[Row]:
    """The earlier rows of a file or of all *.jsonl in a folder, timed on such a device and dtype.

    Raises SystemExit where there are none.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not all(file.is_file() for file in files):
        raise SystemExit(f"--against: there is no {path}")
    try:
        lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
        rows = [json.loads(line) for line in lines]
        found = [
            row for row in rows
            if "op" in row and "us" in row and row["dtype"] == dtype
            and row["device"].startswith("cpu") == (device == "cpu")
        ]  # fmt: skip
        for row in found:
            _ = [row[key] for key in (*KEY, *COMPARED)]
    except (ValueError, TypeError, KeyError) as error:
        raise SystemExit(
            f"--against: {path} does not hold rows of `python -m bench` ({error})"
        ) from error
    gone = [row for row in found if row["op"] not in ops.OPS or row["shape"] not in ops.SHAPES]
    for name in sorted({f"{row['op']} at {row['shape']}" for row in gone}):
        print(f"--against: there is no {name} any more, its rows are left out")
    found = [row for row in found if row not in gone]
    if not found:
        raise SystemExit(f"--against: {path} holds no rows of ops in {dtype} on {device}")
    return found


def indexed(rows: list[Row]) -> dict[tuple, dict[str, Row]]:
    """The variants of each case; of rows measured again the last counts."""
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if "us" in row:
            cases.setdefault(tuple(row[k] for k in KEY), {})[row["variant"]] = row
    return cases


def report(made: list[Row], earlier: list[Row], margin: float) -> bool:
    """Print each speed-up beside the earlier one; True where one fell by more than the margin."""
    before, fell, compared = indexed(earlier), False, 0
    for key, variants in indexed(made).items():
        for name, old in before.get(key, {}).items():
            base = old["baseline"]
            if name == base or name not in variants or base not in variants:
                continue
            compared += 1
            now = variants[base]["us"] / variants[name]["us"]
            lost = now < (1 - margin) * old["speedup"]
            fell |= lost
            print(
                f"{'FELL' if lost else 'held'}  {' '.join(map(str, key))} {name}: "
                f"x{old['speedup']:.2f} then, x{now:.2f} now against {base}"
            )
    print(f"{compared} speed-ups compared, a fall of more than {margin:.0%} counts")
    if not compared:
        print("FELL  nothing that was timed has an earlier row: name its --op, --shape, --batch,")
        print("      and --compile where it has that")
    return fell or not compared
