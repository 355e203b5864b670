"""`fuse(model)`: give one model instance a forward that computes value and tangent together."""

from __future__ import annotations

import collections
import importlib
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tbcm_kernels._layers import function_of

FUSED = {
    "diffusers.models.transformers.sana_transformer.SanaTransformer2DModel": "tbcm_kernels.sana",
}
"""Model class -> the module whose `swaps(model)` says what to replace by what.

Other models keep their forward; `tbcm_kernels.layers` says what is replaced in them.
"""


_live: weakref.WeakSet[Any] = weakref.WeakSet()
"""Models, and what was changed in them, that a handle can restore; a copy is none of them."""


@dataclass(repr=False)
class Fused:
    """What `fuse` returns: the model, what was replaced in it, and the way back.

    `swaps` holds (owner, attribute, new, old); old is None where the instance had none of its own.
    """

    model: nn.Module
    module: str
    swaps: list[tuple[Any, str, Any, Any]]
    undone: bool = False

    def undo(self) -> None:
        """Restore the model's own forward or processors; harmless when done already.

        Raises:
            ValueError: something else has replaced one of them since; nothing is restored then.
        """
        if self.undone:
            return
        for owner, name, new, old in self.swaps:
            now = owner.__dict__.get(name)
            # An undo() that was interrupted goes on. Whoever has called set_attention_backend()
            # since keeps what that has set.
            if now != new and now is not old and name != "_attention_backend":
                raise ValueError(
                    f"undo: the {name} of {type(owner).__name__} was replaced after fuse(); "
                    f"restore that first."
                )
        for owner, name, new, old in self.swaps:
            _live.discard(owner)
            if owner.__dict__.get(name) != new:  # a method that was bound anew is the same
                continue
            if old is None:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
        _live.discard(self.model)
        self.undone = True

    def encode_text(self, encoder_hidden_states: Tensor) -> Any:
        """Text [P, S, D] made ready for all blocks, to be given in its place to many forwards.

        Raises:
            TypeError: the model keeps its own forward, which reads text as it comes.
            RuntimeError: the model is sharded by FSDP2 and was not made whole by unshard(), under
                torch.no_grad().
        """
        encode = getattr(importlib.import_module(self.module), "encode_text", None)
        if encode is None:
            raise TypeError(
                f"encode_text: {type(self.model).__name__} keeps its own forward, which reads "
                f"encoder_hidden_states as they come."
            )
        return encode(self.model, encoder_hidden_states)

    def __repr__(self) -> str:
        counts = collections.Counter(self._label(*swap[:3]) for swap in self.swaps)
        replaced = ", ".join(f"{n} {name}" for name, n in counts.items())
        return f"Fused({type(self.model).__name__}: {'undone' if self.undone else replaced})"

    def _label(self, owner: Any, name: str, new: Any) -> str:
        if owner is self.model:
            return name
        return type(new if name == "processor" else owner).__name__

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, *exception: object) -> None:
        self.undo()


def fuse(model: nn.Module) -> Fused:
    """Replace the forward of `model`, or of parts of it, on this instance alone, by a fused one.

    Parameters keep their names and identity, so optimizers, state dicts and `save_pretrained` see
    no difference. The fused model takes ordinary tensors or forward-AD duals, so
    `torch.func.jvp(model, ...)` stays what one writes.

    Args:
        model: a diffusers `SanaTransformer2DModel`, whose whole forward is fused, or any other
            model, of diffusers or of one's own. There attention, linear layers and norms
            (`tbcm_kernels.layers.LAYERS`) are fused, and what is around them stays PyTorch's.
            Attention is what a module's forward or processor computes by
            `F.scaled_dot_product_attention`, itself or in functions or methods that it names, not
            in `nn.MultiheadAttention`; the handle tells what was found.

    Returns:
        A handle that tells what was replaced; `handle.undo()` restores the model, and
        `with fuse(model):` does at its end. A `copy.deepcopy` of a fused model is fused, and fusing
        it gives it a handle of its own. A pickle is too, but one of SANA has the stock forward.
        Where the model checkpoints activations, call backward before `undo()`: it runs the forward
        again, which must be the same. Fused layers refer to themselves, so that the memory of a
        model that is dropped is free after `undo()` or `gc.collect()`, and so that a shallow
        `copy.copy` computes with the original's parameters; of PyTorch's wrappers DDP and FSDP2
        work, `nn.DataParallel`, which makes such copies, does not. Hooks that know processors by
        their class, as diffusers' layer skip, come before `fuse`. Hooks for all modules of a
        process are not called for layers that a fused forward computes itself.

    Raises:
        TypeError: no module, one with nothing to fuse, or one that wraps a model which has a fused
            forward.
        ValueError: a configuration, a layer or a processor that is not covered, a subclass with a
            forward of its own, or a model that is fused already, as a whole or in part. The model
            is then as it was.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(
            f"fuse: model must be a torch.nn.Module, got {kind}; of a pipeline, its transformer."
        )
    if model in _live:
        raise ValueError("fuse: this model is fused already; undo() that first.")
    target = _target(model)
    if target is None:
        inner = next((n for n, m in model.named_modules() if _target(m)), None)
        if inner is not None:
            kind = type(model).__name__
            raise TypeError(f"fuse: {kind} holds a model with a fused forward; fuse its {inner}.")
    module = target or "tbcm_kernels.layers"
    swaps = [(*swap, _own(*swap)) for swap in importlib.import_module(module).swaps(model)]
    if not swaps:
        raise TypeError(
            f"fuse: {type(model).__name__} has nothing to fuse: no call of "
            f"F.scaled_dot_product_attention, and no linear layer or norm that is known and has "
            f"its class's own forward (hooks of offloading come after fuse)."
        )
    if shared := next((owner for owner, *_ in swaps if owner in _live), None):
        raise ValueError(
            f"fuse: a {type(shared).__name__} in this model is fused already, by the fuse() of "
            f"another that holds it; undo() that first."
        )
    handle = Fused(model, module, [])
    try:
        for swap in swaps:
            owner, name, new, _ = swap
            handle.swaps.append(swap)
            setattr(owner, name, new)
            _live.add(owner)
    except BaseException:
        handle.undo()
        raise
    _live.add(model)
    return handle


def _target(model: nn.Module) -> str | None:
    names = (f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__)
    return next((FUSED[n] for n in names if n in FUSED), None)


def _own(owner: Any, name: str, new: Any) -> Any:
    """What undo() restores: the instance's own attribute, or None where it has its class's.

    A copy of a fused model brings our forward or processor along, which is none of its own.
    """
    old = owner.__dict__.get(name)
    old = getattr(old, "stock", old)
    copied = (function_of(new), getattr(type(owner), name, None))
    return None if function_of(old) in copied else old
