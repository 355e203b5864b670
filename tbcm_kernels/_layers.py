"""What fused code must know of a layer whose parameters it reads itself."""

from __future__ import annotations

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def does_more(layer: nn.Module) -> bool:
    """Whether hooks or a forward of its own make an instance more than its class and parameters."""
    own = layer.__dict__
    return "forward" in own or any(map(own.__getitem__, _HOOKS))
