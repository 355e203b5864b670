"""Options that save memory change no gradient; optimisers, trackers and their missing packages."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from saved import saved, size
from test_train import distiller
from torch import Tensor
from torch.nn.utils import parametrize

from tbcm.config import TrainConfig
from tbcm.distiller import Distiller
from tbcm.errors import UserError
from tbcm.models import load_teacher
from tbcm.optimizer import make_optimizer
from tbcm.progress import Log
from tbcm.student import build_student
from tbcm.text import load_prompts
from tbcm.train import train
from tbcm.trigflow import TrigFlow


def settings(out: Path, **changes: object) -> TrainConfig:
    """A run of a few quick steps."""
    quick = {
        "train_batch_size": 4, "route_steps": 4, "max_train_steps": 2, "lr_warmup_steps": 0,
        "learning_rate": 1e-3, "tangent_warmup_steps": 0, "scm_cfg_scale": [1.5],
        "validation_samples": 4, "validation_steps": 0,
    }  # fmt: skip
    return TrainConfig(**{"output_dir": str(out), **quick, **changes})


def saved_bytes(parts: Distiller) -> tuple[int, list[Tensor]]:
    """What the largest pass keeps for backward, and the gradients of a first step."""
    sizes: list[int] = []
    forward = parts.forward

    def watched(*args: object) -> object:
        with saved() as kept:
            result = forward(*args)
        sizes.append(size(kept))
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


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (torch.full((1, 8, 8), torch.nan), r"\(1, 8, 8\) in .*; it must .* finite real"),
        (torch.zeros(1, 8, 8, dtype=torch.complex64), r"in torch.complex64; it must .* real"),
        (torch.zeros(1, 8, 9), r"is \(1, 8, 9\) in .*; it must have the shape of .*\(1, 8, 8\)"),
        ([1.0], "it holds no saved tensor"),
    ],
)
def test_a_filter_that_is_no_latent_is_refused(content: object, says: str, tmp_path: Path):
    path = tmp_path / "latent.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match=says):
        distiller(settings(tmp_path, filter_latent=str(path)))


def test_a_filter_of_whole_numbers_is_taken(tmp_path: Path):
    path = tmp_path / "latent.pt"
    torch.save(torch.ones(1, 8, 8, dtype=torch.uint8), path)
    taken = distiller(settings(tmp_path, filter_latent=str(path))).filter_latent
    assert taken.dtype == torch.float32 and taken.eq(1).all()


def test_came_has_the_released_betas(monkeypatch: pytest.MonkeyPatch):
    given = SimpleNamespace(CAME=lambda parameters, rate, **options: (parameters, rate, options))
    monkeypatch.setitem(sys.modules, "came_pytorch", given)
    config = settings(
        Path(), optimizer="came", adam_beta1=0.8, adam_beta2=0.95, adam_weight_decay=0.2
    )
    options = {"betas": (0.8, 0.95, 0.9999), "weight_decay": 0.2}
    assert make_optimizer([], config) == ([], 1e-3, options)


def test_adamw_has_the_settings_in_32_and_in_8_bits(monkeypatch: pytest.MonkeyPatch):
    given = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-3, "adam_weight_decay": 0.2}
    whole = make_optimizer([torch.nn.Parameter(torch.ones(1))], settings(Path(), **given))
    names = ("lr", "betas", "eps", "weight_decay")
    found = tuple(whole.defaults[name] for name in names)
    package = SimpleNamespace(AdamW8bit=lambda parameters, *settings: settings)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", package)
    narrow = make_optimizer([], settings(Path(), optimizer="adamw_8bit", **given))
    assert found == narrow == (1e-3, (0.8, 0.95), 1e-3, 0.2)


def test_a_missing_package_is_named_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tbcm.train.load_prompts", lambda config: pytest.fail("too late"))
    options = (
        ("optimizer", "came", "came_pytorch"),
        ("optimizer", "adamw_8bit", "bitsandbytes"),
        ("report_to", "wandb", "wandb"),
    )
    for option, value, name in options:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(UserError, match=r"needs a package that is not here.*pip install"):
                train(settings(tmp_path / "run", **{option: value}))
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


def test_a_lora_student_starts_as_its_teacher_and_shares_its_weights(tmp_path: Path):
    parts = distiller(settings(tmp_path, lora_rank=4, fused=True))
    teachers = {p.data_ptr() for p in parts.teacher.transformer.parameters()}
    frozen = {p.data_ptr() for p in parts.student.parameters() if not p.requires_grad}
    assert frozen <= teachers and len(frozen) > 0.9 * len(teachers)
    learning = sum(p.numel() for p in parts.learning)
    assert learning < 0.2 * sum(p.numel() for p in parts.student.parameters())
    x, t, text = torch.randn(2, 1, 8, 8), torch.tensor([0.4, 1.2]), parts.text([0, 1])
    with torch.no_grad():
        out = parts.student_net(x, t, *text, torch.ones(2))
        torch.testing.assert_close(out, parts.teacher_net(x, t, *text), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_fused_lora_student_has_the_gradients_of_the_stock_one(
    checkpointing: bool, tmp_path: Path
):
    found = []
    for fused in (False, True):
        changes = {"lora_rank": 2, "gradient_checkpointing": checkpointing, "fused": fused}
        parts = distiller(settings(tmp_path, **changes))
        for name, p in parts.student.named_parameters():
            if name.endswith(".up"):  # zero at first, which would hide A
                torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(0))
        loss, _ = parts.gradients(1.0)
        found.append([loss, *(p.grad for p in parts.learning)])
    for mine, stock in zip(found[1], found[0], strict=True):
        scale = stock.abs().max().item()
        torch.testing.assert_close(mine, stock, rtol=1e-3, atol=1e-4 * scale + 1e-9)


def test_a_lora_student_learns_continues_and_is_saved_merged(tmp_path: Path):
    config = settings(tmp_path / "run", lora_rank=4, fused=True, max_train_steps=4, ema_decay=0.9)
    teacher = load_teacher("digits")
    before = [p.clone() for p in teacher.transformer.parameters()]
    straight = Distiller(config, teacher, load_prompts(config))
    straight.train_step()
    state = copy.deepcopy(straight.state())
    rows = [straight.train_step() for _ in range(2)]
    assert all(
        torch.equal(a, b) for a, b in zip(before, teacher.transformer.parameters(), strict=True)
    )
    resumed = distiller(config)
    resumed.load_state(state)
    assert [resumed.train_step()["loss"] for _ in rows] == [row["loss"] for row in rows]
    saved, text = TrigFlow(straight.whole_student()), straight.text([0, 1])
    assert (
        saved.transformer.state_dict().keys()
        == build_student(teacher.transformer).state_dict().keys()
    )
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.4, 1.2])
    with torch.no_grad(), straight.averaged_weights():
        want = straight.student_net(x, t, *text, torch.ones(2))
        teachers = straight.teacher_net(x, t, *text)
        torch.testing.assert_close(saved(x, t, *text, torch.ones(2)), want, rtol=1e-4, atol=1e-5)
    assert (want - teachers).abs().max() > 1e-3
    layers = dict(straight.student.named_modules())
    adapted = {name for name, layer in layers.items() if parametrize.is_parametrized(layer)}
    assert adapted == {name for name in layers if re.search(r"attn\d\.to_([qkv]|out\.0)$", name)}
    for name in adapted:
        (low_rank,) = layers[name].parametrizations.weight
        change = low_rank.up @ low_rank.down
        assert change.abs().max() > 0, name
        base = layers[name].parametrizations.weight.original
        torch.testing.assert_close(layers[name].weight, base + change)


def test_long_validation_prompts_are_refused_before_the_prompts_are_encoded(tmp_path: Path):
    shown, prompts = tmp_path / "shown.txt", tmp_path / "prompts.txt"
    shown.write_text("seven " * 40)
    prompts.write_text("also " * 50)
    config = settings(tmp_path, prompts=str(prompts), validation_prompts=str(shown))
    with pytest.raises(UserError, match="41 tokens"):
        distiller(config)


def test_grids_show_the_validation_prompts(tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the digit 3\n")
    shown = distiller(settings(tmp_path, validation_prompts=str(prompts)))
    own = distiller(settings(tmp_path))
    row = own.prompts.index("the digit 3")
    for a, b in zip(shown.shown.text([0]), own.text([row]), strict=True):
        assert torch.equal(a, b)
    assert len(shown.shown) == 1 and own.shown == own.embeddings == shown.embeddings
    assert not torch.equal(shown.sample(2, 1), own.sample(2, 1))


def test_validation_prompts_come_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the digit 3\nthe digit 4\nthe digit 5\n")
    parts = distiller(settings(tmp_path, validation_prompts=str(prompts)))
    text, asked = parts.shown.text, []
    monkeypatch.setattr(parts.shown, "text", lambda rows: asked.extend(rows) or text(rows))
    parts.sample(7, 1)
    assert asked == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("name", ["init_trackers", "log", "end_training"])
def test_a_tracker_that_fails_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorboard")

    def full(*_: object, **__: object) -> None:
        raise ValueError("no key")

    monkeypatch.setattr(Accelerator, name, full)
    with pytest.raises(UserError, match=r"report_to tensorboard failed \(no key\); .*latest"):
        train(settings(tmp_path / "run", report_to="tensorboard"))
    monkeypatch.undo()
    train(settings(tmp_path / "run", resume_from_checkpoint="latest"))


def test_tensorboard_has_the_losses_and_the_grids(tmp_path: Path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    quick = {"report_to": "tensorboard", "checkpointing_steps": 1}
    train(settings(tmp_path / "run", **quick))
    events = reader.EventAccumulator(str(tmp_path / "run" / "tbcm"))
    events.Reload()
    losses = [event.step for event in events.Scalars("loss")]
    assert losses == [1, 2] and len(events.Images("samples")) == 1
    # What a run that goes back does again, it tells once.
    train(settings(tmp_path / "run", resume_from_checkpoint="step-000001", **quick))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path: Path):
    told = []
    accelerator = SimpleNamespace(
        is_main_process=True, init_trackers=lambda name, scalars, options: told.append(options)
    )
    for run in ("one", "one", "two"):
        (tmp_path / run).mkdir(exist_ok=True)
        Log(settings(tmp_path / run, report_to="wandb"), accelerator, 0)
    first, again, other = (options["wandb"] for options in told)
    assert first == again and first["resume"] == "allow" and first["dir"] == str(tmp_path / "one")
    assert len(first["id"]) == 32 and other["id"] != first["id"]
