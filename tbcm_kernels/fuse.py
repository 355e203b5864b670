"""`fuse(model)`: give one model instance a forward that computes value and tangent together."""

from __future__ import annotations

import importlib
import types
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

FUSED = {
    "diffusers.models.transformers.sana_transformer.SanaTransformer2DModel": "tbcm_kernels.sana",
}
"""Model class -> the module whose `check(model)` and `forward(model, ...)` replace its forward."""


@dataclass
class Fused:
    """What `fuse` returns: the model, and the way back."""

    model: nn.Module
    module: types.ModuleType
    forward: Any
    undone: bool = False

    def undo(self) -> None:
        """Restore the model's own forward; harmless when done already.

        Raises:
            ValueError: something else has replaced the forward since.
        """
        if self.undone:
            return
        if self.model.__dict__.get("forward") is not self.forward:
            raise ValueError(
                "undo: the model's forward was replaced after fuse(); restore that first."
            )
        del self.model.forward
        self.undone = True

    def encode_text(self, encoder_hidden_states: Tensor) -> Any:
        """Text [P, S, D] made ready for all blocks, to be given in its place to many forwards."""
        return self.module.encode_text(self.model, encoder_hidden_states)

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, *exception: object) -> None:
        self.undo()


def fuse(model: nn.Module) -> Fused:
    """Replace the forward of `model`, on this instance alone, by the fused one.

    Parameters keep their names and identity, so optimizers, state dicts and `save_pretrained` see
    no difference. The fused forward takes ordinary tensors or forward-AD duals, so
    `torch.func.jvp(model, ...)` stays what one writes.

    Args:
        model: a diffusers `SanaTransformer2DModel`.

    Returns:
        A handle; `handle.undo()` restores the model, and `with fuse(model):` does at its end.

    Raises:
        TypeError: a model of a class that has no fused forward.
        ValueError: a configuration that the fused forward does not cover, or a model fused already.
    """
    names = [f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__]
    target = next((FUSED[n] for n in names if n in FUSED), None)
    if target is None:
        known = ", ".join(n.rpartition(".")[2] for n in FUSED)
        raise TypeError(
            f"fuse: {type(model).__name__} has no fused forward; there is one for {known}."
        )
    if "forward" in model.__dict__:
        raise ValueError("fuse: this model's forward is replaced already; undo() that first.")
    module = importlib.import_module(target)
    module.check(model)
    model.forward = types.MethodType(module.forward, model)
    return Fused(model, module, model.forward)
