"""FID and CLIP score on a folder like MJHQ-30K, and GenEval's layout, with judges in miniature."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_pipeline
import torch
import yaml
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from tbcm import cli, sampling, scores
from tbcm.evaluate import frechet
from tbcm.scores import score_run

N = 10
PROMPTS = {f"{i:02x}": tiny_pipeline.PROMPTS[i % 4] for i in range(N)}


class Features(nn.Module):
    """Means of the colours, and with return_features also of the squares: [n, 3 or 6]."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1 / 255))

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        x = images.float() * self.scale
        means = x.flatten(2).mean(2)
        if return_features:
            return torch.cat([means, (x * x).flatten(2).mean(2)], 1)
        return means


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """inception.pt and clip/."""
    folder = tmp_path_factory.mktemp("judges")
    torch.jit.script(Features()).save(folder / "inception.pt")
    torch.manual_seed(8)  # cosines of both signs
    common = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "projection_dim": 8,
    }  # fmt: skip
    text = {"vocab_size": 80, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    vision = {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(
        text_config=common | text, vision_config=common | vision, projection_dim=8
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder / "clip")
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(vocabulary)}, [])
    tokenizer.model_max_length = 12
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )  # fmt: skip
    CLIPProcessor(processor, tokenizer).save_pretrained(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten random images of two categories, and their prompts."""
    folder = tmp_path_factory.mktemp("mjhq")
    noise = np.random.default_rng(0)
    meta = {}
    for i, (name, prompt) in enumerate(PROMPTS.items()):
        category = ("animals", "food")[i % 2]
        meta[name] = {"category": category, "prompt": prompt}
        (folder / category).mkdir(exist_ok=True)
        low, high = sorted(noise.integers(0, 256, 2))
        pixels = noise.integers(low, high + 1, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / category / f"{name}.png")
    (folder / "meta_data.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scores, "BATCH", 4)
    monkeypatch.setattr(scores, "CHUNK", 8)


def arguments(judges: Path, real: Path, out: Path) -> list:
    return [
        "--images", str(real), "--out", str(out), "--json", f"{out}.json",
        "--inception", f"{judges}/inception.pt", "--clip", f"{judges}/clip",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def report(tiny_run: Path, judges: Path, real: Path, tmp_path_factory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("scores") / "out"
    assert cli.main(["eval", str(tiny_run), *arguments(judges, real, out)]) == 0
    return json.loads(Path(f"{out}.json").read_text()), out


def features(paths: list[Path]) -> Tensor:
    stacked = [scores.pixels([scores.opened(path)]) for path in paths]
    return torch.cat([Features()(x, return_features=True) for x in stacked])


def test_fid_is_the_frechet_distance_of_the_features(report: tuple, real: Path):
    figures, out = report
    made = [out / "images" / f"{name}.png" for name in PROMPTS]
    want = frechet(features(made), features([*real.rglob("*.png")]))
    assert figures["fid"] == pytest.approx(want, rel=1e-4) and figures["fid"] > 0.01
    assert figures["images"] == N and figures["steps"] == 1
    assert figures["prompts"] == scores.prompts_digest([*PROMPTS.values()])


def test_clip_score_is_the_mean_cosine_of_image_and_prompt(report: tuple, judges: Path):
    figures, out = report
    model = CLIPModel.from_pretrained(judges / "clip")
    processor = CLIPProcessor.from_pretrained(judges / "clip")
    found = []
    for name, prompt in PROMPTS.items():
        inputs = processor(
            text=[prompt], images=[scores.opened(out / "images" / f"{name}.png")],
            return_tensors="pt", truncation=True,
        )  # fmt: skip
        with torch.no_grad():
            logits = model(**inputs).logits_per_image / model.logit_scale.exp()
        found.append(100 * logits.item())
    assert figures["clip_score"] == pytest.approx(sum(max(x, 0) for x in found) / N, abs=1e-3)
    assert min(found) < -1 and max(found) > 1


def test_a_killed_evaluation_continues_and_gives_the_same_figures(
    report: tuple,
    tiny_run: Path,
    judges: Path,
    real: Path,
    tmp_path: Path,
    monkeypatch,
    capsys,
):
    see, drawn, batches = scores.Judges.see, [], []

    def dying(self: scores.Judges, *batch: list) -> None:
        batches.append(batch)
        if len(batches) == 3:
            raise KeyboardInterrupt
        see(self, *batch)

    draw = sampling.draw_images
    monkeypatch.setattr(sampling, "draw_images", lambda *a: drawn.append(a[1]) or draw(*a))
    monkeypatch.setattr(scores.Judges, "see", dying)
    line = ["eval", str(tiny_run), *arguments(judges, real, tmp_path / "out")]
    assert cli.main(line) == 130
    assert len(drawn) == 3 and len(batches) == 3
    kept = torch.load(tmp_path / "out" / "progress.pt", weights_only=True)
    assert len(kept["scores"]) == 8 and not any("inception" in name for name in kept["fid"])
    assert cli.main(line) == 0
    assert len(drawn) == 3 and len(batches) == 4  # nothing is drawn twice, two batches are kept
    assert json.loads((tmp_path / "out.json").read_text()) == report[0]
    (tmp_path / "out.json").unlink()
    assert cli.main(line) == 0  # all is scored already
    assert len(batches) == 4 and json.loads((tmp_path / "out.json").read_text()) == report[0]
    assert cli.main([*line, "--steps", "2"]) == 2
    noted = tmp_path / "out" / "settings.json"
    known = json.loads(noted.read_text())
    noted.write_text(json.dumps({k: v for k, v in known.items() if k != "teacher"}))
    assert cli.main(line) == 2 and "does not say teacher" in capsys.readouterr().err
    noted.write_text(json.dumps(known))
    for name in ("progress.pt", "settings.json"):
        (tmp_path / "out" / name).write_bytes(b"[")
        assert cli.main(line) == 2
        assert f"Cannot read {tmp_path}/out/{name}" in capsys.readouterr().err


def test_progress_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    judges = SimpleNamespace(state=lambda: {"scores": [1.0]})
    scores.save_progress(tmp_path, judges)
    before = (tmp_path / "progress.pt").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    judges.state = lambda: {"scores": [1.0, 2.0]}
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(scores.UserError, match=r"progress\.pt: No space left on device"):
        scores.save_progress(tmp_path, judges)
    assert (tmp_path / "progress.pt").read_bytes() == before


def test_another_student_does_not_continue_what_one_began(
    report: tuple, tiny_run: Path, judges: Path, real: Path, tmp_path: Path, capsys
):
    other = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (weights,) = (other / "student").glob("*.safetensors")
    kept, line = weights.read_bytes(), ["eval", str(other), *arguments(judges, real, report[1])]
    save_file({name: 2 * w for name, w in load_file(weights).items()}, weights, {"format": "pt"})
    assert cli.main(line) == 2
    assert f"{report[1]} was begun with student = " in capsys.readouterr().err
    weights.write_bytes(kept)
    config = yaml.safe_load((other / "config.yaml").read_text())
    before, teacher = config["scm_cfg_scale"], Path(config["pretrained_model_name_or_path"])
    (other / "config.yaml").write_text(yaml.safe_dump(config | {"scm_cfg_scale": [9.5]}))
    assert cli.main(line) == 2
    assert f"{report[1]} was begun with scm_cfg_scale = " in capsys.readouterr().err
    copy = str(shutil.copytree(teacher, tmp_path / "teacher"))
    config |= {"scm_cfg_scale": before, "pretrained_model_name_or_path": copy}
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    (weights,) = (tmp_path / "teacher" / "vae").glob("*.safetensors")
    save_file({name: 2 * w for name, w in load_file(weights).items()}, weights, {"format": "pt"})
    assert cli.main(line) == 2
    assert f"{report[1]} was begun with teacher = " in capsys.readouterr().err


def test_all_that_images_depend_on_is_noted(tiny_run: Path):
    run = sampling.load_drawing_run(tiny_run, 1)
    known = sampling.drawn_by(run, tiny_run)
    others = [
        replace(run, scale=9.5), replace(run, config=replace(run.config, mixed_precision="bf16")),
        *(
            replace(run, teacher=replace(run.teacher, **{name: value}))
            for name, value in {
                "path": run.teacher.path / "vae", "latent_shape": (4, 2, 2), "variant": "bf16",
                "instruct": not run.teacher.instruct,
            }.items()
        ),
    ]  # fmt: skip
    for other in others:
        found = sampling.drawn_by(other, tiny_run)
        assert len([name for name in known if known[name] != found[name]]) == 1


def test_other_judges_and_real_images_do_not_continue_it(
    report: tuple, tiny_run: Path, judges: Path, real: Path, tmp_path: Path, capsys
):
    (weights,) = (judges / "clip").glob("*.safetensors")
    kept = weights.read_bytes()
    save_file({n: 2 * w for n, w in load_file(weights).items()}, weights, {"format": "pt"})
    assert cli.main(["eval", str(tiny_run), *arguments(judges, real, report[1])]) == 2
    assert f"{report[1]} was begun with clip_weights = " in capsys.readouterr().err
    weights.write_bytes(kept)
    first = min(real.rglob("*.png"))
    kept = first.read_bytes()
    first.write_bytes(max(real.rglob("*.png")).read_bytes())
    assert cli.main(["eval", str(tiny_run), *arguments(judges, real, report[1])]) == 2
    assert f"{report[1]} was begun with real_images = " in capsys.readouterr().err
    first.write_bytes(kept)


def test_long_prompts_are_refused_before_anything_is_drawn(tiny_run: Path, tmp_path: Path, capsys):
    prompts = [*tiny_pipeline.PROMPTS, "seven " * 400]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    for options in (f"--prompts {tmp_path}/p.txt", f"--geneval {tmp_path}/m.jsonl"):
        assert cli.main(f"sample {tiny_run} --out {tmp_path}/out.png {options}".split()) == 2
        assert "The prompt 'seven seven" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"p.txt", "m.jsonl"}


def test_missing_weights_are_named_all_at_once(
    tiny_run: Path, real: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = f"eval {tiny_run} --images {real} --out {tmp_path}/out --json {tmp_path}/x.json"
    assert cli.main(line.split()) == 2
    said = capsys.readouterr().err
    assert "inception-2015-12-05.pt" in said and "--inception" in said
    assert "openai/clip-vit-large-patch14" in said and "--clip" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        *(({"samples": n}, "at least two images") for n in (1, 0, -1)),
        ({"seed": 2**64}, "seed must be between"),
        ({"images": "nowhere"}, "not like MJHQ-30K"),
        ({"run_dir": "nowhere"}, "nowhere is not a run"),
        ({"out": "{real}/ours"}, "lies inside --images"),
        ({"inception": "{real}/meta_data.json"}, "damaged: inception.*meta_data.json"),
    ],
)
def test_bad_input(
    changes: dict, says: str, tiny_run: Path, real: Path, judges: Path, tmp_path: Path
):
    changes = {k: v.format(real=real) if isinstance(v, str) else v for k, v in changes.items()}
    settings = {
        "run_dir": tiny_run, "images": real, "out": tmp_path / "out", "json_path": tmp_path / "j",
        "inception": f"{judges}/inception.pt", "clip": f"{judges}/clip",
    }  # fmt: skip
    with pytest.raises(scores.UserError, match=says):
        score_run(**{**settings, **changes})
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_is_no_string_is_named(tmp_path: Path):
    (tmp_path / "meta_data.json").write_text('{"00": {"prompt": 5}}')
    with pytest.raises(scores.UserError, match=r"prompt of 00 in .* is 5"):
        scores.read_items(tmp_path)


def test_a_second_image_of_a_prompt_is_named(real: Path, tmp_path: Path):
    """Such as one that was drawn into the folder of the real ones."""
    folder = Path(shutil.copytree(real, tmp_path / "real"))
    named = (folder / "meta_data.json").read_text()
    (folder / "meta_data.json").write_text(named, encoding="utf-8-sig")
    (folder / "food" / "01.png").rename(folder / "food" / "01.PNG")
    assert len(scores.read_items(folder)) == N
    (folder / "ours").mkdir()
    shutil.copy(folder / "food" / "01.PNG", folder / "ours" / "01.png")
    with pytest.raises(scores.UserError, match="holds two images of 01"):
        scores.read_items(folder)


def test_geneval_gets_the_layout_its_scorer_reads(
    tiny_run: Path, tmp_path: Path, capsys, monkeypatch
):
    metadata, out = tmp_path / "m.jsonl", tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    lines = [json.dumps({"tag": "single_object", "prompt": p}) for p in tiny_pipeline.PROMPTS[:2]]
    metadata.write_text("\n".join(lines) + "\n \n")
    line = f"sample {tiny_run} --geneval {metadata} --out . --images_per_prompt 3"
    assert cli.main(line.split()) == 0 and capsys.readouterr().out == ".\n"
    made = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    names = ["metadata.jsonl", *(f"samples/000{j}.png" for j in range(3))]
    assert made == [*(f"0000{i}/{name}" for i in range(2) for name in names), "settings.json"]
    assert (out / "00001/metadata.jsonl").read_text() == lines[1] + "\n"
    images = {p: p.read_bytes() for p in out.rglob("*.png")}
    assert len(set(images.values())) == 6
    run = sampling.load_drawing_run(tiny_run, 1)
    drawn = sampling.draw_images(run, [tiny_pipeline.PROMPTS[1]] * 3, [3, 4, 5], 1)
    for image, path in zip(drawn, sorted((out / "00001/samples").iterdir()), strict=True):
        sampling.save_image(image, tmp_path / "same.png")
        assert (tmp_path / "same.png").read_bytes() == images[path]
    (out / "settings.json").rename(tmp_path / "settings.json")
    assert cli.main(line.split()) == 2  # nobody knows what they are of
    assert ". holds images without a settings.json" in capsys.readouterr().err
    (tmp_path / "settings.json").rename(out / "settings.json")
    (out / "00001/samples/0001.png").unlink()
    assert cli.main(line.split()) == 0
    assert {p: p.read_bytes() for p in out.rglob("*.png")} == images
    assert cli.main(f"{line} --steps 2".split()) == 2  # would mix two samplers' images
    assert "begun with steps = 1" in capsys.readouterr().err
    metadata.write_text("\n".join(reversed(lines)))
    assert cli.main(line.split()) == 2  # would put the old images under new prompts
    assert "begun with prompts = " in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert cli.main(f"{line} --out {tmp_path}/file".split()) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"m.jsonl", "out", "same.png", "file"}
    metadata.write_text('{"tag": "no prompt"}')
    assert cli.main(line.split()) == 2 and "evaluation_metadata" in capsys.readouterr().err
