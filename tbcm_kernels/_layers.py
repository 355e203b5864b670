"""What fused code must know of a layer whose parameters it reads itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


COUNTERPARTS: set[Callable[..., Any]] = set()
"""Forwards of ours that `fuse` gives to layers: they do what those of the classes do."""


def does_more(layer: nn.Module) -> bool:
    """Whether a call does more than the class's forward: hooks, or a forward of the instance's."""
    return has_other_forward(layer) or has_hooks(layer)


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


def has_hooks(layer: nn.Module) -> bool:
    """Whether more than the layer's forward runs when it is called."""
    return any(map(layer.__dict__.__getitem__, _HOOKS))


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
    if torch.compiler.is_compiling():
        return
    for mode in torch.overrides._get_current_function_mode_stack():
        if type(mode).__module__.startswith("diffusers."):
            raise ValueError(
                f"attention: diffusers' {type(mode).__name__} replaces "
                f"F.scaled_dot_product_attention, which is not called here; undo() fuse for it."
            )
