"""`python -m tbcm_kernels.testing`: prove on this machine every implementation that it can run.

One line for each op, implementation, device and dtype; exit code 1 where one fails. `--record`
appends a row for each to a file; `python -m bench.proofs` makes the table from such rows that lets
impl="auto" take the CUDA kernels.
"""

from __future__ import annotations

import argparse
import json
import warnings
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path

from tbcm_kernels.testing.prove import proofs


def main(argv: list[str] | None = None) -> int:
    """Print the proofs as they come, with their faults; 1 where one has any or none could run."""
    parser = argparse.ArgumentParser("python -m tbcm_kernels.testing", description=__doc__)
    parser.add_argument("--impl", help="prove this implementation alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="prove on this device alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the cases (1)")
    parser.add_argument("--few", action="store_true", help="few shapes, as under a sanitizer")
    parser.add_argument("--record", type=Path, help="file to append JSON lines to")
    args = parser.parse_args(argv)
    if args.few and args.record:
        parser.error("few shapes prove nothing: --few and --record exclude each other")
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    if args.record:
        try:
            args.record.parent.mkdir(parents=True, exist_ok=True)
            args.record.open("a").close()
        except OSError as error:
            parser.error(f"--record: {args.record} cannot be written ({error.strerror})")
    # The notice that kernels are unproved here would only say to run this.
    warnings.simplefilter("ignore")
    tried = failed = 0
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with args.record.open("a") if args.record else nullcontext() as file:
        for proof in proofs(args.impl, args.few, args.device, args.jobs):
            print(proof, flush=True)
            tried += 1
            failed += bool(proof.faults)
            for fault in proof.faults:
                print(f"    {fault}", flush=True)
            if file:
                print(json.dumps(proof.row() | {"date": date}), file=file, flush=True)
    if not tried:
        asked = " ".join(f"--{n} {v}" for n in ("impl", "device") if (v := getattr(args, n)))
        print(f"Nothing here can run {asked}; python -m tbcm_kernels says what can, and why.")
    return int(failed > 0 or not tried)


if __name__ == "__main__":
    raise SystemExit(main())
