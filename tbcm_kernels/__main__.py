"""`python -m tbcm_kernels`: versions, and which implementation of each op runs here and why."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import tbcm_kernels
from tbcm_kernels import _dispatch


def main() -> None:
    """Print the versions, the table, and a sentence where the compiled extension is absent."""
    argparse.ArgumentParser("python -m tbcm_kernels", description=__doc__).parse_args()
    print(
        f"tbcm_kernels {tbcm_kernels.__version__}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, triton {_installed('triton')}, "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}"
    )
    print(f"{'op':<16} {'in float32':<18} reason")
    for op, implementation, reason in tbcm_kernels.implementations():
        print(f"{op:<16} {implementation:<18} {reason}")
    if reason := _dispatch.missing("cpu"):
        print(f"CPU tensors take the plain PyTorch reference, for {reason}.")


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
