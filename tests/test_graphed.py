"""The route as a CUDA graph: the bookkeeping everywhere, the replay where there is a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tbcm import graphed
from tbcm.graphed import Graphed

GPU = torch.cuda.is_available()


class Result(NamedTuple):
    total: Tensor
    given: Tensor


class Graph:
    """What a captured function is to `Graphed`: inputs, outputs, and a replay."""

    def __init__(self, function: object, tensors: tuple[Tensor, ...]):
        self.function, self.inputs = function, [x.clone() for x in tensors]
        self.outputs = function(*self.inputs)

    def replay(self) -> None:
        for own, new in zip(self.outputs, self.function(*self.inputs), strict=True):
            own.copy_(new)


def capture(self: Graphed, tensors: tuple[Tensor, ...]) -> graphed._Graph:
    graph = Graph(self.function, tensors)
    return graphed._Graph(graph, graph.inputs, graph.outputs)


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Graphed:
    if not GPU:
        monkeypatch.setattr(Graphed, "_captured", capture)
    return Graphed(lambda a, b: Result(2 * a + b, a))


@torch.no_grad()
def test_every_call_has_its_own_numbers(add: Graphed) -> None:
    results = []
    device = "cuda" if GPU else "cpu"
    for i in range(5):
        a, b = torch.full((3,), float(i), device=device), torch.ones(3, device=device)
        results.append(add(a, b))
    for i, result in enumerate(results):
        assert result.total.tolist() == [2 * i + 1] * 3 and result.given.tolist() == [i] * 3
    assert add(torch.ones(2, device=device), torch.ones(2, device=device)).total.tolist() == [3, 3]
    assert [g is not None for g in add.graphs.values()] == [True, False]
    for _ in range(2):
        double = torch.full((3,), 0.1, dtype=torch.float64, device=device)
        assert torch.equal(add(double, double).total, 3 * double)


@torch.no_grad()
def test_few_shapes_are_kept(add: Graphed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "MOST", 2)
    for n in (1, 2, 3, 3, 3):
        assert add(torch.ones(n), torch.ones(n)).total.tolist() == [3] * n
    assert len(add.graphs) == 2


def test_gradients_are_not_replayed(add: Graphed) -> None:
    a = torch.ones(2, requires_grad=True)
    for _ in range(3):
        add(a, a).total.sum().backward()
    assert a.grad.tolist() == [9, 9] and not any(add.graphs.values())


@torch.no_grad()
def test_what_cannot_be_captured_runs_and_is_said(
    add: Graphed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Graphed, "_captured", refuse)
    one = torch.ones(2)
    add(one, one)
    with pytest.warns(UserWarning, match="not replayed as a CUDA graph: operation not permitted"):
        assert add(one, one).total.tolist() == [3, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert add(one, one).total.tolist() == [3, 3]


def test_nothing_that_a_failed_capture_cast_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cast while capturing has no values: the call that follows has to cast again."""
    cleared = []

    def refuse(function: Callable[[], object], **_: object) -> None:
        function()
        cleared.append("cast")
        raise RuntimeError("no capture")

    monkeypatch.setattr(graphed, "capture", refuse)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append("cleared"))
    graphed_sum = Graphed(lambda a, b: Result(a + b, a))
    one = torch.ones(2)
    with torch.no_grad(), pytest.warns(UserWarning, match="no capture"):
        for _ in range(2):
            assert graphed_sum(one, one).total.tolist() == [2, 2]
    assert cleared == ["cleared", "cast", "cleared"]
