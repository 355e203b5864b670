"""Options that save memory change no gradient; optimisers, trackers and their missing packages."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tbcm.config import TrainConfig
from tbcm.distiller import Distiller
from tbcm.errors import UserError
from tbcm.models import load_teacher
from tbcm.train import load_prompts, train


def settings(out: Path, **changes: object) -> TrainConfig:
    """A run of a few quick steps."""
    quick = {
        "train_batch_size": 4, "route_steps": 4, "max_train_steps": 2, "lr_warmup_steps": 0,
        "learning_rate": 1e-3, "tangent_warmup_steps": 0, "scm_cfg_scale": [1.5],
        "validation_samples": 4, "validation_steps": 0,
    }  # fmt: skip
    return TrainConfig(**{"output_dir": str(out), **quick, **changes})


def distiller(config: TrainConfig) -> Distiller:
    """The parts of a run without its folder."""
    return Distiller(config, load_teacher("digits"), load_prompts(config))


def saved_bytes(parts: Distiller) -> tuple[int, list[Tensor]]:
    """What the largest pass keeps for backward, and the gradients of a first step."""
    sizes: list[int] = []
    forward = parts.forward

    def watched(*args: object) -> object:
        found: dict[int, torch.UntypedStorage] = {}

        def pack(x: Tensor) -> Tensor:
            if not x._is_zerotensor():
                storage = x.untyped_storage()
                found[storage.data_ptr()] = storage  # held, so that no address returns
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = forward(*args)
        sizes.append(sum(storage.nbytes() for storage in found.values()))
        return result

    parts.forward = watched
    loss, norms = parts.gradients(1.0)
    return max(sizes), [loss, norms.sort().values, *(p.grad for p in parts.parameters)]


SAVERS = {
    "gradient_checkpointing": True, "points_per_pass": 2, "gradient_accumulation_steps": 4,
}  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("saver", SAVERS)
def test_saving_memory_changes_no_gradient(saver: str, fused: bool, tmp_path: Path):
    whole, want = saved_bytes(distiller(settings(tmp_path, fused=fused)))
    config = settings(tmp_path, fused=fused, **{saver: SAVERS[saver]})
    less, got = saved_bytes(distiller(config))
    assert less < 0.8 * whole
    for mine, its in zip(got, want, strict=True):
        scale = its.abs().max().item()
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=2e-5 * scale + 1e-9)


def test_each_prompt_has_its_own_jitter(tmp_path: Path):
    times = distiller(settings(tmp_path)).draw().times
    assert torch.equal(times[:, 0], times[0, :1].expand(4))
    assert all(len(set(column.tolist())) == 4 for column in times[:, 1:].T)
    shared = distiller(settings(tmp_path, jitter_each_prompt=False)).draw().times
    assert torch.equal(shared, shared[:1].expand_as(shared))


def test_a_missing_package_is_named_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for option in ({"optimizer": "came"}, {"optimizer": "adamw_8bit"}, {"report_to": "wandb"}):
        for name in ("came_pytorch", "bitsandbytes", "wandb"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=r"needs a package that is not here.*pip install"):
            train(settings(tmp_path / "run", **option))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("optimizer", "package"), [("came", "came_pytorch"), ("adamw_8bit", "bitsandbytes")]
)
def test_other_optimisers_train_and_continue_bit_for_bit(
    optimizer: str, package: str, tmp_path: Path
):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    config = settings(tmp_path, optimizer=optimizer, fused=True)
    straight = distiller(config)
    straight.train_step()
    state = copy.deepcopy(straight.state())
    rows = [straight.train_step() for _ in range(2)]
    resumed = distiller(config)
    resumed.load_state(state)
    again = [resumed.train_step() for _ in range(2)]
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    for mine, its in zip(resumed.parameters, straight.parameters, strict=True):
        assert torch.equal(mine, its)


def test_tensorboard_has_the_losses_and_the_grids(tmp_path: Path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(settings(tmp_path / "run", report_to="tensorboard"))
    events = reader.EventAccumulator(str(tmp_path / "run" / "tbcm"))
    events.Reload()
    losses = [event.step for event in events.Scalars("loss")]
    assert losses == [1, 2] and len(events.Images("samples")) == 1
