"""What fused code must know of a layer whose parameters it reads itself."""

from __future__ import annotations

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def does_more(layer: nn.Module) -> bool:
    """Whether hooks or a forward of its own make an instance more than its class and parameters."""
    return "forward" in layer.__dict__ or has_hooks(layer)


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
