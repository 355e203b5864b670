"""The forward of diffusers' SanaTransformer2DModel on explicit pairs of value and tangent.

A pair (x, tx) has tx = None where there is no tangent; that work is then skipped. Each residual is
added by the `adaln` call that normalises the sum, across block borders too. Under
`stop_tangent_gradient()` tangents are computed without a graph.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbcm_kernels import _dual
from tbcm_kernels.adaln import adaln_jvp
from tbcm_kernels.attention import attention_jvp
from tbcm_kernels.attention.functional import MAX_HEAD_DIM
from tbcm_kernels.conv_glu import conv_glu_jvp
from tbcm_kernels.linear import linear_jvp
from tbcm_kernels.rms_norm import rms_norm_jvp

Pair = tuple[Tensor, Tensor | None]


@dataclass
class FusedText:
    """Text as the blocks read it: keys and values of every block, for P prompts."""

    keys: list[Pair]
    values: list[Pair]


def encode_text(model: nn.Module, encoder_hidden_states: Tensor) -> FusedText:
    """Keys and values of the text [P, S, D] for every block, to be reused by many forwards."""
    projected = model.caption_projection(encoder_hidden_states)
    text = _split(model.caption_norm(projected.view(len(projected), -1, projected.shape[-1])))
    attentions = [block.attn2 for block in model.transformer_blocks]
    keys = [_norm(attn.norm_k, _linear(attn.to_k, text)) for attn in attentions]
    return FusedText(keys, [_linear(attn.to_v, text) for attn in attentions])


def swaps(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(model, "forward", the fused one); changes nothing.

    Raises:
        ValueError: naming it, a setting or layer with which the fused forward would differ from the
            stock, or a forward that is replaced already.
    """
    if "forward" in model.__dict__:
        raise ValueError("fuse: this model's forward is replaced already; undo() that first.")
    _check(model)
    return [(model, "forward", types.MethodType(forward, model))]


def _check(model: nn.Module) -> None:
    config = model.config
    width = config.cross_attention_head_dim
    refused = {
        "dropout": config.dropout > 0,
        "norm_elementwise_affine": bool(config.norm_elementwise_affine),
        "cross_attention_dim": config.cross_attention_dim is None,
        "cross_attention_head_dim": width % 8 or width > MAX_HEAD_DIM,
        "qk_norm": config.qk_norm not in (None, "rms_norm_across_heads"),
    }
    for name, bad in refused.items():
        if bad:
            raise ValueError(
                f"fuse: {name}={getattr(config, name)!r} has no fused forward; use the stock model."
            )
    for name, module in model.named_modules():
        if name and (reason := _passed_by(module)):
            raise ValueError(
                f"fuse: {name} {reason}, which the fused forward would pass by; use the stock "
                f"model."
            )


def _passed_by(module: nn.Module) -> str | None:
    """Why a submodule does more than its weights say."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return "has hooks or a replaced forward"
    package = type(module).forward.__module__.partition(".")[0]
    return None if package in ("torch", "diffusers") else f"is a {type(module).__name__}"


def forward(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | FusedText,
    timestep: Tensor,
    guidance: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    controlnet_block_samples: tuple[Tensor, ...] | None = None,
    return_dict: bool = True,
) -> Any:
    """Arguments and result of the stock forward; any tensor may be a forward-AD dual.

    The text may hold P prompts where the batch holds k·P images: prompt i then serves images i·k to
    (i+1)·k − 1, and its keys and values are computed once. `Fused.encode_text` computes them ahead.

    Raises:
        ValueError: attention_kwargs, controlnet_block_samples or gradient checkpointing in use, or
            a batch or mask that does not fit the number of prompts.
    """
    _refuse(self, attention_kwargs, controlnet_block_samples)
    _dual.guard_levels("fuse", "the stock model")
    masks = _text_masks(encoder_attention_mask, hidden_states)
    conditions = {} if guidance is None else {"guidance": guidance}
    modulation, embedded = self.time_embed(
        timestep,
        hidden_dtype=hidden_states.dtype,
        **(conditions or {"batch_size": len(hidden_states)}),
    )
    text = encoder_hidden_states
    if not isinstance(text, FusedText):
        text = encode_text(self, text)
    _check_prompts(len(text.keys[0][0]), hidden_states, encoder_attention_mask)
    x = _patch_embed(self, *_split(hidden_states))
    grid = (hidden_states.shape[2] // _patch(self), hidden_states.shape[3] // _patch(self))
    y = _trunk(self, x, text, masks, _split(modulation), _split(embedded), grid)
    sample = _dual.pack(*(None if v is None else _unpatchify(self, v, grid) for v in y))
    if not return_dict:
        return (sample,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)


def _check_prompts(prompts: int, images: Tensor, mask: Tensor | None) -> None:
    if len(images) % prompts:
        raise ValueError(f"fuse: {len(images)} images are no multiple of {prompts} prompts.")
    if mask is not None and len(mask) != prompts:
        raise ValueError(
            f"fuse: encoder_attention_mask has {len(mask)} rows for {prompts} prompts; one each."
        )


def _refuse(model: nn.Module, attention_kwargs: object, controlnet: object) -> None:
    for name, used in (
        ("attention_kwargs", bool(attention_kwargs)),
        ("controlnet_block_samples", controlnet is not None),
        ("gradient checkpointing", model.gradient_checkpointing and torch.is_grad_enabled()),
    ):
        if used:
            raise ValueError(f"fuse: {name} has no fused forward; undo() and use the stock model.")


def _trunk(
    model: nn.Module, x: Pair, text: FusedText, masks: dict[str, Tensor], modulation: Pair,
    embedded: Pair, grid: tuple[int, int],
) -> Pair:  # fmt: skip
    """Blocks, output norm and projection. A block's last residual waits for the next norm."""
    h: Pair = (None, None)
    gate: Pair = (None, None)
    for block, k, v in zip(model.transformer_blocks, text.keys, text.values, strict=True):
        shift1, scale1, gate1, shift2, scale2, gate2 = _chunks(block.scale_shift_table, modulation)
        x, y = _adaln(x, h, gate, scale1, shift1, block.norm1.eps)
        x = _gated_sum(x, gate1, _self_attention(block.attn1, y))
        context = _cross_attention(block.attn2, x, k, v, masks)
        x, y = _adaln(x, context, (None, None), scale2, shift2, block.norm2.eps)
        h, gate = _gated_conv(block.ff, y, grid), gate2
    both = (embedded[0][:, None], None if embedded[1] is None else embedded[1][:, None])
    shift, scale = _chunks(model.scale_shift_table, both)
    _, y = _adaln(x, h, gate, scale, shift, model.norm_out.norm.eps)
    return _linear(model.proj_out, y)


def _adaln(x: Pair, h: Pair, gate: Pair, scale: Pair, shift: Pair, eps: float) -> tuple[Pair, Pair]:
    h = (
        None if h[0] is None else h[0].to(x[0].dtype),
        None if h[1] is None else h[1].to(x[0].dtype),
    )
    out, y, tout, ty = adaln_jvp(*zip_pairs(x, h, gate, scale, shift), eps=eps)
    return (out, tout), (y, ty)


def zip_pairs(*pairs: Pair) -> list[Tensor | None]:
    """Primals of all pairs, then their tangents: the argument order of every `_jvp` function."""
    return [p for p, _ in pairs] + [t for _, t in pairs]


def _split(x: Tensor) -> Pair:
    """A tensor or dual as a pair; its tangent is detached under `stop_tangent_gradient()`."""
    (primal,), (tangent,) = _dual.unpack(x)
    if tangent is not None and _dual.tangent_gradient_stopped():
        tangent = tangent.detach()
    return primal, tangent


def _chunks(table: Tensor, embedded: Pair) -> list[Pair]:
    """The modulations table + embedding, one [B, 1, C] pair for each row of the table [K, C]."""
    e, te = (_rows_of(v, table) for v in embedded)
    total = table + e
    primals = total.chunk(len(table), dim=1)
    if te is None:
        return [(p, None) for p in primals]
    tangents = te.to(total.dtype).expand_as(total).chunk(len(table), dim=1)
    return list(zip(primals, tangents, strict=True))


def _rows_of(embedding: Tensor | None, table: Tensor) -> Tensor | None:
    return None if embedding is None else embedding.reshape(len(embedding), -1, table.shape[1])


def _gated_sum(x: Pair, gate: Pair, h: Pair) -> Pair:
    """x + γ h and its tangent ẋ + γ̇ h + γ ḣ."""
    dtype = x[0].dtype
    out = torch.addcmul(x[0], gate[0].to(dtype), h[0].to(dtype))
    with _dual.tangent_scope():
        terms = [x[1]] if x[1] is not None else []
        if gate[1] is not None:
            terms.append(gate[1].to(dtype) * h[0].to(dtype))
        if h[1] is not None:
            terms.append(gate[0].to(dtype) * h[1].to(dtype))
        return out, sum(terms[1:], terms[0]) if terms else None


def _linear(layer: nn.Linear, x: Pair) -> Pair:
    return linear_jvp(x[0], layer.weight, layer.bias, x[1])


def _norm(layer: nn.Module | None, x: Pair) -> Pair:
    return x if layer is None else rms_norm_jvp(x[0], layer.weight, x[1], eps=layer.eps)


def _self_attention(attn: nn.Module, x: Pair) -> Pair:
    q = _norm(attn.norm_q, _linear(attn.to_q, x))
    k = _norm(attn.norm_k, _linear(attn.to_k, x))
    v = _linear(attn.to_v, x)
    o = linear_attention(q, k, v, attn.heads, 1e-15)
    return _linear(attn.to_out[0], tuple(None if t is None else t.to(v[0].dtype) for t in o))


def linear_attention(q: Pair, k: Pair, v: Pair, heads: int, eps: float) -> Pair:
    """ReLU linear attention in fp32 over pairs [B, N, H·D].

    With q, k after ReLU: S = kᵀv, z = Σ k, o = (q S) / (q z + ε), and
    ȯ = (q̇S + qṠ − o (q̇z + qż)) / (q z + ε),  Ṡ = k̇ᵀv + kᵀv̇,  ż = Σ k̇.
    """
    (q, tq), (k, tk), (v, tv) = (tuple(_heads(_float(t), heads) for t in p) for p in (q, k, v))
    tq, tk = (None if t is None else t * (p > 0) for p, t in ((q, tq), (k, tk)))
    q, k = F.relu(q), F.relu(k)
    state, total = k.mT @ v, k.sum(-2).unsqueeze(-1)
    scale = 1 / (q @ total + eps)
    o = (q @ state) * scale
    to = None
    with _dual.tangent_scope():
        if any(t is not None for t in (tq, tk, tv)):
            numerator = denominator = 0
            if tq is not None:
                numerator, denominator = tq @ state, tq @ total
            if tk is not None or tv is not None:
                parts = [tk.mT @ v] if tk is not None else []
                parts += [k.mT @ tv] if tv is not None else []
                numerator = numerator + q @ sum(parts[1:], parts[0])
            if tk is not None:
                denominator = denominator + q @ tk.sum(-2).unsqueeze(-1)
            to = _merge((numerator - o * denominator) * scale)
    return _merge(o), to


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def _heads(x: Tensor | None, heads: int) -> Tensor | None:
    return None if x is None else x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _text_masks(mask: Tensor | None, like: Tensor) -> dict[str, Tensor]:
    """The stock bias −10000 (1 − mask) [B, 1, 1, S], or the key mask that it amounts to.

    A mask of three dimensions is a bias already. exp(−10000) is 0, and where a prompt has no token
    at all, the bias is the same for every key.
    """
    if mask is None:
        return {}
    if mask.ndim == 3:
        return {"attn_mask": mask[:, None]}
    if mask.is_floating_point():
        return {"attn_mask": ((1 - mask.to(like.dtype)) * -10000.0)[:, None, None]}
    there = mask.bool()
    return {"key_mask": there | ~there.any(-1, keepdim=True)}


def _cross_attention(attn: nn.Module, x: Pair, k: Pair, v: Pair, masks: dict[str, Tensor]) -> Pair:
    q = _linear(attn.to_q, x)
    # The images of one prompt queue up as its queries: no copy of its keys and values.
    shared = tuple(None if t is None else t.reshape(len(k[0]), -1, t.shape[-1]) for t in q)
    heads = (tuple(_heads(t, attn.heads) for t in p) for p in (shared, k, v))
    norm = None if attn.norm_q is None else (attn.norm_q.weight, attn.norm_q.eps)
    o = attention_jvp(*zip_pairs(*heads), **masks, q_norm=norm)
    o = tuple(None if t is None else _merge(t).view(q[0].shape) for t in o)
    return _linear(attn.to_out[0], o)


def _gated_conv(ff: nn.Module, x: Pair, grid: tuple[int, int]) -> Pair:
    """GLUMBConv on tokens: a 1×1 convolution is a linear map on tokens, its weight [O, I, 1, 1]."""
    a, ta = linear_jvp(x[0], ff.conv_inverted.weight.flatten(1), ff.conv_inverted.bias, x[1])
    depth = ff.conv_depth
    y, ty = conv_glu_jvp(a, depth.weight, depth.bias, ta, height=grid[0], width=grid[1])
    return linear_jvp(y, ff.conv_point.weight.flatten(1), None, ty)


def _patch(model: nn.Module) -> int:
    return model.config.patch_size


def _patch_embed(model: nn.Module, x: Tensor, tx: Tensor | None) -> Pair:
    """Patch embedding is affine: its tangent is the convolution without bias and positions."""
    y = model.patch_embed(x)
    dtype = torch.promote_types(y.dtype, model.scale_shift_table.dtype)
    ty = None
    if tx is not None:
        with _dual.tangent_scope():
            projection = model.patch_embed.proj
            ty = F.conv2d(tx, projection.weight, None, projection.stride)
            ty = ty.flatten(2).transpose(1, 2).to(dtype)
    return y.to(dtype), ty


def _unpatchify(model: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [B, N, p·p·C] to images [B, C, H·p, W·p]."""
    p = _patch(model)
    x = x.reshape(len(x), *grid, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(x), -1, grid[0] * p, grid[1] * p)
