"""Make tbcm_kernels/proofs.json, the table of CUDA and Triton sources that have passed on a GPU.

It is made from the rows that `python -m tbcm_kernels.testing --record` wrote to
bench/results/*/proofs.jsonl. A source is in it with the dtypes that have run and in which no run
found a fault.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tbcm_kernels" / "proofs.json"


def table(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The proved sources, each with its proved dtypes, the GPU and the date of its last run."""
    runs = defaultdict(list)
    for row in rows:
        if row["source"]:
            runs[row["source"]].append(row)
    found = {}
    for source, run in sorted(runs.items()):
        faulty = {row["dtype"] for row in run if row["faults"]}
        if dtypes := {row["dtype"] for row in run} - faulty:
            last = max(run, key=lambda row: row["date"])
            found[source] = {key: last[key] for key in ("device", "date")}
            found[source]["dtypes"] = sorted(dtypes)
    return found


def main() -> None:
    """Write the table."""
    files = sorted((ROOT / "bench" / "results").glob("*/proofs.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    TABLE.write_text(json.dumps(table(rows), indent=2) + "\n")


if __name__ == "__main__":
    argparse.ArgumentParser("python -m bench.proofs", description=__doc__).parse_args()
    main()
