"""A function of tensors as a CUDA graph: a GPU replays it, and launches cost no CPU time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST = 8
"""Graphs that are kept; each has memory of its own."""


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Any


class Graphed:
    """`function`, from its second call with tensors of the same shapes on captured and replayed.

    It takes tensors and gives a NamedTuple of tensors. It must compute on the GPU alone, and what
    it reads beside its arguments must stay in place, as the weights of a frozen model do. The
    first call warms up. What cannot be captured runs as it is, which is said once; so do shapes
    beyond the first MOST, and everything that needs a gradient.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function, self.pool = function, None
        self.graphs: dict[tuple, _Graph | None] = {}
        self.able = True

    def __call__(self, *tensors: Tensor) -> Any:
        """The function's tensors, which are the caller's own."""
        key = tuple((x.shape, x.dtype, x.device) for x in tensors)
        if not self.able or torch.is_grad_enabled() or key not in self.graphs:
            if len(self.graphs) < MOST:
                self.graphs.setdefault(key, None)
            return self.function(*tensors)
        if self.graphs[key] is None:
            try:
                self.graphs[key] = self._captured(tensors)
            except RuntimeError as error:
                self.able = False
                reason = str(error).partition("\n")[0]
                warnings.warn(f"The route is not replayed as a CUDA graph: {reason}", stacklevel=2)
                return self.function(*tensors)
        graph, inputs, outputs = self.graphs[key]
        for own, x in zip(inputs, tensors, strict=True):
            own.copy_(x)
        graph.replay()
        return type(outputs)(*(x.clone() for x in outputs))

    def _captured(self, tensors: tuple[Tensor, ...]) -> _Graph:
        inputs = [x.clone() for x in tensors]
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        # Weights that autocast has cast would be gone at a replay; those cast here have no values
        # before one, and none if the capture fails.
        torch.clear_autocast_cache()
        try:
            graph, outputs = capture(
                lambda: self.function(*inputs), pool=self.pool, capture_error_mode="thread_local"
            )
        finally:
            torch.clear_autocast_cache()
        return _Graph(graph, inputs, outputs)


def capture(function: Callable[[], Any], **options: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The kernels of a call as a graph, and what the call gave; options are `torch.cuda.graph`'s.

    Raises RuntimeError for what cannot be captured; random numbers on the GPU stay usable then.
    """
    graph = torch.cuda.CUDAGraph()
    random = torch.cuda.default_generators[torch.cuda.current_device()]
    before = random.clone_state()
    try:
        with torch.cuda.graph(graph, **options):
            return graph, function()
    except RuntimeError:
        random.graphsafe_set_state(before)  # the other one waits for the end of the capture
        raise
