"""How every op is proved, shipped so that a user can prove it on a machine of their own.

    python -m tbcm_kernels.testing         every implementation that this machine can run
    python -m tbcm_kernels.testing.audit   registers and spills of the GPU kernels, without a GPU

`proofs` does the former from Python; `faults` judges one tensor by the error policy, which
`compare.py` explains. `cases.py` holds the inputs and `check.py` runs one case.
"""

from tbcm_kernels.testing.cases import Case
from tbcm_kernels.testing.compare import faults
from tbcm_kernels.testing.prove import Proof, proofs, prove

__all__ = ["Case", "Proof", "faults", "proofs", "prove"]
