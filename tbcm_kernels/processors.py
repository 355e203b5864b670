"""Softmax attention for diffusers models whose forward stays their own.

An attention processor is the function that a diffusers `Attention` calls with itself. These compute
value and tangent together, so that `torch.func.jvp` of the model needs no MATH backend and never
holds an N × S matrix. They need no diffusers, and `fuse(model)` sets them.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, cat, nn

from tbcm_kernels import sdpa
from tbcm_kernels._layers import does_more, has_other_forward, over_heads, refuse_modes
from tbcm_kernels.attention import attention
from tbcm_kernels.attention.functional import MAX_HEAD_DIM, Norm
from tbcm_kernels.backend import backend
from tbcm_kernels.rms_norm import rms_norm
from tbcm_kernels.sdpa import calls_attention


class JVPAttnProcessor:
    """What diffusers' `AttnProcessor2_0` does, correct under forward AD: self- or cross-attention.

    An RMSNorm of queries or keys, over each head or over all, runs inside the kernel. Spatial,
    group, cross and other norms, projections and dropout run as the modules that they are. Not for
    SANA's self-attention, which is linear; `fuse` tells attentions apart.

    Args:
        across_heads: call norms other than RMSNorm on all heads at once, as SANA's processor does.

    Raises:
        ValueError: on call, rotary embeddings, added keys (`add_k_proj`), and what
            `tbcm_kernels.attention` does not take, such as a head dim that is no multiple of 8 or a
            mask that does not fit.
    """

    def __init__(self, across_heads: bool = False) -> None:
        self.across_heads = across_heads

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        if image_rotary_emb is not None or rotary_emb is not None:
            raise ValueError("JVPAttnProcessor: it applies no rotary embedding; set the stock one.")
        if getattr(attn, "add_k_proj", None) is not None:
            raise ValueError(
                "JVPAttnProcessor: it takes no keys beside those of hidden_states and the text, "
                "for which this attention has add_k_proj; set the stock processor."
            )
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if residual.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross is not None:
            context = attn.norm_encoder_hidden_states(context)
        q, k, v = _project(attn, hidden_states, context)
        o = _attend(attn, q, k, v, over_heads(attention_mask, k.shape[0]), self.across_heads)
        o = attn.to_out[1](attn.to_out[0](o))
        if residual.ndim == 4:
            o = o.transpose(-1, -2).reshape(residual.shape)
        if attn.residual_connection:
            o = o + residual
        return o if attn.rescale_output_factor == 1 else o / attn.rescale_output_factor


class JVPJointAttnProcessor:
    """What diffusers' `JointAttnProcessor2_0` does (SD3), correct under forward AD.

    Image and text are attended to as one sequence, each with projections and norms of its own.

    Raises:
        ValueError: on call, an attention_mask, which `JointAttnProcessor2_0` would ignore, and what
            `tbcm_kernels.attention` does not take.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise ValueError(
                "JVPJointAttnProcessor: JointAttnProcessor2_0 ignores attention_mask, so it is "
                "refused here; leave it out."
            )
        image = _project(attn, hidden_states, hidden_states)
        if encoder_hidden_states is None:
            o = _attend(attn, *image, None, False)
            return attn.to_out[1](attn.to_out[0](o))
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = (_heads(layer(encoder_hidden_states), attn) for layer in layers)
        # The kernel takes one weight for all tokens; here image and text have each their own.
        image = map(_normalized, (attn.norm_q, attn.norm_k, None), image)
        text = map(_normalized, (attn.norm_added_q, attn.norm_added_k, None), text)
        o = _merged(*(cat(pair, 1) for pair in zip(image, text, strict=True)))
        tokens = hidden_states.shape[1]
        context = o[:, tokens:]
        if not attn.context_pre_only:
            context = attn.to_add_out(context)
        return attn.to_out[1](attn.to_out[0](o[:, :tokens])), context


PROCESSORS: dict[str, Callable[[], Any] | None] = {
    "diffusers.models.attention_processor.AttnProcessor2_0": JVPAttnProcessor,
    "diffusers.models.attention_processor.JointAttnProcessor2_0": JVPJointAttnProcessor,
    "diffusers.models.attention_processor.SanaLinearAttnProcessor2_0": None,
    "diffusers.models.transformers.transformer_sana_video.SanaLinearAttnProcessor3_0": None,
    "diffusers.models.transformers.sana_transformer.SanaAttnProcessor2_0": functools.partial(
        JVPAttnProcessor, across_heads=True
    ),
}
"""Processor class -> what takes its place; None leaves it, for forward AD of it is right."""

_RMS_NORMS = ("diffusers.models.normalization.RMSNorm", "torch.nn.modules.normalization.RMSNorm")


def swaps(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """What gives every attention a tangent, as (owner, attribute, new).

    A "processor" of PROCESSORS; the "_attention_backend" of one that leaves attention to a backend;
    the "forward" of any other module that calls `F.scaled_dot_product_attention`.

    Raises:
        ValueError: an attention whose processor or head dim is not covered, or fused already.
    """
    found = []
    for name, module in model.named_modules():
        if not hasattr(module, "get_processor"):
            found += _in_scope(module) if calls_attention(module) else []
            continue
        if reason := _refusal(module):
            raise ValueError(f"fuse: {name} {reason}.")
        processor = module.get_processor()
        stock = _stock(processor)
        if _dispatches(processor):
            shared = any(owner is processor for owner, _, _ in found)
            found += [] if shared else [(processor, "_attention_backend", backend())]
            found += _in_scope(module) if _dispatches_otherwise(processor) else []
        elif _path(stock) not in PROCESSORS:
            found += _in_scope(module)
        elif make := PROCESSORS[_path(stock)]:
            new = make()
            new.stock = stock
            found.append((module, "processor", new))
    return found


def _in_scope(module: nn.Module) -> list[tuple[Any, str, Any]]:
    """A forward in which PyTorch's attention is ours, unless the instance has its own forward."""
    if has_other_forward(module):
        return []
    new = functools.partial(sdpa.forward, type(module).forward, module)
    new.__signature__ = inspect.signature(module.forward)
    return [(module, "forward", new)]


def _refusal(attn: nn.Module) -> str | None:
    """Why the attention cannot be fused, in one clause; None where it can."""
    processor = _stock(attn.get_processor())
    kind = type(processor).__name__
    if isinstance(processor, JVPAttnProcessor | JVPJointAttnProcessor):
        return f"has a {kind} already; undo() the earlier fuse, or set the stock processor, first"
    known = _dispatches(processor) or _path(processor) in PROCESSORS
    if not known and not calls_attention(attn):
        return f"has a {kind}, which does not call F.scaled_dot_product_attention"
    width = attn.inner_dim // attn.heads if hasattr(attn, "inner_dim") else 8
    softmax = PROCESSORS.get(_path(processor), True)
    if softmax and (width % 8 or width > MAX_HEAD_DIM):
        return f"has head dim {width}; it must be a multiple of 8 up to {MAX_HEAD_DIM}"
    return None


def _stock(processor: Any) -> Any:
    """What a processor has taken the place of, where a copy of a fused model brings one along."""
    return getattr(processor, "stock", processor)


def _dispatches(processor: Any) -> bool:
    """Whether it is one of diffusers' that leave attention to the backend that they are told."""
    kind = type(processor)
    if not kind.__module__.startswith("diffusers.") or getattr(kind, "_attention_backend", 0):
        return False
    code = getattr(kind.__call__, "__code__", None)
    return code is not None and "_attention_backend" in code.co_names


def _dispatches_otherwise(processor: Any) -> bool:
    """Whether one of its calls of `dispatch_attention_fn` is told another backend, or none."""
    used = [i.argval for i in dis.get_instructions(type(processor).__call__)]
    return used.count("dispatch_attention_fn") > used.count("_attention_backend")


def _path(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"


def _heads(x: Tensor, attn: nn.Module) -> Tensor:
    return x.view(*x.shape[:-1], attn.heads, x.shape[-1] // attn.heads)


def _project(attn: nn.Module, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
    """Queries of x, keys and values of the context, each [B, N, H, D]."""
    pairs = (attn.to_q, x), (attn.to_k, context), (attn.to_v, context)
    return tuple(_heads(layer(inputs), attn) for layer, inputs in pairs)


def _attend(
    attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, across_heads: bool
) -> Tensor:
    """Normalised attention of [B, N, H, D]; norms that the kernel does not know run before it."""
    fused = [_kernel_norm(norm) for norm in (attn.norm_q, attn.norm_k)]
    q, k = (
        x if norm is None or inside else _called(norm, x, across_heads)
        for norm, inside, x in zip((attn.norm_q, attn.norm_k), fused, (q, k), strict=True)
    )
    return _merged(q, k, v, attn_mask=mask, q_norm=fused[0], k_norm=fused[1])


def _merged(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention of [B, N, H, D] as [B, N, H·D]; in this memory order both are views."""
    refuse_modes()
    o = attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)
    return o.transpose(1, 2).flatten(2)


def _kernel_norm(norm: nn.Module | None) -> Norm | None:
    """(weight, eps) of a plain RMSNorm, which says all that it does."""
    if norm is None or _path(norm) not in _RMS_NORMS or norm.weight is None or norm.eps is None:
        return None
    more = getattr(norm, "bias", None) is not None or does_more(norm)
    return None if more else (norm.weight, norm.eps)


def _called(norm: nn.Module, x: Tensor, across_heads: bool) -> Tensor:
    if across_heads:
        return norm(x.flatten(2)).view(x.shape)
    return norm(x.transpose(1, 2)).transpose(1, 2)


def _normalized(norm: nn.Module | None, x: Tensor) -> Tensor:
    """x [B, N, H, D] after a norm over each head."""
    if norm is None:
        return x
    plain = _kernel_norm(norm)
    return _called(norm, x, False) if plain is None else rms_norm(x, plain[0], eps=plain[1])
