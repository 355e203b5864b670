"""`python -m tbcm_kernels.testing`: prove on this machine every implementation that it can run.

One line for each op, implementation, device and dtype; exit code 1 where one fails.
"""

from __future__ import annotations

import warnings

from tbcm_kernels.testing.prove import proofs


def main() -> int:
    """Print the proofs as they come, with the faults of those that fail; 1 where any does."""
    # The notice that kernels are unproved here would only say to run this.
    warnings.simplefilter("ignore")
    failed = 0
    for proof in proofs():
        print(proof, flush=True)
        failed += bool(proof.faults)
        for fault in proof.faults:
            print(f"    {fault}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
