"""Shapes, dtypes, devices and options that do not fit an op are named before any work."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

import tbcm_kernels as tk

X, A, W = torch.ones(2, 6, 8), torch.ones(2, 6, 8), torch.ones(8, 1, 3, 3)
Q, K, V = torch.ones(2, 4, 5, 8), torch.ones(2, 4, 7, 8), torch.ones(2, 4, 7, 16)
GRID, T = {"height": 2, "width": 3}, torch.ones(2)
REFUSED = [
    ("rms_norm_jvp: x must be", lambda: tk.rms_norm_jvp(X.long())),
    ("adaln_jvp: x must be", lambda: tk.adaln_jvp(X[0])),
    ("conv_glu_jvp: a must be", lambda: tk.conv_glu_jvp(A[0], W, **GRID)),
    ("linear_jvp: weight must be", lambda: tk.linear_jvp(X, W)),
    *(
        (f"{name} must be a number, got 'a'", functools.partial(call, impl=impl))
        for impl in ("auto", "reference")
        for name, call in {
            "rms_norm: eps": lambda **o: tk.rms_norm(X, eps="a", **o),
            "adaln_jvp: eps": lambda **o: tk.adaln_jvp(X, eps="a", **o),
            "tangent_loss: c": lambda **o: tk.tangent_loss(X, X, X, X, T, 1, "a", **o),
            "trajectory_step: sigma_data": lambda **o: tk.trajectory_step(
                X, torch.cat((X, X)), T, T, T, "a", **o
            ),
        }.items()
    ),
    ("adaln: x must be .* floating", lambda: tk.adaln(X[0])),
    ("adaln: x must be .* floating", lambda: tk.adaln(X.long())),
    ("adaln: x has width 0", lambda: tk.adaln(X[..., :0])),
    ("adaln: dtype must be", lambda: tk.adaln(X.bfloat16(), dtype=torch.float16)),
    ("adaln: dtype must be", lambda: tk.adaln(X, dtype=torch.float64)),
    ("adaln: h must match x", lambda: tk.adaln(X, X[:, :3])),
    ("adaln: h must match x", lambda: tk.adaln(X, X.double())),
    ("adaln: h must match x", lambda: tk.adaln(X, X.to("meta"))),
    ("adaln: gate was given without h", lambda: tk.adaln(X, gate=X)),
    ("adaln_jvp: gate was given without h", lambda: tk.adaln_jvp(X, gate=X)),
    ("adaln: gate must be", lambda: tk.adaln(X, X, X[:, :1, :1])),
    ("adaln: scale must be", lambda: tk.adaln(X, scale=X[:, :2])),
    ("adaln: scale must be", lambda: tk.adaln(X, scale=X[None])),
    ("adaln: scale must be", lambda: tk.adaln(X, scale=X.long())),
    ("adaln: shift must be", lambda: tk.adaln(X, shift=X[:, :1].to("meta"))),
    ("conv_glu: a must be", lambda: tk.conv_glu(A[0], W, **GRID)),
    ("conv_glu: a must be", lambda: tk.conv_glu(A[..., :7], W[:7], **GRID)),
    ("conv_glu: a must be", lambda: tk.conv_glu(A[..., :0], W[:0], **GRID)),
    ("conv_glu: a must be", lambda: tk.conv_glu(A.long(), W, **GRID)),
    ("conv_glu: height · width", lambda: tk.conv_glu(A, W, height=2, width=2)),
    ("conv_glu: height · width", lambda: tk.conv_glu(A, W, height=-2, width=-3)),
    ("conv_glu: weight must be", lambda: tk.conv_glu(A, W[:4], **GRID)),
    ("conv_glu: weight must be", lambda: tk.conv_glu(A, W.to("meta"), **GRID)),
    ("conv_glu: weight and bias", lambda: tk.conv_glu(A, W.long(), **GRID)),
    ("conv_glu: weight and bias", lambda: tk.conv_glu(A, W, X[0, 0].long(), **GRID)),
    ("conv_glu: bias must be", lambda: tk.conv_glu(A, W, X[0, 0, :4], **GRID)),
    ("conv_glu: bias must be", lambda: tk.conv_glu(A, W, X[0, 0].to("meta"), **GRID)),
    ("linear_attention: is_causal", lambda: tk.linear_attention(Q, K, V, is_causal=True)),
    ("linear_attention: feature_map", lambda: tk.linear_attention(Q, K, V, feature_map="elu")),
    ("linear_attention: q must be", lambda: tk.linear_attention(Q[0], K[0], V[0])),
    ("linear_attention: q must be", lambda: tk.linear_attention(Q.long(), K.long(), V.long())),
    ("linear_attention: k must be", lambda: tk.linear_attention(Q, K[0], V)),
    ("linear_attention: k must be", lambda: tk.linear_attention(Q, K.double(), V)),
    ("linear_attention: v must be", lambda: tk.linear_attention(Q, K, V.to("meta"))),
    ("linear_attention: k must be", lambda: tk.linear_attention(Q, K[:1], V[:1])),
    ("linear_attention: k must be", lambda: tk.linear_attention(Q, K[:, :1], V[:, :1])),
    ("linear_attention: k must be", lambda: tk.linear_attention(Q, V, V)),
    ("linear_attention: k must be", lambda: tk.linear_attention(Q, K, V[:, :, :6])),
    ("head dim of q and k", lambda: tk.linear_attention(Q[..., :0], K[..., :0], V)),
    ("head dim of v", lambda: tk.linear_attention(Q, K, V.repeat(1, 1, 1, 17))),
    ("rms_norm: x must be", lambda: tk.rms_norm(X.long())),
    ("rms_norm: x must be", lambda: tk.rms_norm(X[..., :0])),
    ("rms_norm: weight must be", lambda: tk.rms_norm(X, X[0, 0, :4])),
    ("rms_norm: weight must be", lambda: tk.rms_norm(X, X[0])),
    ("rms_norm: weight must be", lambda: tk.rms_norm(X, X[0, 0].long())),
    ("rms_norm: weight must be", lambda: tk.rms_norm(X, X[0, 0].to("meta"))),
    ("linear: weight must be", lambda: tk.linear(X, X[0, :, :4])),
    ("linear: weight must be", lambda: tk.linear(X, X[0, 0])),
    ("linear: bias must be", lambda: tk.linear(X, X[0], X[0, 0, :1])),
    ("t?x must match x", lambda: tk.linear_jvp(X, X[0], tx=X.double())),
    ("tweight must match weight", lambda: tk.linear_jvp(X, X[0], tweight=X[0, :1])),
    ("tbias was given without bias", lambda: tk.linear_jvp(X, X[0], tbias=X[0, :, 0])),
    ("tx must match x", lambda: tk.adaln_jvp(X, tx=X.to("meta"))),
    ("ta must match a", lambda: tk.conv_glu_jvp(A, W, ta=A.double(), **GRID)),
    ("tx must match x", lambda: tk.rms_norm_jvp(X, tx=X[:1])),
    ("tv must match v", lambda: tk.linear_attention_jvp(Q, K, V, tv=K)),
    ("adaln: scale must be a dense tensor, got float", lambda: tk.adaln(X, scale=0.5)),
    ("attention: q must be a dense tensor, got nd", lambda: tk.attention(Q.numpy(), K, V)),
    ("attn_mask must be a dense tensor, got list", lambda: tk.attention(Q, K, V, [[True]])),
    ("attention_jvp: tq must be a dense", lambda: tk.attention_jvp(Q, K, V, 1.0)),
    ("linear_attention: v must be a dense", lambda: tk.linear_attention(Q, K, None)),
    ("rms_norm: weight must be a dense tensor, got float", lambda: tk.rms_norm(X, 1.0)),
    ("x must be a dense tensor, got torch.sparse_coo", lambda: tk.rms_norm(X.to_sparse())),
    ("linear_jvp: x must be a dense tensor, got NoneType", lambda: tk.linear_jvp(None, X[0])),
    ("x is .* float8_e4m3fn on cpu; cast", lambda: tk.rms_norm(X.to(torch.float8_e4m3fn))),
    ("linear: x is .* float8_e5m2 on", lambda: tk.linear(X.to(torch.float8_e5m2), X[0])),
    ("conv_glu: weight must be a dense", lambda: tk.conv_glu(A, None, **GRID)),
    ("conv_glu: height and width must be integers", lambda: tk.conv_glu(A, W, height=2.0, width=3)),
    ("conv_glu: height and width must be integers", lambda: tk.conv_glu(A, W, height="2", width=3)),
    ("tangent_loss: jvp must be a dense", lambda: tk.tangent_loss(X, None, X, X, T, 1.0)),
    ("tangent_loss: t must be a dense", lambda: tk.tangent_loss(X, X, X, X, 0.5, 1.0)),
    ("tangent_loss: jvp must be .* real", lambda: tk.tangent_loss(X, X + 0j, X, X, T, 1.0)),
    ("flow_input: t must be a dense", lambda: tk.flow_input(X, 0.5)),
    ("flow_output: v must be a dense", lambda: tk.flow_output(None, X, T)),
    ("trajectory_step: t must be", lambda: tk.trajectory_step(X, X, 0.5, T, T)),
    ("trajectory_step: guidance must be", lambda: tk.trajectory_step(X, X, T, T, 4.5)),
]


@pytest.mark.parametrize(("message", "call"), REFUSED)
def test_what_does_not_fit_is_named(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
