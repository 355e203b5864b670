"""`backend()`, by which diffusers' attention dispatch calls `attention`."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_anyflow_far as anyflow
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tbcm_kernels import _dispatch, processors
from tbcm_kernels.backend import backend


def test_a_backend_that_a_class_has_chosen_stays() -> None:
    processor = anyflow.AnyFlowCausalAttnProcessor()
    assert processor._attention_backend == "flex" and not processors._dispatches(processor)


def test_what_the_backend_does_not_do_is_named() -> None:
    q = torch.randn(2, 6, 2, 16)
    for options, says in (
        ({"dropout_p": 0.1}, "dropout_p"),
        ({"attention_kwargs": {"return_lse": True}}, "return_lse"),
        ({"parallel_config": object()}, "context parallelism"),
    ):
        with pytest.raises(ValueError, match=says):
            dispatch_attention_fn(q, q, q, backend=backend(), **options)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    for options in ({}, {"attn_mask": mask}, {"is_causal": True}, {"scale": 0.3}):
        got = dispatch_attention_fn(q, q, q, backend=backend(), **options)
        torch.testing.assert_close(got, dispatch_attention_fn(q, q, q, **options))
    shared = [torch.randn(2, 6, 1, 16) for _ in "kv"]
    got = dispatch_attention_fn(q, *shared, enable_gqa=True, backend=backend())
    torch.testing.assert_close(got, dispatch_attention_fn(q, *shared, enable_gqa=True))


@pytest.mark.parametrize("moves", [True, False])
def test_a_mask_of_the_backend_that_learns_is_pytorchs(moves: bool) -> None:
    q, bias = torch.randn(2, 6, 2, 16, requires_grad=True), torch.randn(6, 6, requires_grad=True)

    def step(**options: object) -> list[Tensor]:
        def function(x: Tensor) -> Tensor:
            return dispatch_attention_fn(x, x, x, attn_mask=bias, **options)

        pair = torch.func.jvp(function, (q,), (torch.ones_like(q),)) if moves else [function(q)]
        loss = sum(x.sin().sum() for x in pair)
        return [*pair, *torch.autograd.grad(loss, [q, bias])]

    with sdpa_kernel(SDPBackend.MATH):
        want = step()
    _dispatch._notice_fallback.cache_clear()
    with pytest.warns(UserWarning, match="neither moves nor learns"):
        torch.testing.assert_close(step(backend=backend()), want)
