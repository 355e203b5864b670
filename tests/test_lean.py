"""Linear maps that compute their input again in backward, against those that save it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn

import tbcm_kernels as tk
from tbcm_kernels.linear import lean

B, H, W, C, K = 2, 16, 17, 12, 24
N = H * W
EPS = 0.1


def _leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s).requires_grad_() for s in shapes]


def _adaln(bias: bool, save: bool, moving: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and what is differentiated."""
    x, scale, shift = leaves = _leaves((B, N, C), (B, 1, C), (B, 1, C))
    layers = [nn.Linear(C, width, bias) for width in (C, K, C)]
    tx = torch.randn(B, N, C) if moving else None
    _, y, _, ty = tk.adaln_jvp(x, None, None, scale, shift, tx, eps=EPS)
    if save:
        pairs = [tk.linear_jvp(y, layer.weight, layer.bias, ty) for layer in layers]
    else:
        pairs = lean.of_adaln((y, ty), x, scale, shift, EPS, layers, "cpu")
    return [v for pair in pairs for v in pair], leaves + [p for m in layers for p in m.parameters()]


def _conv_glu(bias: bool, save: bool, moving: bool) -> tuple[list[Tensor], list[Tensor]]:
    (a, weight) = leaves = _leaves((B, N, 2 * K), (C, K))
    depth = nn.Conv2d(2 * K, 2 * K, 3, padding=1, groups=2 * K, bias=bias)
    ta = torch.randn(B, N, 2 * K) if moving else None
    pair = tk.conv_glu_jvp(a, depth.weight, depth.bias, ta, height=H, width=W)
    if save:
        pair = tk.linear_jvp(pair[0], weight, None, pair[1])
    else:
        pair = lean.of_conv_glu(pair, a, depth.weight, depth.bias, (H, W), weight, "cpu")
    return list(pair), leaves + list(depth.parameters())


def _gated(bias: bool, save: bool, moving: bool) -> tuple[list[Tensor], list[Tensor]]:
    x, gate, o = leaves = _leaves((B, N, C), (B, 1, C), (B, N, K))
    layer = nn.Linear(K, C, bias)
    tx, tgate, to = (torch.randn(v.shape) if moving else None for v in leaves)
    if save:
        h, th = tk.linear_jvp(o, layer.weight, layer.bias, to)
        out = x + gate * h
        tout = tx + tgate * h + gate * th if moving else None
    else:
        out, tout = lean.gated_sum((x, tx), (gate, tgate), (o, to), layer)
    return [out, tout], leaves + list(layer.parameters())


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("function", [_adaln, _conv_glu, _gated])
def test_same_values_tangents_and_gradients(function, bias: bool, moving: bool, need) -> None:
    need("cpu")
    found = []
    for save in (True, False):
        torch.manual_seed(3)
        with tk.stop_tangent_gradient():
            outputs, inputs = function(bias, save, moving)
        values = [v for v in outputs if v is not None]
        loss = sum((v * v.detach().cos()).sum() for v in outputs[::2])
        found.append([*values, *torch.autograd.grad(loss, inputs)])
    assert len(found[0]) >= 4
    for got, want in zip(*found, strict=True):
        assert (got - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("frozen", ["weight", "gate", "o", "weight gate", "bias"])
def test_frozen_inputs_of_the_gated_sum(frozen: str) -> None:
    names = ["x", "gate", "o", "weight", "bias"]
    values = _leaves((B, N, C), (B, 1, C), (B, N, K), (C, K), (C,))
    for name, v in zip(names, values, strict=True):
        v.requires_grad_(name not in frozen.split())
    wanted = [v for v in values if v.requires_grad]
    x, gate, o, weight, bias = values
    got = torch.autograd.grad(lean.gated_linear(*values)[0].sin().sum(), wanted)
    plain = x + gate * nn.functional.linear(o, weight, bias)
    for a, b in zip(got, torch.autograd.grad(plain.sin().sum(), wanted), strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()


@pytest.mark.parametrize("batch", [1, 16])
def test_gated_sum_in_bf16_is_no_further_from_the_truth_than_stock(batch: int) -> None:
    """Over a batch, too: the weight's gradient is rounded once, not once for each sample."""
    torch.manual_seed(0)
    shapes = (batch, N, 64), (batch, 1, 64), (batch, N, 64), (64, 64), (64,)
    values = [torch.randn(s, dtype=torch.bfloat16) for s in shapes]
    cotangent = torch.randn(shapes[0], dtype=torch.bfloat16)

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [v.to(dtype).requires_grad_() for v in values]
        return torch.autograd.grad(function(*leaves), leaves, cotangent.to(dtype))

    def stock(x: Tensor, gate: Tensor, *o_and_layer: Tensor) -> Tensor:
        return torch.addcmul(x, gate, nn.functional.linear(*o_and_layer))

    truth = gradients(stock, torch.float64)
    found = gradients(lambda *v: lean.gated_linear(*v)[0], torch.bfloat16)
    for got, low, want in zip(found, gradients(stock, torch.bfloat16), truth, strict=True):
        assert (got - want).square().mean() <= (1.25**2) * (low - want).square().mean()


def test_one_gate_for_all_samples() -> None:
    x, gate, o, weight, bias = values = _leaves((B, N, C), (1, 1, C), (B, N, K), (C, K), (C,))
    got = torch.autograd.grad(lean.gated_linear(*values)[0].sin().sum(), values)
    plain = x + gate * nn.functional.linear(o, weight, bias)
    for a, b in zip(got, torch.autograd.grad(plain.sin().sum(), values), strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()


@pytest.mark.parametrize("function", [_adaln, _conv_glu, _gated])
def test_backward_inside_a_dual_level(function, need) -> None:
    need("cpu")
    with tk.stop_tangent_gradient():
        outputs, inputs = function(True, False, False)
    loss = sum(v.sum() for v in outputs[::2])
    want = torch.autograd.grad(loss, inputs, retain_graph=True)
    with fwAD.dual_level():
        got = torch.autograd.grad(loss, inputs)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_opcheck() -> None:
    x, scale, shift, a, depth = _leaves(
        (B, N, C), (B, 1, C), (B, 1, C), (B, N, 2 * K), (2 * K, 1, 3, 3)
    )
    y = tk.adaln(x, None, None, scale, shift)[1].detach().requires_grad_()
    z = tk.conv_glu(a, depth, height=H, width=W).detach().requires_grad_()
    weights, biases = _leaves((C, C), (K, C)), _leaves((C,), (K,))
    (weight,) = _leaves((C, K))
    gate = torch.randn(B, 1, C, requires_grad=True)
    for op, arguments in (
        (lean.linear_of_adaln, (y, x, scale, shift, 1e-6, weights, biases, "reference")),
        (lean.linear_of_adaln, (y, x, scale, shift, 1e-6, weights, [], "reference")),
        (lean.linear_of_conv_glu, (z, a, depth, None, H, W, weight, "reference")),
        (lean.gated_linear, (x, gate, z, weight, None)),
    ):
        torch.library.opcheck(op.op, arguments)


def test_an_activation_in_fp32_under_autocast(need: Callable[[str], None]) -> None:
    need("cpu")
    found = []
    for save in (True, False):
        with torch.autocast("cpu", torch.bfloat16), tk.stop_tangent_gradient():
            (y, _), leaves = _conv_glu(True, save, False)
        found.append(torch.autograd.grad(y.sum(), leaves[1]))
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)


def test_frozen_weights_need_no_input_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under LoRA."""
    y, x, a, depth = (
        torch.randn(s) for s in ((B, N, C), (B, N, C), (B, N, 2 * C), (2 * C, 1, 3, 3))
    )
    scale, weight = torch.randn(B, 1, C), torch.randn(K, C)
    y.requires_grad_()
    for name in ("adaln_op", "conv_glu_op"):
        monkeypatch.setattr(lean, name, lambda *_: pytest.fail("computed again"))
    outputs = (
        *lean.linear_of_adaln(y, x, scale, scale, EPS, [weight], [], "cpu"),
        lean.linear_of_conv_glu(y, a, depth, None, H, W, weight, "cpu"),
    )
    for out in outputs:
        (got,) = torch.autograd.grad(out.sum(), y)
        torch.testing.assert_close(got, weight.sum(0).expand_as(y))


def test_only_long_sequences_under_a_semi_gradient() -> None:
    x, t = torch.randn(2, 1, lean.LONG, 4)
    assert lean.worth_it(x) and not lean.worth_it(x[:, 1:])
    assert not lean.worth_it(x, t)
    with tk.stop_tangent_gradient():
        assert lean.worth_it(x, t)
        with torch.no_grad():
            assert not lean.worth_it(x, t)
