"""Two processes do what one does: the same samples, and losses and weights equal to rounding."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.normalization import AdaLayerNormContinuous, RMSNorm
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.torch_version import TorchVersion

import tbcm_kernels as tk
from tbcm import distributed
from tbcm.config import TrainConfig
from tbcm.distiller import Distiller
from tbcm.distributed import check_alike, check_shares
from tbcm.errors import UserError
from tbcm.models import load_teacher
from tbcm.train import train

QUICK = {
    "train_batch_size": 4, "route_steps": 3, "max_train_steps": 3, "checkpointing_steps": 2,
    "lr_warmup_steps": 0, "learning_rate": 1e-3, "tangent_warmup_steps": 0,
    "scm_cfg_scale": [1.0, 1.5], "ema_decay": 0.9, "validation_steps": 0, "validation_samples": 2,
}  # fmt: skip
SPRINT = {"method": "sana_sprint", "fused": True}
RUNS = {
    "ddp": {},
    "ddp_fused": {"fused": True, "gradient_accumulation_steps": 2, "points_per_pass": 1},
    "fsdp": {"fsdp": True},
    "fsdp_fused": {"fsdp": True, "fused": True},
    "sprint": SPRINT,
    "sprint_fsdp": {**SPRINT, "fsdp": True},
    "from_one": {"fsdp": True, "fused": True, "resume_from_checkpoint": "step-000002"},
}
"""What each run of two processes changes."""
if torch.__version__ < (2, 13):  # refused there: a sharded model had no torch.func.jvp
    del RUNS["fsdp"]


def settings(run: Path, **changes: object) -> TrainConfig:
    """A run of a few quick steps."""
    return TrainConfig(str(run), **{**QUICK, **changes})


def process(rank: int, folder: str) -> None:
    """One of two processes: all the runs, one after the other, and one that a process is told to
    stop."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}

    def meet(name: str) -> None:
        meeting = f"file://{folder}/meeting_{name}"
        torch.distributed.init_process_group(
            "gloo", meeting, timedelta(seconds=60), rank=rank, world_size=2
        )

    for name, changes in RUNS.items():
        meet(name)
        train(settings(Path(folder) / name, **changes))
    step = Distiller.train_step

    def told(self: Distiller) -> dict:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    if rank == 1:
        Distiller.train_step = told
    meet("told")
    with pytest.raises(UserError, match="Told to stop: step 1 is saved"):
        train(settings(Path(folder) / "told"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs; "one" and "sprint_one" are what a single process does."""
    folder = tmp_path_factory.mktemp("runs")
    train(settings(folder / "one"))
    train(settings(folder / "sprint_one", **SPRINT))
    train(settings(folder / "from_one", max_train_steps=2))
    processes = torch.multiprocessing.spawn(process, (str(folder),), 2, join=False, daemon=True)
    end = time.monotonic() + 120
    while not processes.join(timeout=5):  # raises what a process raises, and ends the other
        assert time.monotonic() < end, "the processes hang"
    return folder


def rows(run: Path) -> list[dict]:
    """The records of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state(run: Path, step: int = 3) -> dict:
    """A checkpoint."""
    return torch.load(run / f"checkpoints/step-{step:06d}/state.pt", weights_only=True)


def assert_same_run(run: Path, other: Path) -> None:
    """Records, weights and averaged weights differ by rounding."""
    for mine, its in zip(rows(run), rows(other), strict=True):
        for key in ("loss", "g_norm", "grad_norm"):
            # SANA-Sprint's loss is a sum of two that can cancel.
            size = abs(its[key]) + (key == "loss") * 0.5 * abs(its.get("adv_loss", 0.0))
            assert mine[key] == pytest.approx(its[key], abs=1e-4 * size), (key, mine["step"])
    a, b = state(run), state(other)
    moved = QUICK["learning_rate"] * QUICK["max_train_steps"]
    for name, weight in b["student"].items():
        # AdamW turns a gradient that is all rounding into a step of either sign.
        apart = (a["student"][name] - weight).abs()
        assert apart.mean() < 0.02 * moved and apart.max() <= 2 * moved, name
    for mine, its in zip(a["ema"]["shadow_params"], b["ema"]["shadow_params"], strict=True):
        assert (mine - its).abs().mean() < 0.02 * moved
    assert torch.equal(a["generator"], b["generator"])


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(runs: Path, name: str):
    assert_same_run(runs / name, runs / ("sprint_one" if "sprint" in name else "one"))


def test_what_one_of_two_processes_was_told_stops_both(runs: Path):
    train(settings(runs / "told", resume_from_checkpoint="latest"))
    assert_same_run(runs / "told", runs / "one")


@pytest.mark.parametrize("name", ["ddp", "fsdp_fused"])
def test_one_process_continues_what_two_began(runs: Path, name: str):
    (runs / "metrics").mkdir(exist_ok=True)
    kept = (runs / name / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]
    run = runs / f"{name}_on_one"
    shutil.copytree(runs / name / "checkpoints/step-000002", run / "checkpoints/step-000002")
    (run / "metrics.jsonl").write_text("".join(kept))
    train(settings(run, resume_from_checkpoint="step-000002"))
    assert_same_run(run, runs / "one")


def test_processes_that_were_given_other_things_are_refused(monkeypatch: pytest.MonkeyPatch):
    there = [{"seed": 1, "prompts": "a"}, {"seed": 1, "prompts": "b"}]
    monkeypatch.setattr(distributed, "gather_object", lambda own: there)
    with pytest.raises(UserError, match="processes do not have the same prompts; give all"):
        check_alike(there[0])
    there[1]["prompts"] = "a"
    check_alike(there[0])


def test_settings_and_teacher_are_compared_before_a_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compared = []
    monkeypatch.setattr(distributed, "check_alike", lambda found: compared.append(set(found)))
    monkeypatch.setattr("tbcm.train.check_alike", distributed.check_alike)
    train(settings(tmp_path / "run", max_train_steps=1))
    every = set().union(*compared)
    assert {"seed", "teacher's weights", "prompts or the text encoder", "view of None"} <= every
    assert not {"prompts", "output_dir", "validation_prompts"} & every


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_layers_leave_a_dtensor_to_pytorch_and_ops_refuse_it(mesh: DeviceMesh):
    x = torch.randn(2, 4, 16)
    shared = distribute_tensor(x, mesh, [Shard(1)])
    norms = nn.RMSNorm(16), nn.LayerNorm(16, elementwise_affine=False), nn.LayerNorm(16)
    for stock in (*norms, RMSNorm(16, 1e-6)):
        net = nn.Sequential(parallelize_module(stock, mesh, SequenceParallel()))
        want = stock(shared).full_tensor()
        with tk.fuse(net):
            torch.testing.assert_close(net(shared).full_tensor(), want)
    net = distribute_module(AdaLayerNormContinuous(16, 16, elementwise_affine=False), mesh)
    samples = [distribute_tensor(v, mesh, [Shard(0)]) for v in (x, x[:, 0])]
    want = net(*samples).full_tensor()
    with tk.fuse(net):
        torch.testing.assert_close(net(*samples).full_tensor(), want)
    for op in (tk.rms_norm, tk.adaln, lambda x: tk.attention(x[None], x[None], x[None])):
        with pytest.raises(
            ValueError, match=r"[xq] is a DTensor; give its own part, [xq].to_local"
        ):
            op(shared)
    torch.testing.assert_close(tk.linear(shared, shared[0]).full_tensor(), F.linear(x, x[0]))


def test_text_of_a_sharded_model_is_encoded_once_it_is_whole(mesh: DeviceMesh):
    net = load_teacher("digits").transformer
    text = torch.randn(2, 5, net.config.caption_channels)
    handle = tk.fuse(net)
    with torch.no_grad():
        want = handle.encode_text(text).keys[0][0]
        fully_shard(net, mesh=mesh)
        with pytest.raises(RuntimeError, match=r"this model is sharded.*unshard\(\) before"):
            handle.encode_text(text)
        net.unshard()
        torch.testing.assert_close(handle.encode_text(text).keys[0][0], want)


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match=r"train_batch_size .* 3 must become a multiple of 4"):
        check_shares(settings(Path(), train_batch_size=3, gradient_accumulation_steps=2), 2)
    with pytest.raises(UserError, match="fsdp shares a model among processes"):
        check_shares(settings(Path(), fsdp=True), 1)


def test_an_old_pytorch_shards_no_plain_tangent_pass(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0"))
    check_shares(settings(Path(), fsdp=True, fused=True), 2)
    with pytest.raises(UserError, match="fsdp without fused needs PyTorch"):
        check_shares(settings(Path(), fsdp=True), 2)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_accelerate_s_own_ways_to_share_are_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=f"Leave {name} out of accelerate's own settings"):
        distributed.make_accelerator(settings(Path()))


def test_another_process_learns_what_the_main_one_found(monkeypatch: pytest.MonkeyPatch):
    other = SimpleNamespace(is_main_process=False)
    for result, error in (("found", None), (None, "output_dir is not empty")):
        told = [result, error]
        monkeypatch.setattr(
            distributed, "broadcast_object_list", lambda x, told=told: x.__setitem__(slice(2), told)
        )
        refused = pytest.raises(UserError, match=error) if error else nullcontext()
        with refused:
            assert distributed.on_main(other, lambda: pytest.fail("not here")) == result
