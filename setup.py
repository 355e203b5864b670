"""Builds the optional compiled extension; everything else about the package is in pyproject.toml.

TBCM_BUILD_CPU=auto|0|1: auto builds where PyTorch and a C++ compiler are at hand, and otherwise
installs without the extension; 1 fails with the reason. TBCM_BUILD_CUDA=auto|0|1: the same for the
CUDA kernels in it, which need nvcc and no GPU.
"""

import copy
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(p) for p in Path("csrc").glob("*.cpp") if p.stem != "cuda_registration")
CUDA_SOURCES = sorted(Path("csrc").glob("*.cu"))
HEADERS = sorted(str(p) for p in Path("csrc").glob("*.h"))
STABLE_ABI = 0x020A000000000000  # PyTorch 2.10, the oldest supported
CHOICE = os.environ.get("TBCM_BUILD_CPU", "auto")
CUDA_CHOICE = os.environ.get("TBCM_BUILD_CUDA", "auto")
FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-g0", "-Wall"]
TARGETS = [
    "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",  # what later GPUs compile when they load it
]  # fmt: skip


class OptionalBuild(build_ext):
    """Compile against PyTorch's stable ABI, or go on without where that is not possible."""

    def build_extensions(self) -> None:
        self.force = True  # a header that is gone, or an older one, is a change too
        try:
            self._configure()
            if CUDA_CHOICE == "0" or not self._build_with_cuda():
                super().build_extensions()
        except Exception as reason:  # any failure of a toolchain: compiler, headers, linker
            if "1" in (CHOICE, CUDA_CHOICE):
                raise
            say(f"installing without the compiled extension: {reason}")
            for extension in self.extensions:  # nor with one of an earlier build
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = []

    def build_extension(self, extension: Extension) -> None:
        in_turn = self.compiler.compile
        self.compiler.compile = at_once(in_turn)
        try:
            super().build_extension(extension)
        finally:
            self.compiler.compile = in_turn

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        if self.extensions:
            super().copy_extensions_to_source()

    def _configure(self) -> None:
        if CHOICE == "0" or not SOURCES:
            raise RuntimeError("csrc is not there" if CHOICE != "0" else "TBCM_BUILD_CPU is 0")
        import torch  # not a build requirement: that would fetch gigabytes into a build environment

        root = Path(torch.__file__).parent
        for extension in self.extensions:
            extension.include_dirs += [str(root / "include"), "csrc"]
            extension.library_dirs += [str(root / "lib")]
            extension.libraries += ["torch_cpu"]
            extension.define_macros += [
                ("TORCH_TARGET_VERSION", f"{STABLE_ABI:#x}ULL"),
                ("Py_LIMITED_API", "0x030a0000"),
                ("TBCM_SOURCES", f'"{digest(sorted(Path("csrc").glob("[a-z]*.[ch]*")))}"'),
            ]
            extension.extra_compile_args += [
                *FLAGS, "-fopenmp-simd", "-Wno-unknown-pragmas", "-Wno-psabi",
            ]  # fmt: skip

    def _build_with_cuda(self) -> bool:
        """Whether that worked, from nvcc to the linker."""
        plain, self.extensions = self.extensions, copy.deepcopy(self.extensions)
        try:
            self._add_cuda()
            super().build_extensions()
        except Exception as reason:
            if CUDA_CHOICE == "1":
                raise
            say(f"building without CUDA kernels: {reason}")
            self.extensions = plain
            return False
        return True

    def _add_cuda(self) -> None:
        nvcc = find_nvcc()
        objects = compile_cuda(nvcc, Path(self.build_temp))
        hashes = " ".join(f"{source.stem}:{source_hash(source)}" for source in CUDA_SOURCES)
        for extension in self.extensions:
            extension.sources.append("csrc/cuda_registration.cpp")
            extension.define_macros.append(("TBCM_CUDA_SOURCES", f'"{hashes}"'))
            extension.extra_objects += objects
            extension.library_dirs += library_directories(nvcc)
            extension.libraries += ["cudart_static", "dl", "rt", "pthread"]


class HonestWheel(bdist_wheel):
    """A wheel for any machine where it was built without the extension."""

    def get_tag(self) -> tuple[str, str, str]:
        built = self.get_finalized_command("build_ext").extensions
        return super().get_tag() if built else ("py3", "none", "any")


def at_once(compile_in_turn: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """A compiler's `compile` that gives each source a process of its own, all at the same time."""

    def compile_at_once(sources: list[str], **options: object) -> list[str]:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            made = threads.map(lambda source: compile_in_turn([source], **options), sources)
            return [name for names in made for name in names]

    return compile_at_once


def find_nvcc() -> str:
    """nvcc on PATH or in CUDA_HOME."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    nvcc = shutil.which("nvcc") or shutil.which(home)
    if nvcc is None:
        raise RuntimeError("nvcc is neither on PATH nor in CUDA_HOME")
    return nvcc


def compile_cuda(nvcc: str, directory: Path) -> list[str]:
    """Compile all CUDA sources at the same time and return their objects."""
    directory.mkdir(parents=True, exist_ok=True)
    host = ",".join([*FLAGS[2:], "-fPIC", "-Wno-unknown-pragmas"])
    objects = [str(directory / f"{source.stem}.cuda.o") for source in CUDA_SOURCES]
    running = [
        subprocess.Popen(
            [nvcc, *FLAGS[:2], "-Xcompiler", host, *TARGETS, "-c", str(source), "-o", made]
        )
        for source, made in zip(CUDA_SOURCES, objects, strict=True)
    ]
    if any([process.wait() for process in running]):
        raise RuntimeError(f"{nvcc} failed")
    return objects


def library_directories(nvcc: str) -> list[str]:
    """Where nvcc itself looks for the CUDA runtime."""
    told = subprocess.run([nvcc, "--dryrun", "-o", "x", "x.o"], capture_output=True, text=True)
    return re.findall(r'"-L([^"]+)"', told.stderr)


def source_hash(source: Path) -> str:
    """Twelve digits that change with a source and the headers of ours that it includes."""
    return digest(includes(source))


def digest(files: Iterable[Path]) -> str:
    """Twelve digits that change with the files; _dispatch.py looks for those of all in csrc."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def includes(source: Path) -> list[Path]:
    """The source and, each once, the headers beside it that it includes, in order."""
    found = [source]
    for file in found:
        names = re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE)
        found += [source.with_name(n) for n in names if source.with_name(n) not in found]
    return found


def say(sentence: str) -> None:
    print(f"tbcm-kernels: {sentence}", file=sys.stderr)


for name, choice in (("TBCM_BUILD_CPU", CHOICE), ("TBCM_BUILD_CUDA", CUDA_CHOICE)):
    if choice not in ("auto", "0", "1"):
        sys.exit(f"{name} must be auto, 0 or 1, not {choice!r}.")
if CHOICE == "0" and CUDA_CHOICE == "1":
    sys.exit("TBCM_BUILD_CUDA=1 needs the extension that TBCM_BUILD_CPU=0 leaves out.")
setup(
    ext_modules=[  # also where it is not built: a source distribution has its sources
        Extension(
            "tbcm_kernels._C", SOURCES,
            depends=[*HEADERS, *map(str, CUDA_SOURCES), "csrc/cuda_registration.cpp"],
            py_limited_api=True, language="c++",
        )
    ],
    cmdclass={"build_ext": OptionalBuild, "bdist_wheel": HonestWheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)  # fmt: skip
