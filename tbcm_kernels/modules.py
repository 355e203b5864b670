"""Drop-in modules: constructors and state dicts of torch and diffusers, on this package's ops.

A model built from them loads the same checkpoints, and its value, tangent and gradient come from
the fused ops. Options that they do not cover are refused by name when a module is built, shapes
that an op does not cover on call. Norms and gates return the dtype of their input, under autocast
too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbcm_kernels._dual import any_dual, takes_stock
from tbcm_kernels._layers import does_more, over_heads
from tbcm_kernels._library import shaped
from tbcm_kernels.adaln import adaln
from tbcm_kernels.attention import attention
from tbcm_kernels.conv_glu import conv_glu
from tbcm_kernels.linear import linear
from tbcm_kernels.linear_attention import linear_attention
from tbcm_kernels.rms_norm import rms_norm

__all__ = [
    "AdaLayerNormContinuous",
    "AdaLayerNormZero",
    "AdaLayerNormZeroSingle",
    "Attention",
    "GLUMBConv",
    "LayerNorm",
    "Linear",
    "LinearAttention",
    "RMSNorm",
    "SanaModulatedNorm",
]


class Linear(nn.Linear):
    """`torch.nn.Linear` that spends two GEMMs on a dual, not three.

    Args: those of `torch.nn.Linear`.

    Example:
        >>> import torch
        >>> from tbcm_kernels.modules import Linear
        >>> old, new = torch.nn.Linear(64, 32), Linear(64, 32)
        >>> new.load_state_dict(old.state_dict())
        <All keys matched successfully>
        >>> x, tx = torch.randn(2, 4, 16, 64)
        >>> y, ty = torch.func.jvp(new, (x,), (tx,))
        >>> torch.allclose(y, old(x), atol=1e-5), ty.shape
        (True, torch.Size([4, 16, 32]))
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`, or diffusers' `RMSNorm` without bias.

        y = weight · x · (mean x² + eps)^−½

    Args:
        normalized_shape: width C of the last dimension.
        eps: added to the mean square; None is the epsilon of fp32, for fp64 that of fp64.
        elementwise_affine: whether there is a weight [C].
        factory: device and dtype of the weight.

    Raises:
        ValueError: a normalized_shape of several dimensions.

    Example:
        >>> import torch
        >>> from tbcm_kernels.modules import RMSNorm
        >>> old, new = torch.nn.RMSNorm(64), RMSNorm(64)
        >>> new.load_state_dict(old.state_dict())
        <All keys matched successfully>
        >>> x, tx = torch.randn(2, 4, 16, 64)
        >>> y, ty = torch.func.jvp(new, (x,), (tx,))
        >>> torch.allclose(y, old(x), atol=1e-5), ty.shape
        (True, torch.Size([4, 16, 64]))
    """

    def __init__(
        self,
        normalized_shape: int,
        eps: float | None = None,
        elementwise_affine: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, **factory)
        _check_last_dimension(self)

    def forward(self, x: Tensor) -> Tensor:
        if takes_stock(x):
            return nn.RMSNorm.forward(self, x)
        weight = self.weight
        _check_width(self, x, weight)
        eps = self.eps
        if eps is None:
            eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        return rms_norm(x, weight, eps=eps)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension.

        y = weight · (x − mean x) · (var x + eps)^−½ + bias

    Args:
        normalized_shape: width C of the last dimension.
        eps: added to the variance.
        elementwise_affine: whether there is a weight [C].
        bias: whether there is a bias [C] beside the weight.
        factory: device and dtype of weight and bias.

    Raises:
        ValueError: a normalized_shape of several dimensions.

    Example:
        >>> import torch
        >>> from tbcm_kernels.modules import LayerNorm
        >>> old, new = torch.nn.LayerNorm(64), LayerNorm(64)
        >>> new.load_state_dict(old.state_dict())
        <All keys matched successfully>
        >>> x, tx = torch.randn(2, 4, 16, 64)
        >>> y, ty = torch.func.jvp(new, (x,), (tx,))
        >>> torch.allclose(y, old(x), atol=1e-5), ty.shape
        (True, torch.Size([4, 16, 64]))
    """

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, **factory)
        _check_last_dimension(self)

    def forward(self, input: Tensor) -> Tensor:
        if takes_stock(input):
            return nn.LayerNorm.forward(self, input)
        x, weight, bias = input, self.weight, self.bias
        _check_width(self, x, weight)
        if weight is not None and x.dtype.itemsize > 2:
            weights = (weight, bias)
            if weight.dtype == x.dtype and not any_dual(x, *weights):
                # One pass, where what follows takes three.
                return F.layer_norm(x, self.normalized_shape, *weights, self.eps)
            # adaln takes weight − 1, whose rounding shows here where weights are small. A layer
            # norm is the RMS norm of the centred row.
            y = rms_norm(x - x.mean(-1, keepdim=True), weight, eps=self.eps)
            return y if bias is None else y + bias
        scale = None if weight is None else weight.float() - 1
        rows = x.reshape(1, -1, x.shape[-1])
        return shaped(adaln(rows, scale=scale, shift=bias, eps=self.eps)[1], x.shape)


class AdaLayerNormZero(nn.Module):
    """diffusers' `AdaLayerNormZero`, which opens the blocks of SD3 and Flux.

        shift, scale, gate, … = linear(silu(emb)),  y = LayerNorm(x) · (1 + scale) + shift

    Args:
        embedding_dim: width C of x and emb.
        num_embeddings: None; embed timestep and label outside.
        norm_type: "layer_norm".
        bias: whether the linear layer has one.

    Raises:
        ValueError: another num_embeddings or norm_type.

    Example:
        >>> import torch, diffusers.models.normalization as stock
        >>> from tbcm_kernels.modules import AdaLayerNormZero
        >>> old, new = stock.AdaLayerNormZero(64), AdaLayerNormZero(64)
        >>> new.load_state_dict(old.state_dict())
        <All keys matched successfully>
        >>> x, emb = torch.randn(4, 16, 64), torch.randn(4, 64)
        >>> values, tangents = torch.func.jvp(lambda *v: new(v[0], emb=v[1]), (x, emb), (x, emb))
        >>> [t.shape for t in tangents] == [v.shape for v in old(x, emb=emb)]
        True
    """

    def __init__(
        self,
        embedding_dim: int,
        num_embeddings: int | None = None,
        norm_type: str = "layer_norm",
        bias: bool = True,
    ) -> None:
        super().__init__()
        _only(self, num_embeddings=(num_embeddings, None), norm_type=(norm_type, "layer_norm"))
        self.linear = Linear(embedding_dim, 6 * embedding_dim, bias)

    def forward(self, x: Tensor, *, emb: Tensor) -> tuple[Tensor, ...]:
        """(y, gate, shift, scale and gate of the MLP): y like x [B, N, C], others like emb [B, C].

        Arguments of the original that it ignores without embeddings of its own are not taken.
        """
        shift, scale, *others = self.linear(F.silu(emb)).chunk(6, dim=1)
        return _modulated(x, scale, shift, 1e-6), *others


class AdaLayerNormZeroSingle(nn.Module):
    """diffusers' `AdaLayerNormZeroSingle`, which opens the single-stream blocks of Flux.

        shift, scale, gate = linear(silu(emb)),  y = LayerNorm(x) · (1 + scale) + shift

    Args:
        embedding_dim: width C of x and emb.
        norm_type: "layer_norm".
        bias: whether the linear layer has one.

    Raises:
        ValueError: another norm_type.

    Example:
        >>> import torch, diffusers.models.normalization as stock
        >>> from tbcm_kernels.modules import AdaLayerNormZeroSingle
        >>> old, new = stock.AdaLayerNormZeroSingle(64), AdaLayerNormZeroSingle(64)
        >>> new.load_state_dict(old.state_dict())
        <All keys matched successfully>
        >>> x, emb = torch.randn(4, 16, 64), torch.randn(4, 64)
        >>> (y, gate), (ty, tgate) = torch.func.jvp(new, (x, emb), (x, emb))
        >>> torch.allclose(y, old(x, emb)[0], atol=1e-5), tgate.shape
        (True, torch.Size([4, 64]))
    """

    def __init__(
        self, embedding_dim: int, norm_type: str = "layer_norm", bias: bool = True
    ) -> None:
        super().__init__()
        _only(self, norm_type=(norm_type, "layer_norm"))
        self.linear = Linear(embedding_dim, 3 * embedding_dim, bias)

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        """(y, gate): y like x [B, N, C], gate like emb [B, C]."""
        shift, scale, gate = self.linear(F.silu(emb)).chunk(3, dim=1)
        return _modulated(x, scale, shift, 1e-6), gate


class AdaLayerNormContinuous(nn.Module):
    """diffusers' `AdaLayerNormContinuous`, the output norm of SD3 and Flux.

        scale, shift = linear(silu(emb)),  y = LayerNorm(x) · (1 + scale) + shift

    Args:
        embedding_dim: width C of x.
        conditioning_embedding_dim: width of emb.
        elementwise_affine: False must be passed: the original's default is True.
        eps: added to the variance.
        bias: whether the linear layer has one.
        norm_type: "layer_norm".

    Raises:
        ValueError: another elementwise_affine or norm_type.

    Example:
        >>> import torch, diffusers.models.normalization as stock
        >>> from tbcm_kernels.modules import AdaLayerNormContinuous
        >>> old = stock.AdaLayerNormContinuous(64, 32, elementwise_affine=False)
        >>> new = AdaLayerNormContinuous(64, 32, elementwise_affine=False)
        >>> new.load_state_dict(old.state_dict())
        <All keys matched successfully>
        >>> x, emb = torch.randn(4, 16, 64), torch.randn(4, 32)
        >>> y, ty = torch.func.jvp(new, (x, emb), (x, emb))
        >>> torch.allclose(y, old(x, emb), atol=1e-5), ty.shape
        (True, torch.Size([4, 16, 64]))
    """

    def __init__(
        self,
        embedding_dim: int,
        conditioning_embedding_dim: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        bias: bool = True,
        norm_type: str = "layer_norm",
    ) -> None:
        super().__init__()
        _only(
            self,
            elementwise_affine=(elementwise_affine, False),
            norm_type=(norm_type, "layer_norm"),
        )
        self.eps = eps
        self.linear = Linear(conditioning_embedding_dim, 2 * embedding_dim, bias)

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        """y like x [B, N, C] for an embedding [B, conditioning_embedding_dim]."""
        emb = F.silu(conditioning_embedding).to(x.dtype)
        scale, shift = self.linear(emb).chunk(2, dim=1)
        return _modulated(x, scale, shift, self.eps)


class SanaModulatedNorm(nn.Module):
    """diffusers' `SanaModulatedNorm`, the output norm of SANA; it has no parameters.

        shift, scale = table + temb,  y = LayerNorm(x) · (1 + scale) + shift

    Args:
        dim: width C; not used, as the norm has no parameters.
        elementwise_affine: False.
        eps: added to the variance.

    Raises:
        ValueError: another elementwise_affine.

    Example:
        >>> import torch, diffusers.models.transformers.sana_transformer as stock
        >>> from tbcm_kernels.modules import SanaModulatedNorm
        >>> old, new = stock.SanaModulatedNorm(64), SanaModulatedNorm(64)
        >>> new.load_state_dict(old.state_dict())
        <All keys matched successfully>
        >>> x, temb, table = torch.randn(4, 16, 64), torch.randn(4, 64), torch.randn(2, 64)
        >>> y, ty = torch.func.jvp(lambda *v: new(*v, table), (x, temb), (x, temb))
        >>> torch.allclose(y, old(x, temb, table), atol=1e-5), ty.shape
        (True, torch.Size([4, 16, 64]))
    """

    def __init__(self, dim: int, elementwise_affine: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        _only(self, elementwise_affine=(elementwise_affine, False))
        self.eps = eps

    def forward(self, hidden_states: Tensor, temb: Tensor, scale_shift_table: Tensor) -> Tensor:
        """y like hidden_states [B, N, C] for temb [B, C] and a table [2, C] of shift and scale."""
        shift, scale = (temb.to(scale_shift_table.device) + row for row in scale_shift_table)
        return _modulated(hidden_states, scale, shift, self.eps)


class GLUMBConv(nn.Module):
    """diffusers' `GLUMBConv`, the feed-forward of SANA: all of it on tokens.

    Args:
        in_channels: of the image [B, in_channels, H, W].
        out_channels: of the result [B, out_channels, H, W].
        expand_ratio: hidden channels for each input channel.
        norm_type: None.
        residual_connection: whether the input is added to the result.

    Raises:
        ValueError: another norm_type.

    Example:
        >>> import torch, diffusers.models.transformers.sana_transformer as stock
        >>> from tbcm_kernels.modules import GLUMBConv
        >>> old, new = stock.GLUMBConv(16, 16), GLUMBConv(16, 16)
        >>> new.load_state_dict(old.state_dict())
        <All keys matched successfully>
        >>> x, tx = torch.randn(2, 4, 16, 8, 8)
        >>> y, ty = torch.func.jvp(new, (x,), (tx,))
        >>> torch.allclose(y, old(x), atol=1e-5), ty.shape
        (True, torch.Size([4, 16, 8, 8]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expand_ratio: float = 4,
        norm_type: str | None = None,
        residual_connection: bool = True,
    ) -> None:
        super().__init__()
        _only(self, norm_type=(norm_type, None))
        hidden = int(expand_ratio * in_channels)
        self.residual_connection = residual_connection
        self.conv_inverted = _TokenLinear(in_channels, 2 * hidden, 1)
        self.conv_depth = _GatedConv(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = _TokenLinear(hidden, out_channels, 1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, out_channels, H, W] of [B, in_channels, H, W], in channels-last memory."""
        grid = hidden_states.shape[2:]
        y = self.conv_inverted(hidden_states.flatten(2).mT)
        y = torch.unflatten(self.conv_point(self.conv_depth(y, *grid)).mT, 2, grid)
        return y + hidden_states if self.residual_connection else y


class Attention(nn.Module):
    """diffusers' `Attention` with `AttnProcessor2_0` or `SanaAttnProcessor2_0`.

    Softmax self- or cross-attention; the norm of queries and keys runs inside the kernel.

    Args:
        query_dim: width of hidden_states and of the result.
        cross_attention_dim: width of encoder_hidden_states; None is query_dim.
        heads: of queries.
        kv_heads: of keys and values, which consecutive query heads share; None is heads.
        dim_head: width of a head, a multiple of 8 up to 256.
        dropout: of the result.
        bias: whether to_q, to_k and to_v have one.
        qk_norm: None, "rms_norm" of each head or "rms_norm_across_heads".
        out_bias: whether to_out has a bias.
        eps: of the norms.

    Raises:
        ValueError: another qk_norm.
        RuntimeError: on call, a tangent of a norm's weight or of the mask.

    Example:
        >>> import torch, diffusers.models.attention_processor as stock
        >>> from tbcm_kernels.modules import Attention
        >>> old = stock.Attention(64, heads=4, dim_head=16)
        >>> new = Attention(64, heads=4, dim_head=16)
        >>> new.load_state_dict(old.state_dict())
        <All keys matched successfully>
        >>> x, tx = torch.randn(2, 4, 16, 64)
        >>> y, ty = torch.func.jvp(new, (x,), (tx,))
        >>> torch.allclose(y, old(x), atol=1e-5), ty.shape
        (True, torch.Size([4, 16, 64]))
    """

    _qk_norms: tuple[str | None, ...] = (None, "rms_norm", "rms_norm_across_heads")

    def __init__(
        self,
        query_dim: int,
        cross_attention_dim: int | None = None,
        heads: int = 8,
        kv_heads: int | None = None,
        dim_head: int = 64,
        dropout: float = 0.0,
        bias: bool = False,
        *,
        qk_norm: str | None = None,
        out_bias: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if qk_norm not in self._qk_norms:
            raise ValueError(
                f"{type(self).__name__}: qk_norm must be one of {self._qk_norms}, got {qk_norm!r}."
            )
        context_dim = query_dim if cross_attention_dim is None else cross_attention_dim
        inner, kv_inner = heads * dim_head, (kv_heads or heads) * dim_head
        self.dim_head = dim_head
        self.norm_q = self.norm_k = None
        if qk_norm is not None:
            across = qk_norm == "rms_norm_across_heads"
            self.norm_q = RMSNorm(inner if across else dim_head, eps)
            self.norm_k = RMSNorm(kv_inner if across else dim_head, eps)
        self.to_q = Linear(query_dim, inner, bias)
        self.to_k = Linear(context_dim, kv_inner, bias)
        self.to_v = Linear(context_dim, kv_inner, bias)
        self.to_out = nn.ModuleList([Linear(inner, query_dim, out_bias), nn.Dropout(dropout)])

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of hidden_states [B, N, query_dim] to themselves or to others; the same shape.

        Args:
            hidden_states: what queries are made of.
            encoder_hidden_states: what keys and values are made of, [B, S, cross_attention_dim];
                None is hidden_states.
            attention_mask: [B, S], [B, N or 1, S], [B, 1, N or 1, S] or [B·H, N or 1, S]; True
                takes part, floats are added to the logits.
        """
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = self._heads(self.to_q(hidden_states))
        k, v = self._heads(self.to_k(context)), self._heads(self.to_v(context))
        o = self._attend(q, k, v, over_heads(attention_mask, q.shape[0]))
        return self.to_out[1](self.to_out[0](o.transpose(1, 2).flatten(2)))

    def _heads(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (-1, self.dim_head)).transpose(1, 2)

    def _norms(self) -> dict[str, tuple[Tensor, float]]:
        if self.norm_q is None:
            return {}
        norms = {"q_norm": self.norm_q, "k_norm": self.norm_k}
        if any(map(does_more, norms.values())):
            raise ValueError(
                f"{type(self).__name__}: norm_q or norm_k has hooks or a replaced forward, which "
                f"its kernel would pass by; remove them."
            )
        return {name: (norm.weight, norm.eps) for name, norm in norms.items()}

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attention(q, k, v, attn_mask=mask, enable_gqa=True, **self._norms())


class LinearAttention(Attention):
    """diffusers' `Attention` with `SanaLinearAttnProcessor2_0`: the self-attention of SANA.

    ReLU linear attention, in fp32 between the projections. fp16 is not clipped at its largest
    number, as it is there.

    Args: those of `Attention`; qk_norm is None or "rms_norm_across_heads".

    Raises:
        ValueError: another qk_norm; on call, an attention_mask, which the original ignores.

    Example:
        >>> import torch, diffusers.models.attention_processor as stock
        >>> from tbcm_kernels.modules import LinearAttention
        >>> new = LinearAttention(64, heads=4, dim_head=16)
        >>> linear = stock.SanaLinearAttnProcessor2_0()
        >>> old = stock.Attention(64, heads=4, dim_head=16, processor=linear)
        >>> new.load_state_dict(old.state_dict())
        <All keys matched successfully>
        >>> x, tx = torch.randn(2, 4, 16, 64)
        >>> y, ty = torch.func.jvp(new, (x,), (tx,))
        >>> torch.allclose(y, old(x), atol=1e-5), ty.shape
        (True, torch.Size([4, 16, 64]))
    """

    _qk_norms = (None, "rms_norm_across_heads")

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            raise ValueError(
                "LinearAttention: SanaLinearAttnProcessor2_0 ignores attention_mask, so it is "
                "refused here; leave it out."
            )
        return linear_attention(q, k, v, **self._norms())


class _TokenLinear(nn.Conv2d):
    """A 1×1 convolution on tokens [B, N, I], where it is linear; its weight stays [O, I, 1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.flatten(1), self.bias)


class _GatedConv(nn.Conv2d):
    """A depthwise 3×3 convolution on tokens [B, H·W, 2K], between SiLU and gated linear unit."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return conv_glu(x, self.weight, self.bias, height=height, width=width)


def _modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """x [B, N, C] after LayerNorm and the modulations [B, C]."""
    return adaln(x, scale=scale[:, None], shift=shift[:, None], eps=eps)[1]


def _only(module: nn.Module, **options: tuple[object, object]) -> None:
    """Raise for an option (given, covered) that is not what the module covers."""
    for name, (given, covered) in options.items():
        if given != covered:
            raise ValueError(
                f"{type(module).__name__}: {name} must be {covered!r}, got {given!r}; keep the "
                f"original module for that."
            )


def _check_width(norm: nn.RMSNorm | nn.LayerNorm, x: Tensor, weight: Tensor | None) -> None:
    """Raise for another width where there is no weight; with one the op does."""
    if weight is None and x.shape[-1:] != norm.normalized_shape:
        raise ValueError(
            f"{type(norm).__name__}: the last dimension must be {norm.normalized_shape[0]}, got "
            f"{list(x.shape)}."
        )


def _check_last_dimension(norm: nn.RMSNorm | nn.LayerNorm) -> None:
    if len(norm.normalized_shape) != 1:
        raise ValueError(
            f"{type(norm).__name__}: normalized_shape must be one dimension, got "
            f"{list(norm.normalized_shape)}; flatten them before the norm."
        )
