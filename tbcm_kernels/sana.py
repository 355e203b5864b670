"""The forward of diffusers' SanaTransformer2DModel on explicit pairs of value and tangent.

A pair (x, tx) has tx = None where there is no tangent; that work is then skipped. A residual
before a norm is added by the `adaln` call that normalises the sum, across block borders too. Under
`stop_tangent_gradient()` tangents are computed without a graph.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from tbcm_kernels import _dispatch, _dual
from tbcm_kernels._layers import ADDED, Made, does_more, is_plain
from tbcm_kernels._library import autocast_dtype, cast
from tbcm_kernels.adaln import adaln_jvp
from tbcm_kernels.attention import attention_jvp
from tbcm_kernels.attention.functional import MAX_HEAD_DIM
from tbcm_kernels.conv_glu import conv_glu_jvp
from tbcm_kernels.conv_glu.functional import choose as choose_conv_glu
from tbcm_kernels.linear import lean, linear_jvp
from tbcm_kernels.linear_attention import linear_attention_jvp
from tbcm_kernels.rms_norm import rms_norm_jvp

Pair = tuple[Tensor, Tensor | None]
Stream = tuple[Pair, Pair, Pair]
"""x, and the h and gate of the residual γ h that is still to be added."""


@dataclass
class FusedText:
    """Text as the blocks read it: keys and values of every block, for P prompts."""

    keys: list[Pair]
    values: list[Pair]


def encode_text(model: nn.Module, encoder_hidden_states: Tensor) -> FusedText:
    """Keys and values of the text [P, S, D] for every block, to be reused by many forwards."""
    if _dual.is_dtensor(model.scale_shift_table):
        raise RuntimeError(
            "encode_text: this model is sharded, and its weights are whole within its forward "
            "alone; under torch.no_grad() call unshard() before and reshard() after, and for a "
            "pass with gradients give the model the text itself."
        )
    projected = model.caption_projection(encoder_hidden_states)
    tokens = encoder_hidden_states.shape[1]
    text = _split(model.caption_norm(projected.view(len(projected), tokens, projected.shape[-1])))
    attentions = [block.attn2 for block in model.transformer_blocks]
    keys = [_norm(attn.norm_k, _linear(attn.to_k, text)) for attn in attentions]
    return FusedText(keys, [_linear(attn.to_v, text) for attn in attentions])


def swaps(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(model, "forward", the fused one); changes nothing.

    Raises:
        ValueError: naming it, a setting or layer with which the fused forward would differ from the
            stock, or a forward that is replaced already.
    """
    if getattr(model.forward, "__func__", None) not in (forward, type(model).forward):
        raise ValueError(
            "fuse: this model's forward is replaced already, by a hook, offloading or fuse(); "
            "remove that first."
        )
    if not is_plain(type(model).forward):
        raise ValueError(
            f"fuse: {type(model).__name__} has a forward of its own, which the fused one would "
            f"pass by; put a diffusers model inside, and fuse that."
        )
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
    if reason := _passed_by(model):
        raise ValueError(reason)


_TRUNK = ("patch_embed", "norm_out", "proj_out")
"""What the fused forward passes by, beside the blocks; the rest runs as modules."""


@_dual.constant_under_compile
def _passed_by(model: nn.Module) -> str | None:
    """What the fused forward would pass by, in a sentence.

    Asked on every call too, for a layer may get a hook or an adapter later.
    """
    plain = (item for item in model.config.items() if not isinstance(item[1], list | dict))
    made = _as_made(tuple(plain))
    parts = {n: part for n, part in model._modules.items() if n not in ADDED}
    block = made.parts["transformer_blocks"].parts["0"]
    queue = [(layer, block) for layer in parts.pop("transformer_blocks")]
    queue += [(layer, made.parts[n] if n in _TRUNK else None) for n, layer in parts.items()]
    for layer, want in queue:  # it grows under the loop, at a tenth of what modules() takes
        if layer is None:
            continue
        if does_more(layer):
            reason = "has hooks or a replaced forward"
        elif want is None:
            kind = type(layer)
            path = f"{kind.__module__}.{kind.__qualname__}"
            reason = None if is_plain(kind.forward) else f"is a {path}"
        else:
            reason = want.difference(layer)
        if reason:
            name = next(n for n, m in model.named_modules() if m is layer)
            return (
                f"fuse: {name} {reason}, which the fused forward would pass by; use the stock "
                f"model, of adapters the merged one, under FSDP the model sharded as one unit."
            )
        if inside := layer._modules:
            wanted = want.parts if want else {}
            queue += [(part, wanted.get(n)) for n, part in inside.items() if n not in ADDED]
    own = getattr(model, "_gradient_checkpointing_func", None)
    if model.gradient_checkpointing and own and not is_plain(own):
        return (
            "fuse: gradient checkpointing is by a function of yours, which the fused forward would "
            "pass by; call enable_gradient_checkpointing() without one, or use the stock model."
        )
    return None


@functools.lru_cache(maxsize=8)
def _as_made(config: tuple[tuple[str, Any], ...]) -> Made:
    """A model of this configuration as diffusers makes it, with one block and without memory."""
    from diffusers import SanaTransformer2DModel

    known = inspect.signature(SanaTransformer2DModel.__init__).parameters
    settings = {name: value for name, value in config if name in known}
    with torch.device("meta"):
        return Made.of(SanaTransformer2DModel(**settings | {"num_layers": 1}))


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
    """Arguments and result of the stock forward, which ignores `attention_mask` too.

    Any tensor may be a forward-AD dual.

    The text may hold P prompts where the batch holds k·P images: prompt i then serves images i·k to
    (i+1)·k − 1, and its keys and values are computed once. `Fused.encode_text` computes them ahead.

    Raises:
        ValueError: attention_kwargs or controlnet_block_samples in use, a batch or mask that does
            not fit the number of prompts, or a layer that has got a hook since fuse().
    """
    _refuse(attention_kwargs, controlnet_block_samples)
    if reason := _passed_by(self):
        raise ValueError(reason)
    if torch.compiler.is_dynamo_compiling():  # looked at, so that with others it is compiled anew
        for block in self.transformer_blocks:
            _ = type(block.attn1.processor), type(block.attn2.processor)
    _dual.guard_levels("fuse", "the stock model")
    masks = _text_masks(encoder_attention_mask, hidden_states)
    told = {"batch_size": len(hidden_states)} if guidance is None else {"guidance": guidance}
    modulation, embedded = self.time_embed(timestep, hidden_dtype=hidden_states.dtype, **told)
    text = encoder_hidden_states
    if not isinstance(text, FusedText):
        text = encode_text(self, text)
    _check_prompts(len(text.keys[0][0]), hidden_states, encoder_attention_mask)
    grid = (hidden_states.shape[2] // _patch(self), hidden_states.shape[3] // _patch(self))
    x = _patch_embed(self, _split(hidden_states), grid)
    y = _trunk(self, x, text, masks, _split(modulation), _split(embedded), grid)
    sample = _dual.pack(*(None if v is None else _unpatchify(self, v, grid) for v in y))
    if not return_dict:
        return (sample,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)


def _check_prompts(prompts: int, images: Tensor, mask: Tensor | None) -> None:
    if not prompts or len(images) % prompts:
        raise ValueError(f"fuse: {len(images)} images are no multiple of {prompts} prompts.")
    if mask is not None and len(mask) != prompts:
        raise ValueError(
            f"fuse: encoder_attention_mask has {len(mask)} rows for {prompts} prompts; one each."
        )


def _refuse(attention_kwargs: object, controlnet: object) -> None:
    for name, used in (
        ("attention_kwargs", bool(attention_kwargs)),
        ("controlnet_block_samples", controlnet is not None),
    ):
        if used:
            raise ValueError(f"fuse: {name} has no fused forward; undo() and use the stock model.")


def _trunk(
    model: nn.Module, x: Pair, text: FusedText, masks: dict[str, Tensor], modulation: Pair,
    embedded: Pair, grid: tuple[int, int],
) -> Pair:  # fmt: skip
    """Blocks, output norm and projection. A block's last residual waits for the next norm."""
    stream: Stream = (x, (None, None), (None, None))
    run = _checkpointed if model.gradient_checkpointing and torch.is_grad_enabled() else _block
    for block, k, v in zip(model.transformer_blocks, text.keys, text.values, strict=True):
        stream = run(block, stream, k, v, modulation, masks, grid)
    both = (embedded[0][:, None], None if embedded[1] is None else embedded[1][:, None])
    shift, scale = _chunks(model.scale_shift_table, both)
    _, y = _adaln(*stream, scale, shift, model.norm_out.norm.eps)
    return _linear(model.proj_out, y)


def _block(
    block: nn.Module, stream: Stream, k: Pair, v: Pair, modulation: Pair,
    masks: dict[str, Tensor], grid: tuple[int, int],
) -> Stream:  # fmt: skip
    shift1, scale1, gate1, shift2, scale2, gate2 = _chunks(block.scale_shift_table, modulation)
    attn = block.attn1
    x, y = _adaln(*stream, scale1, shift1, block.norm1.eps)
    layers = (attn.to_q, attn.to_k, attn.to_v)
    q, *kv = _after_adaln(layers, x, y, scale1, shift1, block.norm1.eps)
    x = _gated_sum(x, gate1, _self_attention(attn, q, *kv), attn.to_out[0])
    context = _cross_attention(block.attn2, x, k, v, masks)
    x, y = _adaln(x, context, (None, None), scale2, shift2, block.norm2.eps)
    layer = _as_linear(block.ff.conv_inverted)
    (a,) = _after_adaln((layer,), x, y, scale2, shift2, block.norm2.eps)
    return x, _gated_conv(block.ff, a, grid), gate2


def _checkpointed(
    block: nn.Module, stream: Stream, k: Pair, v: Pair, modulation: Pair,
    masks: dict[str, Tensor], grid: tuple[int, int],
) -> Stream:  # fmt: skip
    """A block that runs again in backward. For a semi-gradient its tangents then stay out.

    So they are neither arguments of the checkpointed function nor in its closure, which are kept
    until then.
    """
    primals, tangents = zip(*stream, k, v, modulation, strict=True)
    first, later = [tangents], (None,) * len(tangents)

    def run(*primals: Tensor | None) -> tuple[Tensor | None, ...]:
        *stream, k, v, modulation = zip(primals, take(), strict=True)
        out = _block(block, tuple(stream), k, v, modulation, masks, grid)
        return tuple(zip_pairs(*out))

    def once() -> Sequence[Tensor | None]:
        return first.pop() if first else later

    # The compiler traces once and sees for itself what backward needs.
    again = torch.compiler.is_dynamo_compiling() or not _dual.tangent_gradient_stopped()
    take = (lambda: tangents) if again else once
    out = checkpoint(run, *primals, use_reentrant=False)
    return tuple(zip(out[:3], out[3:], strict=True))


def _adaln(x: Pair, h: Pair, gate: Pair, scale: Pair, shift: Pair, eps: float) -> tuple[Pair, Pair]:
    dtype = x[0].dtype
    if h[0] is not None and dtype == torch.float32 and h[0].dtype.itemsize < 4:
        dtype = h[0].dtype  # which adaln takes, and saves in 16 bits
    h = tuple(cast(v, dtype) for v in h)
    pairs = zip_pairs(x, h, gate, scale, shift)
    out, y, tout, ty = adaln_jvp(*pairs, eps=eps, dtype=_of_layers(x[0]))
    return (out, tout), (y, ty)


def _of_layers(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast would give a stream in fp32 to the layers after its norm."""
    return autocast_dtype(x.device.type) if x.dtype == torch.float32 else None


def zip_pairs(*pairs: Pair) -> list[Tensor | None]:
    """Primals of all pairs, then their tangents: the argument order of every `_jvp` function."""
    return [p for p, _ in pairs] + [t for _, t in pairs]


def _split(x: Tensor) -> Pair:
    """A tensor or dual as a pair; its tangent is detached under `stop_tangent_gradient()`."""
    (primal,), tangents = _dual.unpack(x)
    return primal, *_dual.held(*tangents)


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


def _after_adaln(
    layers: Sequence[nn.Linear | AsLinear], x: Pair, y: Pair, scale: Pair, shift: Pair, eps: float
) -> list[Pair]:
    """Each layer on y = LN(x)(1 + scale) + shift."""
    alike = len({layer.bias is None for layer in layers}) == 1
    if not alike or not lean.worth_it(x[0], y[1]):
        return [_linear(layer, y) for layer in layers]
    impl = _dispatch.choose_for_rows("adaln", "auto", x[0])
    return lean.of_adaln(y, x[0], scale[0], shift[0], eps, layers, impl)


def _gated_sum(x: Pair, gate: Pair, o: Pair, layer: nn.Linear) -> Pair:
    """x + γ (o Wᵀ + b) and its tangent."""
    if lean.worth_it(x[0], x[1], gate[1], o[1]):
        return lean.gated_sum(x, gate, o, layer)
    h = _linear(layer, o)
    out = lean.add_product(x[0], gate[0], h[0])
    with _dual.tangent_scope():
        return out, lean.tangent_of_gated_sum(x[1], gate, h, out.dtype)


def _linear(layer: nn.Linear | AsLinear, x: Pair) -> Pair:
    if x[1] is None and not torch.is_grad_enabled():
        return F.linear(x[0], layer.weight, layer.bias), None
    return linear_jvp(x[0], layer.weight, layer.bias, x[1])


def _norm(layer: nn.Module | None, x: Pair) -> Pair:
    return x if layer is None else rms_norm_jvp(x[0], layer.weight, x[1], eps=layer.eps)


def _self_attention(attn: nn.Module, *qkv: Pair) -> Pair:
    """Before the projection of its output."""
    heads = (tuple(_heads(t, attn.heads) for t in p) for p in qkv)
    norms = {
        f"{name}_norm": None if norm is None else (norm.weight, norm.eps)
        for name, norm in (("q", attn.norm_q), ("k", attn.norm_k))
    }
    o = linear_attention_jvp(*zip_pairs(*heads), **norms)
    return tuple(None if t is None else _merge(t) for t in o)


def _heads(x: Tensor | None, heads: int) -> Tensor | None:
    if x is None:
        return None
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(1, 2)


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


def _gated_conv(ff: nn.Module, a: Pair, grid: tuple[int, int]) -> Pair:
    """GLUMBConv behind its first convolution, on tokens."""
    # Read once: a parametrization may draw, or move on.
    depth, point = AsLinear(ff.conv_depth.weight, ff.conv_depth.bias), _as_linear(ff.conv_point)
    y = conv_glu_jvp(a[0], depth.weight, depth.bias, a[1], height=grid[0], width=grid[1])
    if point.bias is not None or not lean.worth_it(a[0], y[1]):
        return linear_jvp(y[0], *point, y[1])
    impl = choose_conv_glu("auto", a[0])
    return lean.of_conv_glu(y, a[0], *depth, grid, point.weight, impl)


class AsLinear(NamedTuple):
    """A 1×1 convolution as the linear map on tokens that it is."""

    weight: Tensor
    bias: Tensor | None


def _as_linear(conv: nn.Conv2d) -> AsLinear:
    return AsLinear(conv.weight.flatten(1), conv.bias)


def _patch(model: nn.Module) -> int:
    return model.config.patch_size


def _patch_embed(model: nn.Module, x: Pair, grid: tuple[int, int]) -> Pair:
    """The convolution of patches as the linear map on tokens that it is."""
    embed = model.patch_embed
    tokens = tuple(_patches(model, v, grid) for v in x)
    if embed.pos_embed is None:
        y, ty = _linear(_as_linear(embed.proj), tokens)
    else:  # it adds positions, fitted to the grid
        with parametrize.cached():  # both of one reading of the weight
            y, (_, ty) = embed(x[0]), _linear(_as_linear(embed.proj), tokens)
    dtype = torch.promote_types(y.dtype, model.scale_shift_table.dtype)
    return y.to(dtype), cast(ty, dtype)


def _patches(model: nn.Module, x: Tensor | None, grid: tuple[int, int]) -> Tensor | None:
    """Images [B, C, H·p, W·p] as tokens [B, N, C·p·p]; what makes no whole patch is left out."""
    if x is None:
        return None
    p, (height, width) = _patch(model), grid
    if not height * width:
        raise ValueError(f"fuse: images of {list(x.shape[2:])} hold no patch of {p} by {p}.")
    x = x[..., : height * p, : width * p].reshape(*x.shape[:2], height, p, width, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(len(x), height * width, -1)


def _unpatchify(model: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [B, N, p·p·C] to images [B, C, H·p, W·p]."""
    p = _patch(model)
    x = x.reshape(len(x), *grid, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(x), -1, grid[0] * p, grid[1] * p)
