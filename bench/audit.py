"""`python -m bench audit [PATTERN]`: what the compilers make of every GPU kernel, without a GPU."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from bench.environment import append, check_rows
from tbcm_kernels.testing import audit

HEAD = (
    f"{'kernel':<58} {'sm':>4} {'regs':>5} {'spill':>6} {'shared':>7} {'warps/SM':>9} "
    f"{'HGMMA':>6} {'HMMA':>5} {'s':>6}"
)


def main(argv: list[str]) -> int:
    """Print a table; 1 where a kernel spills too much, misses its tensor cores or does not fit."""
    parser = argparse.ArgumentParser("python -m bench audit", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="names to match, all by default")
    parser.add_argument("--json", type=Path, help="file to append JSON lines to")
    args = parser.parse_args(argv)
    check_rows(args.json)
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # what a cache gives took no time
    print(HEAD)
    failed, count = False, 0
    for report, failure in audit.reports(args.pattern):
        failed |= failure is not None
        count += 1
        print(line(report) + (f"  {failure.upper()}" if failure else ""), flush=True)
        append(asdict(report) | {"failure": failure}, args.json)
    found = "some fail" if failed else "none fails" if count else "no name matches"
    print(f"{count} kernels compiled, {found}")
    return int(failed or not count)


def line(report: audit.Report) -> str:
    """One kernel; what its compiler does not say is a dash."""
    warps = report.occupancy()
    bound = None if warps is None else f"{warps}/64"
    said = (bound, report.hgmma, report.hmma, report.seconds)
    bound, hgmma, hmma, seconds = ("-" if x is None else x for x in said)
    return (
        f"{report.name:<58} {report.architecture:>4} {report.registers:>5} {report.spilled:>6} "
        f"{report.shared:>7} {bound:>9} {hgmma:>6} {hmma:>5} {seconds:>6}"
    )
