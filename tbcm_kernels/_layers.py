"""What fused code must know of a layer whose parameters it reads itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


COUNTERPARTS: set[Callable[..., Any]] = set()
"""Forwards of ours that `fuse` gives to layers: they do what those of the classes do."""


def does_more(layer: nn.Module) -> bool:
    """Whether a call does more than the class's forward: hooks, or a forward of the instance's."""
    return has_other_forward(layer) or any(map(layer.__dict__.__getitem__, _HOOKS))


def is_plain(forward: Callable[..., Any]) -> bool:
    """Whether a forward is torch's or diffusers' own; one that `functools.wraps` it is not.

    Nothing is kept of what is asked: it may hold a model.
    """
    home = getattr(forward, "__globals__", {}).get("__name__", forward.__module__)
    return home.partition(".")[0] in ("torch", "diffusers")


def has_other_forward(layer: nn.Module) -> bool:
    """Whether an instance's forward is neither its class's nor a counterpart of that.

    `layer.forward` and `partial(cls.forward, layer)` count as the class's; one with more arguments,
    or bound to another instance, does not.
    """
    forward = layer.__dict__.get("forward")
    if forward is None or function_of(forward) in COUNTERPARTS:
        return False
    given = getattr(forward, "args", (getattr(forward, "__self__", None),))
    own = len(given) == 1 and given[0] is layer and not getattr(forward, "keywords", None)
    return not own or function_of(forward) is not type(layer).forward


def function_of(x: Any) -> Any:
    """What a bound method or a partial calls; else x itself."""
    return getattr(x, "__func__", getattr(x, "func", x))


@dataclass(frozen=True)
class Made:
    """A layer as its library makes it: class, plain values, other objects' types, layers inside."""

    kind: type
    values: dict[str, Any]
    objects: dict[str, type]
    parts: dict[str, Made | None]

    @classmethod
    def of(cls, layer: nn.Module) -> Made:
        """The description of a layer that nobody has changed."""
        own = {n: v for n, v in layer.__dict__.items() if n[0] != "_" and n not in _READ}
        values = {n: v for n, v in own.items() if isinstance(v, _PLAIN)}
        objects = {n: type(v) for n, v in own.items() if n not in values}
        parts = {n: None if part is None else cls.of(part) for n, part in layer._modules.items()}
        return cls(type(layer), values, objects, parts)

    def difference(self, layer: nn.Module) -> str | None:
        """In what a layer differs, in a clause; None where only its weights may."""
        if type(layer).forward is not self.kind.forward:
            return f"is a {type(layer).__module__}.{type(layer).__qualname__}"
        own = layer.__dict__
        if not self.values.items() <= own.items():
            found = next(n for n, v in self.values.items() if (n, v) not in own.items())
            return f"has {found}={own.get(found)!r}, not {self.values[found]!r}"
        for name, kind in self.objects.items():
            if type(own.get(name)) is not kind:
                return f"has a {type(own.get(name)).__name__}, not {kind.__name__}"
        parts = own["_modules"].keys()
        if parts != self.parts.keys() and parts - ADDED != self.parts.keys():
            return f"has {', '.join(parts) or 'nothing'} in it"
        return None


_PLAIN = (bool, int, float, str, tuple, type(None))
_READ = ("training", "eps")
"""What may change, for it is read at each call."""
ADDED = {"parametrizations"}
"""Layers inside a layer that its parameters are read through, and that run."""


def over_heads(mask: Tensor | None, batch: int) -> Tensor | None:
    """A mask as diffusers' `Attention` takes it, to broadcast over [B, H, N, S].

    [B, S], [B, N or 1, S] or [B, 1, N or 1, S]; or [B·H, N or 1, S], which
    `Attention.prepare_attention_mask` makes of the second by copying it.
    """
    if mask is None or mask.ndim == 4:
        return mask
    rows = mask[:, None] if mask.ndim == 2 else mask
    if rows.ndim == 3 and rows.shape[0] in (batch, 1):
        return rows[:, None]
    if rows.ndim != 3 or not batch or rows.shape[0] % batch:
        raise ValueError(
            f"attention: attention_mask must be [B, S], [B, N or 1, S], [B, 1, N or 1, S] or "
            f"[B·H, N or 1, S] with B = {batch}, got {list(mask.shape)}."
        )
    return rows.unflatten(0, (batch, -1))


def refuse_modes() -> None:
    """Raise where diffusers waits for a call of `F.scaled_dot_product_attention`, to replace it."""
    if torch.compiler.is_dynamo_compiling():
        return
    for mode in torch.overrides._get_current_function_mode_stack():
        if type(mode).__module__.startswith("diffusers."):
            raise ValueError(
                f"attention: diffusers' {type(mode).__name__} replaces "
                f"F.scaled_dot_product_attention, which is not called here; undo() fuse for it."
            )
