"""sCM and SANA-Sprint: their own parts of a step, the latents' cache, and that they learn."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import AutoencoderDC
from PIL import Image
from test_train import distiller, one_step_rmse

from tbcm import digits, images
from tbcm.config import PRESETS, TrainConfig
from tbcm.errors import UserError
from tbcm.models import ASSETS, load_teacher, teacher_of
from tbcm.sprint import HEAD_BLOCKS, Head, Heads, kept_outputs
from tbcm.text import load_prompts
from tbcm.train import train
from tbcm.trigflow import SIGMA_DATA, TrigFlow, like


def settings(out: Path, **changes: object) -> TrainConfig:
    """A run of a few quick steps of a baseline."""
    preset = yaml.safe_load((PRESETS / "digits_baselines.yaml").read_text())
    quick = {"train_batch_size": 4, "max_train_steps": 2, "method": "scm", "output_dir": str(out)}
    quick |= {"tangent_warmup_steps": 0, "misaligned_pairs_D": True}
    return TrainConfig(**{**preset, **quick, **changes})


@pytest.mark.parametrize("fused", [False, True])
def test_scm_adds_noise_to_images_and_asks_the_guided_teacher_there(fused: bool, tmp_path: Path):
    parts = distiller(settings(tmp_path, fused=fused, scm_cfg_scale=[1.0, 4.0]))
    draw = parts.draw()
    x, t, velocity, text, guidance, keep = parts.harvest(draw)
    (pixels, labels), _ = digits.load_digits()
    cos, sin = like(torch.cos(t), x), like(torch.sin(t), x)
    torch.testing.assert_close(x, SIGMA_DATA * cos * pixels[draw.rows] + sin * draw.noise)
    asked = parts.latents.rows[draw.rows] % 10
    assert parts.prompts == digits.prompts() and torch.equal(asked, labels[draw.rows])
    assert keep.min() == 1
    torch.testing.assert_close(guidance, 0.1 * draw.guidance)
    teacher = distiller(settings(tmp_path)).teacher_net
    null = [a.expand_as(b) for a, b in zip(parts.null, text, strict=True)]
    with torch.no_grad():
        with_text, without = (teacher(x / SIGMA_DATA, t, *c) for c in (text, null))
    scale = like(draw.guidance, x)
    want = SIGMA_DATA * (without + scale * (with_text - without))
    torch.testing.assert_close(velocity, want, rtol=1e-4, atol=1e-5)


def test_scm_draws_its_times_from_a_log_normal(tmp_path: Path):
    config = settings(tmp_path, train_batch_size=4000, logit_mean=0.5, logit_std=2.0)
    tau = torch.log(SIGMA_DATA * torch.tan(distiller(config).draw().times.double()))
    assert tau.mean().item() == pytest.approx(0.5, abs=0.1)
    assert tau.std().item() == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("method", ["scm", "sana_sprint"])
def test_a_baseline_brings_the_one_step_image_to_the_end_of_the_teachers_path(
    method: str, tmp_path: Path
):
    # Without the preset's warm-up of the tangent a student of so small batches comes apart.
    parts = distiller(
        settings(tmp_path, method=method, fused=True, train_batch_size=24, ema_decay=0.0,
                 max_train_steps=450, tangent_warmup_steps=60)
    )  # fmt: skip
    pair_rmse = one_step_rmse(parts)
    before = pair_rmse()
    for _ in range(30):
        parts.train_step()
    assert pair_rmse() < 0.8 * before


def test_the_heads_read_the_stock_teachers_blocks_through_a_fused_one(tmp_path: Path):
    parts = distiller(settings(tmp_path, method="sana_sprint", fused=True, head_block_ids=[1, 3]))
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    t, text = torch.tensor([0.3, 1.2]), parts.text([0, 1])
    fused = parts.features(x, t, text)
    teacher = load_teacher("digits").transformer
    with kept_outputs([teacher.transformer_blocks[i] for i in (1, 3)]) as stock:
        TrigFlow(teacher)(x / SIGMA_DATA, t, *text)
    assert [f.shape for f in fused] == 2 * [(2, 16, 128)] and not torch.equal(*fused)
    for a, b in zip(fused, stock, strict=True):
        assert torch.equal(a, b)
    parts.teacher_net(x, t, *text)  # no hook is left, which the fused forward would refuse


def test_student_and_heads_each_follow_their_own_loss(tmp_path: Path):
    parts = distiller(settings(tmp_path, method="sana_sprint", adv_lambda=0.5))
    samples = parts.harvest(parts.draw())
    loss, _ = parts.forward(samples, 0.5)
    parts.backward(loss)
    got = {id(p): p.grad for p in [*parts.parameters, *parts.heads.parameters()]}
    base, _ = super(type(parts), parts).forward(samples[:6], 0.5)
    fake, images = parts.fake_features(samples), parts.image_features(samples)
    adversarial = -parts.heads(fake).mean()
    assert loss.item() == pytest.approx((base + 0.5 * adversarial).item(), rel=1e-5)
    want = torch.autograd.grad(base + 0.5 * adversarial, parts.parameters, retain_graph=True)
    made, (right, other) = parts.heads([f.detach() for f in fake]), parts.heads(images).chunk(2)
    wrong = 0.5 * ((1 + made).clamp(min=0).mean() + (1 + other).clamp(min=0).mean())
    hinge = 0.5 * (wrong + (1 - right).clamp(min=0).mean())
    theirs = torch.autograd.grad(hinge, list(parts.heads.parameters()))
    for p, gradient in zip([*parts.parameters, *parts.heads.parameters()], [*want, *theirs],
                           strict=True):  # fmt: skip
        scale = gradient.abs().max().item()
        torch.testing.assert_close(got[id(p)], gradient, rtol=1e-4, atol=1e-5 * scale)


def test_what_the_heads_see_is_noised_again(tmp_path: Path):
    """Images, also beside each other's captions, and those that the student makes in one step."""
    parts = distiller(settings(tmp_path, method="sana_sprint"))
    parts.features = lambda x, t, text: (x, t, *text)
    samples = parts.harvest(parts.draw())
    d, x0 = samples.draw, samples.x0

    def mixed(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return like(torch.cos(t), x0) * x0 + like(torch.sin(t), x0) * noise

    x = mixed(x0, d.gan_noise, d.gan_t)
    with torch.no_grad():
        out = parts.student_net(x / 0.5, d.gan_t, *samples.text, samples.guidance)
        made = mixed(x, -0.5 * out, d.gan_t)
        seen = parts.fake_features(samples)
    images, other = zip(*(a.chunk(2) for a in parts.image_features(samples)), strict=True)
    for (got, times, *text), want, t in (
        (seen, mixed(made, d.fake_noise, d.fake_t), d.fake_t),
        (images, mixed(x0, d.real_noise, d.real_t), d.real_t),
        (other, mixed(x0.roll(1, 0), d.other_noise, d.other_t), d.other_t),
    ):
        torch.testing.assert_close(got, want)
        assert torch.equal(times, t) and all(map(torch.equal, text, samples.text))


@pytest.mark.parametrize("change", [{"misaligned_pairs_D": False}, {"train_batch_size": 1}])
def test_pairs_are_misaligned_where_asked_and_possible(change: dict, tmp_path: Path):
    parts = distiller(settings(tmp_path, method="sana_sprint", **change))
    samples = parts.harvest(parts.draw())
    assert samples.other is None
    loss, _ = parts.forward(samples, 0.5)
    assert loss.isfinite() and len(parts.image_features(samples)[0]) == len(samples.x0)


def test_a_head_is_a_residual_of_convolutions():
    assert Head(48)(torch.randn(2, 5, 48)).shape == (2, 5)  # no multiple of 32
    head, tokens = Head(8).eval(), torch.randn(2, 5, 8)
    rows = tokens.transpose(1, 2)
    for conv, norm in zip((head.mix, head.near), head.norms, strict=True):
        half = conv.kernel_size[0] // 2
        ring = torch.cat([rows[..., 5 - half :], rows, rows[..., :half]], -1) if half else rows
        y = torch.nn.functional.conv1d(ring, conv.weight, conv.bias)
        y = torch.nn.functional.group_norm(y, norm.num_groups, norm.weight, norm.bias)
        y = torch.where(y > 0, y, 0.2 * y)
        rows = y if conv is head.mix else (rows + y) / 2**0.5
    want = torch.einsum("bcn,kck->bn", rows, head.logit.weight) + head.logit.bias
    torch.testing.assert_close(head(tokens), want)
    assert HEAD_BLOCKS == (2, 8, 14, 19)


def test_the_heads_step_with_the_student_alone(tmp_path: Path):
    """At its peak rate, clipped as it is, then with new spectral norms; where it skips, not."""
    parts = distiller(settings(tmp_path, method="sana_sprint", lr_warmup_steps=4))
    scale = [p for n, p in parts.heads.named_parameters() if "original" in n]
    vectors = [b for n, b in parts.heads.named_buffers() if n.endswith("_u") and len(b) > 1]
    assert scale and vectors

    def now() -> list[torch.Tensor]:
        return [v.detach().clone() for v in (*scale, *vectors)]

    before, step = now(), parts.heads_optimizer.step
    norms = []

    def clipped() -> None:
        norms.append(torch.stack([p.grad.norm() for p in parts.heads.parameters()]).norm().item())
        step()

    parts.heads_optimizer.step = clipped
    row = parts.train_step()
    assert parts.heads_optimizer.param_groups[0]["lr"] == parts.config.learning_rate > row["lr"]
    assert norms[0] <= parts.config.gradient_clip * 1.001
    adversarial, hinge = torch.stack(parts.judged).mean(0).tolist()
    assert (row["adv_loss"], row["hinge_loss"]) == pytest.approx((adversarial, hinge))
    assert hinge > 0 and adversarial != hinge
    after = now()
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    good = parts.forward
    parts.forward = lambda *args: tuple(v * torch.nan for v in good(*args))
    assert parts.train_step()["skipped"]
    assert all(torch.equal(a, b) for a, b in zip(after, now(), strict=True))


def test_half_of_what_the_gan_sees_comes_from_pure_noise(tmp_path: Path):
    parts = distiller(settings(tmp_path, method="sana_sprint", train_batch_size=1000))
    draw = parts.draw()
    assert 0.45 < (draw.gan_t == torch.tensor(torch.pi / 2)).float().mean() < 0.55
    for noise in (draw.gan_noise, draw.fake_noise, draw.real_noise, draw.other_noise):
        assert noise.std().item() == pytest.approx(SIGMA_DATA, rel=0.05)
    tau = torch.log(SIGMA_DATA * torch.tan(draw.fake_t.double()))
    assert tau.mean().item() == pytest.approx(-0.6, abs=0.15)
    assert not torch.equal(draw.fake_t, draw.real_t)
    assert not torch.equal(draw.other_t, draw.real_t)
    parts = distiller(settings(tmp_path, method="sana_sprint", largest_timestep_prob=1.0))
    assert (parts.draw().gan_t == torch.tensor(torch.pi / 2)).all()


def test_all_that_the_gan_draws_is_of_the_runs_own_generator(tmp_path: Path):
    config = settings(tmp_path, method="sana_sprint", train_batch_size=64)
    parts, again = distiller(config), distiller(config)
    draw = parts.draw()
    torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(draw, again.draw(), strict=True))


def test_the_heads_learn_to_tell_images_from_the_students(tmp_path: Path):
    parts = distiller(
        settings(tmp_path, method="sana_sprint", fused=True, train_batch_size=16, adv_lambda=0.0,
                 largest_timestep_prob=1.0, learning_rate=2e-3, lr_scheduler="constant")
    )  # fmt: skip
    parts.optimizer.step = lambda: None  # the student stands still
    hinge = [parts.train_step()["hinge_loss"] for _ in range(25)]
    assert sum(hinge[-5:]) < 0.9 * sum(hinge[:5])


def test_spectral_norms_change_by_renewal_alone():
    heads = Heads([Head(8)]).eval()
    before = copy.deepcopy(heads.state_dict())
    heads([torch.randn(2, 16, 8)])
    assert all(torch.equal(v, before[k]) for k, v in heads.state_dict().items())
    heads.renew()
    assert any(not torch.equal(v, before[k]) for k, v in heads.state_dict().items())


@pytest.mark.parametrize("method", ["scm", "sana_sprint"])
def test_a_baseline_continues_bit_for_bit(method: str, tmp_path: Path):
    config = settings(tmp_path, method=method, fused=True)
    straight = distiller(config)
    straight.train_step()
    state = copy.deepcopy(straight.state())
    rows = [straight.train_step() for _ in range(2)]
    resumed = distiller(config)
    resumed.load_state(state)
    for row in rows:
        again = resumed.train_step()
        assert all(again[key] == row[key] for key in row if key != "prompts_per_s")
    for mine, its in zip(resumed.parameters, straight.parameters, strict=True):
        assert torch.equal(mine, its)
    resumed.latents = resumed.latents._replace(digest="others")
    with pytest.raises(UserError, match="not those of the checkpoint"):
        resumed.load_state(state)


def test_accumulation_changes_no_gradient_of_student_or_heads(tmp_path: Path):
    found = []
    for parts in (1, 2):
        config = settings(tmp_path, method="sana_sprint", gradient_accumulation_steps=parts)
        run = distiller(config)
        run.gradients(0.5)
        found.append([p.grad for p in [*run.parameters, *run.heads.parameters()]])
    for mine, its in zip(*found, strict=True):
        scale = its.abs().max().item()
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=2e-5 * scale + 1e-9)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits teacher with a tiny DC-AE: images of 16 × 16 pixels are latents [1, 8, 8]."""
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    shutil.copytree(ASSETS / "digits", folder)
    torch.manual_seed(0)
    AutoencoderDC(
        latent_channels=1, attention_head_dim=4, encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), scaling_factor=0.41,
    ).save_pretrained(folder / "vae")  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"vae": ["diffusers", "AutoencoderDC"]})
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images of different sizes with captions, two of which are the same."""
    found = tmp_path / "images"
    found.mkdir()
    random = np.random.default_rng(0)
    for i in range(5):
        pixels = random.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(found / f"{i}.png")
        (found / f"{i}.txt").write_text(f"the digit {max(i, 1)}\n")
    return found


def opened(config: TrainConfig) -> images.Latents:
    """The latents of a run in this process."""
    prompts, accelerator = load_prompts(config), Accelerator(cpu=True)
    return images.open_latents(config, teacher_of(config), prompts, accelerator)


def of_folder(out: Path, teacher: Path, folder: Path, **changes: object) -> TrainConfig:
    """A run on a folder of images."""
    return settings(
        out,
        teacher=None,
        pretrained_model_name_or_path=str(teacher),
        images=str(folder),
        complex_human_instruction=False,
        **changes,
    )


def test_latents_are_encoded_once_and_after_a_change_alone(
    teacher: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = of_folder(tmp_path / "run", teacher, folder)
    found = opened(config)
    latents = found.load(torch.tensor([3, 0]))
    vae = AutoencoderDC.from_pretrained(teacher / "vae")
    pixels = np.asarray(Image.open(folder / "3.png").resize((20, 16), Image.LANCZOS))
    middle = torch.from_numpy(pixels[:, 2:18].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        want = 0.41 * vae.encode(middle).latent
    torch.testing.assert_close(latents[:1], want, rtol=0, atol=0.05)
    assert load_prompts(config) == [f"the digit {i}" for i in (1, 2, 3, 4)]
    assert found.rows.tolist() == [0, 0, 1, 2, 3]

    asked: list[str] = []
    encode = images.encode

    def watched(pairs: list, *rest: object) -> None:
        asked.extend(image.name for image, _ in pairs)
        encode(pairs, *rest)

    monkeypatch.setattr(images, "encode", watched)
    assert torch.equal(opened(config).load(torch.tensor([3, 0])), latents)
    assert asked == []
    Image.new("RGB", (16, 16)).save(folder / "3.png")
    digests = {found.digest, opened(config).digest}
    assert asked == ["3.png"]
    larger = replace(config, resolution=32)
    assert opened(larger).load(torch.tensor([0])).shape == (1, 1, 16, 16)
    other = Path(shutil.copytree(teacher, tmp_path / "other"))
    (other / "vae" / "config.json").write_text((other / "vae" / "config.json").read_text() + " ")
    digests |= {opened(larger).digest, opened(of_folder(tmp_path, other, folder)).digest}
    assert len(digests) == 4 and len(asked) == 1 + 5 + 5


def test_a_run_does_not_go_on_with_other_images(teacher: Path, folder: Path, tmp_path: Path):
    train(of_folder(tmp_path / "run", teacher, folder))
    Image.new("RGB", (16, 16)).save(folder / "3.png")
    again = {"resume_from_checkpoint": "latest", "max_train_steps": 9}
    with pytest.raises(
        UserError, match=r"images \(.*\) or the VAE are not those of the checkpoint"
    ):
        train(of_folder(tmp_path / "run", teacher, folder, **again))


def test_a_cache_that_is_not_written_or_not_shared_is_named(
    teacher: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = of_folder(tmp_path / "run", teacher, folder)
    monkeypatch.setattr(images, "encode", lambda *_: None)  # another node's
    with pytest.raises(UserError, match="lacks latents that another process made; give as latents"):
        opened(config)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match=r"Cannot write latents to .* by latents_cache"):
        opened(config)


def test_a_run_goes_on_with_other_settings_that_it_does_not_look_at(tmp_path: Path):
    run, again = tmp_path / "run", {"resume_from_checkpoint": "latest", "max_train_steps": 3}
    train(settings(run, route_steps=3))
    with pytest.raises(UserError, match="made with logit_std = "):
        train(settings(run, logit_std=0.5, **again))
    train(settings(run, route_steps=5, **again))


def test_a_folder_of_images_trains(teacher: Path, folder: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    train(of_folder(tmp_path / "run", teacher, folder, latents_cache=str(cache), fused=True))
    assert len(list(cache.iterdir())) == 5 and not (folder / "tbcm_latents").exists()
    assert (tmp_path / "run" / "student" / "config.json").exists()


def test_a_long_caption_is_refused_before_an_image_is_encoded(
    teacher: Path, folder: Path, tmp_path: Path
):
    (folder / "4.txt").write_text("seven " * 40)
    with pytest.raises(UserError, match="41 tokens"):
        train(of_folder(tmp_path / "run", teacher, folder))
    assert not (folder / "tbcm_latents").exists()


def test_an_emptied_latent_is_named(teacher: Path, folder: Path, tmp_path: Path):
    config = of_folder(tmp_path / "run", teacher, folder)
    opened(config)
    for file in (folder / "tbcm_latents").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"Cannot read .*safetensors; delete it"):
        opened(config).load(torch.tensor([0]))


def test_images_are_read_upright_on_white_and_in_eight_bits(tmp_path: Path):
    path, turned = tmp_path / "i.png", Image.Exif()
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(path, "TIFF")
    with pytest.raises(UserError, match=r"i\.png has floating-point pixels; save it in 8 or 16"):
        images.opened(path)
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(path)
    assert np.asarray(images.opened(path))[0, :, 0].tolist() == [0, 100, 255]
    Image.fromarray(np.array([[[9, 9, 9, 0], [9, 8, 7, 255]]], np.uint8)).save(path)
    assert np.asarray(images.opened(path)).tolist() == [[[255, 255, 255], [9, 8, 7]]]
    turned[274] = 6  # the orientation: a quarter turn
    Image.new("RGB", (3, 2)).save(path, exif=turned)
    assert images.opened(path).size == (2, 3)


def without_caption(folder: Path) -> None:
    (folder / "2.txt").unlink()


def empty_caption(folder: Path) -> None:
    (folder / "2.txt").write_text(" \n")


def torn_image(folder: Path) -> None:
    (folder / "2.png").write_bytes(b"torn")


def wrong_length(folder: Path) -> None:
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[:33] + b"\x00\x00\x00\x05IDAT" + whole[41:])


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def no_image(folder: Path) -> None:
    for image in folder.glob("*.png"):
        image.unlink()


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (without_caption, r"Cannot read the caption .*2\.txt"), (empty_caption, r"2\.txt is empty"),
        (torn_image, r"Cannot read the image .*2\.png"),
        (wrong_length, r"Cannot read the image .*2\.png"), (no_image, r"holds no \.jpg"),
        (moved, "images .* is no folder; give the one that holds them"),
    ],
)  # fmt: skip
def test_bad_images_are_named(
    harm: Callable[[Path], None], says: str, teacher: Path, folder: Path, tmp_path: Path
):
    harm(folder)
    with pytest.raises(UserError, match=says):
        train(of_folder(tmp_path / "run", teacher, folder))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompts": "p.txt"}, "takes the images' captions"),
        ({"points_per_pass": 2}, "points_per_pass splits a trajectory"),
        ({"filter_latent": "l.pt"}, "filter_latent drops trajectories"),
        ({"method": "tbcm", "images": "folder"}, "tbcm needs prompts"),
    ],
)
def test_settings_that_a_method_would_pass_by_are_refused(changes: dict, says: str, tmp_path: Path):
    with pytest.raises(UserError, match=says):
        settings(tmp_path, **changes)


def test_a_teacher_without_vae_and_blocks_it_has_not_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="has no vae/ to encode images with"):
        train(of_folder(tmp_path / "run", ASSETS / "digits", folder))
    with pytest.raises(UserError, match=r"4 blocks, from 0 to 3, not \[2, 8\]"):
        distiller(settings(tmp_path, method="sana_sprint", head_block_ids=[2, 8]))
