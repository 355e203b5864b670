"""What attention does not take is refused, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attention_inputs import heads
from torch import Tensor

import tbcm_kernels as tk

pytestmark = pytest.mark.kernels


Q, K = (2, 4, 5, 16), (2, 4, 7, 16)


def _refusals() -> Iterator[tuple[str, str, Callable[[Tensor, Tensor], Any]]]:
    def call(**options: Any) -> Callable[[Tensor, Tensor], Any]:
        return lambda q, k: tk.attention(q, k, k, **options)

    yield (
        "head dim",
        "head dim of q and k must be a multiple of 8 up to 256, got 28",
        lambda q, k: tk.attention(*(torch.zeros(1, 1, 3, 28) for _ in range(3))),
    )
    yield (
        "head dim of v",
        "head dim of v must be a multiple of 8 up to 256, got 12",
        lambda q, k: tk.attention(q, k, k[..., :12]),
    )
    yield (
        "wide",
        "multiple of 8 up to 256, got 264",
        lambda q, k: tk.attention(*(torch.zeros(1, 1, 3, 264) for _ in range(3))),
    )
    yield "dropout", "dropout_p must be 0, got 0.1", call(dropout_p=0.1)
    yield (
        "dropout of pairs",
        "dropout_p must be 0, got 0.1",
        lambda q, k: tk.attention_jvp(q, k, k, q, dropout_p=0.1),
    )
    yield (
        "dtype",
        "k must have q's number of dimensions, dtype and device",
        lambda q, k: tk.attention(q, k.double(), k),
    )
    yield "integers", "q must be floating", lambda q, k: tk.attention(q.long(), k, k)
    yield (
        "dimensions",
        r"q must be floating \[B, H, N, D\] or \[B, N, D\]",
        lambda q, k: tk.attention(q[0, 0], k[0, 0], k[0, 0]),
    )
    yield (
        "batch",
        "expand them where they should broadcast",
        lambda q, k: tk.attention(q, k[:1], k[:1]),
    )
    yield "keys", "with q's B and D", lambda q, k: tk.attention(q, k, k[:, :, :3])
    yield (
        "heads",
        "q has 4 heads and k 2; pass enable_gqa=True",
        lambda q, k: tk.attention(q, k[:, :2], k[:, :2]),
    )
    yield (
        "multiple",
        "q's 4 heads are no multiple of k's 3",
        lambda q, k: tk.attention(q, k[:, :3], k[:, :3], enable_gqa=True),
    )
    yield (
        "mask shape",
        r"attn_mask must broadcast to \[B, H, N, S\] = \[2, 4, 5, 7\]",
        call(attn_mask=torch.zeros(5, 6)),
    )
    yield (
        "mask dtype",
        "attn_mask must be boolean or floating",
        call(attn_mask=torch.zeros(5, 7, dtype=torch.int)),
    )
    yield (
        "mask device",
        "attn_mask must be boolean or floating on cpu",
        call(attn_mask=torch.zeros(5, 7, device="meta")),
    )
    yield (
        "mask gradient",
        "attn_mask requires grad",
        call(attn_mask=torch.zeros(5, 7, requires_grad=True)),
    )
    yield (
        "key mask shape",
        r"key_mask must be boolean \[B, S\] = \[2, 7\]",
        call(key_mask=torch.ones(2, 6, dtype=torch.bool)),
    )
    yield "key mask dtype", "key_mask must be boolean", call(key_mask=torch.ones(2, 7))
    yield (
        "norm width",
        "q_norm must be .* of 16 elements .* or 64",
        call(q_norm=(torch.ones(32), 1e-6)),
    )
    yield (
        "norm of no heads",
        r"q_norm must be .* got \[0\]",
        lambda q, k: tk.attention(q[:, :0], k[:, :0], k[:, :0], q_norm=(torch.ones(0), 1e-6)),
    )
    yield "norm dtype", "k_norm must be", call(k_norm=(torch.ones(16).long(), 1e-6))
    yield (
        "alignment",
        "causal_alignment must be upper_left or lower_right, got 'left'",
        call(is_causal=True, causal_alignment="left"),
    )
    expected = "impl must be one of auto, triton, cpu, reference, got "
    yield "impl", expected + "'hip'", call(impl="hip")
    yield "impl of other ops", "attention has no cuda implementation", call(impl="cuda")
    yield (
        "tangent",
        "tq must match q in shape, dtype and device",
        lambda q, k: tk.attention_jvp(q, k, k, q[:1]),
    )
    yield "no parts", "parts must be pairs of o", lambda q, k: tk.merge_attention([])
    yield (
        "parts",
        "all parts must have one shape",
        lambda q, k: tk.merge_attention([(q, q[..., 0]), (k, k[..., 0])]),
    )


@pytest.mark.parametrize(
    ("message", "call"), [pytest.param(*rest, id=name) for name, *rest in _refusals()]
)
def test_refusals(message: str, call: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call(*heads(Q, K))


def test_the_reference_takes_heads_without_width() -> None:
    """Every query then sees the mean of the values, as in F.scaled_dot_product_attention."""
    q, k, v = torch.ones(1, 2, 3, 0), torch.ones(1, 2, 5, 0), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"head dim.*impl=\"reference\""):
        tk.attention(q, k, v)
    o = tk.attention(q, k, v, impl="reference")
    torch.testing.assert_close(o, v.mean(2, keepdim=True).expand(1, 2, 3, 8))


def test_the_reference_takes_any_head_dim_and_differentiates_the_bias() -> None:
    q, k, v = heads((1, 1, 3, 28), (1, 1, 4, 28), (1, 1, 4, 5))
    bias = torch.zeros(3, 4, requires_grad=True)
    o = tk.attention(q, k, v, attn_mask=bias, impl="reference")
    assert torch.autograd.grad(o.sum(), bias)[0].any()


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("attn_mask carries a tangent", lambda t: {"attn_mask": t[:5, :7]}),
        ("weight of q_norm carries a tangent", lambda t: {"q_norm": (t[0], 1e-6)}),
        ("weight of k_norm carries a tangent", lambda t: {"k_norm": [t[0], 1e-6]}),
    ],
)
def test_a_tangent_of_a_mask_or_weight_raises(
    message: str, options: Callable[[Tensor], dict[str, Any]]
) -> None:
    q, k = heads(Q, K)
    moving = torch.ones(16, 16)
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(lambda t: tk.attention(q, k, k, **options(t)), (moving,), (moving,))
    with pytest.raises(RuntimeError, match=r"carries a tangent|forward-AD dual"):
        torch.func.jvp(lambda t: tk.attention_jvp(q, k, k, **options(t)), (moving,), (moving,))
    if "weight" not in message:
        return
    for op in (tk.attention_jvp, tk.linear_attention, tk.linear_attention_jvp):
        with pytest.raises(RuntimeError, match=message):
            torch.func.jvp(lambda t: op(q, k, k, **options(t)), (moving,), (moving,))  # noqa: B023


@pytest.mark.parametrize("norm", [(torch.ones(8), None), (None, 1e-6), torch.ones(8)], ids=str)
def test_a_norm_that_is_no_pair_raises(norm: Any) -> None:
    (q,) = heads((1, 2, 3, 8))
    with pytest.raises(ValueError, match="must be a pair"):
        tk.attention(q, q, q, q_norm=norm)


def test_autocast_casts_no_integers() -> None:
    q = torch.ones(1, 2, 3, 8, dtype=torch.int64)
    with torch.autocast(q.device.type, torch.bfloat16), pytest.raises(ValueError, match="floating"):
        tk.attention(q, q, q)


def test_a_mask_that_learns_and_is_made_inside_jvp_raises_in_backward() -> None:
    q, k = heads(Q, K)
    bias = torch.zeros(5, 7, requires_grad=True)
    o, _ = torch.func.jvp(lambda q: tk.attention(q, k, k, attn_mask=2 * bias), (q,), (q,))
    with pytest.raises(RuntimeError, match="attn_mask requires grad"):
        o.sum().backward()


def test_autocast_leaves_fp64_alone() -> None:
    (q,) = heads((1, 2, 3, 8), dtype=torch.float64)
    with torch.autocast(q.device.type, torch.bfloat16):
        got = tk.attention(q, q, q)
    torch.testing.assert_close(got, tk.attention(q, q, q), rtol=0, atol=0)
