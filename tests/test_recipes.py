"""docs/recipes.md: its program runs, and gives the losses and gradients that PyTorch gives."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tbcm_kernels as tk


@pytest.fixture(scope="module")
def recipes() -> dict[str, Any]:
    """The names that the page's program defines."""
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    names: dict[str, Any] = {"__name__": "recipes"}
    torch.manual_seed(0)
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    return names


def _gradients(loss: Tensor, net: nn.Module) -> list[Tensor]:
    # Keys' biases cancel in softmax: their gradients are rounding.
    used = [p for n, p in net.named_parameters() if not n.endswith("qkv.bias")]
    return [loss.detach(), *torch.autograd.grad(loss, used)]


@pytest.mark.parametrize(("times", "flow"), [(1, False), (1, True), (2, False)])
def test_losses_and_gradients(recipes: dict[str, Any], times: int, flow: bool) -> None:
    """sCM's with one time, also of a flow's velocity, MeanFlow's with two."""
    torch.manual_seed(1)
    net = recipes["DiT"](times=times)
    net = recipes["TrigFlow"](net) if flow else net
    stock = copy.deepcopy(net)
    loss = recipes["meanflow_loss" if times == 2 else "scm_loss"]
    t = torch.tensor([0.4, 0.7, 1.1])
    inputs = torch.randn(3, 6, 4), 0.5 * torch.randn(3, 6, 4), *(t * 0.5, t)[-times:]
    with tk.fuse(net):
        got = _gradients(loss(net, *inputs), net)
    with pytest.raises(NotImplementedError, match="forward AD"):
        loss(stock, *inputs)
    with sdpa_kernel(SDPBackend.MATH):
        want = _gradients(loss(stock, *inputs), stock)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_checkpointed_block(recipes: dict[str, Any]) -> None:
    torch.manual_seed(1)
    block = recipes["Block"](64, 4)
    tk.fuse(block)
    x, dx, condition, moves = (torch.randn(s) for s in ((2, 6, 64), (2, 6, 64), (2, 64), (2, 64)))
    kept: list[list[int]] = []
    results = []
    for run in (recipes["checkpointed"], None):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda s, sizes=sizes: (sizes.append(s.numel()), s)[1], lambda s: s
        ):
            if run:
                y, dy = run(block, x, condition, dx, moves)
            else:
                with tk.stop_tangent_gradient():
                    y, dy = torch.func.jvp(block, (x, condition), (dx, moves))
        kept.append(sizes)
        results.append([y, dy, *_gradients(y.sin().sum(), block)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert sum(kept[0]) == 2 * (x.numel() + condition.numel()) < sum(kept[1]) / 4


def test_what_fuse_says_is_on_the_page(recipes: dict[str, Any]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    assert repr(tk.fuse(recipes["DiT"]())) in page
