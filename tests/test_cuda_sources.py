"""The CUDA kernels without a GPU: what nvcc makes of them, and their own source run on the host."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import proofs
from tbcm_kernels import _dispatch
from tbcm_kernels.conv_glu import functional as conv_glu
from tbcm_kernels.linear_attention import cuda as linear_attention_cuda
from tbcm_kernels.linear_attention import functional as linear_attention
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


@pytest.mark.skipif(audit_cuda.missing() is not None, reason=str(audit_cuda.missing()))
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


@pytest.mark.skipif(audit_cuda.missing() is not None, reason=str(audit_cuda.missing()))
def test_the_shipped_table_is_of_todays_sources() -> None:
    table = json.loads(proofs.TABLE.read_text())
    assert set(table) <= proofs.sources()
    assert {source.partition(":")[0] for source in table} >= set(KERNELS)


def test_only_proved_kernels_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """impl="auto" leaves out a CUDA kernel without a proof, and says how to prove it."""
    monkeypatch.setattr(_dispatch, "refusal", lambda op, impl, *_: None)
    monkeypatch.setattr(_dispatch, "source", lambda op, impl: f"{op} {impl}")
    _dispatch._proved.cache_clear()
    with pytest.warns(UserWarning, match=r"reference.*cuda: its source.*tbcm_kernels\.testing"):
        _dispatch._notice_fallback.cache_clear()
        assert _dispatch._choice("conv_glu", "auto", "cuda", torch.bfloat16)[0] == "reference"
    assert _dispatch._choice("conv_glu", "cuda", "cuda", torch.bfloat16)[0] == "cuda"
    table = {"conv_glu cuda": {"9.0": {"dtypes": ["bfloat16"]}}}
    monkeypatch.setattr(_dispatch.json, "loads", lambda text: table)
    for capability, dtype, chosen in (
        ("9.0", torch.bfloat16, "cuda"), ("9.0", torch.float16, "reference"),
        ("8.0", torch.bfloat16, "reference"),
    ):  # fmt: skip
        monkeypatch.setattr(_dispatch, "capability", lambda found=capability: found)
        _dispatch._proved.cache_clear()
        assert _dispatch._choice("conv_glu", "auto", "cuda", dtype)[0] == chosen
    _dispatch._proved.cache_clear()


def test_wide_rows_go_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's kernels have registers for 4096 columns; where Triton is not, the reference runs."""
    monkeypatch.setattr(_dispatch, "_known_choice", _dispatch._choice)
    monkeypatch.setattr(_dispatch, "_proved", lambda *_: True)
    monkeypatch.setattr(_dispatch, "_DEVICES", dict.fromkeys(_dispatch._DEVICES, "meta"))
    here = {impl: None for impl in _dispatch.IMPLEMENTATIONS}
    monkeypatch.setattr(_dispatch, "missing", here.get)
    monkeypatch.setattr(_dispatch, "source", lambda op, impl: f"{op} {impl}")
    narrow, wide = (torch.empty(1, 1, n, device="meta") for n in (4096, 4097))
    for op in ("adaln", "rms_norm"):
        assert _dispatch.choose_for_rows(op, "auto", narrow) == "cuda"
        assert _dispatch.choose_for_rows(op, "auto", wide) == "triton"
        with pytest.raises(ValueError, match="at most 4096 numbers"):
            _dispatch.choose_for_rows(op, "cuda", wide)
    here |= {"triton": "no Triton", "cpu": "no extension"}
    _dispatch._notice_fallback.cache_clear()
    with pytest.warns(UserWarning, match="reference.*at most 4096 numbers.*no Triton"):
        assert _dispatch.choose_for_rows("adaln", "auto", wide) == "reference"


def test_fp32_falls_back_where_shared_memory_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """conv_glu's backward in fp32 does not fit the blocks of consumer GPUs; 16 bits do."""
    monkeypatch.setattr(_dispatch, "choose", lambda *_: "cuda")
    monkeypatch.setattr(_dispatch, "_notice_fallback", lambda *_: None)

    def chosen(impl: str, dtype: torch.dtype) -> str:
        device = SimpleNamespace(index=0)
        return conv_glu._choose(impl, SimpleNamespace(is_cuda=True, device=device, dtype=dtype))

    for size, found in ((99, "reference"), (163, "cuda")):
        monkeypatch.setattr(_dispatch, "shared_memory", lambda device, size=size: size << 10)
        assert chosen("auto", torch.float32) == found
        assert chosen("cuda", torch.float32) == chosen("auto", torch.half) == "cuda"


def test_linear_attention_goes_to_triton_where_cuda_has_no_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_dispatch, "_known_choice", _dispatch._choice)
    monkeypatch.setattr(_dispatch, "_proved", lambda *_: True)
    monkeypatch.setattr(_dispatch, "_DEVICES", dict.fromkeys(_dispatch._DEVICES, "meta"))
    monkeypatch.setattr(_dispatch, "missing", lambda impl: None)
    monkeypatch.setattr(_dispatch, "source", lambda op, impl: f"{op} {impl}")

    def chosen(impl: str, heads: int = 36, width: int = 32, feature_map: str = "relu") -> str:
        q = torch.empty(1, heads, 4, width, device="meta", dtype=torch.bfloat16)
        return linear_attention._choose(impl, q, q, feature_map)

    assert chosen("auto") == chosen("auto", heads=96) == chosen("cuda") == "cuda"
    for other in ({"heads": 97}, {"width": 64}, {"feature_map": "identity"}):
        assert chosen("auto", **other) == "triton"
        with pytest.raises(ValueError, match='takes feature_map="relu" and up to 96 heads of 32'):
            chosen("cuda", **other)
    monkeypatch.setattr(_dispatch, "shared_memory", lambda device: 163 << 10)
    q = SimpleNamespace(is_cuda=True, shape=(1, 36, 4, 32), device=SimpleNamespace(index=0))
    assert "such as Hopper" in linear_attention.why_not_cuda(q, q, "relu")


def test_an_older_extension_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "missing", lambda impl: None)
    monkeypatch.setattr(_dispatch, "source", lambda op, impl: None)
    chosen, reason = _dispatch._choice("adaln", "cuda", "cuda", torch.float32)
    assert chosen is None and "older version; build it again" in reason


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
