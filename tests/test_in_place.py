"""What follows a layer of ours in place is allowed as after the stock layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tbcm_kernels as tk


@pytest.mark.parametrize("after", [nn.ReLU(inplace=True), nn.SiLU(inplace=True)], ids=repr)
@pytest.mark.parametrize("layer", [
    nn.Linear(16, 16), nn.LayerNorm(16), nn.LayerNorm(16, elementwise_affine=False), nn.RMSNorm(16),
], ids=repr)  # fmt: skip
def test_an_activation_in_place_under_a_semi_gradient(layer: nn.Module, after: nn.Module) -> None:
    torch.manual_seed(0)
    net, (x, dx) = nn.Sequential(nn.Linear(16, 16), layer, after), torch.randn(2, 2, 3, 16)
    found = []
    for fused in (False, True):
        handle = tk.fuse(net) if fused else None
        net.zero_grad()
        with tk.stop_tangent_gradient():
            value, tangent = torch.func.jvp(net, (x,), (dx,))
        value.sum().backward()
        found.append((value.detach(), tangent.detach(), net[0].weight.grad))
        if handle:
            handle.undo()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [
    nn.LayerNorm(16), nn.LayerNorm(16, elementwise_affine=False), nn.RMSNorm(16),
], ids=repr)  # fmt: skip
def test_a_result_without_a_graph_takes_one_and_can_be_detached(
    layer: nn.Module, dtype: torch.dtype
) -> None:
    net, added = nn.Sequential(layer).to(dtype), nn.Parameter(torch.ones(16, dtype=dtype))
    with tk.fuse(net):
        with torch.no_grad():
            y = net(torch.randn(2, 3, 16, dtype=dtype))
        assert y.add_(added).requires_grad
        assert not net(torch.randn(2, 3, 16, dtype=dtype)).detach_().requires_grad


def test_a_tangent_of_the_bias_alone_takes_an_addition():
    x, weight, bias, tbias = torch.ones(2, 3, 4), torch.ones(5, 4), torch.ones(5), torch.ones(5)
    _, ty = tk.linear_jvp(x, weight, bias, tbias=tbias)
    torch.testing.assert_close(ty.add_(1), torch.full((2, 3, 5), 2.0))
