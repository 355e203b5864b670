"""The fused SANA forward against stock diffusers: value, tangent, every parameter's gradient."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import types
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from diffusers import SanaTransformer2DModel
from saved import saved, size
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

import tbcm_kernels as tk

TINY = {
    "in_channels": 3, "out_channels": 3, "num_attention_heads": 2, "attention_head_dim": 16,
    "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
    "cross_attention_dim": 32, "caption_channels": 24, "mlp_ratio": 2.5, "sample_size": 8,
    "patch_size": 2, "qk_norm": "rms_norm_across_heads",
}  # fmt: skip
SIX_HUNDRED_MILLION = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 36, "attention_head_dim": 32,
    "num_layers": 2, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152, "caption_channels": 24, "sample_size": 4, "patch_size": 1,
    "qk_norm": "rms_norm_across_heads",
}  # fmt: skip
VARIANTS = {
    "teacher": (TINY, False),
    "student": (TINY | {"guidance_embeds": True}, False),
    "patch 1, no qk norm": (TINY | {"patch_size": 1, "qk_norm": None}, False),
    "position embedding": (TINY | {"interpolation_scale": 1}, False),
    "moving text": (TINY, True),
    "SANA 0.6B widths": (SIX_HUNDRED_MILLION | {"guidance_embeds": True}, False),
}


def _model(config: dict, dtype: torch.dtype = torch.float32) -> SanaTransformer2DModel:
    torch.manual_seed(0)
    return SanaTransformer2DModel(**config).to(dtype)


def _inputs(model: SanaTransformer2DModel, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(1)
    side, channels = model.config.sample_size, model.config.in_channels
    return {
        "hidden_states": torch.randn(2, channels, side, side + 2).to(dtype),
        "timestep": torch.tensor([0.3, 0.9], dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 7, model.config.caption_channels).to(dtype),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3], dtype=dtype),
    }


def _dual_pass(model: SanaTransformer2DModel, inputs: dict[str, Tensor], moving_text: bool = False):
    """Value, tangent, and the gradients of a random projection of the value."""
    names = ["hidden_states", "timestep"] + ["encoder_hidden_states"] * moving_text
    guidance = {"guidance": torch.tensor([0.45, 0.4]).to(inputs["timestep"].dtype)}
    extra = guidance if model.config.guidance_embeds else {}

    def function(*values: Tensor) -> Tensor:
        arguments = inputs | dict(zip(names, values, strict=True)) | extra
        return model(**arguments, return_dict=False)[0]

    torch.manual_seed(2)
    primals = tuple(inputs[n] for n in names)
    tangents = tuple(torch.randn(p.shape).to(p.dtype) for p in primals)
    with sdpa_kernel(SDPBackend.MATH):
        value, tangent = torch.func.jvp(function, primals, tangents)
        model.zero_grad()
        value.backward(torch.randn(value.shape).to(value.dtype))
    return value.detach(), tangent.detach(), {n: p.grad for n, p in model.named_parameters()}


def _worst(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_stock(variant: str) -> None:
    config, moving_text = VARIANTS[variant]
    model = _model(config)
    inputs = _inputs(model)
    value, tangent, grads = _dual_pass(model, inputs, moving_text)
    with tk.fuse(model), tk.stop_tangent_gradient():
        fused_value, fused_tangent, fused_grads = _dual_pass(model, inputs, moving_text)
    assert _worst(fused_value, value) < 1e-5
    assert _worst(fused_tangent, tangent) < 2e-5
    assert set(fused_grads) == set(grads)
    worst = {n: _worst(fused_grads[n], g) for n, g in grads.items()}
    # Keys' biases cancel in softmax: their true gradient is zero and both sides hold rounding.
    worst = {n: w for n, w in worst.items() if not n.endswith("attn2.to_k.bias")}
    assert max(worst.values()) < 2e-3, max(worst.items(), key=lambda item: item[1])


@pytest.mark.parametrize("side", [4, 16], ids=["short", "long"])
def test_biases_that_a_block_was_not_made_with_count(side: int) -> None:
    model = _model(TINY | {"patch_size": 1, "sample_size": side})
    block = model.transformer_blocks[0]
    block.ff.conv_point = torch.nn.Conv2d(80, 32, 1)
    block.attn1.to_v = torch.nn.Linear(32, 32)
    inputs = _inputs(model)
    value, tangent, grads = _dual_pass(model, inputs)
    with tk.fuse(model), tk.stop_tangent_gradient():
        fused_value, fused_tangent, fused_grads = _dual_pass(model, inputs)
    assert _worst(fused_value, value) < 1e-5
    assert _worst(fused_tangent, tangent) < 2e-5
    for name in ("ff.conv_point", "attn1.to_v", "attn1.to_q"):
        name = f"transformer_blocks.0.{name}.{'weight' if 'to_q' in name else 'bias'}"
        assert _worst(fused_grads[name], grads[name]) < 2e-3, name


def test_a_prompt_of_no_tokens_is_as_in_stock() -> None:
    model = _model(TINY | {"num_layers": 1})
    inputs = _inputs(model) | {"encoder_hidden_states": torch.empty(2, 0, 24)}
    inputs["encoder_attention_mask"] = None
    value, tangent, _ = _dual_pass(model, inputs)
    with tk.fuse(model), tk.stop_tangent_gradient():
        fused_value, fused_tangent, _ = _dual_pass(model, inputs)
    assert _worst(fused_value, value) < 1e-5 and _worst(fused_tangent, tangent) < 2e-5


def test_gradients_of_several_cotangents_at_once() -> None:
    model = _model(TINY | {"patch_size": 1, "sample_size": 16, "num_layers": 1})
    with tk.fuse(model):
        y = model(**_inputs(model), return_dict=False)[0]
        leaves, cotangents = list(model.parameters()), torch.randn(2, *y.shape)
        each = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in cotangents]
        both = torch.autograd.grad(y, leaves, cotangents, is_grads_batched=True)
    for got, want in zip(both, map(torch.stack, zip(*each, strict=True)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_agrees_in_double_precision_and_through_the_tangent() -> None:
    """In fp64 nothing hides: stock attention in fp32 is the one difference, so replace its cast."""
    model = _model(TINY | {"num_layers": 1}, torch.float32)
    inputs = _inputs(model)

    def loss(value: Tensor, tangent: Tensor) -> Tensor:
        return value.square().sum() + tangent.square().sum()

    def gradients() -> list[Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            pair = torch.func.jvp(
                lambda x: model(**(inputs | {"hidden_states": x}), return_dict=False)[0],
                (inputs["hidden_states"],),
                (torch.ones_like(inputs["hidden_states"]),),
            )
        return torch.autograd.grad(loss(*pair), list(model.parameters()), allow_unused=True)

    with tk.fuse(model):
        fused = gradients()
    # F.layer_norm is wrong through its tangent (pytorch#196700): give stock the right one.
    for module in list(model.modules()):
        if isinstance(module, torch.nn.LayerNorm):
            module.forward = functools.partial(_layer_norm, eps=module.eps)
    for name, got, want in zip(dict(model.named_parameters()), fused, gradients(), strict=True):
        if not name.endswith("attn2.to_k.bias"):
            assert _worst(got, want) < 2e-3, name


def _layer_norm(x: Tensor, eps: float) -> Tensor:
    center = x - x.mean(-1, keepdim=True)
    return center * torch.rsqrt(center.square().mean(-1, keepdim=True) + eps)


def test_bfloat16_is_no_further_from_fp32_than_stock() -> None:
    model = _model(TINY | {"guidance_embeds": True})
    inputs = _inputs(model)
    with tk.fuse(model):
        truth = _dual_pass(model, inputs)[:2]
    low = copy.deepcopy(model).bfloat16()
    rounded = {n: v.bfloat16() for n, v in inputs.items()}
    with torch.no_grad():
        stock = low(**rounded, guidance=torch.tensor([0.45, 0.4]).bfloat16(), return_dict=False)[0]
    with tk.fuse(low):
        value, tangent, _ = _dual_pass(low, rounded)
    assert value.dtype == tangent.dtype == torch.bfloat16
    stock_error = (stock.float() - truth[0]).square().mean().sqrt()
    assert (value.float() - truth[0]).square().mean().sqrt() < 1.25 * stock_error
    assert _worst(tangent.float(), truth[1]) < 0.1


def test_without_tangents_under_no_grad() -> None:
    model = _model(TINY)
    inputs = _inputs(model)
    with torch.no_grad():
        want = model(**inputs).sample
        with tk.fuse(model):
            got = model(**inputs).sample
    assert _worst(got, want) < 1e-5


def test_explicit_dual_and_autocast() -> None:
    model = _model(TINY)
    inputs = _inputs(model)
    device = inputs["timestep"].device.type
    with tk.fuse(model), fwAD.dual_level(), torch.autocast(device, torch.bfloat16):
        x = fwAD.make_dual(inputs["hidden_states"], torch.ones_like(inputs["hidden_states"]))
        value, tangent = fwAD.unpack_dual(model(**(inputs | {"hidden_states": x})).sample)
    assert tangent is not None and tangent.isfinite().all() and value.isfinite().all()


def test_prompts_shared_by_several_images() -> None:
    model = _model(TINY)
    inputs = _inputs(model)
    many = {n: inputs[n].repeat_interleave(3, 0) for n in ("hidden_states", "timestep")}
    text = {n: inputs[n] for n in ("encoder_hidden_states", "encoder_attention_mask")}
    with torch.no_grad():
        want = model(**many, **{n: v.repeat_interleave(3, 0) for n, v in text.items()}).sample
        handle = tk.fuse(model)
        assert _worst(model(**many, **text).sample, want) < 1e-5
        ready = text | {
            "encoder_hidden_states": handle.encode_text(inputs["encoder_hidden_states"])
        }
        assert _worst(model(**many, **ready).sample, want) < 1e-5
    with pytest.raises(ValueError, match="no multiple of 2 prompts"):
        model(**{n: v[:5] for n, v in many.items()}, **text)
    with pytest.raises(ValueError, match="1 rows for 2 prompts"):
        model(**many, **(text | {"encoder_attention_mask": torch.ones(1, 7)}))
    with pytest.raises(ValueError, match="no multiple of 0 prompts"):
        model(**many, **{n: v[:0] for n, v in text.items()})


MASKS = {
    "whole": torch.ones(2, 7),
    "integers": torch.tensor([[1] * 7, [1] + [0] * 6]),
    "booleans": torch.tensor([[True] * 3 + [False] * 4, [False] * 5 + [True] * 2]),
    "a bias": torch.linspace(-3, 2, 14).view(2, 1, 7),
    "a prompt all hidden": torch.tensor([[1.0] * 7, [0.0] * 7]),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
def test_masks_mean_what_they_do_in_the_stock_model(kind: str, qk_norm: str | None) -> None:
    model = _model(TINY | {"qk_norm": qk_norm})
    for name, weight in model.named_parameters():
        if name.endswith("norm_q.weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    inputs = _inputs(model) | {"encoder_attention_mask": MASKS[kind].to(model.device)}
    value, tangent, grads = _dual_pass(model, inputs)
    with tk.fuse(model):
        fused_value, fused_tangent, fused_grads = _dual_pass(model, inputs)
    # −10000 + x rounds x to 10⁻³, in both and each in its own order.
    close = 1e-3 if kind == "a prompt all hidden" else 2e-5
    assert _worst(fused_value, value) < close
    assert _worst(fused_tangent, tangent) < close
    names = [n for n in grads if n.endswith("attn2.norm_q.weight") or n.endswith("to_q.weight")]
    assert max(_worst(fused_grads[n], grads[n]) for n in names) < 100 * close


def test_a_prompt_that_booleans_hide_whole_is_seen_whole() -> None:
    """As in the stock model, where −10000 for every key changes nothing but the rounding."""
    model = _model(TINY)
    inputs, hidden = _inputs(model), torch.tensor([[True] * 7, [False] * 7]).to(model.device)
    with tk.fuse(model):
        want = _dual_pass(model, inputs | {"encoder_attention_mask": torch.ones_like(hidden)})
        got = _dual_pass(model, inputs | {"encoder_attention_mask": hidden})
    assert all(torch.equal(a, b) for a, b in zip(got[:2], want[:2], strict=True))


def test_names_instance_and_undo() -> None:
    model, other = _model(TINY), _model(TINY)
    names = list(model.state_dict())
    handle = tk.fuse(model)
    assert repr(handle) == "Fused(SanaTransformer2DModel: 1 forward)"
    assert list(model.state_dict()) == names
    assert model.forward.__func__ is not type(model).forward
    assert other.forward.__func__ is type(other).forward
    with pytest.raises(ValueError, match="undo"):
        tk.fuse(model)
    handle.undo()
    handle.undo()
    assert model.forward.__func__ is type(model).forward


def test_an_undo_that_was_interrupted_goes_on() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    handle = tk.fuse(model)
    for layer in list(model)[:2]:
        del layer.forward
    handle.undo()
    assert handle.undone and not any("forward" in layer.__dict__ for layer in model)


def test_a_fuse_that_is_interrupted_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    own = type(model[1]).__setattr__

    def interrupted(layer: nn.Module, name: str, value: object) -> None:
        if layer is model[1] and name == "forward":
            raise KeyboardInterrupt
        own(layer, name, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nn.Linear, "__setattr__", interrupted)
        tk.fuse(model)
    assert not any("forward" in layer.__dict__ for layer in model)
    tk.fuse(model).undo()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_handle_is_copied_with_its_model(copied: Callable) -> None:
    """As whatever holds it is, for a moving average or a file."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    x, handle = torch.randn(2, 8), tk.fuse(model)
    other = copied(handle)
    assert torch.equal(other.model(x), model(x)) and repr(other) == repr(handle)
    other.undo()
    assert not any("forward" in layer.__dict__ for layer in other.model)
    assert all("forward" in layer.__dict__ for layer in model)


def test_undo_leaves_a_later_wrapper_alone() -> None:
    model = _model(TINY)
    handle = tk.fuse(model)
    own = model.forward
    model.forward = lambda *a, **k: own(*a, **k)
    with pytest.raises(ValueError, match="replaced after"):
        handle.undo()
    model.forward = types.MethodType(own.__func__, model)  # bound anew, as accelerate does
    handle.undo()
    tk.fuse(model)
    again = model.forward
    handle.undo()
    assert model.forward is again


@pytest.mark.parametrize("name", ["scale_shift_table", "patch_embed.proj.weight",
    "transformer_blocks.0.attn1.to_q.weight", "transformer_blocks.0.attn2.norm_q.weight",
    "transformer_blocks.0.ff.conv_depth.weight", "transformer_blocks.0.scale_shift_table",
    "transformer_blocks.1.attn1.to_out.0.bias", "transformer_blocks.1.ff.conv_inverted.bias",
    "transformer_blocks.0.ff.conv_point.weight", "proj_out.weight"])  # fmt: skip
@pytest.mark.parametrize("side", [8, 32])
def test_tangents_of_parameters_raise(name: str, side: int) -> None:
    """Also where 256 tokens or more are computed again in backward."""
    model = _model(TINY | {"sample_size": side})
    inputs = _inputs(model)
    weight = dict(model.named_parameters())[name]

    def function(weight: Tensor) -> Tensor:
        changed = torch.func.functional_call(model, {name: weight}, (), inputs)
        return changed.sample

    with tk.fuse(model), pytest.raises(RuntimeError, match="not of parameters"):
        torch.func.jvp(function, (weight,), (torch.ones_like(weight),))


def test_fused_save_and_load(tmp_path) -> None:
    model = _model(TINY)
    with tk.fuse(model):
        model.save_pretrained(tmp_path)
    again = SanaTransformer2DModel.from_pretrained(tmp_path).to(model.device)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"norm_elementwise_affine": True}, "affine"),
        ({"qk_norm": "layer_norm_across_heads"}, "qk_norm='layer_norm_across_heads'"),
        (
            {"cross_attention_head_dim": 12, "num_cross_attention_heads": 1},
            "cross_attention_head_dim=12",
        ),
    ],
)
def test_refuses_what_it_does_not_cover(change: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tk.fuse(_model(TINY | change))


def test_refuses_layers_that_do_more_than_their_weights_say() -> None:
    class Adapter(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = _model(TINY)
    model.transformer_blocks[0].attn1.to_q = Adapter(32, 32, bias=False)
    with pytest.raises(ValueError, match=r"0\.attn1\.to_q is a \S*\.Adapter"):
        tk.fuse(model)
    for hook in ("forward_hook", "forward_pre_hook", "full_backward_hook"):
        model = _model(TINY)
        getattr(model.transformer_blocks[1], f"register_{hook}")(lambda *_: None)
        with pytest.raises(ValueError, match=r"transformer_blocks\.1 has hooks"):
            tk.fuse(model)


class Doubled(SanaTransformer2DModel):
    """A subclass that wraps the forward."""

    def forward(self, *args, **options):
        return 2 * super().forward(*args, **options)


class Half(nn.Module):
    """A parametrization of a weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Zero:
    """An attention processor of one's own."""

    def __call__(self, attn, hidden_states, *args, **options):
        return 0 * hidden_states


CHANGES = {
    r"attn1 has a Zero": lambda block: block.attn1.set_processor(Zero()),
    r"attn2 has a SanaLinearAttnProcessor2_0": lambda block: block.attn2.set_processor(
        block.attn1.processor
    ),
    r"attn1 has rescale_output_factor=2\.0": lambda block: setattr(
        block.attn1, "rescale_output_factor", 2.0
    ),
    r"attn2 has residual_connection=True": lambda block: setattr(
        block.attn2, "residual_connection", True
    ),
    r"attn2\.to_out\.1 has p=0\.5": lambda block: setattr(block.attn2.to_out[1], "p", 0.5),
    r"attn1\.to_out\.1 is a .*Tanh": lambda block: block.attn1.to_out.__setitem__(1, nn.Tanh()),
    r"attn1\.norm_q is a .*LayerNorm": lambda block: setattr(
        block.attn1, "norm_q", nn.LayerNorm(32)
    ),
    r"attn2\.to_k is a .*Sequential": lambda block: setattr(block.attn2, "to_k", nn.Sequential()),
    r"norm1 has elementwise_affine=True": lambda block: setattr(block, "norm1", nn.LayerNorm(32)),
    r"norm2 is a .*RMSNorm": lambda block: setattr(block, "norm2", nn.RMSNorm(32)),
    r"ff has residual_connection=True": lambda block: setattr(
        block.ff, "residual_connection", True
    ),
    r"ff\.nonlinearity is a .*ReLU": lambda block: setattr(block.ff, "nonlinearity", nn.ReLU()),
    r"ff\.conv_depth has dilation=\(2, 2\)": lambda block: setattr(
        block.ff.conv_depth, "dilation", (2, 2)
    ),
    r"ff\.conv_depth has padding_mode='reflect'": lambda block: setattr(
        block.ff.conv_depth, "padding_mode", "reflect"
    ),
    r"attn1 has .*, more in it": lambda block: block.attn1.add_module("more", nn.Linear(2, 2)),
}


@pytest.mark.parametrize("named", CHANGES)
def test_refuses_blocks_that_are_not_as_diffusers_makes_them(named: str) -> None:
    model = _model(TINY)
    inputs, handle = _inputs(model), tk.fuse(model)
    CHANGES[named](model.transformer_blocks[1])
    with pytest.raises(ValueError, match=rf"transformer_blocks\.1\.{named}"):
        model(**inputs)
    handle.undo()
    with pytest.raises(ValueError, match=rf"transformer_blocks\.1\.{named}"):
        tk.fuse(model)


def test_refuses_another_end_and_takes_what_it_reads() -> None:
    model = _model(TINY)
    model.transformer_blocks[0].norm1.eps = 1e-3
    parametrize.register_parametrization(model.transformer_blocks[0].attn1.to_q, "weight", Half())
    inputs = _inputs(model)
    want = model(**inputs).sample
    with tk.fuse(model):
        torch.testing.assert_close(model(**inputs).sample, want, rtol=1e-4, atol=1e-5)
        model.norm_out.norm = nn.LayerNorm(32)
        with pytest.raises(ValueError, match=r"norm_out\.norm has elementwise_affine=True"):
            model(**inputs)


def test_refuses_a_forward_of_a_subclass_and_a_wrapper() -> None:
    with pytest.raises(ValueError, match="Doubled has a forward of its own"):
        tk.fuse(Doubled(**TINY))
    for wrapper in (torch.nn.DataParallel(_model(TINY)), torch.compile(_model(TINY))):
        with pytest.raises(TypeError, match=r"fuse its (module|_orig_mod)"):
            tk.fuse(wrapper)
    class_alone = type("Named", (SanaTransformer2DModel,), {})
    assert "1 forward" in repr(tk.fuse(class_alone(**TINY)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_fused_model_are_fused_anew(copied: Callable) -> None:
    model = _model(TINY)
    inputs, handle = _inputs(model), tk.fuse(model)
    want, other = model(**inputs).sample, copied(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(other(**inputs).sample, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="fused already"):
        tk.fuse(model)
    handle.undo()
    with tk.fuse(other):
        assert other.forward.__func__ is not type(other).forward
        assert torch.equal(other(**inputs).sample, want)
        with pytest.raises(ValueError, match="fused already"):
            tk.fuse(other)
    assert other.forward.__func__ is type(other).forward


def test_refuses_a_layer_that_changes_after_fuse() -> None:
    model = _model(TINY)
    inputs = _inputs(model)
    with tk.fuse(model):
        hook = model.transformer_blocks[0].attn1.to_q.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=r"0\.attn1\.to_q has hooks"):
            model(**inputs)
        hook.remove()
        model(**inputs)
        attn = model.transformer_blocks[1].attn1
        attn.set_processor(Zero())
        with pytest.raises(ValueError, match=r"1\.attn1 has a Zero"):
            model(**inputs)


def test_what_makes_no_whole_patch_is_left_out_or_refused() -> None:
    model = _model(TINY)
    inputs = _inputs(model)
    odd, small = (torch.randn(2, TINY["in_channels"], *size) for size in ((5, 7), (1, 5)))
    with torch.no_grad():
        want = model(**(inputs | {"hidden_states": odd})).sample
        with tk.fuse(model):
            assert _worst(model(**(inputs | {"hidden_states": odd})).sample, want) < 1e-5
            with pytest.raises(ValueError, match="hold no patch of 2 by 2"):
                model(**(inputs | {"hidden_states": small}))


def test_refuses_unknown_models_and_arguments() -> None:
    with pytest.raises(TypeError, match="GELU has nothing to fuse"):
        tk.fuse(torch.nn.GELU())
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got NoneType"):
        tk.fuse(None)
    model = _model(TINY)
    with tk.fuse(model), pytest.raises(ValueError, match="controlnet"):
        model(**_inputs(model), controlnet_block_samples=(torch.zeros(1),))


def test_compiles_in_one_graph() -> None:
    model = _model(TINY | {"num_layers": 1})
    inputs = _inputs(model)

    def dual(x: Tensor) -> tuple[Tensor, Tensor]:
        def function(x: Tensor) -> Tensor:
            return model(**(inputs | {"hidden_states": x}), return_dict=False)[0]

        return torch.func.jvp(function, (x,), (torch.ones_like(x),))

    with tk.fuse(model):
        want = dual(inputs["hidden_states"])
        got = torch.compile(dual, backend="aot_eager", fullgraph=True)(inputs["hidden_states"])
    torch._dynamo.reset()
    assert max(map(_worst, got, want)) < 1e-5


@pytest.mark.parametrize("stop", [False, True])
def test_saves_no_matrix_of_probabilities(stop: bool) -> None:
    """With text as long as the widest activation is wide, B · H · N · S would be the largest."""
    model = _model(TINY | {"num_layers": 1})
    inputs = _inputs(model) | {"encoder_hidden_states": torch.randn(2, 300, 24)}
    del inputs["encoder_attention_mask"]
    probabilities = 2 * 2 * 20 * 300
    sizes = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    context = tk.stop_tangent_gradient() if stop else contextlib.nullcontext()
    with tk.fuse(model), context, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        torch.func.jvp(
            lambda x: model(**(inputs | {"hidden_states": x}), return_dict=False)[0],
            (inputs["hidden_states"],),
            (torch.ones_like(inputs["hidden_states"]),),
        )
    assert max(sizes) < probabilities, (max(sizes), probabilities)


def test_semi_gradient_saves_less_than_stock() -> None:
    """Bytes kept for backward, parameters not counted, against the stock grad-enabled forward."""
    model = _model(TINY)
    inputs = _inputs(model)

    x = inputs.pop("hidden_states")
    with saved() as stock:
        model(x, **inputs)
    with tk.fuse(model), tk.stop_tangent_gradient(), saved() as fused:
        torch.func.jvp(
            lambda x: model(x, **inputs, return_dict=False)[0], (x,), (torch.ones_like(x),)
        )
    assert size(fused, model.parameters()) <= size(stock, model.parameters())
