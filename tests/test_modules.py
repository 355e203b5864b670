"""Each drop-in module against the module of torch or diffusers that it replaces."""

from __future__ import annotations

import copy
import doctest
import functools
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from diffusers.models import normalization
from diffusers.models.attention_processor import (
    Attention,
    SanaLinearAttnProcessor2_0,
)
from diffusers.models.transformers import sana_transformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map

import tbcm_kernels as tk
from tbcm_kernels import modules
from tbcm_kernels.testing.compare import faults


@dataclass
class Case:
    """A module, what it replaces, arguments of both constructors, shapes of the inputs."""

    new: type[nn.Module]
    old: type[nn.Module] | Callable[..., nn.Module]
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = ((2, 12, 32),)
    keywords: tuple[str, ...] = ()
    scale: float = 1.0

    def call(self, module: nn.Module, parameters: dict[str, Tensor], *inputs: Tensor) -> object:
        """The module with other parameters; the last inputs go in by their keywords."""
        first = len(inputs) - len(self.keywords)
        keywords = dict(zip(self.keywords, inputs[first:], strict=True))
        return torch.func.functional_call(module, parameters, inputs[:first], keywords)

    def function(self, module: nn.Module) -> Callable[..., object]:
        return functools.partial(self.call, module, {})


SOFTMAX = functools.partial(Attention, processor=sana_transformer.SanaAttnProcessor2_0())
LINEAR = functools.partial(Attention, processor=SanaLinearAttnProcessor2_0())
HEADS = {"heads": 4, "dim_head": 8}
ACROSS = HEADS | {"kv_heads": 4, "qk_norm": "rms_norm_across_heads"}
X, EMB, TEXT = (2, 12, 32), (2, 32), (2, 5, 24)
CASES = {
    "Linear": Case(modules.Linear, nn.Linear, (32, 24)),
    "RMSNorm": Case(modules.RMSNorm, nn.RMSNorm, (32,)),
    "RMSNorm without weight": Case(modules.RMSNorm, nn.RMSNorm, (32, 0.1, False)),
    "RMSNorm of diffusers": Case(modules.RMSNorm, normalization.RMSNorm, (32, 1e-6)),
    "LayerNorm": Case(modules.LayerNorm, nn.LayerNorm, (32,)),
    "LayerNorm, small weights": Case(modules.LayerNorm, nn.LayerNorm, (32,), scale=1e-3),
    "LayerNorm without bias": Case(modules.LayerNorm, nn.LayerNorm, (32,), {"bias": False}),
    "LayerNorm without weights": Case(modules.LayerNorm, nn.LayerNorm, (32, 0.1, False)),
    "AdaLayerNormZero": Case(
        modules.AdaLayerNormZero, normalization.AdaLayerNormZero, (32,), shapes=(X, EMB),
        keywords=("emb",),
    ),
    "AdaLayerNormZeroSingle": Case(
        modules.AdaLayerNormZeroSingle, normalization.AdaLayerNormZeroSingle, (32,),
        {"bias": False}, shapes=(X, EMB),
    ),
    "AdaLayerNormContinuous": Case(
        modules.AdaLayerNormContinuous, normalization.AdaLayerNormContinuous, (32, 24, False),
        shapes=(X, (2, 24)),
    ),
    "AdaLayerNormContinuous, eps": Case(
        modules.AdaLayerNormContinuous, normalization.AdaLayerNormContinuous, (32, 24, False, 0.1),
        shapes=(X, (2, 24)),
    ),
    "SanaModulatedNorm, eps": Case(
        modules.SanaModulatedNorm, sana_transformer.SanaModulatedNorm, (32, False, 0.1),
        shapes=(X, EMB, (2, 32)),
    ),
    "SanaModulatedNorm": Case(
        modules.SanaModulatedNorm, sana_transformer.SanaModulatedNorm, (32,),
        shapes=(X, EMB, (2, 32)),
    ),
    "GLUMBConv": Case(
        modules.GLUMBConv, sana_transformer.GLUMBConv, (16, 16), shapes=((2, 16, 3, 4),)
    ),
    "GLUMBConv without residual": Case(
        modules.GLUMBConv, sana_transformer.GLUMBConv, (16, 24, 2.5),
        {"residual_connection": False}, shapes=((2, 16, 3, 4),),
    ),
    "Attention": Case(modules.Attention, Attention, (32,), HEADS),
    "Attention to text": Case(
        modules.Attention, Attention, (32, 24), HEADS | {"bias": True, "out_bias": False},
        shapes=(X, TEXT),
    ),
    "Attention, rms_norm": Case(
        modules.Attention, Attention, (32,), HEADS | {"qk_norm": "rms_norm", "eps": 1e-6}
    ),
    "Attention, rms_norm_across_heads": Case(
        modules.Attention, SOFTMAX, (32, 24), ACROSS, shapes=(X, TEXT)
    ),
    "LinearAttention": Case(modules.LinearAttention, LINEAR, (32,), HEADS),
    "LinearAttention, rms_norm_across_heads": Case(modules.LinearAttention, LINEAR, (32,), ACROSS),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def _modules(case: Case) -> tuple[nn.Module, nn.Module]:
    """The new module with the weights of the old one, by a strict load."""
    torch.manual_seed(0)
    old, new = (kind(*case.args, **case.kwargs) for kind in (case.old, case.new))
    for parameter in old.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=case.scale)
    new.load_state_dict(old.state_dict(), strict=True)
    return new, old


def _inputs(case: Case) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape) for shape in case.shapes]


def _tangents(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.detach().cos() for x in inputs)


def _dual_pass(case: Case, module: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Values, tangents, and gradients of a projection of the values, by name."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        values, tangents = map(
            tree_leaves, torch.func.jvp(case.function(module), tuple(leaves), _tangents(inputs))
        )
        loss = sum((v * v.detach().sin()).sum() for v in values)
        wanted = dict(module.named_parameters()) | {f"input {i}": x for i, x in enumerate(leaves)}
        grads = torch.autograd.grad(loss, list(wanted.values()))
    found = {f"value {i}": v for i, v in enumerate(values)}
    found |= {f"tangent {i}": t for i, t in enumerate(tangents)}
    return found | {f"gradient of {n}": g for n, g in zip(wanted, grads, strict=True)}


def _truth(case: Case, old: nn.Module, inputs: list[Tensor], off: float = 0.0) -> dict[str, Tensor]:
    """The stock module in fp64, its parameters and inputs off by a relative error."""
    exact = copy.deepcopy(nn.ModuleList([old])).double()
    for parent in list(exact.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, normalization.RMSNorm):  # its mean square is in fp32
                plain = nn.RMSNorm(norm.dim, norm.eps, dtype=torch.float64)
                plain.load_state_dict(norm.state_dict())
                setattr(parent, name, plain)
    torch.manual_seed(2)

    def moved(x: Tensor) -> Tensor:
        return x.detach().double() * (1 + off * torch.randn(x.shape, dtype=torch.float64))

    for parameter in exact.parameters():
        parameter.data = moved(parameter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", lambda x: x)  # stock linear attention runs in fp32
        return _dual_pass(case, exact[0], [moved(x) for x in inputs])


def test_state_dict_is_that_of_the_original(case: Case) -> None:
    new, old = _modules(case)
    states = [module.state_dict() for module in (new, old)]
    assert list(states[0]) == list(states[1])
    assert [v.shape for v in states[0].values()] == [v.shape for v in states[1].values()]
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1)
    old.load_state_dict(new.state_dict(), strict=True)
    for name, value in old.state_dict().items():
        assert torch.equal(value, new.state_dict()[name])


def test_value_tangent_and_gradients(case: Case) -> None:
    """By the error policy, with the stock module in fp32 as the baseline."""
    new, old = _modules(case)
    inputs = _inputs(case)
    got, stock = _dual_pass(case, new, inputs), _dual_pass(case, old, inputs)
    truth, near = (_truth(case, old, inputs, off) for off in (0.0, torch.finfo(torch.float32).eps))
    assert list(got) == list(stock) == list(truth)
    found = []
    for name in got:
        values = [got[name], truth[name], stock[name], near[name] - truth[name]]
        values = [v.detach().to("cpu", torch.float64) for v in values]
        if name.endswith(("weight", "bias")):  # parameters have no rows to judge one by one
            values = [v.flatten() for v in values]
        found += faults(name, *values[:3], torch.float32, values[3])
    assert found == []


def test_without_gradients_and_with_dual_level(case: Case) -> None:
    new, _ = _modules(case)
    inputs, function = _inputs(case), case.function(new)
    want = _dual_pass(case, new, inputs)
    with torch.no_grad(), fwAD.dual_level():
        duals = map(fwAD.make_dual, inputs, _tangents(inputs))
        outputs = [fwAD.unpack_dual(y) for y in tree_leaves(function(*duals))]
    for i, (value, tangent) in enumerate(outputs):
        torch.testing.assert_close(value, want[f"value {i}"])
        torch.testing.assert_close(tangent, want[f"tangent {i}"])


def test_a_tangent_of_a_parameter_is_right_or_raises(case: Case) -> None:
    new, old = _modules(case)

    def along(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        moving = (
            {name: p.detach().to(dtype) for name, p in module.named_parameters()},
            tuple(x.to(dtype) for x in _inputs(case)),
        )

        def function(parameters: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> object:
            return case.call(module, parameters, *inputs)

        with sdpa_kernel(SDPBackend.MATH):
            return tree_leaves(torch.func.jvp(function, moving, tree_map(torch.cos, moving))[1])

    try:
        got = along(new, torch.float32)
    except RuntimeError as refusal:
        assert "_norm carries a tangent" in str(refusal)
        return
    for tangent, want in zip(got, along(old.double(), torch.float64), strict=True):
        torch.testing.assert_close(tangent.double(), want, rtol=1e-4, atol=1e-4)


def test_semi_gradient(case: Case) -> None:
    """Inside `stop_tangent_gradient()` no plain layer brings the tangent's graph back."""
    new, _ = _modules(case)
    inputs = _inputs(case)
    want = _dual_pass(case, new, inputs)
    with tk.stop_tangent_gradient():
        got = _dual_pass(case, new, inputs)
    for name, value in got.items():
        assert (value - want[name]).abs().max() <= 1e-5 * want[name].abs().max(), name
    if new.state_dict():
        assert want["tangent 0"].requires_grad and not got["tangent 0"].requires_grad


LAST_OF_EACH_CLASS = {case.new: name for name, case in CASES.items()}.values()


@pytest.mark.parametrize("name", LAST_OF_EACH_CLASS)
def test_compiles_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    case = CASES[name]
    new, _ = _modules(case)
    inputs = _inputs(case)

    def dual(*inputs: Tensor) -> object:
        return torch.func.jvp(case.function(new), inputs, _tangents(inputs))

    compiled = torch.compile(dual, backend="aot_eager", fullgraph=True)
    parameters = list(new.parameters())
    results = []
    for function in (compiled, dual):
        outputs = tree_leaves(function(*inputs))
        loss = sum(y.square().sum() for y in outputs[: len(outputs) // 2])
        results.append([*outputs, *(torch.autograd.grad(loss, parameters) if parameters else ())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(case: Case, autocast: bool) -> None:
    """Values and tangents are about as near to fp64 as the stock module's, and of one dtype."""
    new, old = _modules(case)
    inputs = _inputs(case)
    if not autocast:
        new, old, inputs = new.bfloat16(), old.bfloat16(), [x.bfloat16() for x in inputs]
    truth = [v for n, v in _truth(case, old, inputs).items() if not n.startswith("gradient")]
    got, stock = (_under_autocast(case, module, inputs, autocast) for module in (new, old))
    assert len(got) == len(stock) == len(truth)
    for value, tangent in zip(got[: len(got) // 2], got[len(got) // 2 :], strict=True):
        assert value.dtype == tangent.dtype
    for actual, baseline, want in zip(got, stock, truth, strict=True):
        errors = [float((v.double() - want).norm() / want.norm()) for v in (actual, baseline)]
        assert errors[0] <= 2 * max(errors[1], torch.finfo(actual.dtype).eps / 4), errors


def _under_autocast(
    case: Case, module: nn.Module, inputs: list[Tensor], autocast: bool
) -> list[Tensor]:
    scope = torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=autocast)
    with scope, sdpa_kernel(SDPBackend.MATH):
        pair = torch.func.jvp(case.function(module), tuple(inputs), _tangents(inputs))
    return tree_leaves(pair)


def test_copies_and_meta_tensors(case: Case) -> None:
    new, _ = _modules(case)
    inputs = _inputs(case)
    want = tree_leaves(case.function(new)(*inputs))
    with torch.device("meta"):
        empty = case.new(*case.args, **case.kwargs)
    empty.load_state_dict(new.state_dict(), assign=True)
    for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new)), empty):
        for got, value in zip(tree_leaves(case.function(other)(*inputs)), want, strict=True):
            assert torch.equal(got, value)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", ["GLUMBConv", "Attention", "AdaLayerNormZero"])
def test_layers_inside_keep_parametrizations_and_hooks(name: str) -> None:
    """They are called as modules, which is what adapters count on."""
    case = CASES[name]
    new, old = _modules(case)
    layers = [n.removesuffix(".weight") for n in new.state_dict() if n.endswith("weight")]
    calls = []
    for layer in map(new.get_submodule, layers):
        layer.register_forward_hook(lambda *_: calls.append(1))
        parametrize.register_parametrization(layer, "weight", Twice())
    for layer in map(old.get_submodule, layers):
        layer.weight.data.mul_(2)
    inputs = _inputs(case)
    got, want = (tree_leaves(case.function(m)(*inputs)) for m in (new, old))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == len(layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 4, 32), (0, 4, 32)])
@pytest.mark.parametrize("kind", ["Linear", "RMSNorm", "LayerNorm", "LayerNorm without weights"])
def test_norms_and_linear_take_any_leading_shape(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    new, old = (module.to(dtype) for module in _modules(CASES[kind]))
    x = torch.randn(shape, dtype=dtype)
    # A sum near zero may round the other way: PyTorch adds up rows and stacks of rows differently.
    unit = {"rtol": 0.016, "atol": torch.finfo(dtype).eps} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(new(x), old(x), **unit)
    if len(shape) == 4:
        torch.testing.assert_close(new(x.transpose(1, 2)), old(x.transpose(1, 2)), **unit)


@pytest.mark.parametrize("shape", [(2, 5), (2, 1, 5), (2, 12, 5)])
@pytest.mark.parametrize("boolean", [False, True])
def test_masks_of_attention(shape: tuple[int, ...], boolean: bool) -> None:
    case = CASES["Attention to text"]
    new, old = _modules(case)
    inputs = _inputs(case)
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    mask = mask if boolean else torch.randn(shape)
    torch.testing.assert_close(new(*inputs, mask), old(*inputs, mask))
    with pytest.raises(ValueError, match="attn_mask"):
        new(*inputs, torch.zeros(2, 3, 5))


def test_what_attention_would_pass_by_or_cannot_broadcast_is_named() -> None:
    layer, x = (
        modules.Attention(32, heads=2, dim_head=16, qk_norm="rms_norm"),
        torch.randn(2, 6, 32),
    )
    with pytest.raises(ValueError, match=r"attention_mask must be .* got \[6\]"):
        layer(x, attention_mask=torch.ones(6, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask"):
        layer(x, attention_mask=torch.ones(3, 6, dtype=torch.bool))
    alone = layer(x, attention_mask=torch.ones(1, 6, dtype=torch.bool))
    torch.testing.assert_close(alone, layer(x))
    assert layer(x[:0], attention_mask=torch.ones(0, 6, dtype=torch.bool)).shape == (0, 6, 32)
    for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
        hook = getattr(layer.norm_k, f"register_{kind}_hook")(lambda *_: None)
        with pytest.raises(ValueError, match="norm_q or norm_k has hooks"):
            layer(x)
        hook.remove()


def test_attention_is_exported_for_every_batch() -> None:
    layer, auto = modules.Attention(32, heads=2, dim_head=16), torch.export.Dim.AUTO
    shapes = ({0: auto, 1: auto},)
    program = torch.export.export(
        layer, (torch.randn(2, 6, 32),), dynamic_shapes=shapes, strict=False
    )
    x = torch.randn(3, 9, 32)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_one_modulation_for_all_samples_is_exported_for_every_batch() -> None:
    class Modulated(torch.nn.Module):
        def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
            return tk.adaln(x, shift=shift)[1]

    layer, x, shift = Modulated(), torch.randn(16, 3, 16), torch.randn(16)
    sizes = ({0: torch.export.Dim("b", min=2, max=64)}, None)
    program = torch.export.export(layer, (x[:4], shift), dynamic_shapes=sizes)
    torch.testing.assert_close(program.module()(x, shift), layer(x, shift))


def test_the_gated_convolution_is_exported_for_every_grid() -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.taps = nn.Parameter(torch.randn(8, 1, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            _, height, width, _ = x.shape
            return tk.conv_glu(x.flatten(1, 2), self.taps, height=height, width=width)

    layer, any_size = Images(), dict.fromkeys((0, 1, 2), torch.export.Dim.DYNAMIC)
    program = torch.export.export(layer, (torch.randn(2, 3, 5, 8),), dynamic_shapes=(any_size,))
    x = torch.randn(4, 6, 7, 8)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_grouped_heads_are_repeated_heads() -> None:
    torch.manual_seed(0)
    grouped = modules.Attention(32, heads=4, kv_heads=2, dim_head=8)
    full = modules.Attention(32, heads=4, dim_head=8)
    state = grouped.state_dict()
    for name in ("to_k.weight", "to_v.weight"):
        heads = state[name].reshape(2, 8, 32)
        state[name] = heads.repeat_interleave(2, 0).reshape(32, 32)
    full.load_state_dict(state)
    x = torch.randn(2, 6, 32)
    torch.testing.assert_close(grouped(x), full(x))


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: modules.RMSNorm((4, 8)), "RMSNorm: normalized_shape must be one dimension"),
        (lambda: modules.LayerNorm((4, 8)), "LayerNorm: normalized_shape must be one dimension"),
        (lambda: modules.AdaLayerNormZero(8, 10), "AdaLayerNormZero: num_embeddings must be None"),
        (lambda: modules.AdaLayerNormZero(8, None, "fp32_layer_norm"), "Zero: norm_type must be"),
        (lambda: modules.AdaLayerNormZeroSingle(8, "rms_norm"), "ZeroSingle: norm_type must be"),
        (lambda: modules.AdaLayerNormContinuous(8, 8), "elementwise_affine must be False"),
        (
            lambda: modules.AdaLayerNormContinuous(8, 8, False, norm_type="rms_norm"),
            "Continuous: norm_type must be 'layer_norm', got 'rms_norm'",
        ),
        (lambda: modules.SanaModulatedNorm(8, True), "elementwise_affine must be False, got True"),
        (lambda: modules.GLUMBConv(8, 8, norm_type="rms_norm"), "norm_type must be None"),
        (
            lambda: modules.Attention(8, qk_norm="l2"),
            "Attention: qk_norm must be one of .* got 'l2'",
        ),
        (lambda: modules.LinearAttention(8, qk_norm="rms_norm"), "qk_norm must be one of"),
    ],
)
def test_refused_options_are_named(build: Callable[[], nn.Module], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        build()


def test_options_that_no_constructor_knows() -> None:
    with pytest.raises(TypeError, match="norm_num_groups"):
        modules.Attention(8, norm_num_groups=2)
    with pytest.raises(TypeError, match="bias"):
        modules.RMSNorm(8, 1e-6, bias=True)


def test_linear_attention_refuses_a_mask() -> None:
    with pytest.raises(ValueError, match="ignores attention_mask"):
        modules.LinearAttention(32, heads=4, dim_head=8)(
            torch.randn(2, 6, 32), attention_mask=torch.ones(2, 6)
        )


@pytest.mark.parametrize("name", modules.__all__)
def test_examples(name: str) -> None:
    """Every module has an example, and it prints what it says."""
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(modules, name), name, globs={})
    results = doctest.DocTestRunner().run(test)
    assert results.attempted and not results.failed


def test_the_example_of_the_readme() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"## Drop-in modules.*?```python\n(.*?)```", text, re.DOTALL)
    exec(example, {})


def test_linear_of_other_layouts_is_pytorchs() -> None:
    layer = modules.Linear(8, 8)
    rows = [torch.randn(n, 8) for n in (3, 5)]
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.nested_tensor(rows, layout=layout)
        for row, y in zip(rows, layer(nested).unbind(), strict=True):
            torch.testing.assert_close(y, layer(row))
    torch.testing.assert_close(layer(torch.eye(8).to_sparse()), layer(torch.eye(8)))
    bias = torch.ones(3)
    empty = torch.ones(2, 0), torch.ones(3, 0), bias
    assert torch.equal(tk.linear(*empty), torch.nn.functional.linear(*empty))
    with pytest.raises(ValueError, match="x must be a dense tensor, got a nested one"):
        tk.adaln(nested, nested)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_norms_of_nested_tensors_are_pytorchs(name: str, layout: torch.layout) -> None:
    norm, stock = getattr(modules, name)(8), getattr(nn, name)(8)
    rows = [torch.randn(n, 8) for n in (3, 5)]
    nested = torch.nested.nested_tensor(rows, layout=layout)
    try:
        want = stock(nested).unbind()
    except RuntimeError as error:  # PyTorch has no such norm
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:40])):
            norm(nested)
        return
    torch.testing.assert_close(norm(nested).unbind(), want)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 2, 3, 4)])
@pytest.mark.parametrize("turned", [False, True])
def test_linear_saves_inside_jvp_what_it_saves_outside(
    shape: tuple[int, ...], turned: bool
) -> None:
    """A checkpointed function is run again outside; `F.linear` saves other views there."""
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in (shape, (5, 4), (5,)))
    x = x.mT.contiguous().mT if turned else x
    one = torch.ones(())

    def saved(call: Callable[[], object]) -> list[tuple]:
        found: list[tuple] = []

        def pack(v: Tensor) -> Tensor:
            found.append((v.shape, v.stride()))
            return v

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
            call()
        return found

    outside = saved(lambda: tk.linear(x, weight, bias))
    inside = saved(
        lambda: torch.func.jvp(lambda z: (z, tk.linear(x, weight, bias))[0], (one,), (one,))
    )
    assert outside == inside and len(outside) > 1


def test_inputs_by_name_and_of_another_width_are_as_torch_has_them() -> None:
    x = torch.randn(3, 8)
    for kind in ("Linear", "LayerNorm"):
        new, old = (getattr(m, kind)(*(8, 8)[: 1 + (kind == "Linear")]) for m in (modules, nn))
        new.load_state_dict(old.state_dict())
        torch.testing.assert_close(new(input=x), old(input=x))
    for kind in ("LayerNorm", "RMSNorm"):
        with pytest.raises(ValueError, match=r"last dimension must be 16, got \[3, 8\]"):
            getattr(modules, kind)(16, elementwise_affine=False)(x)


def test_the_default_eps_is_that_of_the_dtype() -> None:
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    old, new = (kind(32, dtype=torch.float64) for kind in (nn.RMSNorm, modules.RMSNorm))
    torch.testing.assert_close(new(x), old(x), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["Attention", "LinearAttention"])
def test_dropout_is_of_the_result(name: str) -> None:
    case = copy.copy(CASES[name])
    case.kwargs = case.kwargs | {"dropout": 0.5}
    (x,) = _inputs(case)
    new, old = (torch.manual_seed(2) and module(x) for module in _modules(case))
    assert (new == 0).any()
    torch.testing.assert_close(new, old)


def test_an_embedding_of_another_dtype() -> None:
    new, old = _modules(CASES["AdaLayerNormContinuous"])
    x, emb = (v.bfloat16() for v in _inputs(CASES["AdaLayerNormContinuous"]))
    new, old = (module.bfloat16()(x, emb.float()) for module in (new, old))
    assert new.dtype == torch.bfloat16
    torch.testing.assert_close(new, old, rtol=0.05, atol=0.05)
