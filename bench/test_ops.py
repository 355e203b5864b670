"""`pytest bench --benchmark-only`: the cases of `python -m bench` at small shapes.

Each case is checked against fp64 before it is timed. The table groups the variants of a pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from bench import ops

pytest.importorskip(
    "pytest_benchmark", reason="in the checkout run pip install --no-build-isolation '.[bench]'"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPES = ("digits", "sana-0.6b-512")
FEW = 4
"""Samples at most."""


def shape_of(name: str) -> ops.Shape:
    shape = ops.SHAPES[name]
    return replace(shape, batch=min(FEW, shape.batch)) if name != "digits" else shape


def cases() -> Iterator[tuple[str, str, str, str]]:
    """Op, shape, pass and variant."""
    for name in SHAPES:
        for op in ops.OPS:
            few = ops.checked(op, ops.SHAPES[name], DTYPE, "meta")
            impls = ops.implementations(op, DEVICE, DTYPE)
            variants = {impl: ops.ours(few, impl) for impl in impls} | ops.baselines(few, False)
            for what in ops.OPS[op].passes:
                for variant, v in variants.items():
                    if ops.takes_part(variant, v, what):
                        yield op, name, what, variant


@functools.cache
def variants(op: str, name: str) -> tuple[dict[str, ops.Variant], list[str], ops.Case]:
    """The variants of an op, the faults of ours, and inputs."""
    few = ops.checked(op, shape_of(name), DTYPE, DEVICE)
    impls = ops.implementations(op, DEVICE, DTYPE)
    faults = [fault for impl in impls for fault in ops.wrong(few, impl)]
    found = {impl: ops.ours(few, impl) for impl in impls} | ops.baselines(few, False)
    return found, faults, ops.draw(op, shape_of(name), DTYPE, DEVICE)


@pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize(("op", "name", "what", "variant"), list(cases()))
def test_op(benchmark, op: str, name: str, what: str, variant: str) -> None:
    found, faults, case = variants(op, name)
    assert not faults, "what fails its check is not timed"
    benchmark.group = f"{op} {name} {what}"
    benchmark.extra_info["bytes"] = ops.traffic(case, what)
    call = ops.call(found[variant], what, case)

    def once() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(once)
