"""What GPUs need of the launches of Triton's kernels, seen without one."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import tbcm_kernels as tk
from tbcm_kernels import _dispatch
from tbcm_kernels.testing.cases import Case, attention_case, cases
from tbcm_kernels.testing.check import run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _(need: Callable[[str], None]) -> None:
    need("triton")


class _Told:
    """A kernel whose launches are told to a function."""

    def __init__(self, kernel: Any, tell: Callable[[str], None]):
        self.kernel, self.tell = kernel, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: Any) -> Any:
        self.tell(self.kernel.fn.__name__)
        return self.kernel[grid]


def _drawn(op: str) -> list[Case]:
    """The smallest case with all inputs of each function of an op."""
    if op == "attention":
        sizes = {"sizes": (1, 2, 2, 16, 16, 16, 16), "q_norm": "each", "k_norm": "all"}
        return [attention_case("", torch.float32, DEVICE, **sizes)]
    found: dict[str, list[Case]] = {}
    for case in cases(op, torch.float32, DEVICE, few=True):
        if None not in case.primals and all(p.numel() for p in case.primals):
            found.setdefault(case.op, []).append(case)
    return [min(group, key=lambda c: sum(p.numel() for p in c.primals)) for group in found.values()]


OPS = [op for op, impls in _dispatch.OPS.items() if "triton" in impls]


@pytest.mark.parametrize("op", OPS)
def test_on_the_tensors_device(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel, for tensors may be on another GPU than the current one."""
    module = importlib.import_module(f"tbcm_kernels.{op}.triton")
    guard, inside, found = module.device_of, [], {}

    @contextlib.contextmanager
    def watched(x: Tensor) -> Iterator[None]:
        with guard(x):
            inside.append(x)
            yield
        inside.pop()

    monkeypatch.setattr(module, "device_of", watched)
    for name, kernel in list(vars(module).items()):
        if name.endswith("_kernel"):
            tell = lambda name: found.setdefault(name, []).append(bool(inside))  # noqa: E731
            monkeypatch.setattr(module, name, _Told(kernel, tell))
    for case in _drawn(op):
        run(case, "triton")
    assert found and all(map(all, found.values())), found


def test_attention_searches_for_each_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that one has room for may be too large for another, as with a mask's tiles."""
    kernels = importlib.import_module("tbcm_kernels.attention.triton")
    found = set()

    def tuned(kernel: Any, kind: str, variant: tuple[Any, ...]) -> Any:
        found.add((kind, variant))
        config = dict(zip(("BM", "BN", "num_warps", "num_stages"), kernels._SMALL, strict=True))

        class Timed:
            def __getitem__(self, grid: Any) -> Any:
                return lambda *arguments, **constants: kernel[grid](
                    *arguments, **constants, **config
                )

        return Timed()

    monkeypatch.setattr(kernels, "_pinned", lambda *_: None)
    monkeypatch.setattr(kernels, "_tuned", tuned)
    q, k, v, tq, tv = torch.randn(5, 1, 1, 16, 16)
    mask = torch.zeros(1, 1, 16, 16)
    variants: list[dict[str, Any]] = [
        {}, {"attn_mask": mask}, {"attn_mask": mask > 0}, {"is_causal": True}, {"tq": tq},
        {"tv": tv},
    ]  # fmt: skip
    for i, options in enumerate(variants):
        tk.attention_jvp(q, k, v, **options, impl="triton")
        assert len(found) == i + 1
    tk.attention_jvp(q, k, torch.randn(1, 1, 16, 32), impl="triton")
    assert len(found) == len(variants) + 1


def test_gpus_of_two_kinds_have_proved_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [(9, 0), (8, 6)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: kinds[i])
    assert _dispatch.capability.__wrapped__() is None
    kinds[1] = (9, 0)
    assert _dispatch.capability.__wrapped__() == "9.0"


@pytest.mark.parametrize("impl", ["triton", "cpu"])
def test_a_norm_without_eps_in_linear_attention(impl: str, need: Callable[[str], None]) -> None:
    """Rows beyond the last, which a tile of keys holds as zeros, have no norm."""
    need(impl)
    q, k, v = torch.randn(3, 1, 2, 17, 32, device=DEVICE if impl == "triton" else "cpu")
    norms = {name: (q.new_ones(32), 0.0) for name in ("q_norm", "k_norm")}
    o = tk.linear_attention(q, k, v, **norms, impl=impl)
    want = tk.linear_attention(q, k, v, **norms, impl="reference")
    torch.testing.assert_close(o, want, rtol=1e-3, atol=1e-5)
