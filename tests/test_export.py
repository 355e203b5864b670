"""A student of a miniature SANA, from prompts to a pipeline that diffusers opens by itself."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_pipeline
import torch
from diffusers import SanaSprintPipeline
from PIL import Image

from tbcm import cli, sampling
from tbcm.config import TrainConfig, read_config
from tbcm.errors import UserError
from tbcm.export import assembled, export_run
from tbcm.models import load_teacher
from tbcm.sampling import Run, draw_images, grid, load_drawing_run
from tbcm.student import build_student
from tbcm.train import train


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Path:
    return tiny_run


@pytest.fixture(scope="module")
def drawing(run: Path) -> Run:
    return load_drawing_run(run, 2)


@pytest.fixture(scope="module")
def pipeline(run: Path) -> SanaSprintPipeline:
    """The exported pipeline, loaded as a user loads it."""
    pipeline = SanaSprintPipeline.from_pretrained(export_run(run, run.with_name("pipeline")))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_run_draws_its_prompts_through_the_vae(run: Path):
    with Image.open(run / "samples" / "step-000003.png") as grid:
        assert grid.size == (3 * 33 * 8, 33 * 8) and grid.mode == "RGB"


def test_the_student_has_moved(run: Path, pipeline: SanaSprintPipeline):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [False] * 3
    assert pipeline.transformer.time_embed.guidance_embedder.linear_2.weight.abs().sum() > 0


@pytest.mark.parametrize(("steps", "intermediate"), [(1, None), (2, 1.0)])
def test_pipeline_and_tbcm_sample_draw_the_same(
    steps: int,
    intermediate: float | None,
    run: Path,
    drawing: Run,
    pipeline: SanaSprintPipeline,
    tmp_path: Path,
):
    images = pipeline(
        tiny_pipeline.PROMPTS, num_inference_steps=steps, guidance_scale=4.5,
        max_timesteps=math.pi / 2, intermediate_timesteps=intermediate, height=32, width=32,
        use_resolution_binning=False, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
    ).images  # fmt: skip
    ours = draw_images(drawing, tiny_pipeline.PROMPTS, [0, 1, 2, 3], steps)
    torch.testing.assert_close((ours + 1) / 2, images, atol=1e-5, rtol=0)
    assert cli.main(["sample", str(run), "--steps", str(steps), "--out", f"{tmp_path}/x.png"]) == 0
    grid(ours, tmp_path / "y.png")
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()


def test_other_prompts_need_not_the_runs_own(
    drawing: Run, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whose file may have moved."""
    (tmp_path / "p.txt").write_text(tiny_pipeline.PROMPTS[1])
    monkeypatch.setattr(sampling, "load_prompts", None)
    sampling.sample_run(run, 1, tmp_path / "x.png", tmp_path / "p.txt", seed=0)
    grid(draw_images(drawing, tiny_pipeline.PROMPTS[1:2], [0], 1), tmp_path / "y.png")
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()


def test_images_depend_on_prompt_seed_and_steps_alone(
    drawing: Run, monkeypatch: pytest.MonkeyPatch
):
    prompts = tiny_pipeline.PROMPTS
    together = draw_images(drawing, prompts, [3, 4, 5, 6], 2)
    monkeypatch.setattr(sampling, "DRAW_BATCH", 3)
    torch.testing.assert_close(draw_images(drawing, prompts, [3, 4, 5, 6], 2), together)
    for prompt, seed, steps in ((prompts[0], 4, 2), (prompts[1], 3, 2), (prompts[0], 3, 1)):
        other = draw_images(drawing, [prompt], [seed], steps)
        assert (other[0] - together[0]).abs().max() > 1e-3


def test_a_run_in_bf16_is_drawn_so(drawing: Run):
    told, config = [], replace(drawing.config, mixed_precision="bf16")
    net = drawing.student.transformer.proj_out
    hook = net.register_forward_hook(lambda *call: told.append(call[-1].dtype))
    images = draw_images(replace(drawing, config=config), tiny_pipeline.PROMPTS[:1], [3], 2)
    hook.remove()
    assert told == [torch.bfloat16] * 2 and images.dtype == torch.float32


def test_a_variant_is_exported_with_its_own_parts(tmp_path: Path):
    teacher = tiny_pipeline.save_teacher(tmp_path / "t", variant="bf16", dtype=torch.bfloat16)
    run = tiny_pipeline.distil(teacher, tmp_path / "of", variant="bf16", max_train_steps=1)
    SanaSprintPipeline.from_pretrained(export_run(run, tmp_path / "pipeline"))


def test_a_student_of_another_teacher_is_refused(run: Path, tmp_path: Path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copy / "student")
    build_student(load_teacher("digits").transformer).save_pretrained(copy / "student")
    teacher = load_teacher(str(read_config(run).pretrained_model_name_or_path))
    for student in (None, load_teacher("digits").transformer, teacher.transformer):
        if student:
            shutil.rmtree(copy / "student")
            student.save_pretrained(copy / "student")
        with pytest.raises(UserError, match=r"student in .*run does not fit .*teacher"):
            load_drawing_run(copy, 1)
        with pytest.raises(UserError, match=r"student in .*run does not fit .*teacher"):
            export_run(copy, tmp_path / "out")


def test_what_came_to_its_place_meanwhile_is_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def slow(run_dir: Path) -> SanaSprintPipeline:
        (tmp_path / "out").mkdir()
        return assembled(run_dir)

    monkeypatch.setattr("tbcm.export.assembled", slow)
    with pytest.raises(UserError, match="out was made meanwhile"):
        export_run(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_pipeline_is_complete(pipeline: SanaSprintPipeline):
    assert type(pipeline.scheduler).__name__ == "SCMScheduler"
    assert pipeline.scheduler.config.prediction_type == "trigflow"
    assert pipeline.scheduler.config.sigma_data == 0.5
    assert pipeline.transformer.config.guidance_embeds_scale == 0.1


def test_what_cannot_be_exported_is_said(run: Path, tmp_path: Path):
    with pytest.raises(UserError, match="not a run"):
        export_run(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="is there already"):
        export_run(run, tmp_path)
    (tmp_path / "new.tmp").mkdir()
    with pytest.raises(UserError, match=r"new\.tmp is there already"):
        export_run(run, tmp_path / "new")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"Cannot write .*/file/a/b; give a place"):
        export_run(tmp_path / "before the run is read", tmp_path / "file" / "a" / "b")
    with pytest.raises(UserError, match="is there already"):
        export_run(run, tmp_path / "link")
    with pytest.raises(UserError, match=r"Cannot write .*/link/a; give a place"):
        export_run(tmp_path / "before the run is read", tmp_path / "link" / "a")
    train(TrainConfig(str(tmp_path / "digits"), **{**tiny_pipeline.QUICK, "max_train_steps": 1}))
    with pytest.raises(UserError, match=r"no vae/"):
        export_run(tmp_path / "digits", tmp_path / "out")
    assert not (tmp_path / "out").exists()
