"""Make tbcm_kernels/proofs.json, the table of CUDA and Triton sources that have passed on a GPU.

It is made from the rows that `python -m tbcm_kernels.testing --record` wrote to
bench/results/*/proofs.jsonl. A source of today's is in it, for each compute capability, with the
dtypes that have run there and in which no run found a fault.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from bench.environment import ROOT
from tbcm_kernels import _dispatch
from tbcm_kernels.testing.prove import GPU_KERNELS

TABLE = ROOT / "tbcm_kernels" / "proofs.json"


def table(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By source and compute capability the proved dtypes, the GPU and the date of the last run."""
    runs = defaultdict(list)
    for row in rows:
        runs[row["source"], row["capability"]].append(row)
    found = defaultdict(dict)
    for (source, capability), run in sorted(runs.items()):
        faulty = {row["dtype"] for row in run if row["faults"]}
        if dtypes := {row["dtype"] for row in run} - faulty:
            last = max(run, key=lambda row: row["date"])
            proved = {key: last[key] for key in ("device", "date")} | {"dtypes": sorted(dtypes)}
            found[source][capability] = proved
    return dict(found)


def sources() -> set[str | None]:
    """Those that run here."""
    return {
        _dispatch.source(op, impl)
        for op, kernels in _dispatch.OPS.items()
        for impl in kernels
        if impl in GPU_KERNELS
    }


def main() -> None:
    """Write the table; SystemExit where the extension has no CUDA kernels to compare with."""
    if reason := _dispatch.missing("cuda"):
        raise SystemExit(f"{TABLE.name} is left as it is: {reason}.")
    files = sorted((ROOT / "bench" / "results").glob("*/proofs.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    today = sources()
    found = table(row for row in rows if row["source"] in today)
    TABLE.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    argparse.ArgumentParser("python -m bench.proofs", description=__doc__).parse_args()
    main()
