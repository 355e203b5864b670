"""Builds the optional compiled extension; everything else about the package is in pyproject.toml.

TBCM_BUILD_CPU=auto|0|1: auto builds where PyTorch and a C++ compiler are at hand, and otherwise
installs without the extension; 1 fails with the reason.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(p) for p in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(p) for p in Path("csrc").glob("*.h"))
STABLE_ABI = 0x020A000000000000  # PyTorch 2.10, the oldest supported
CHOICE = os.environ.get("TBCM_BUILD_CPU", "auto")


class OptionalBuild(build_ext):
    """Compile against PyTorch's stable ABI, or go on without where that is not possible."""

    def build_extensions(self) -> None:
        try:
            self._configure()
            super().build_extensions()
        except Exception as reason:  # any failure of a toolchain: compiler, headers, linker
            if CHOICE == "1":
                raise
            print(
                f"tbcm-kernels: installing without the compiled extension: {reason}",
                file=sys.stderr,
            )
            self.extensions = []

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        if self.extensions:
            super().copy_extensions_to_source()

    def _configure(self) -> None:
        import torch  # not a build requirement: that would fetch gigabytes into a build environment

        root = Path(torch.__file__).parent
        for extension in self.extensions:
            extension.include_dirs += [str(root / "include"), "csrc"]
            extension.library_dirs += [str(root / "lib")]
            extension.libraries += ["torch_cpu"]
            extension.define_macros += [
                ("TORCH_TARGET_VERSION", f"{STABLE_ABI:#x}ULL"),
                ("Py_LIMITED_API", "0x030a0000"),
            ]
            extension.extra_compile_args += [
                "-std=c++20", "-O3", "-fopenmp-simd", "-fvisibility=hidden", "-g0", "-Wall",
                "-Wno-unknown-pragmas", "-Wno-psabi",
            ]  # fmt: skip


setup(
    ext_modules=[]
    if CHOICE == "0"
    else [
        Extension("tbcm_kernels._C", SOURCES, depends=HEADERS, py_limited_api=True, language="c++")
    ],
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
