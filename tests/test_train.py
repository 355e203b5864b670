"""The training loop on the built-in teacher: what a run leaves, and that it learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import SanaTransformer2DModel

from tbcm import train as trainer
from tbcm.config import PRESETS, TrainConfig, read_config, unused
from tbcm.errors import UserError
from tbcm.models import load_teacher
from tbcm.optimizer import lr_factor
from tbcm.progress import Display, Metrics
from tbcm.rollout import rollout
from tbcm.sampling import consistency_sample
from tbcm.text import load_prompts
from tbcm.trigflow import SIGMA_DATA, route


def settings(out: Path, **changes: object) -> TrainConfig:
    """A run of a few quick steps."""
    quick = {
        "train_batch_size": 2, "route_steps": 4, "max_train_steps": 4, "lr_warmup_steps": 0,
        "learning_rate": 1e-3, "tangent_warmup_steps": 2, "scm_cfg_scale": [1.5],
        "validation_samples": 4, "ema_decay": 0.9, "time_weighting": False, "log_variance": False,
    }  # fmt: skip
    return TrainConfig(**{"output_dir": str(out), **quick, **changes})


def distiller(config: TrainConfig) -> trainer.Distiller:
    """The parts of a run without its folder."""
    make = trainer.METHODS[config.method]
    return make(config, load_teacher("digits"), load_prompts(config))


def one_step_rmse(parts: trainer.Distiller) -> Callable[[], float]:
    """How far the student's images are from the ends of the teacher's path, whenever asked."""
    noise = SIGMA_DATA * torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    text, scale = parts.text(list(range(32))), torch.full((32,), 1.5)
    path = rollout(parts.teacher_net, noise, route(30, 2.5).float(), parts.guided(text), scale)

    def pair_rmse() -> float:
        with torch.no_grad():
            image = consistency_sample(parts.student_net, noise, *text, 0.1 * scale, steps=1)
        return (image - path.x0 / SIGMA_DATA).square().mean().sqrt().item()

    return pair_rmse


def metrics(run: Path) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_run_leaves_all_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = settings(tmp_path / "run", checkpointing_steps=2, validation_steps=3)
    trainer.train(config)
    run = tmp_path / "run"
    made = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert made >= {
        "config.yaml", "metrics.jsonl", "loss.png", "student/config.json",
        "samples/step-000003.png", "samples/step-000004.png",
        "checkpoints/step-000002/state.pt", "checkpoints/step-000004/state.pt",
    }  # fmt: skip
    assert len([name for name in made if "step-" in name]) == 4
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    assert all(row["loss"] > 0 and row["prompts_per_s"] > 0 for row in metrics(run))
    assert [row["r"] for row in metrics(run)] == [0, 0.5, 1, 1]
    assert read_config(run) == config
    said = capsys.readouterr().out
    assert "step 4/4" in said and " prompts/s" in said


def test_settings_that_do_nothing_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    assert unused(settings(out)) == {}
    assert unused(settings(out, optimizer="came", adam_epsilon=1e-6, logit_mean=0.1)) == {
        "logit_mean": "method tbcm", "adam_epsilon": "optimizer came",
    }  # fmt: skip
    assert unused(settings(out, method="scm", logit_mean=0.1)) == {"route_steps": "method scm"}
    trainer.train(settings(out, adv_lambda=0.1, lr_warmup_steps=5, max_train_steps=1))
    said = capsys.readouterr().out
    assert "adv_lambda is not used with --method tbcm." in said
    assert "never reaches its peak: lr_warmup_steps 5, max_train_steps 1." in said


def test_a_jitter_of_each_prompt_does_nothing_without_jitter():
    said = unused(settings(Path(), jitter=False, jitter_each_prompt=False))
    assert said == {"jitter_each_prompt": "jitter False"}


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_calm_value_beyond_its_range_is_refused(value: float):
    with pytest.raises(UserError, match="tangent_calm_value must be between 0 and 1"):
        settings(Path(), tangent_calm_value=value)


def test_saved_student_has_the_averaged_weights(tmp_path: Path):
    trainer.train(settings(tmp_path / "run", max_train_steps=3))
    student = SanaTransformer2DModel.from_pretrained(tmp_path / "run" / "student")
    assert student.config.guidance_embeds and student.config.guidance_embeds_scale == 0.1
    state = torch.load(tmp_path / "run/checkpoints/step-000003/state.pt", weights_only=True)
    shadow = state["ema"]["shadow_params"]
    for saved, averaged in zip(student.parameters(), shadow, strict=True):
        assert torch.equal(saved, averaged)
    assert not torch.equal(student.proj_out.weight, state["student"]["proj_out.weight"])


def test_the_student_gets_its_weights_back_where_a_sample_fails(tmp_path: Path):
    parts = distiller(settings(tmp_path))
    for a in parts.ema.shadow_params:
        a.add_(1)
    before = [p.detach().clone() for p in parts.learning]
    with pytest.raises(MemoryError), parts.averaged_weights():
        raise MemoryError
    assert all(torch.equal(a, b) for a, b in zip(before, parts.learning, strict=True))


def test_everything_on_at_once(tmp_path: Path):
    latent = tmp_path / "black.pt"
    torch.save(torch.full((1, 8, 8), -1.0), latent)
    config = settings(
        tmp_path / "run", log_variance=True, time_weighting=True, filter_latent=str(latent),
        scm_cfg_scale=[1.0, 1.5], jitter=False, lr_scheduler="cosine",
    )  # fmt: skip
    parts = distiller(config)
    rows = [parts.train_step() for _ in range(3)]
    assert not any(row["skipped"] for row in rows)
    assert parts.log_variance.linear.weight.abs().max() > 0


def test_log_variance_head_is_not_in_the_student(tmp_path: Path):
    parts = distiller(settings(tmp_path, log_variance=True))
    fresh = SanaTransformer2DModel.from_config(parts.student.config)
    assert parts.student.state_dict().keys() == fresh.state_dict().keys()


def test_the_log_variance_is_clipped_with_the_student(tmp_path: Path):
    parts = distiller(settings(tmp_path, log_variance=True, gradient_clip=1e-3))
    step, norms = parts.optimizer.step, []

    def clipped() -> None:
        norms.append(torch.stack([p.grad.norm() for p in parts.parameters]).norm().item())
        step()

    parts.optimizer.step = clipped
    assert parts.train_step()["grad_norm"] > 0.1
    assert norms == [pytest.approx(1e-3, rel=1e-2)]


def test_non_finite_step_is_skipped_counted_and_not_applied(tmp_path: Path):
    parts = distiller(settings(tmp_path, max_skipped_steps=2))
    parts.train_step()
    before = [p.detach().clone() for p in parts.parameters]
    good = parts.forward

    def bad(*args: object):
        loss, norm = good(*args)
        return loss * torch.nan, norm

    parts.forward = bad
    assert parts.train_step()["skipped"]
    assert all(torch.equal(a, b) for a, b in zip(before, parts.parameters, strict=True))
    parts.forward = good
    assert not parts.train_step()["skipped"]
    assert (parts.skipped, parts.skipped_in_row) == (1, 0)
    parts.forward = bad
    parts.train_step()
    with pytest.raises(UserError, match=r"2 steps in a row.*learning_rate"):
        parts.train_step()


def test_a_skipped_step_leaves_the_averages(tmp_path: Path):
    parts = distiller(settings(tmp_path))
    for _ in "12":  # after the first they are the weights
        parts.train_step()
    before = [a.clone() for a in parts.ema.shadow_params]
    good = parts.forward
    parts.forward = lambda *args: tuple(v * torch.nan for v in good(*args))
    assert parts.train_step()["skipped"]
    assert all(torch.equal(a, b) for a, b in zip(before, parts.ema.shadow_params, strict=True))


def test_an_infinite_gradient_of_a_finite_loss_is_not_applied(tmp_path: Path):
    parts = distiller(settings(tmp_path))
    before = [p.detach().clone() for p in parts.parameters]

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        parts.parameters[-1].grad[0] = torch.inf

    parts.backward = backward
    row = parts.train_step()
    assert row["skipped"] and row["loss"] < 100
    assert all(torch.equal(a, b) for a, b in zip(before, parts.parameters, strict=True))
    again = distiller(settings(tmp_path))
    again.load_state(parts.state())
    assert (again.step, again.skipped, again.skipped_in_row) == (1, 1, 1)


def test_a_step_has_the_learning_rate_of_its_number(tmp_path: Path):
    parts = distiller(settings(tmp_path, lr_warmup_steps=4, learning_rate=4e-3))
    for step in (1, 2, 3):
        assert parts.train_step()["lr"] == pytest.approx(1e-3 * step)
        assert {group["lr"] for group in parts.optimizer.param_groups} == {1e-3 * step}


def test_prompts_per_second_count_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts = distiller(settings(tmp_path))
    clock = SimpleNamespace(perf_counter=iter((10.0, 14.0)).__next__)
    monkeypatch.setattr("tbcm.distiller.time", clock)
    assert parts.train_step()["prompts_per_s"] == 2 / 4


def test_a_number_that_is_not_finite_is_null_in_the_metrics(tmp_path: Path):
    Metrics(tmp_path / "metrics.jsonl", 0).write({"step": 1, "loss": float("nan"), "r": -torch.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "loss": null, "r": null}\n'


def test_the_time_that_is_left_is_told_by_the_steps_since_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock = SimpleNamespace(monotonic=iter([0.0, 30.0]).__next__)
    monkeypatch.setattr("tbcm.progress.time", clock)
    shown = Display(6, settings(tmp_path, max_train_steps=12, logging_steps=1))
    shown.show({"step": 9, "loss": 1.0, "g_norm": 1.0, "r": 1.0, "prompts_per_s": 1.0})
    assert "step 9/12" in (said := capsys.readouterr().out) and said.endswith("ETA 30 s\n")


def test_a_draw_is_of_the_runs_own_generator(tmp_path: Path):
    scales = [1.0, 1.5, 4.0]
    config = settings(tmp_path, train_batch_size=300, scm_cfg_scale=scales)
    parts, again = distiller(config), distiller(config)
    draw = parts.draw()
    torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(draw, again.draw(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(draw, parts.draw(), strict=True))
    assert len(set(draw.rows.tolist())) > 70 and draw.rows.max() == len(parts.prompts) - 1
    assert all(70 < (draw.guidance == scale).sum() < 130 for scale in scales)
    assert draw.noise.std().item() == pytest.approx(SIGMA_DATA, rel=0.02)
    assert draw.uniform.mean().item() == pytest.approx(0.5, abs=0.05)
    still = distiller(settings(tmp_path, jitter=False)).draw().times
    assert torch.equal(still, route(4, 2.5).float().expand(2, -1))


def test_what_pytorch_itself_draws_continues_too(tmp_path: Path):
    parts, again = (distiller(settings(tmp_path)) for _ in "12")
    torch.rand(3)  # as dropout in a student does
    state, want = parts.state(), torch.rand(3)
    again.load_state(state)
    assert torch.equal(torch.rand(3), want)


def test_the_filter_drops_by_the_number_that_was_drawn(tmp_path: Path):
    parts = distiller(settings(tmp_path, train_batch_size=1))
    draw, found = parts.draw(), []
    path = parts.rollout

    def kept(*args: object):
        found.append(path(*args))
        return found[-1]

    parts.rollout = kept
    parts.harvest(draw)
    parts.filter_latent = found[0].x0[0] / SIGMA_DATA + 0.5**0.5  # so that the mse is a half
    for uniform in (0.4, 0.6) * 4:
        keep = parts.harvest(draw._replace(uniform=torch.tensor([uniform]))).keep
        assert set(keep.tolist()) == {float(uniform < 0.5)}


@pytest.mark.parametrize("fused", [False, True])
def test_a_bad_sample_is_counted_and_a_fused_step_goes_on_without_it(tmp_path: Path, fused: bool):
    parts = distiller(settings(tmp_path, fused=fused))
    good = parts.student_pass

    def bad(count: int):
        def student_pass(*args: object):
            out, jvp = good(*args)
            jvp = jvp.clone()
            jvp[:count] = torch.nan
            return out, jvp

        return student_pass

    parts.student_pass = bad(1)
    row = parts.train_step()
    assert row["bad_samples"] == 1 and row["skipped"] is not fused and row["g_norm"] > 0
    parts.student_pass = bad(100)
    row = parts.train_step()
    assert row["bad_samples"] == 2 * 3 and row["skipped"]


@pytest.mark.parametrize("fused", [False, True])
def test_bf16_keeps_fp32_weights_and_stays_near_fp32(tmp_path: Path, fused: bool):
    rows = {}
    for precision in ("no", "bf16"):
        config = settings(tmp_path, mixed_precision=precision, fused=fused, tangent_warmup_steps=0)
        parts = distiller(config)
        rows[precision] = parts.train_step()
        assert {p.dtype for p in parts.parameters} == {torch.float32}
    assert rows["bf16"]["g_norm"] == pytest.approx(rows["no"]["g_norm"], rel=0.1)
    assert rows["bf16"]["g_norm"] != rows["no"]["g_norm"]


@pytest.mark.parametrize("plan", [{}, {"fused": True}, {"method": "sana_sprint"}], ids=str)
def test_a_teacher_in_bf16_gives_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: dict
):
    def records() -> list[dict]:
        config = settings(tmp_path, mixed_precision="bf16", **plan)
        parts = distiller(config)
        sizes.append(sum(p.nbytes for p in parts.transformer.parameters()))
        rows = [parts.train_step() for _ in range(2)]
        return [{k: v for k, v in row.items() if k != "prompts_per_s"} for row in rows]

    sizes: list[int] = []
    narrow = records()
    shared = load_teacher("digits")  # whose next run starts from fp32 again
    config = settings(tmp_path, mixed_precision="bf16", **plan)
    first, second = (trainer.Distiller(config, shared, load_prompts(config)) for _ in "12")
    assert first.teacher_digest == second.teacher_digest
    monkeypatch.setattr("tbcm.distiller.narrow_products", lambda net: None)
    assert records() == narrow
    assert sizes[0] < 0.52 * sizes[1]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("constant_then_linear", [0.5, 1, 1, 1, 1, 0.5]),
    ],
)
def test_learning_rate(shape: str, expected: list[float]):
    config = settings(Path(), lr_scheduler=shape, lr_warmup_steps=2, max_train_steps=6)
    assert [lr_factor(step, config) for step in range(6)] == expected


def test_learning_rate_of_a_cosine():
    config = settings(Path(), lr_scheduler="cosine", lr_warmup_steps=2, max_train_steps=6)
    expected = [0.5, 1, 1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]
    assert [lr_factor(step, config) for step in range(6)] == pytest.approx(expected)


def test_a_long_prompt_is_refused_before_the_first_step(tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the digit 3\n" * 300 + "seven " * 40)
    with pytest.raises(UserError, match="41 tokens"):
        trainer.train(settings(tmp_path / "run", prompts=str(prompts)))
    assert not (tmp_path / "run").exists()


def test_fused_and_plain_give_the_same_curve(tmp_path: Path):
    curves = []
    for fused in (False, True):
        parts = distiller(settings(tmp_path, fused=fused, tangent_warmup_steps=0))
        curves.append([parts.train_step() for _ in range(6)])
    for plain, fused in zip(*curves, strict=True):
        for key in ("loss", "g_norm", "grad_norm"):
            assert fused[key] == pytest.approx(plain[key], rel=1e-3), (key, plain["step"])


@pytest.mark.parametrize("fused", [False, True])
def test_distilling_brings_the_one_step_image_to_the_end_of_the_teachers_path(
    fused: bool, tmp_path: Path
):
    preset = yaml.safe_load((PRESETS / "digits.yaml").read_text())
    quick = {"train_batch_size": 4, "route_steps": 6, "ema_decay": 0.0, "output_dir": str(tmp_path)}
    parts = distiller(TrainConfig(**{**preset, **quick, "fused": fused}))
    pair_rmse = one_step_rmse(parts)
    before = pair_rmse()
    for _ in range(30):
        parts.train_step()
    assert pair_rmse() < 0.75 * before
