"""Teachers in the Hub's layout: what is loaded, in which precision, and what is refused."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny_pipeline
import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from tbcm.errors import UserError
from tbcm.models import Teacher, load_teacher, load_transformer
from tbcm.student import build_student, student_key


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> Teacher:
    return load_teacher(str(tiny_teacher), instruct=True)


def change(folder: Path, part: str, **values: Any) -> None:
    """Edit a config file of a pipeline."""
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_prompts_are_encoded_as_the_pipeline_encodes_them(teacher: Teacher, tiny_teacher: Path):
    pipeline = SanaPipeline.from_pretrained(tiny_teacher)
    prompts = ["A Cat on a Mat ", "two owls"]
    want = pipeline.encode_prompt(
        prompts, device="cpu", complex_human_instruction=teacher.text.instruction
    )
    got = (*teacher.text.encode(prompts), *(a.expand(2, *a.shape[1:]) for a in teacher.text.null()))
    assert teacher.text.instruction[-1] == "User Prompt: "
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b.float())
    assert teacher.text.null()[1].sum() == 1


def test_a_prompt_fills_what_the_instruction_leaves_and_no_token_more(teacher: Teacher):
    words = "cat on a mat two owls in the fog " * 40
    fits = next(
        n for n in range(len(words), 0, -1)
        if len(teacher.text.tokenizer(words[:n]).input_ids) == 299
    )  # fmt: skip
    teacher.text.check([words[:fits]])
    with pytest.raises(UserError, match=r"30\d tokens.*takes 300"):
        teacher.text.check(["two owls", words[: fits + 8]])


def test_an_instruction_that_the_encoder_cannot_read_is_refused():
    """The digits' has 12 tokens; SANA's instruction would leave nothing of a prompt."""
    assert load_teacher("digits").text.max_length == 12
    with pytest.raises(UserError, match=r"894 tokens.*takes 12.*complex_human_instruction false"):
        _ = load_teacher("digits", instruct=True).text


def test_parts_are_loaded_when_asked_for_and_freed(tiny_teacher: Path):
    teacher = load_teacher(str(tiny_teacher))
    assert vars(teacher).keys() == {"path", "latent_shape", "variant", "instruct"}
    assert teacher.latent_shape == (4, 4, 4) and teacher.drawable
    assert teacher.images(torch.zeros(2, 4, 4, 4)).shape == (2, 3, 16, 16)
    assert "vae" in vars(teacher)
    teacher.free("vae")
    teacher.free("text")
    assert "vae" not in vars(teacher) and "transformer" not in vars(teacher)


def test_a_variant_in_bf16_is_a_teacher_in_fp32_with_its_text_encoder_in_bf16(tmp_path: Path):
    tiny_pipeline.save_teacher(tmp_path, variant="bf16", dtype=torch.bfloat16)
    teacher = load_teacher(str(tmp_path), variant="bf16")
    assert teacher.transformer.dtype == torch.float32
    assert teacher.text.model.dtype == torch.bfloat16
    with pytest.raises(UserError, match="--variant"):
        _ = load_teacher(str(tmp_path)).transformer


def test_resolution_sets_the_latents(tiny_teacher: Path):
    assert load_teacher(str(tiny_teacher), resolution=24).latent_shape == (4, 6, 6)
    with pytest.raises(UserError, match="resolution 30 is not a multiple of 4"):
        load_teacher(str(tiny_teacher), resolution=30)


@pytest.mark.parametrize(
    ("part", "values", "says"),
    [
        ("transformer", {"qk_norm": None}, "no RMSNorm of queries and keys .*SANA-Sprint"),
        ("transformer", {"timestep_scale": 1.0}, r"times in \[0, 1000\]"),
        ("transformer", {"guidance_embeds": True}, "it is a student"),
        ("transformer", {"caption_channels": 24}, "caption_channels is 24, but 16"),
        ("transformer", {"out_channels": 8}, "out_channels is 8, but 4"),
        ("vae", {"latent_channels": 8}, "in_channels is 4, but 8"),
        ("scheduler", {"_class_name": "DDPMScheduler", "prediction_type": "epsilon"}, "DDPM"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(
    part: str, values: dict, says: str, tiny_teacher: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "t"))
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    load_teacher(str(folder))
    change(folder, part, **values)
    with pytest.raises(UserError, match=says):
        load_teacher(str(folder))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_layers": 1}, "other weights than its config.json says"),
        ({"num_layers": 3}, "other weights than its config.json says"),
        ({"in_channels": 5, "out_channels": 5}, "Cannot load"),
    ],
)
def test_weights_that_do_not_fit_their_config_are_refused(
    values: dict, says: str, tiny_teacher: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "t"))
    change(folder, "transformer", **values)
    with pytest.raises(UserError, match=says):
        load_transformer(folder / "transformer")


def test_a_text_encoder_that_lacks_weights_is_refused(tiny_teacher: Path, tmp_path: Path):
    """transformers would fill them with random numbers, and say so in a log alone."""
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "t"))
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    weights = load_file(file)
    larger = {f"model.{name}": weight for name, weight in weights.items()}
    save_file(larger, file, {"format": "pt"})
    assert load_teacher(str(folder)).text.max_length > 0
    save_file(dict(list(larger.items())[1:]), file, {"format": "pt"})
    with pytest.raises(UserError, match=r"text_encoder lacks 1 of its model's weights, such as"):
        _ = load_teacher(str(folder)).text


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_lost_weights_are_said_once(
    part: str, tiny_teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """diffusers would print the error that it raises."""
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "t"))
    (file,) = (folder / part).glob("*.safetensors")
    file.unlink()
    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.ERROR)
    try:
        with pytest.raises(UserError, match="Cannot load"):
            getattr(load_teacher(str(folder)), part)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_a_vae_that_lacks_weights_is_said_before_long_work(tiny_teacher: Path, tmp_path: Path):
    """diffusers leaves them without storage. Nothing but the first grid reads it, hours later."""
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "t"))
    (file,) = (folder / "vae").glob("*.safetensors")
    weights = load_file(file)
    del weights["decoder.conv_in.bias"]
    save_file(weights, file, {"format": "pt"})
    for other in (folder / "text_encoder").glob("*.safetensors"):
        other.unlink()  # so that encoding the prompts would fail
    with pytest.raises(UserError, match=r"vae lacks 1 of its model's weights, such as decoder"):
        tiny_pipeline.distil(folder, tmp_path / "of")
    assert not (tmp_path / "of" / "run").exists()


def test_weights_that_are_not_finite_are_refused(teacher: Teacher, tmp_path: Path):
    student = build_student(teacher.transformer)
    with torch.no_grad():
        student.proj_out.bias[0] = torch.nan
    student.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="weights that are not finite"):
        load_transformer(tmp_path)


def test_configs_that_are_none_are_said(tiny_teacher: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "t"))
    path = folder / "transformer" / "config.json"
    kept = json.loads(path.read_text())
    del kept["patch_size"]
    path.write_text(json.dumps(kept))
    with pytest.raises(UserError, match="lack patch_size"):
        load_teacher(str(folder))
    path.write_text("[1]")
    with pytest.raises(UserError, match="Cannot read"):
        load_teacher(str(folder))
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    with pytest.raises(UserError, match=r"lacks tokenizer/tokenizer_config\.json"):
        load_teacher(str(folder))


def test_sana_s_own_scheduler_is_a_flow(tiny_teacher: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "t"))
    kind = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}
    change(folder, "scheduler", **kind)
    load_teacher(str(folder))


def test_a_hub_teacher_is_refused_before_its_weights_come(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "configs"
    shutil.copytree(tiny_teacher, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    change(folder, "transformer", timestep_scale=1.0)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.setattr(SanaPipeline, "download", lambda *_, **__: pytest.fail("weights came"))
    with pytest.raises(UserError, match=r"takes times in \[0, 1000\]"):
        load_teacher("some/one")


@pytest.mark.parametrize("name", [".", "../presets"])
def test_a_folder_is_looked_for_where_the_user_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not among the built-in teachers."""
    (tmp_path / "presets").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=rf"The teacher folder {re.escape(name)} lacks"):
        load_teacher(name)


def test_without_the_hub_a_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no folder some/one, .*`hf download some/one --local-dir"):
        load_teacher("some/one")


def test_student_starts_as_its_teacher_with_guidance_silent(teacher: Teacher):
    student = build_student(teacher.transformer)
    torch.manual_seed(0)
    x, text, t = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 16), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        want = teacher.transformer(x, text, t).sample
        for scale in (0.4, 0.5):
            guidance = torch.full((2,), scale)
            assert torch.equal(student(x, text, t, guidance=guidance).sample, want)
    assert student.time_embed.guidance_embedder.linear_1.weight.abs().sum() > 0


def test_a_config_file_may_leave_out_what_it_has_by_default(tiny_teacher: Path, tmp_path: Path):
    """As those do that were saved before diffusers knew guidance."""
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "t"))
    path = folder / "transformer" / "config.json"
    kept = json.loads(path.read_text())
    for name in ("guidance_embeds", "guidance_embeds_scale", "interpolation_scale", "dropout"):
        del kept[name]
    path.write_text(json.dumps(kept))
    student = build_student(load_teacher(str(folder)).transformer)
    assert student.config.guidance_embeds and student.config.guidance_embeds_scale == 0.1
    student.save_pretrained(tmp_path / "s")
    assert load_transformer(tmp_path / "s").config.guidance_embeds


@pytest.mark.parametrize(
    ("heads", "layers", "cross", "width", "millions"),
    [(36, 28, 16, 72, 594), (70, 20, 20, 112, 1610)],
)
def test_students_of_true_size_have_every_weight_of_their_teachers(
    heads: int, layers: int, cross: int, width: int, millions: int
):
    with torch.device("meta"):
        teacher = SanaTransformer2DModel(
            num_attention_heads=heads, num_layers=layers, num_cross_attention_heads=cross,
            cross_attention_head_dim=width, cross_attention_dim=heads * 32,
            qk_norm="rms_norm_across_heads", timestep_scale=1e-3,
        )  # fmt: skip
        student = build_student(teacher)
    assert round(sum(p.numel() for p in student.parameters()) / 1e6) == millions
    assert student.config.guidance_embeds and student.config.sample_size == 32
    new = student.state_dict().keys() - map(student_key, teacher.state_dict())
    assert {name.rpartition(".")[0] for name in new} == {
        f"time_embed.guidance_embedder.linear_{i}" for i in (1, 2)
    }
