"""Kill, resume, damage: a continued run is the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_pipeline
import torch
from accelerate import Accelerator
from filelock import FileLock
from safetensors.torch import load_file, save_file

from tbcm import checkpoint
from tbcm.config import TrainConfig
from tbcm.distiller import Distiller
from tbcm.errors import UserError
from tbcm.files import check_writable, content, write_whole
from tbcm.models import load_teacher
from tbcm.train import stop_signals, train

QUICK = {
    "train_batch_size": 1, "route_steps": 3, "lr_warmup_steps": 3, "learning_rate": 1e-3,
    "tangent_warmup_steps": 4, "scm_cfg_scale": [1.0, 1.5], "ema_decay": 0.9,
    "checkpointing_steps": 3, "validation_steps": 0, "validation_samples": 2,
}  # fmt: skip


def settings(out: Path, steps: int = 8, resume: str | None = None, **more: object) -> TrainConfig:
    """A quick run; the schedule does not depend on its length."""
    return TrainConfig(
        str(out), max_train_steps=steps, resume_from_checkpoint=resume, **{**QUICK, **more}
    )


def losses(run: Path) -> list[float]:
    """All losses of metrics.jsonl, which must hold every step once and in order."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps, checkpoints at 3, 6 and 8, that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(settings(run))
    return run


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of that run to do harm to."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_kill_9_and_resume_gives_the_same_losses(tmp_path: Path):
    """In the fused mode, which is the one that long runs use; the other tests run plain."""
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    config.write_text(settings(run, fused=True).dump())
    command = [sys.executable, "-m", "tbcm", "train", "--config", str(config)]
    process = subprocess.Popen(
        [*command, "--output_dir", str(run), "--max_train_steps", "5000", "--fused"],
        stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        while not (run / "checkpoints/step-000003").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    steps = (run / "metrics.jsonl").read_text().count("\n") + 5
    train(settings(run, steps, "latest", fused=True))
    train(settings(tmp_path / "straight", steps, fused=True))
    assert losses(run) == losses(tmp_path / "straight")
    ends = [
        torch.load(r / f"checkpoints/step-{steps:06d}/state.pt", weights_only=True)
        for r in (run, tmp_path / "straight")
    ]
    for name, weight in ends[0]["student"].items():
        assert torch.equal(weight, ends[1]["student"][name])


def zeros_inside(state: Path) -> None:
    """What a failing disc makes of a checkpoint: its weights are wrong and its archive is whole."""
    content = bytearray(state.read_bytes())
    half = len(content) // 2
    content[half : half + 4096] = bytes(4096)
    state.write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        lambda state: state.write_bytes(b"torn"),
        lambda state: torch.save({"step": 8}, state),
        zeros_inside,
    ],
)
def test_half_written_checkpoints_are_skipped_with_a_sentence(
    harm: Callable[[Path], object], whole: Path, copy: Path, capsys: pytest.CaptureFixture[str]
):
    states = copy / "checkpoints"
    harm(states / "step-000008" / "state.pt")
    (states / "step-000009.tmp").mkdir()
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    train(settings(copy, resume="latest"))
    said = capsys.readouterr().out
    assert "step-000009.tmp: a checkpoint that was not finished" in said
    assert "step-000008: it is half-written or damaged" in said
    assert losses(copy) == losses(whole)


def test_a_damaged_checkpoint_that_is_named_is_refused(copy: Path):
    zeros_inside(copy / "checkpoints" / "step-000006" / "state.pt")
    before = snapshot(copy)
    with pytest.raises(UserError, match=r"step-000006: it is half-written or damaged; give"):
        train(settings(copy, resume="step-000006"))
    assert snapshot(copy) == before


def test_a_checkpoint_that_cannot_be_opened_is_not_passed_over(
    copy: Path, monkeypatch: pytest.MonkeyPatch
):
    """For it may be whole, and the steps after the one before it would be lost."""
    before = snapshot(copy)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    for place in ("ZipFile", "acquire"):
        with monkeypatch.context() as patch:
            owner = checkpoint.zipfile if place == "ZipFile" else FileLock
            patch.setattr(owner, place, refuse)
            with pytest.raises(UserError, match=r"(state\.pt|output_dir .*): Permission denied;"):
                train(settings(copy, steps=9, resume="latest"))
    assert snapshot(copy) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_told_to_stop_saves_its_step(
    number: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step, before = Distiller.train_step, signal.getsignal(number)

    def told(self: Distiller) -> dict:
        record = step(self)
        if self.step == 4:
            os.kill(os.getpid(), number)
        return record

    monkeypatch.setattr(Distiller, "train_step", told)
    with pytest.raises(UserError, match="Told to stop: step 4 is saved; continue"):
        train(settings(tmp_path / "run"))
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    train(settings(tmp_path / "run", resume="latest"))
    assert losses(tmp_path / "run") == losses(whole)
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "check_trigger", lambda _: True)
        with pytest.raises(UserError, match="Told to stop before the first step; continue"):
            train(settings(tmp_path / "early", steps=1))
    train(settings(tmp_path / "early", steps=1, resume="latest"))
    # At its end it ends as it would have.
    monkeypatch.setattr(Distiller, "train_step", told)
    train(settings(tmp_path / "short", steps=4))
    assert (tmp_path / "short" / "student").exists()


def test_a_handler_that_python_has_not_set_stops_nothing(monkeypatch: pytest.MonkeyPatch):
    """`signal.signal` gives None for it, and takes no None."""
    given = []

    def set_handler(number: int, handler: object) -> None:
        if not callable(handler):
            raise TypeError("signal handler must be callable")
        given.append(number)

    monkeypatch.setattr("tbcm.train.signal.signal", set_handler)
    with stop_signals() as told:
        assert not told()
    assert given == [signal.SIGTERM, signal.SIGUSR1]


def test_going_back_sets_the_newer_checkpoints_aside(whole: Path, copy: Path):
    train(settings(copy, resume=str(copy / "checkpoints" / "step-000003")))
    assert losses(copy) == losses(whole)
    aside = copy / "checkpoints" / "step-000006.replaced"
    # Moved back, with its metrics, the abandoned future goes on.
    assert (aside / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    shutil.rmtree(copy / "checkpoints" / "step-000006")
    (aside / "metrics.jsonl").rename(copy / "metrics.jsonl")
    aside.rename(aside.with_suffix(""))
    train(settings(copy, resume="step-000006"))
    assert losses(copy) == losses(whole)


def test_run_stopped_before_its_first_checkpoint_starts_again(
    whole: Path, copy: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.rmtree(copy / "checkpoints")
    metrics = copy / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:4]))  # the third was followed by a checkpoint
    with pytest.raises(UserError, match="There is no checkpoint"):
        train(settings(copy, resume="latest"))
    metrics.write_text("".join(lines[:3]))
    with pytest.raises(UserError, match="seed = 0, not 1"):
        train(settings(copy, resume="latest", seed=1))
    train(settings(copy, resume="latest"))
    assert "stopped before its first checkpoint" in capsys.readouterr().out
    assert losses(copy) == losses(whole)


def test_longer_run_continues_and_says_so(copy: Path, capsys: pytest.CaptureFixture[str]):
    before = losses(copy)
    train(settings(copy, steps=9, resume="latest", fused=True))
    said = capsys.readouterr().out
    assert "Resuming with max_train_steps = 9; it was 8." in said
    assert "Resuming with fused = True; it was False." in said
    # Until the new end nothing draws with the student of the old one.
    assert "of an earlier end of this run, as student.replaced" in said
    assert (copy / "student").exists() and (copy / "student.replaced").exists()
    assert losses(copy)[:8] == before and len(losses(copy)) == 9


def test_a_setting_that_is_younger_than_the_run_has_its_default(whole: Path, copy: Path):
    for path in (copy / "checkpoints").glob("*/state.pt"):
        state = torch.load(path, weights_only=True)
        del state["config"]["seed"]
        torch.save(state, path)
    train(settings(copy, resume="step-000003"))
    assert losses(copy) == losses(whole)
    with pytest.raises(UserError, match="seed = 0, not 1"):
        train(settings(copy, resume="step-000003", seed=1))


def test_what_a_failed_start_leaves_is_no_run(tmp_path: Path):
    for name in (".lock", ".config.yaml.123.part"):
        (tmp_path / name).touch()
    theirs = tmp_path / ".holiday.part"
    for make in (theirs.touch, theirs.mkdir):
        make()
        with pytest.raises(UserError, match="is not empty"):
            train(settings(tmp_path, steps=1))
        theirs.unlink() if theirs.is_file() else theirs.rmdir()
    train(settings(tmp_path, steps=1))
    assert not list(tmp_path.rglob("*.part"))


def test_a_grid_that_was_not_drawn_is_drawn_on_resume(tmp_path: Path):
    run = tmp_path / "run"
    train(settings(run, steps=4, validation_steps=2, checkpointing_steps=2))
    last, middle = (run / "samples" / f"step-00000{n}.png" for n in (4, 2))
    want = {path: path.read_bytes() for path in (last, middle)}
    last.unlink()
    train(settings(run, 4, "latest", validation_steps=2, checkpointing_steps=2))
    assert last.read_bytes() == want[last]
    for path in want:
        path.unlink()
    train(settings(run, 4, "step-000002", validation_steps=2, checkpointing_steps=2))
    assert {path: path.read_bytes() for path in want} == want


def test_a_checkpoint_that_lies_elsewhere_is_the_run_s_own(copy: Path, tmp_path: Path):
    """Of a link that the limit removes, or another folder replaces, the link goes."""
    own, elsewhere = copy / "checkpoints", tmp_path / "big"
    elsewhere.mkdir()
    for name in ("step-000003", "step-000006", "step-000008"):
        shutil.move(own / name, elsewhere / name)
        (own / name).symlink_to(elsewhere / name)
    train(settings(copy, resume="step-000003", checkpoints_total_limit=1))
    for name in ("student", "student.replaced"):  # links whose folder has gone
        shutil.rmtree(copy / name, ignore_errors=True)
        (copy / name).symlink_to(tmp_path / "nowhere")
    assert [path.name for path in checkpoint.checkpoints(copy)] == ["step-000008"]
    link = tmp_path / "link"
    link.symlink_to(own / "step-000008")
    train(settings(copy, resume=str(link), steps=9, checkpoints_total_limit=1))
    assert len(list(elsewhere.iterdir())) == 3


def test_the_checkpoint_is_chosen_when_no_other_process_is_at_the_run(
    copy: Path, monkeypatch: pytest.MonkeyPatch
):
    held = []
    find = checkpoint.find_start

    def watched(config: TrainConfig) -> Path | None:
        with pytest.raises(UserError, match="Another process is at the run"):
            checkpoint.alone(copy).__enter__()
        held.append(True)
        return find(config)

    monkeypatch.setattr(checkpoint, "find_start", watched)
    train(settings(copy, steps=9, resume="latest"))
    assert held


def snapshot(run: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(p): p.read_bytes() for p in run.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"resume": None}, "is not empty"),
        ({"resume": "latest", "learning_rate": 2e-3}, "learning_rate = 0.001, not 0.002"),
        ({"resume": "latest", "ema_decay": 0.5}, "ema_decay = "),
        ({"resume": "latest", "gradient_clip": 0.7}, "gradient_clip = "),
        ({"resume": "latest", "mixed_precision": "bf16"}, "mixed_precision = no, not bf16"),
        ({"resume": "latest", "scm_cfg_scale": [2.5]}, "scm_cfg_scale = "),
        ({"resume": "latest", "train_batch_size": 4}, "train_batch_size = "),
        ({"resume": "step-000099"}, "step-000099: it is missing"),
        ({"resume": "latest", "steps": 7}, "is past max_train_steps 7"),
    ],
)
def test_wrong_start_is_refused_and_touches_nothing(copy: Path, changes: dict, says: str):
    before = snapshot(copy)
    with pytest.raises(UserError, match=says):
        train(settings(copy, **changes))
    assert snapshot(copy) == before


def test_another_run_s_checkpoint_is_refused_and_touches_nothing(whole: Path, copy: Path):
    before = snapshot(copy.parent)
    for out in (copy, copy.with_name("new")):
        with pytest.raises(UserError, match=r"step-000003 is not of the run in output_dir"):
            train(settings(out, resume=str(whole / "checkpoints" / "step-000003")))
    assert snapshot(copy.parent) == before and not copy.with_name("new").exists()


def test_a_run_that_another_process_is_at_is_refused(copy: Path):
    before = snapshot(copy)
    for lost in (None, copy / "config.yaml"):
        if lost:
            before.pop(str(lost))
            config = lost.read_bytes()
            lost.unlink()
        with FileLock(copy / ".lock"), pytest.raises(UserError, match="Another process is at"):
            train(settings(copy, steps=9, resume="latest"))
        assert snapshot(copy) == before
    lost.write_bytes(config)
    train(settings(copy, steps=9, resume="latest"))


def test_a_wrong_start_is_refused_before_long_work(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from tbcm import train as trainer

    monkeypatch.setattr(trainer, "load_prompts", lambda config: pytest.fail("too late"))
    (copy / "metrics.jsonl").unlink()
    for out, changes, says in (
        (tmp_path / "none", {}, "There is no run in .*none yet; leave out"),
        (copy, {"learning_rate": 2e-3}, "not 0.002"),
        (copy, {}, "does not hold every step"),
    ):
        with pytest.raises(UserError, match=says):
            train(settings(out, resume="latest", **changes))


def test_an_empty_config_file_is_said(copy: Path):
    shutil.rmtree(copy / "checkpoints")
    (copy / "config.yaml").write_text("")
    with pytest.raises(UserError, match="is not a run of"):
        train(settings(copy, resume="latest"))


def test_changed_prompts_are_refused(tmp_path: Path):
    run, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("the digit 3\n")
    train(settings(run, steps=1, prompts=str(prompts)))
    prompts.write_text("the digit 4\n")
    with pytest.raises(UserError, match="prompts or the text encoder are not those"):
        train(settings(run, resume="latest", prompts=str(prompts)))


def test_a_changed_teacher_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch):
    from tbcm import train as trainer

    teacher = load_teacher("digits")
    next(teacher.transformer.parameters()).data[0] += 1e-3
    monkeypatch.setattr(trainer, "teacher_of", lambda config: teacher)
    with pytest.raises(UserError, match="teacher's weights are not those of the checkpoint"):
        train(settings(copy, steps=9, resume="latest"))


def test_a_teacher_that_was_moved_is_the_same(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    moved = Path(shutil.copytree(tiny_teacher, tmp_path / "moved"))
    run = tiny_pipeline.distil(tiny_teacher, tmp_path, checkpointing_steps=2)
    shutil.rmtree(run / "checkpoints" / "step-000003")
    more = {"resume_from_checkpoint": "latest", "checkpointing_steps": 2}
    tiny_pipeline.distil(moved, tmp_path, **more)
    assert f"Resuming with pretrained_model_name_or_path = {moved}" in capsys.readouterr().out


@pytest.mark.parametrize(("what", "says"), [
    ("text_encoder", "prompts or the text encoder are"), ("filter", "numbers of filter_latent are"),
    ("transformer", "teacher's settings are"),
])  # fmt: skip
def test_what_else_a_run_is_made_from_must_be_the_same(
    what: str, says: str, tiny_teacher: Path, tmp_path: Path
):
    teacher, latent = tmp_path / "teacher", tmp_path / "latent.pt"
    shutil.copytree(tiny_teacher, teacher)
    torch.save(torch.zeros(4, 8, 8), latent)
    more = {"filter_latent": str(latent), "checkpointing_steps": 2}
    run = tiny_pipeline.distil(teacher, tmp_path, **more)
    shutil.rmtree(run / "checkpoints" / "step-000003")
    if what == "transformer":
        config = teacher / what / "config.json"
        made = json.loads(config.read_text())
        config.write_text(json.dumps(made | {"norm_eps": 0.1}))
    elif what == "filter":
        torch.save(torch.ones(4, 8, 8), latent)
    else:
        (file,) = (teacher / what).glob("*.safetensors")
        save_file({k: 2 * w for k, w in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"The {says} not those of the checkpoint"):
        tiny_pipeline.distil(teacher, tmp_path, resume_from_checkpoint="latest", **more)


def test_latest_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"There is no run in .*none yet; leave out"):
        train(settings(tmp_path / "none", resume="latest"))


def test_metrics_that_lost_steps_are_refused(copy: Path):
    (copy / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    before = snapshot(copy)
    for resume, step in (("latest", 8), ("step-000003", 3)):
        with pytest.raises(UserError, match=f"does not hold every step up to {step}"):
            train(settings(copy, resume=resume))
    assert snapshot(copy) == before


def test_limit_removes_the_oldest_after_a_save(tmp_path: Path):
    for step in (1, 999999, 1000000):
        checkpoint.save(tmp_path, step, dict.fromkeys(checkpoint.KEYS, step), limit=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-999999", "step-1000000"]
    assert checkpoint.latest(tmp_path)["step"] == 1000000


def test_failed_save_leaves_the_older_ones_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoint.save(tmp_path, 1, {"step": 1}, limit=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    says = "step-000002: No space left on device; mend that and continue with --resume_"
    with pytest.raises(UserError, match=says):
        checkpoint.save(tmp_path, 2, {"step": 2}, limit=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_a_checkpoint_and_what_it_counts_on_are_flushed_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flushed, sync = [], os.fsync

    def watched(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    train(settings(tmp_path / "run", steps=1))
    assert re.fullmatch(r"\.config\.yaml\.\d+\.part", flushed[0]) and flushed[1] == "run"
    kept = flushed[flushed.index("metrics.jsonl") :]
    assert kept[:4] == ["metrics.jsonl", "state.pt", "step-000001.tmp", "checkpoints"]


def test_the_students_files_can_be_read_as_the_others_can(whole: Path):
    """safetensors makes its own for their owner alone."""
    modes = {path.stat().st_mode for path in (whole / "student").iterdir()}
    assert modes == {(whole / "metrics.jsonl").stat().st_mode}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    write_whole(path, b"old")
    for module, name in ((os, "replace"), (Path, "write_bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(UserError, match="file: No space left on device"):
                write_whole(path, b"new")
        assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_what_is_no_file_stays_what_it_is(tmp_path: Path):
    """As /dev/null, or a pipe to another program; a link goes on pointing."""
    pipe, link, kept = tmp_path / "pipe", tmp_path / "link", tmp_path / "folder" / "kept"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_writable(pipe)
    write_whole(pipe, b"new")
    assert pipe.is_fifo() and os.read(reader, 9) == b"new"
    os.close(reader)
    write_whole(kept, b"old")
    link.symlink_to(kept)
    check_writable(link)
    write_whole(link, b"new")
    assert link.is_symlink() and kept.read_bytes() == b"new"
    assert {p.name for p in tmp_path.rglob("*")} == {"pipe", "link", "folder", "kept"}


def test_a_fingerprint_is_the_same_in_whatever_order_a_folder_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_text(file.name)
    found = set()
    for order in (files, files[::-1]):
        monkeypatch.setattr(Path, "iterdir", lambda _, order=order: iter(order))
        found.add(content(tmp_path))
    assert len(found) == 1
