"""Attention processors in stock diffusers models against diffusers' own."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from test_fuse import _layer_norm, _worst
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tbcm_kernels as tk
from tbcm_kernels import sdpa
from tbcm_kernels.processors import JVPAttnProcessor, JVPJointAttnProcessor

PIXART = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 3, "out_channels": 3,
    "num_layers": 2, "cross_attention_dim": 32, "sample_size": 8, "patch_size": 2,
    "caption_channels": 24, "use_additional_conditions": False,
}  # fmt: skip
SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 3, "out_channels": 3, "num_layers": 3,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
    "caption_projection_dim": 32, "pooled_projection_dim": 20, "pos_embed_max_size": 8,
}  # fmt: skip
MODELS = {
    "PixArt": (PixArtTransformer2DModel, PIXART, "4 JVPAttnProcessor"),
    "SD3": (SD3Transformer2DModel, SD3, "3 JVPJointAttnProcessor"),
    "SD3.5": (
        SD3Transformer2DModel,
        SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
        "5 JVPJointAttnProcessor",
    ),
}
# fp64 falls to the reference, and diffusers' RMSNorm takes its mean square in fp32 at any rate.
CLOSE = {
    ("PixArt", torch.float64): 1e-12,
    ("SD3", torch.float64): 1e-12,
    ("SD3.5", torch.float64): 1e-5,
}


def _model(name: str, dtype: torch.dtype = torch.float32, **change: object) -> nn.Module:
    kind, config, _ = MODELS[name]
    torch.manual_seed(0)
    model = kind(**config | change).to(dtype)
    for norm in (m for n, m in model.named_modules() if "norm_" in n and "RMS" in type(m).__name__):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model


def _inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 3, 8, 8).to(dtype),
        "timestep": torch.tensor([3.0, 9.0], dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 7, 24).to(dtype),
    }
    if name == "PixArt":
        return inputs | {"encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
    return inputs | {"pooled_projections": torch.randn(2, 20).to(dtype)}


def _function(
    model: nn.Module, inputs: dict[str, Tensor], names: tuple[str, ...]
) -> Callable[..., Tensor]:
    return lambda *values: model(
        **inputs | dict(zip(names, values, strict=True)), return_dict=False
    )[0]


def _dual_pass(
    model: nn.Module, inputs: dict[str, Tensor], moving_text: bool = True, through: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """Value, tangent, and gradients of a random projection of the value, or of both."""
    names = ("hidden_states",) + ("encoder_hidden_states",) * moving_text
    torch.manual_seed(2)
    primals = tuple(inputs[n] for n in names)
    tangents = tuple(torch.randn(p.shape).to(p.dtype) for p in primals)
    with sdpa_kernel(SDPBackend.MATH):
        value, tangent = torch.func.jvp(_function(model, inputs, names), primals, tangents)
        weights = torch.randn(2, *value.shape).to(value.dtype)
        loss = (value * weights[0]).sum() + (tangent * weights[1]).sum() * through
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return value.detach(), tangent.detach(), dict(zip(parameters, grads, strict=True))


def _compare_gradients(got: dict, want: dict, close: float) -> None:
    assert {n for n, g in got.items() if g is None} == {n for n, g in want.items() if g is None}
    # Keys' biases cancel in softmax without key norms: both sides hold rounding.
    names = [n for n, g in want.items() if g is not None and not n.endswith("k.bias")]
    worst = {n: _worst(got[n], want[n]) for n in names if not n.endswith("k_proj.bias")}
    assert max(worst.values()) < close, max(worst.items(), key=lambda item: item[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_stock(name: str, dtype: torch.dtype) -> None:
    model, inputs = _model(name, dtype), _inputs(name, dtype)
    close = CLOSE.get((name, dtype), 2e-5)
    for moving_text in (False, True):
        value, tangent, grads = _dual_pass(model, inputs, moving_text)
        with tk.fuse(model):
            fused_value, fused_tangent, fused_grads = _dual_pass(model, inputs, moving_text)
        assert _worst(fused_value, value) < close
        assert _worst(fused_tangent, tangent) < close
        _compare_gradients(fused_grads, grads, 100 * close)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_through_the_tangent(name: str) -> None:
    """Both sides share PyTorch's layer norms, which are given their right second order here."""
    model, inputs = _model(name, torch.float64), _inputs(name, torch.float64)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = functools.partial(_layer_norm, eps=module.eps)
    _, _, want = _dual_pass(model, inputs, through=True)
    with tk.fuse(model):
        _, _, got = _dual_pass(model, inputs, through=True)
    _compare_gradients(got, want, 1e-4 if name == "SD3.5" else 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_undo_and_state(name: str) -> None:
    model, other = _model(name), _model(name)
    before, names = dict(model.attn_processors), list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    handle = tk.fuse(model)
    assert repr(handle).startswith(f"Fused({type(model).__name__}: {MODELS[name][2]}, ")
    assert list(model.state_dict()) == names
    assert [id(p) for p in model.parameters()] == parameters
    assert not any("JVP" in type(p).__name__ for p in other.attn_processors.values())
    with pytest.raises(ValueError, match="already; undo"):
        tk.fuse(model)
    with pytest.raises(TypeError, match="keeps its own forward"):
        handle.encode_text(torch.zeros(1, 7, 24))
    handle.undo()
    handle.undo()
    after = model.attn_processors
    assert before.keys() == after.keys() and all(after[n] is p for n, p in before.items())
    assert "undone" in repr(handle)


def test_undo_leaves_a_later_processor_alone() -> None:
    model = _model("PixArt")
    handle = tk.fuse(model)
    attn = model.transformer_blocks[1].attn1
    own = attn.processor
    attn.set_processor(AttnProcessor2_0())
    with pytest.raises(ValueError, match="replaced after"):
        handle.undo()
    assert isinstance(model.transformer_blocks[0].attn1.processor, JVPAttnProcessor)
    attn.set_processor(own)
    handle.undo()


def test_refusals_change_nothing() -> None:
    model = _model("PixArt")
    model.transformer_blocks[1].attn2.set_processor(AttnProcessor())
    before = model.attn_processors
    with pytest.raises(ValueError, match=r"1\.attn2 has a AttnProcessor, which does not call F"):
        tk.fuse(model)
    assert all(model.attn_processors[n] is p for n, p in before.items())
    odd = PixArtTransformer2DModel(**PIXART | {"attention_head_dim": 12, "cross_attention_dim": 24})
    with pytest.raises(ValueError, match="attn1 has head dim 12"):
        tk.fuse(odd)
    for attn in (m for m in model.modules() if isinstance(m, Attention)):
        attn.set_processor(JVPAttnProcessor())
    with pytest.raises(ValueError, match="already"):
        tk.fuse(model)
    joint = _model("SD3").transformer_blocks[0].attn
    x = torch.randn(2, 5, 32)
    with pytest.raises(ValueError, match="ignores attention_mask"):
        JVPJointAttnProcessor()(joint, x, x, attention_mask=torch.zeros(2, 1, 10))


ATTENTIONS = {
    "self": {},
    "no bias, cross": {"cross_attention_dim": 24, "bias": False},
    "residual, rescale, group norm": {
        "residual_connection": True, "rescale_output_factor": 2.0, "norm_num_groups": 4,
    },
    "spatial norm": {"spatial_norm_dim": 6, "residual_connection": True},
    "layer norm of the text": {"cross_attention_dim": 24, "cross_attention_norm": "layer_norm"},
    "group norm of the text": {
        "cross_attention_dim": 24, "cross_attention_norm": "group_norm",
        "cross_attention_norm_num_groups": 3,
    },
    "rms_norm": {"qk_norm": "rms_norm"},
    "rms_norm without weight": {"qk_norm": "rms_norm", "elementwise_affine": False},
    "layer_norm": {"qk_norm": "layer_norm"},
    "l2": {"qk_norm": "l2"},
    "unscaled": {"scale_qk": False},
}  # fmt: skip
ACROSS_HEADS = {
    "rms_norm_across_heads": {"qk_norm": "rms_norm_across_heads"},
    "layer_norm_across_heads": {"qk_norm": "layer_norm_across_heads"},
    "l2 across heads": {"qk_norm": "l2"},
}


@pytest.mark.parametrize("variant", [*ATTENTIONS, *ACROSS_HEADS])
def test_every_kind_of_attention(variant: str) -> None:
    """One Attention module with every option that diffusers' processors know."""
    across = variant in ACROSS_HEADS
    options = ACROSS_HEADS[variant] if across else ATTENTIONS[variant]
    torch.manual_seed(0)
    attn = Attention(query_dim=32, heads=4, kv_heads=4, dim_head=8, **options)
    attn = _randomized(attn).double()
    cross = "cross_attention_dim" in options
    image = "norm_num_groups" in options or "spatial_norm_dim" in options
    x = torch.randn(2, 32, 3, 4) if image else torch.randn(2, 12, 32)
    text = torch.randn(2, 5, 24) if cross else x[:, :5]
    arguments: dict = {"temb": torch.randn(2, 6, 3, 4).double()} if image else {}
    stock = SanaAttnProcessor2_0() if across else AttnProcessor2_0()
    results = []
    for processor in (stock, JVPAttnProcessor(across_heads=across)):
        attn.set_processor(processor)

        def function(x: Tensor, text: Tensor) -> Tensor:
            return attn(x, text if cross else None, **arguments)

        with sdpa_kernel(SDPBackend.MATH):
            primals = (x.double(), text.double())
            pair = torch.func.jvp(function, primals, tuple(p.cos() for p in primals))
        grads = torch.autograd.grad(pair[0].sin().sum(), list(attn.parameters()), allow_unused=True)
        results.append((*pair, *(g for g in grads if g is not None)))
    for got, want in zip(results[1], results[0], strict=True):
        assert (got - want).abs().max() < 1e-6 * (1 + want.abs().max())


def _randomized(attn: Attention) -> Attention:
    for parameter in attn.parameters():
        nn.init.normal_(parameter, 0.3, 0.3)
    return attn


@pytest.mark.parametrize("shape", [(2, 5), (2, 1, 5), (2, 12, 5), (8, 1, 5), (8, 12, 5)])
@pytest.mark.parametrize("boolean", [False, True])
def test_masks(shape: tuple[int, ...], boolean: bool) -> None:
    """As they come and as `prepare_attention_mask` repeats them; also a row that hides all."""
    torch.manual_seed(0)
    attn = _randomized(Attention(query_dim=32, heads=4, dim_head=8, cross_attention_dim=24))
    x, text = torch.randn(2, 12, 32), torch.randn(2, 5, 24)
    keep = torch.rand(shape) < 0.6
    keep[..., 0] = True
    mask = keep if boolean else (~keep * -10000.0).index_fill_(0, torch.tensor([1]), -10000.0)
    results = []
    for processor in (AttnProcessor2_0(), JVPAttnProcessor()):
        attn.set_processor(processor)
        with sdpa_kernel(SDPBackend.MATH):
            results.append(torch.func.jvp(functools.partial(_masked, attn, text, mask), (x,), (x,)))
    for got, want in zip(results[1], results[0], strict=True):
        # Where all is hidden, −10000 + x rounds x to 10⁻³: both sides do, each in its own order.
        assert _worst(got, want) < 2e-3
    with pytest.raises(ValueError, match="broadcast"):
        attn(x, text, attention_mask=torch.zeros(2, 1, 4))


def _masked(attn: Attention, text: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    return attn(x, text, attention_mask=mask)


def test_a_backward_hook_of_a_norm_is_called() -> None:
    attn = Attention(query_dim=32, heads=4, dim_head=8, qk_norm="rms_norm").eval()
    attn.set_processor(JVPAttnProcessor())
    calls = []
    attn.norm_q.register_full_backward_hook(lambda *_: calls.append(1))
    attn(torch.randn(2, 6, 32)).sum().backward()
    assert calls == [1]


def test_a_model_without_attn_processors_is_fused() -> None:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8,
        num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    x, t, label = torch.randn(2, 4, 8, 8), torch.tensor([3, 5]), torch.tensor([1, 2])
    want = model(x, t, label).sample
    with tk.fuse(model):
        assert _worst(model(x, t, label).sample, want) < 1e-5


@pytest.mark.parametrize("change", ["hook", "forward"])
def test_norms_with_more_than_weights_are_called(change: str) -> None:
    """A hook or a replaced forward of a norm is not passed by."""
    torch.manual_seed(0)
    attn = Attention(query_dim=32, heads=4, dim_head=8, qk_norm="rms_norm").eval()
    own, heads = attn.norm_k.forward, torch.tensor([3.0, 1.0, 0.0, 1.0])[:, None, None]
    if change == "hook":
        attn.norm_q.register_forward_hook(lambda module, args, y: y * heads)
    else:
        attn.norm_k.forward = lambda x: 2 * own(x)
    x = torch.randn(2, 6, 32)
    want = attn(x)
    attn.set_processor(JVPAttnProcessor())
    assert _worst(attn(x), want) < 1e-5


def test_unet_and_refused_autoencoder() -> None:
    """The convolutional models of diffusers hold the same attention."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(16, 32), cross_attention_dim=24, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    inputs = _inputs("PixArt") | {"encoder_attention_mask": torch.ones(2, 7)}
    inputs["sample"] = inputs.pop("hidden_states")
    function = _function(unet, inputs, ("sample",))
    x = inputs["sample"]
    with sdpa_kernel(SDPBackend.MATH):
        want = torch.func.jvp(function, (x,), (x.cos(),))
    with tk.fuse(unet):
        got = torch.func.jvp(function, (x,), (x.cos(),))
    assert max(map(_worst, got, want)) < 2e-5
    vae = AutoencoderKL(block_out_channels=(264,), norm_num_groups=4)
    with pytest.raises(ValueError, match="head dim 264"):
        tk.fuse(vae)


@pytest.mark.parametrize("name", ["PixArt", "SD3.5"])
def test_compiles_in_one_graph(name: str) -> None:
    model, inputs = _model(name, num_layers=1), _inputs(name)
    function = _function(model, inputs, ("hidden_states",))
    x = inputs["hidden_states"]

    def dual(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(function, (x,), (torch.ones_like(x),))

    with tk.fuse(model):
        want = dual(x)
        got = torch.compile(dual, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()
    assert max(map(_worst, got, want)) < 1e-5


def test_without_tangents_and_under_autocast() -> None:
    model, inputs = _model("SD3.5"), _inputs("SD3.5")
    with torch.no_grad():
        want = model(**inputs).sample
        with tk.fuse(model):
            assert _worst(model(**inputs).sample, want) < 1e-5
            with torch.autocast(want.device.type, torch.bfloat16):
                assert _worst(model(**inputs).sample.float(), want) < 0.05


def test_semi_gradient_saves_no_matrix_of_probabilities() -> None:
    """Nothing saved has N · S elements per head, for image and text longer than the width."""
    torch.manual_seed(0)
    attn = Attention(query_dim=16, heads=2, dim_head=8, processor=JVPAttnProcessor())
    x = torch.randn(1, 200, 16)
    sizes = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.untyped_storage().nbytes())
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks, tk.stop_tangent_gradient():
        _, tangent = torch.func.jvp(attn, (x,), (x.cos(),))
    assert 0 < max(sizes) < 200 * 200 * 4
    assert tangent.requires_grad  # to_out is the model's own layer


def test_what_a_processor_would_pass_by_is_refused() -> None:
    """Rotary embeddings and added keys, which diffusers hands over or leaves with the module."""
    x = torch.randn(2, 6, 32)
    attn = Attention(query_dim=32, heads=4, dim_head=8, processor=JVPAttnProcessor())
    for name in ("image_rotary_emb", "rotary_emb"):
        with pytest.raises(ValueError, match="no rotary embedding"):
            attn(x, **{name: (x, x)})
    attn = Attention(query_dim=32, heads=4, dim_head=8, added_kv_proj_dim=32)
    attn.set_processor(JVPAttnProcessor())
    with pytest.raises(ValueError, match="add_k_proj"):
        attn(x)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("text", [False, True])
def test_dropout_is_of_the_result(joint: bool, text: bool) -> None:
    torch.manual_seed(0)
    added = {"added_kv_proj_dim": 32, "context_pre_only": False} if joint else {}
    attn = Attention(query_dim=32, heads=4, dim_head=8, dropout=0.5, **added)
    x = torch.randn(2, 6, 32)
    found = []
    for processor in (
        (JointAttnProcessor2_0(), JVPJointAttnProcessor())
        if joint else (AttnProcessor2_0(), JVPAttnProcessor())
    ):  # fmt: skip
        attn.set_processor(processor)
        torch.manual_seed(1)
        y = attn(x, x.cos() if text else None)
        found.append(y[0] if joint and text else y)
    assert (found[1] == 0).any()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", ["processor", "in scope"])
def test_skipped_attention_scores_are_refused(kind: str) -> None:
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    attn = Attention(query_dim=32, heads=4, dim_head=8)
    if kind == "processor":
        attn.set_processor(JVPAttnProcessor())
    else:
        attn.forward = functools.partial(sdpa.forward, Attention.forward, attn)

    def skipped(x: Tensor) -> Tensor:
        with AttentionScoreSkipFunctionMode():
            return attn(x)

    x = torch.randn(2, 6, 32)
    with pytest.raises(ValueError, match="which is not called here"):
        torch.func.jvp(skipped, (x,), (x,))


def test_norms_of_image_and_text_keep_their_eps() -> None:
    torch.manual_seed(0)
    attn = Attention(
        query_dim=32, heads=4, dim_head=8, qk_norm="rms_norm", eps=0.1, added_kv_proj_dim=32,
        context_pre_only=False,
    )  # fmt: skip
    x, text = torch.randn(2, 6, 32), torch.randn(2, 5, 32)
    found = []
    for processor in (JointAttnProcessor2_0(), JVPJointAttnProcessor()):
        attn.set_processor(processor)
        found.append(attn(x, text))
    torch.testing.assert_close(*found)


def test_a_norm_of_the_default_eps() -> None:
    torch.manual_seed(0)
    attn = Attention(query_dim=32, heads=4, dim_head=8, qk_norm="rms_norm")
    attn.norm_q = nn.RMSNorm(8)
    x = torch.randn(2, 6, 32)
    want = attn(x)
    attn.set_processor(JVPAttnProcessor())
    assert _worst(attn(x), want) < 1e-5


def test_a_mask_of_four_dimensions() -> None:
    torch.manual_seed(0)
    attn = _randomized(Attention(query_dim=32, heads=4, dim_head=8))
    x, keep = torch.randn(2, 6, 32), torch.rand(2, 1, 6, 6) < 0.6
    keep[..., 0] = True
    want = attn(x, attention_mask=keep)
    attn.set_processor(JVPAttnProcessor())
    assert _worst(attn(x, attention_mask=keep), want) < 1e-5


def test_the_norm_of_the_text_is_not_for_the_image_itself() -> None:
    torch.manual_seed(0)
    attn = _randomized(
        Attention(query_dim=32, heads=4, dim_head=8, cross_attention_norm="layer_norm")
    )
    x = torch.randn(2, 6, 32)
    want = attn(x)
    attn.set_processor(JVPAttnProcessor())
    assert _worst(attn(x), want) < 1e-5


@pytest.mark.parametrize(("width", "says"), [(256, None), (264, "has head dim 264; it must be")])
def test_the_widest_head_dim(width: int, says: str | None) -> None:
    layers = nn.Sequential(Attention(query_dim=32, heads=1, dim_head=width))
    if says:
        with pytest.raises(ValueError, match=says):
            tk.fuse(layers)
        return
    x, want = torch.randn(2, 6, 32), layers[0].get_processor()
    with tk.fuse(layers):
        assert isinstance(layers[0].get_processor(), JVPAttnProcessor)
        _, tangent = torch.func.jvp(layers, (x,), (x,))
    assert tangent.abs().max() > 0 and layers[0].get_processor() is want
