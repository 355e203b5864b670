"""Which implementation runs where, and what is said of those that do not."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tbcm_kernels
from tbcm_kernels import _dispatch
from tbcm_kernels.attention import functional as attention
from tbcm_kernels.conv_glu import functional as conv_glu
from tbcm_kernels.linear_attention import functional as linear_attention


@pytest.mark.parametrize("impl", ["cuda", "fastest", ""])
def test_unknown_implementation_is_refused(impl: str) -> None:
    with pytest.raises(ValueError, match=r"^adaln: .*impl.* (cuda|one of)"):
        tbcm_kernels.adaln(torch.ones(1, 1, 8), impl=impl)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_explicit_implementation_that_cannot_run_says_why(
    impl: str, need: Callable[[str], None]
) -> None:
    need(impl)
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    x = torch.ones(2, 8, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match=f"impl='{impl}' cannot run: it takes .*are float64"):
        tbcm_kernels.rms_norm(x, impl=impl)


def test_tf32_may_be_used_once_pytorch_is_told_so_in_either_way() -> None:
    products, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    try:
        for precision, may in (("highest", False), ("high", True)):
            torch.set_float32_matmul_precision(precision)
            assert _dispatch.may_use_tf32() is may
        for precision, may in (("ieee", False), ("tf32", True)):
            products.fp32_precision = precision
            assert _dispatch.may_use_tf32() is may
    finally:
        torch.set_float32_matmul_precision(before)
        products.fp32_precision = "none"


def test_fallback_is_said_once() -> None:
    _dispatch._remembered.cache_clear()
    _dispatch._notice_fallback.cache_clear()
    x = torch.ones(2, 8, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            tbcm_kernels.rms_norm(x)
    assert len(said) == 1
    assert "rms_norm runs its plain PyTorch reference for float64 on cpu" in str(said[0].message)


def test_the_table_of_implementations_leaves_notices_to_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_dispatch, "missing", lambda impl: "it is not there")
    known = (_dispatch._remembered, _dispatch._notice_fallback, _dispatch._interpreted)
    for answers in known:
        answers.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert {row[1] for row in _dispatch.implementations()} >= {"reference (cpu)"}
            assert not said
            tbcm_kernels.rms_norm(torch.ones(2, 8))
        assert len(said) == 1
    finally:
        for answers in known:
            answers.cache_clear()


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


@pytest.mark.parametrize(
    ("gpus", "want"), [([], None), ([(9, 0)] * 2, "9.0"), ([(9, 0), (8, 6)], None)]
)
def test_the_capability_is_that_of_all_gpus(
    gpus: list[tuple[int, int]], want: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus.__getitem__)
    assert _dispatch.capability.__wrapped__() == want


def test_an_older_extension_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "missing", lambda impl: None)
    monkeypatch.setattr(_dispatch, "source", lambda op, impl: None)
    chosen, reason = _dispatch._choice("adaln", "cuda", "cuda", torch.float32)
    assert chosen is None and "older version; build it again" in reason


def test_rows_go_where_they_fit(gpu_on_meta: dict[str, str | None]) -> None:
    """CUDA's kernels have registers for 4096 columns and Triton's for 8192."""
    for op in ("adaln", "rms_norm"):

        def chosen(width: int, impl: str = "auto", op: str = op) -> str:
            return _dispatch.choose_for_rows(op, impl, torch.empty(1, 1, width, device="meta"))

        assert [chosen(n) for n in (4096, 4097, 8192)] == ["cuda", "triton", "triton"]
        for impl, widest in (("cuda", 4096), ("triton", 8192)):
            with pytest.raises(ValueError, match=f"impl='{impl}' cannot run: .* most {widest}"):
                chosen(widest + 1, impl)
        gpu_on_meta["cpu"] = "no extension"
        with pytest.warns(UserWarning, match="reference.*at most 4096.*at most 8192.*no extension"):
            assert chosen(8193) == "reference"
        gpu_on_meta["cpu"] = None
    gpu_on_meta |= {"triton": "no Triton", "cpu": "no extension"}
    wide = torch.empty(4097, device="meta")
    with pytest.warns(UserWarning, match="reference.*at most 4096 numbers.*no Triton"):
        assert _dispatch.choose_for_rows("adaln", "auto", wide) == "reference"


def test_conv_glu_in_fp32_falls_back_where_shared_memory_is_small(
    gpu_on_meta: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backward in fp32 does not fit the blocks of consumer GPUs; 16 bits do."""
    gpu_on_meta["cpu"] = "no extension"

    def chosen(impl: str, dtype: torch.dtype) -> str:
        device = SimpleNamespace(index=0, type="meta")
        return conv_glu.choose(impl, SimpleNamespace(is_cuda=True, device=device, dtype=dtype))

    monkeypatch.setattr(_dispatch, "shared_memory", lambda device: 163 << 10)
    assert chosen("auto", torch.float32) == "cuda"
    monkeypatch.setattr(_dispatch, "shared_memory", lambda device: 99 << 10)
    assert chosen("cuda", torch.float32) == chosen("auto", torch.half) == "cuda"
    with pytest.warns(UserWarning, match="in fp32 its backward takes 124 KiB of shared memory"):
        assert chosen("auto", torch.float32) == "reference"


def test_linear_attention_goes_to_triton_where_cuda_has_no_kernel(
    gpu_on_meta: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_attention_leaves_out_what_spills_in_triton(
    dtype: torch.dtype, gpu_on_meta: dict[str, str | None]
) -> None:
    gpu_on_meta["cpu"] = "no extension"

    def chosen(width: int, v_width: int, impl: str = "auto") -> str:
        q, v = (torch.empty(1, 1, 2, n, dtype=dtype, device="meta") for n in (width, v_width))
        return linear_attention._choose(impl, q, v, "relu")

    assert chosen(128, 128) == chosen(136, 8, impl="triton") == "triton"
    with pytest.warns(UserWarning, match="head dims above 128 spill registers; ask by impl"):
        assert chosen(136, 8) == chosen(8, 136) == "reference"


def test_attention_leaves_out_what_spills_in_triton(gpu_on_meta: dict[str, str | None]) -> None:
    """fp32, and the way through the tangent at large head dims; both run where asked for."""
    gpu_on_meta["cpu"] = "no extension"

    def chosen(
        width: int, grad: bool, through: bool = True, impl: str = "auto", dtype=torch.bfloat16
    ) -> str:
        q = torch.empty(1, 1, 2, width, requires_grad=grad, dtype=dtype, device="meta")
        return attention._choose(impl, (q, q, q, None, None), (q.detach(), None, None), through)

    with pytest.warns(UserWarning, match="exact fp32 products spill registers; ask by impl"):
        assert chosen(64, False, dtype=torch.float32) == "reference"
    with pytest.warns(UserWarning, match="above 128 spill registers through the tangent"):
        assert chosen(136, True) == "reference"
    assert chosen(136, False) == chosen(136, True, False) == chosen(128, True) == "triton"
    with torch.no_grad():
        assert chosen(136, True) == "triton"
    assert chosen(136, True, impl="triton") == "triton"
    assert chosen(64, True, impl="triton", dtype=torch.float32) == "triton"


def test_the_hash_of_triton_kernels_changes_with_all_that_they_are_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package, source = tmp_path / "tbcm_kernels", _dispatch.source.__wrapped__
    shutil.copytree(Path(_dispatch.__file__).parent, package, ignore=shutil.ignore_patterns("*.so"))
    want = source("adaln", "triton")
    monkeypatch.setattr(_dispatch, "files", lambda name: tmp_path / name)
    assert source("adaln", "triton") == want
    for name in ("adaln/triton.py", "_triton.py", "attention/triton_tiles.py"):
        (package / name).write_text("# another\n")
        assert source("adaln", "triton") != want
        want = source("adaln", "triton")
    for name in ("adaln/cpu.py", "rms_norm/triton.py"):
        (package / name).write_text("# another\n")
        assert source("adaln", "triton") == want
