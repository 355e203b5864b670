"""Ops under torch.func.vmap: what they refuse, and that the mend is one."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import tbcm_kernels as tk


def test_inside_jvp_raises_with_the_mend() -> None:
    """The mend that it names is one: the reference's products are those of jvp inside vmap."""
    x, tx = torch.randn(2, 3, 1, 4, 8)
    taps, t = torch.randn(8, 1, 3, 3), torch.rand(1)
    ops = {
        "linear": lambda x: F.linear(x, torch.ones(6, 8)),
        "rms_norm": tk.rms_norm,
        "adaln": lambda x, **impl: tk.adaln(x, x.sin(), **impl)[1],
        "conv_glu": lambda x, **impl: tk.conv_glu(x, taps, height=2, width=2, **impl),
        "attention": lambda x, **impl: tk.attention(x, x.sin(), x.cos(), **impl),
        "linear_attention": lambda x, **impl: tk.linear_attention(
            x[None], x[None], x[None], **impl
        ),
        "flow_input": lambda x, **impl: tk.flow_input(x, t, **impl)[0],
        "flow_output": lambda x, **impl: tk.flow_output(x, x.sin(), t, **impl),
    }
    for name, f in ops.items():
        plain = f if name == "linear" else functools.partial(f, impl="reference")
        ours = (lambda x: tk.linear(x, torch.ones(6, 8))) if name == "linear" else f
        with pytest.raises(RuntimeError, match="put jvp inside vmap"):
            torch.func.jvp(torch.func.vmap(ours), (x,), (tx,))
        got = torch.func.jvp(torch.func.vmap(plain), (x,), (tx,))
        want = torch.func.vmap(lambda x, tx: torch.func.jvp(ours, (x,), (tx,)))(x, tx)  # noqa: B023
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)


def test_over_nothing_raises() -> None:
    with pytest.raises(ValueError, match="at least one element"):
        torch.vmap(tk.rms_norm)(torch.randn(0, 3, 8))
