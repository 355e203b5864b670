"""The fused SANA model as training uses it: true widths, bf16, saved bytes, checkpointing, DDP."""

from __future__ import annotations

import copy
import faulthandler
import gc
import os
import time
import unittest.mock
import weakref
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from diffusers import SanaTransformer2DModel
from saved import saved, size
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tbcm_kernels as tk
from tbcm_kernels import sana

WIDTHS = {"0.6B": (36, 16, 72), "1.6B": (70, 20, 112)}
"""Heads of linear attention (32 wide), heads of cross-attention and their width."""
Result = tuple[Tensor, Tensor, dict[str, Tensor]]


def _model(heads: int, cross: int, cross_width: int, layers: int = 2) -> SanaTransformer2DModel:
    torch.manual_seed(0)
    return SanaTransformer2DModel(
        in_channels=32, out_channels=32, num_attention_heads=heads, attention_head_dim=32,
        num_layers=layers, num_cross_attention_heads=cross, cross_attention_head_dim=cross_width,
        cross_attention_dim=heads * 32, caption_channels=24, mlp_ratio=2.5, sample_size=16,
        patch_size=1, qk_norm="rms_norm_across_heads", guidance_embeds=True,
    )  # fmt: skip


def _inputs(side: int = 16, text: int = 20, batch: int = 1) -> tuple[Tensor, ...]:
    """x, t, text, mask, guidance; then tangents of x and t, and a cotangent."""
    torch.manual_seed(1)
    x, tx, cotangent = torch.randn(3, batch, 32, side, side + 2)
    t, tt = torch.linspace(0.3, 0.9, batch), torch.full((batch,), 0.7)
    mask = (torch.arange(text) < text - 3).float().expand(batch, text).clone()
    guidance = torch.full((batch,), 0.45)
    return x, t, torch.randn(batch, text, 24), mask, guidance, tx, tt, cotangent


def _dual_pass(model: Callable, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    x, t, text, mask, guidance, tx, tt, _ = inputs

    def function(x: Tensor, t: Tensor) -> Tensor:
        return model(
            x, encoder_hidden_states=text, timestep=t, encoder_attention_mask=mask,
            guidance=guidance, return_dict=False,
        )[0]  # fmt: skip

    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(function, (x, t), (tx, tt))


def _stock_pass(model: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """On CUDA the tangent of a LayerNorm in bf16 is fp32, which convolutions refuse; not here."""
    forward = torch.nn.LayerNorm.forward
    rounded = lambda module, x: forward(module, x).float().to(x.dtype)  # noqa: E731
    with unittest.mock.patch.object(torch.nn.LayerNorm, "forward", rounded):
        return _dual_pass(model, inputs)


def _step(
    model: torch.nn.Module, inputs: tuple[Tensor, ...], dual_pass: Callable = _dual_pass
) -> Result:
    """Value, tangent and all gradients of a projection of the value: a semi-gradient step."""
    model.zero_grad()
    with tk.stop_tangent_gradient():
        value, tangent = dual_pass(model, inputs)
    value.backward(inputs[-1].to(value.dtype))
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    return value.detach(), tangent.detach(), grads


def _to(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype) for x in inputs)


def _error(got: Tensor, want: Tensor) -> float:
    return (got.double() - want).square().mean().sqrt().item()


@pytest.fixture
def exact_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock linear attention casts to fp32; here fp64 stays fp64."""
    narrow = torch.Tensor.float
    keep = lambda x: x if x.dtype == torch.float64 else narrow(x)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "float", keep)


@pytest.mark.timeout(600)  # PyTorch's g @ w in bf16 makes 0.5 GFLOP/s on a core with AVX2 alone
@pytest.mark.usefixtures("exact_stock", "one_thread")
@pytest.mark.parametrize("size", WIDTHS)
def test_no_further_from_the_truth_than_stock(size: str) -> None:
    """In fp32 and bf16, where stock in fp64 on the same rounded weights and inputs is the truth.

    The error of PyTorch's products varies tenfold with threads; one thread is fair to both.
    """
    low = _model(*WIDTHS[size]).bfloat16()
    inputs = _to(_inputs(side=10), torch.bfloat16)
    truth = _step(copy.deepcopy(low).double(), _to(inputs, torch.float64))
    for dtype in (torch.bfloat16, torch.float32):
        model = low.to(dtype)
        stock = _step(model, _to(inputs, dtype), _stock_pass)
        with tk.fuse(model):
            fused = _step(model, _to(inputs, dtype))
        assert fused[0].dtype == fused[1].dtype == dtype
        names = ("value", "tangent", *truth[2])
        rows = zip(names, *(_flat(r) for r in (fused, stock, truth)), strict=True)
        errors = {n: (_error(f, t), _error(s, t)) for n, f, s, t in rows}
        worse = {n: e for n, e in errors.items() if e[0] > 1.25 * e[1]}
        # Keys' biases cancel in softmax: their true gradient is zero and both hold rounding.
        assert {n for n in worse if not n.endswith("attn2.to_k.bias")} == set(), (dtype, worse)


def _flat(result: Result) -> list[Tensor]:
    return [*result[:2], *result[2].values()]


@pytest.mark.parametrize(("autocast", "most"), [(False, 16), (True, 9.5)])
def test_a_block_saves_sixteen_residual_streams(autocast: bool, most: float) -> None:
    """Bytes kept for backward by one block of SANA 0.6B with 1024 tokens and 300 of text; under
    bf16 autocast, whose casts of the weights are not counted, those of nine and a half.
    """
    inputs = _inputs(side=31, text=300)  # 31 x 33 = 1023 tokens
    kept = []
    for layers in (1, 2):
        model = _model(*WIDTHS["0.6B"], layers=layers)
        context = torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=autocast)
        with tk.fuse(model), context:
            kept.append(_saved_bytes(model, inputs))
    dense = [w for w in model.transformer_blocks[0].parameters() if w[0].numel() > 9]
    casts = sum(2 * w.numel() for w in dense if autocast)
    stream = 31 * 33 * 1152 * 4
    assert 0.8 * most < (kept[1] - kept[0] - casts) / stream <= most


def _saved_bytes(model: torch.nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Of the storages that autograd holds, parameters not counted."""
    x, t, text, mask, guidance, tx, tt, _ = inputs
    with saved() as kept, tk.stop_tangent_gradient(), fwAD.dual_level():
        model(
            fwAD.make_dual(x, tx), encoder_hidden_states=text, timestep=fwAD.make_dual(t, tt),
            encoder_attention_mask=mask, guidance=guidance,
        )  # fmt: skip
    return size(kept, model.parameters())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("side", [3, 16])
def test_checkpointing_gives_the_same_bits(side: int, compiled: bool) -> None:
    """Below and above the length from which inputs of linear maps are computed again."""
    model, inputs = _model(2, 2, 16), _inputs(side=side, batch=2)
    with tk.fuse(model):
        want = _step(model, inputs)
        model.enable_gradient_checkpointing()
        torch._dynamo.reset()
        compiler = torch.compile(backend="aot_eager", fullgraph=True, disable=not compiled)
        got = _step(model, inputs, compiler(_dual_pass))
    for a, b in zip(_flat(got), _flat(want), strict=True):
        _same(a, b)


def _same(a: Tensor, b: Tensor) -> None:
    """The same bits on a CPU; cuBLAS may round x alone unlike x and its tangent in one product."""
    close = 1e-5 * b.abs().max() if b.is_cuda else 0
    assert (a - b).abs().max() <= close


def test_checkpointing_computes_primals_alone_again_and_saves_the_rest() -> None:
    model, inputs = _model(2, 2, 16, layers=4), _inputs(side=8)
    counts, kept = [], []
    with tk.fuse(model):
        for checkpointing in (False, True):
            if checkpointing:
                model.enable_gradient_checkpointing()
            kept.append(_saved_bytes(model, inputs))
            with tk.stop_tangent_gradient(), FlopCounterMode(display=False) as forward:
                value, _ = _dual_pass(model, inputs)
            with FlopCounterMode(display=False) as backward:
                value.sum().backward()
            counts.append(backward.get_total_flops())
    again = (counts[1] - counts[0]) / forward.get_total_flops()
    assert 0.3 < again < 0.52  # a dual pass is two products where a primal one is one
    assert kept[1] < 0.35 * kept[0]


def test_checkpointing_keeps_no_tangents(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = _model(2, 2, 16), _inputs()
    model.enable_gradient_checkpointing()
    block, seen = sana._block, []

    def watched(block_: torch.nn.Module, stream: sana.Stream, *rest: object) -> sana.Stream:
        seen.extend(weakref.ref(tangent) for _, tangent in stream if tangent is not None)
        return block(block_, stream, *rest)

    monkeypatch.setattr(sana, "_block", watched)
    x, t, text, mask, guidance, tx, tt, _ = inputs
    with tk.fuse(model), tk.stop_tangent_gradient(), fwAD.dual_level():
        value = model(
            fwAD.make_dual(x, tx), encoder_hidden_states=text, timestep=fwAD.make_dual(t, tt),
            encoder_attention_mask=mask, guidance=guidance, return_dict=False,
        )[0]  # fmt: skip
        value = fwAD.unpack_dual(value).primal
    gc.collect()
    assert len(seen) > 2 and [t for t in seen if t() is not None] == []
    value.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("side", [3, 16])
def test_runs_on_the_meta_device(side: int) -> None:
    model, inputs = _model(2, 2, 16).to("meta"), _inputs(side=side)
    with tk.fuse(model):
        value, tangent, _ = _step(model, tuple(x.to("meta") for x in inputs))
    assert value.shape == tangent.shape == inputs[0].shape


def test_checkpointing_through_the_tangent() -> None:
    model, inputs = _model(2, 2, 16), _inputs(side=3)
    found = []
    with tk.fuse(model):
        for checkpointing in (False, True):
            if checkpointing:
                model.enable_gradient_checkpointing()
            value, tangent = _dual_pass(model, inputs)
            loss = value.square().sum() + tangent.square().sum()
            found.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            _same(a, b)


def test_autocast_keeps_branches_and_norms_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, t, text, mask, guidance, *_) = _model(4, 2, 64), _inputs(batch=2)
    seen = []

    def spied(x: Tensor, h: Tensor | None, *rest: Tensor | None, **options: object) -> object:
        seen.append((x.dtype, None if h is None else h.dtype, options["dtype"]))
        return tk.adaln_jvp(x, h, *rest, **options)

    monkeypatch.setattr(sana, "adaln_jvp", spied)
    with tk.fuse(model), torch.autocast(x.device.type, torch.bfloat16):
        model(x, text, t, guidance, mask)
    narrow = torch.bfloat16
    assert set(seen) == {(torch.float32, None, narrow), (torch.float32, narrow, narrow)}


def test_autocast_agrees_with_fp32_as_stock_does() -> None:
    """fp32 weights under bf16 autocast, 288 tokens; linear attention stays fp32."""
    model, inputs = _model(4, 2, 64), _inputs(batch=2)
    truth = _step(model, inputs)

    def narrow(model: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        with torch.autocast(inputs[0].device.type, torch.bfloat16):  # of the forward pass alone
            return _dual_pass(model, inputs)

    def separately(model: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        # As people train: PyTorch's math attention cannot go back through autocast on CUDA.
        x, t, text, mask, guidance, *_ = inputs
        with torch.no_grad():
            _, tangent = narrow(model, inputs)
        with torch.autocast(x.device.type, torch.bfloat16):
            return model(x, text, t, guidance, mask, return_dict=False)[0], tangent

    stock = _step(model, inputs, separately if inputs[0].is_cuda else narrow)
    with tk.fuse(model):
        fused = _step(model, inputs, narrow)
    errors = {
        n: (_error(f, t.double()), _error(s, t.double()))
        for n, f, s, t in zip(
            ("value", "tangent", *truth[2]), _flat(fused), _flat(stock), _flat(truth), strict=True
        )
        if not n.endswith("attn2.to_k.bias")
    }
    assert {n: e for n, e in errors.items() if e[0] > 1.25 * e[1]} == {}


def _distributed(rank: int, meeting: str, path: str) -> None:
    """One of two processes: half of the batch each, gradients averaged by DDP."""
    faulthandler.dump_traceback_later(100)  # where it hangs, before the test gives up
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", f"file://{meeting}", timedelta(seconds=60), rank=rank, world_size=2
    )
    model = _model(2, 2, 16)
    tk.fuse(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    inputs = _inputs(batch=2)
    half = tuple(x[rank : rank + 1] for x in inputs)
    result = _step(wrapped, half)
    if rank == 0:
        torch.save({n.removeprefix("module."): g for n, g in result[2].items()}, path)
    # DDP's destructor holds the GIL. Were it the last to hold the process group, it would join
    # gloo's thread, which may wait for the GIL to let go of its last work.
    del wrapped
    torch.distributed.destroy_process_group()


def test_data_parallel_processes_average_gradients(tmp_path) -> None:
    path = str(tmp_path / "gradients.pt")
    arguments = (str(tmp_path / "meeting"), path)
    processes = torch.multiprocessing.spawn(_distributed, arguments, 2, join=False, daemon=True)
    end = time.monotonic() + 120
    while not processes.join(timeout=5):  # raises what a process raises, and ends the other
        assert time.monotonic() < end, "the processes hang"
    with torch.device("cpu"):  # as in the processes
        model = _model(2, 2, 16)
        with tk.fuse(model):
            want = _step(model, _inputs(batch=2))[2]
    for name, got in torch.load(path, map_location="cpu").items():
        largest = want[name].abs().max()
        assert (2 * got - want[name]).abs().max() <= 1e-4 * largest + 1e-7, name
