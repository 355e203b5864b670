"""Softmax attention for the diffusers models whose processors call `dispatch_attention_fn`.

Those of Flux, Wan, Qwen-Image, HunyuanVideo, LTX and most models since hand queries, keys and
values to a backend that the processor's `_attention_backend` names. Here is one more backend.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tbcm_kernels._layers import refuse_modes
from tbcm_kernels.attention import attention
from tbcm_kernels.sdpa import moves_or_learns, pytorchs

NAME = "tbcm_kernels"


def backend() -> Any:
    """What a processor's `_attention_backend` is set to; the first call registers it."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    if NAME not in AttentionBackendName._value2member_map_:
        # diffusers names its backends in an Enum, which has no door for others.
        name = str.__new__(AttentionBackendName, NAME)
        name._name_, name._value_ = NAME.upper(), NAME
        name.__reduce_ex__ = lambda protocol: (backend, ())  # it is made where it is loaded
        AttentionBackendName._member_names_.append(name._name_)
        AttentionBackendName._member_map_[name._name_] = name
        AttentionBackendName._value2member_map_[NAME] = name
        _AttentionBackendRegistry.register(name)(_attend)
    return AttentionBackendName(NAME)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """Attention of [B, N, H, D], as diffusers' native backend has it: o in the same layout.

    Raises:
        ValueError: return_lse, context parallelism, diffusers' skipping of attention scores, and
            what `attention` does not take.
    """
    if return_lse:
        raise ValueError("attention: return_lse is not for this backend; undo() fuse for it.")
    if _parallel_config is not None:
        raise ValueError("attention: context parallelism is not built; undo() fuse for it.")
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    refuse_modes()
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    attend = pytorchs if moves_or_learns(attn_mask) else attention
    o = attend(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
        enable_gqa=enable_gqa,
    )  # fmt: skip
    return o.transpose(1, 2)
