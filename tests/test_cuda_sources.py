"""The CUDA kernels without a GPU: what nvcc makes of them, and their own source run on the host."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import proofs
from tbcm_kernels import _dispatch
from tbcm_kernels.linear_attention import cuda as linear_attention_cuda
from tbcm_kernels.testing import audit_cuda
from tbcm_kernels.testing import proofs as proofs_of

ROOT = Path(__file__).parents[1]
KERNELS = ["adaln", "conv_glu", "linear_attention", "rms_norm"]
DTYPES = ["float32", "bfloat16", "float16"]
# So that two blocks or more fit; conv_glu's backward and linear_attention are alone on a processor.
REGISTERS = {
    "adaln forward bf16": 128, "adaln forward tangent bf16": 128, "adaln forward tangent fp32": 128,
    "adaln forward tangent fp16": 168, "adaln backward bf16": 128, "adaln backward fp32": 128,
    "conv_glu forward bf16": 128, "conv_glu forward tangent bf16": 128, "conv_glu forward": 168,
    "conv_glu backward": 128, "linear_attention": 128, "rms_norm forward": 102,
    "rms_norm backward": 80,
}  # fmt: skip


@pytest.mark.skipif(_dispatch.missing("cuda") is not None, reason=str(_dispatch.missing("cuda")))
def test_no_spills_and_few_registers() -> None:
    made = Path(importlib.import_module("tbcm_kernels._C").__file__).stat().st_mtime
    changed = [f.name for f in (ROOT / "csrc").iterdir() if f.stat().st_mtime > made]
    assert not changed, "build the extension again"
    rows = list(audit_cuda.built())
    assert {row["architecture"] for row in rows} == {80, 90}
    assert len(rows) == 2 * (46 + 24 + 23 + 36)
    assert [row for row in rows if row["spilled"]] == []
    for kernel, limit in REGISTERS.items():
        found = [row["registers"] for row in rows if row["name"].startswith(f"cuda {kernel}")]
        assert found and max(found) <= limit, kernel


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA sources and their registration, compiled for the host."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    root, made = Path(torch.__file__).parent, tmp_path_factory.mktemp("host")
    flags = ["-std=c++20", "-O1", "-fPIC", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"]
    flags += [f"-I{root / 'include'}", "-DTORCH_TARGET_VERSION=0x020A000000000000ULL"]
    flags += ["-DTBCM_DEVICE=CPU", "-include", str(ROOT / "tests" / "cuda_on_host.h")]
    sources = [*(ROOT / "csrc" / f"{op}.cu" for op in KERNELS), ROOT / "csrc/cuda_registration.cpp"]
    objects = [made / f"{source.stem}.o" for source in sources]
    running = [
        subprocess.Popen([compiler, *flags, "-x", "c++", "-c", source, "-o", target])
        for source, target in zip(sources, objects, strict=True)
    ]
    assert not any([process.wait() for process in running])
    target = made / "kernels.so"
    link = [compiler, "-shared", *objects, f"-L{root / 'lib'}", "-ltorch_cpu", "-o", target]
    subprocess.run(link, check=True)
    return target


def proved(library: Path, cases: str, *dtypes: str, **environment: str) -> list[str]:
    """What the proofs print, a line for each op and dtype and one for each fault.

    Each dtype has a process of its own, with one thread: the kernels know no more.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    running = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests" / "prove_on_host.py", library, cases, dtype],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for dtype in dtypes
    ]  # fmt: skip
    lines = []
    for process in running:
        printed, error = process.communicate()
        assert process.returncode == 0, error
        lines += printed.splitlines()
    return lines


def test_kernels_are_right_on_the_host(library: Path) -> None:
    """Every case in fp32, bf16 and fp16, outputs and gradients, twice with the same bits."""
    lines = proved(library, "all", *DTYPES)
    assert len(lines) == 3 * len(KERNELS) - 1  # linear_attention has none in fp32
    assert all(line.endswith("passed") for line in lines), "\n".join(lines)


def test_missing_barriers_are_found(library: Path) -> None:
    lines = proved(library, "few", "bfloat16", WITHOUT_BARRIERS="1")
    assert len(lines) > len(KERNELS) and not any(line.endswith("passed") for line in lines)


def test_missing_waits_are_found(library: Path) -> None:
    """Kernels that copy ahead into shared memory use what has come."""
    lines = proved(library, "few", "bfloat16", WITHOUT_WAITS="1")
    assert len(lines) > len(KERNELS) and not any(line.endswith("passed") for line in lines)


def test_proofs_are_of_dtypes_without_a_fault() -> None:
    about = {"device": "a GPU", "date": "2026-01-01"}

    def rows(source: str, dtypes: list[str], **change: object) -> list[dict]:
        row = about | {"capability": "9.0", "source": source, "faults": []}
        return [row | {"dtype": d} | change for d in dtypes]

    table = proofs.table([
        *rows("adaln:1", DTYPES), *rows("adaln:2", DTYPES[:2]), *rows("adaln:3", DTYPES),
        *rows("adaln:3", DTYPES[:1], faults=["y: too far off"]),
        *rows("adaln:3", DTYPES[:1], capability="8.0"),
    ])  # fmt: skip
    assert table == {
        "adaln:1": {"9.0": about | {"dtypes": sorted(DTYPES)}},
        "adaln:2": {"9.0": about | {"dtypes": sorted(DTYPES[:2])}},
        "adaln:3": {
            "8.0": about | {"dtypes": DTYPES[:1]}, "9.0": about | {"dtypes": sorted(DTYPES[1:])},
        },
    }  # fmt: skip


@pytest.mark.skipif(_dispatch.missing("cuda") is not None, reason=str(_dispatch.missing("cuda")))
def test_the_shipped_table_is_of_todays_sources() -> None:
    table = json.loads(proofs.TABLE.read_text())
    assert set(table) <= proofs.sources()
    assert {source.partition(":")[0] for source in table} >= set(KERNELS)


def test_processes_share_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "OPS", {op: _dispatch.OPS[op] for op in ("adaln", "rms_norm")})
    alone, shared = (list(proofs_of("cpu", few=True, device="cpu", jobs=n)) for n in (1, 2))
    assert len(alone) == 4 and [str(p) for p in shared] == [str(p) for p in alone]


def test_linear_attention_copies_what_a_tensor_map_cannot_describe() -> None:
    """Strides of 0, and rows off 16 bytes; a transposed view stays as it is."""
    tokens_first = torch.ones(2, 5, 3, 32, dtype=torch.bfloat16).transpose(1, 2)
    assert linear_attention_cuda._aligned(tokens_first) is tokens_first
    expanded = torch.ones(2, 3, 1, 32, dtype=torch.bfloat16).expand(-1, -1, 5, -1)
    shifted = torch.ones(2, 3, 5, 33, dtype=torch.bfloat16)[..., 1:]
    for x in (expanded, shifted):
        copy = linear_attention_cuda._aligned(x)
        assert copy.stride() == (480, 160, 32, 1) and torch.equal(copy, x)
