"""Make tbcm_kernels/proofs.json, the table of CUDA and Triton sources that have passed on a GPU.

It is made from the rows that `python -m tbcm_kernels.testing --record` wrote to
bench/results/*/proofs.jsonl. A source is in it where every dtype has run and no run found a fault.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tbcm_kernels" / "proofs.json"
DTYPES = {"float32", "bfloat16", "float16"}


def table(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """The proved sources, each with the GPU and the date of its last run."""
    runs = defaultdict(list)
    for row in rows:
        if row["source"]:
            runs[row["source"]].append(row)
    return {
        source: {key: max(run, key=lambda row: row["date"])[key] for key in ("device", "date")}
        for source, run in sorted(runs.items())
        if not any(row["faults"] for row in run) and {row["dtype"] for row in run} == DTYPES
    }


def main() -> None:
    """Write the table."""
    files = sorted((ROOT / "bench" / "results").glob("*/proofs.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    TABLE.write_text(json.dumps(table(rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
