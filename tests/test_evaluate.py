"""Samplers, the metrics, and an evaluation of a student whose scores are known beforehand."""

import json
import math

import pytest
import torch
from PIL import Image
from torch import nn

from tbcm import classifier, digits, evaluate
from tbcm.classifier import accuracy, trained_classifier
from tbcm.config import TrainConfig
from tbcm.errors import UserError
from tbcm.evaluate import (
    Prompts,
    evaluate_run,
    frechet,
    images_of_seed,
    pair_rmse,
    teacher_images,
)
from tbcm.models import load_teacher
from tbcm.sampling import consistency_sample, grid, load_run, sample_run
from tbcm.student import build_student
from tbcm.trigflow import SIGMA_DATA, TrigFlow, like


class OnePoint(nn.Module):
    """The exact F of data that is one point, x0/σ_d = text[:, 0, 0] in every pixel."""

    def forward(self, x, t, text, mask, guidance=None):
        point, t = like(text[:, 0, 0], x), like(t, x)
        z = (x - t.cos() * point) / t.sin()
        return t.cos() * z - t.sin() * point


def conditions(n: int, value: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((n, 2, 3), value, dtype=torch.float64), torch.ones(n, 2)


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return SIGMA_DATA * torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run whose student is the teacher itself, its guidance embedding still silent."""
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(str(folder), scm_cfg_scale=[1.0, 1.5, 2.0])
    (folder / "config.yaml").write_text(config.dump(), encoding="utf-8")
    build_student(load_teacher("digits").transformer).save_pretrained(folder / "student")
    return folder


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_consistency_sampler_is_exact_on_one_point(noise, steps):
    x0 = consistency_sample(OnePoint(), noise, *conditions(4, 0.3), None, steps)
    assert torch.allclose(x0, torch.full_like(x0, 0.3), atol=1e-12)


def test_consistency_sampler_draws_fresh_noise_from_its_generator(noise):
    class Silent(nn.Module):
        def forward(self, x, t, text, mask, guidance=None):
            return torch.zeros_like(x)

    def sample(seed: int, steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return consistency_sample(Silent(), noise, *conditions(4, 0), None, steps, generator)

    assert torch.equal(sample(0, 2), sample(0, 2)) and not torch.equal(sample(0, 2), sample(1, 2))
    assert torch.equal(sample(0, 1), sample(1, 1))
    # With F = 0, x0 = cos t x: the last x0 of two steps is cos 1 × (cos π/2 … + sin 1 σ_d ε) / σ_d.
    fresh = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0), dtype=noise.dtype)
    assert torch.allclose(sample(0, 2), math.cos(1) * math.sin(1) * fresh, atol=1e-7)
    with pytest.raises(UserError, match="3-step"):
        sample(0, 3)


@pytest.mark.parametrize("scale", [1, 1.5, 4])
def test_trajectory_under_guidance_is_exact_on_two_points(noise, scale):
    named, null = conditions(1, 0.3), conditions(1, -0.2)
    rows = torch.zeros(4, dtype=torch.int64)
    prompts = Prompts(*(torch.cat(pair) for pair in zip(named, null, strict=True)), rows)
    x0 = teacher_images(OnePoint(), noise, prompts, scale)
    assert torch.allclose(x0, torch.full_like(x0, -0.2 + scale * 0.5), atol=1e-12)


def test_frechet_distance_has_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(500, 5, generator=generator, dtype=torch.float64)
    a = a - a.mean(0)
    a = a @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov())).T  # covariance exactly I
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    stretch = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    shift = torch.arange(5.0, dtype=torch.float64)
    expected = (shift.square().sum() + (1 - stretch).square().sum()).item()
    assert frechet(a, a * stretch @ turn + shift) == pytest.approx(expected, rel=1e-9)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_classifier_reads_held_out_digits_and_leaves_the_random_state():
    trained_classifier.cache_clear()
    state = torch.get_rng_state()
    _, (images, labels) = digits.load_digits()
    assert accuracy(trained_classifier(), images, labels) >= 0.985
    assert torch.equal(state, torch.get_rng_state())


def test_the_classifier_sees_digits_turned_either_way_and_is_the_same_for_all(monkeypatch):
    seen, grid = [], classifier.F.affine_grid
    monkeypatch.setattr(
        classifier.F, "affine_grid", lambda theta, *rest, **how: seen.append(theta) or
        grid(theta, *rest, **how)
    )  # fmt: skip
    classifier.augment(torch.zeros(1000, 1, 8, 8))
    turn, shift = seen[0].split([2, 1], 2)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(2).expand_as(turn))
    for moved, most in ((turn[:, 1, 0].asin(), 0.15), (shift, 0.1)):
        assert 0.9 * most < moved.max() <= most + 1e-6 and abs(moved.mean()) < 0.1 * most
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(trained_classifier.__wrapped__().head.weight)
    assert torch.equal(*heads)


def test_teacher_draws_the_digit_asked_for(run_dir):
    run = load_run(run_dir)
    prompts = Prompts.of(run.teacher.text, 200)
    generator = torch.Generator().manual_seed(0)
    noise = SIGMA_DATA * torch.randn(200, 1, 8, 8, generator=generator)
    with torch.no_grad():
        images = teacher_images(TrigFlow(run.teacher.transformer), noise, prompts, 1)
    assert accuracy(trained_classifier(), images, prompts.labels) >= 0.95
    assert prompts.labels.tolist() == 20 * list(range(10))


def test_noise_between_steps_is_none_that_an_image_began_with(run_dir, monkeypatch):
    run = load_run(run_dir)
    prompts = Prompts.of(run.teacher.text, 12)
    seen = []

    def sampler(net, noise, text, mask, guidance, steps, generator):
        seen.append((noise, torch.randn(noise.shape, generator=generator)))
        return noise

    monkeypatch.setattr(evaluate, "CHUNK", 4)
    monkeypatch.setattr(evaluate, "consistency_sample", sampler)
    monkeypatch.setattr(evaluate, "teacher_images", lambda net, noise, *rest: noise)
    images_of_seed(run, TrigFlow(run.teacher.transformer), prompts, 0)
    of_two_steps = seen[2 * 3 : 3 * 3]  # after the undistilled teacher's and one step's
    first, fresh = (torch.cat(x) for x in zip(*of_two_steps, strict=True))
    drawn = torch.cat([first / SIGMA_DATA, fresh]).flatten(1)
    apart = torch.cdist(drawn, drawn) + 100 * torch.eye(len(drawn))
    assert apart.min() > 1
    assert torch.equal(fresh, torch.cat([x for _, x in seen[3 * 3 :]]))


def test_untrained_student_scores_as_the_undistilled_teacher(run_dir, tmp_path, monkeypatch):
    path = tmp_path / "eval.json"
    monkeypatch.setattr(evaluate, "SEEDS", (0, 1))
    report = evaluate_run(run_dir, path, samples=30)
    assert json.loads(path.read_text()) == report
    assert set(report["teacher"]) == {"accuracy", "fd"}
    assert list(report["student"]) == ["1", "2", "4"]
    assert report["student"]["1"] == pytest.approx(report["undistilled"], rel=1e-3)
    assert report["undistilled"]["pair_rmse"] > 0.2
    assert 0 < report["floor"]["fd_teacher"] < report["undistilled"]["fd_teacher"]
    assert report["spread"]["undistilled"]["fd"] > 0 and report["classifier_accuracy"] > 0.98


def test_evaluation_refuses_what_it_cannot_do(run_dir, tmp_path):
    path = tmp_path / "eval.json"
    with pytest.raises(UserError, match="samples must be at least 2, not 1"):
        evaluate_run(run_dir, path, samples=1)
    with pytest.raises(UserError, match="not a run"):
        evaluate_run(tmp_path, path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write"):
        evaluate_run(run_dir, tmp_path / "file" / "eval.json")
    with pytest.raises(UserError, match="folder"):
        evaluate_run(run_dir, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_scores_compare_with_held_out_digits_and_with_the_other_teacher():
    (train, _), (held_out, labels) = digits.load_digits()
    other = train[:360]
    images = {"teacher": held_out, "1": other}
    scores = evaluate.scores_of_seed(images, labels, other)
    apart = frechet(*(trained_classifier().features(x) for x in (other, held_out)))
    same = pytest.approx(0, abs=1e-6)
    assert scores["teacher"] == {
        "accuracy": accuracy(trained_classifier(), held_out, labels), "fd": same,
        "fd_teacher": pytest.approx(apart), "pair_rmse": 0,
    }  # fmt: skip
    assert (scores["1"]["fd"], scores["1"]["fd_teacher"]) == (pytest.approx(apart), same)
    assert scores["1"]["pair_rmse"] == pair_rmse(other, held_out)


def test_a_report_has_means_and_standard_deviations():
    keys, names = ("accuracy", "fd", "fd_teacher", "pair_rmse"), ("teacher", "undistilled", *"124")
    seeds = [{name: dict.fromkeys(keys, x) for name in names} for x in (1.0, 2.0, 6.0)]
    report = evaluate.report_of(seeds)
    for part in ("teacher", "undistilled"):
        assert set(report[part].values()) == {3.0}
        assert set(report["spread"][part].values()) == {7**0.5}
    assert report["student"]["2"]["fd"] == 3 and report["spread"]["student"]["2"]["fd"] == 7**0.5
    assert report["floor"]["fd_teacher"] == 3


def test_pair_rmse_is_in_image_units():
    assert pair_rmse(torch.zeros(3, 1, 2, 2), torch.full((3, 1, 2, 2), -0.5)) == 0.5


def test_sample_writes_one_tile_per_prompt(run_dir, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a handwritten seven\n" * 11)
    sample_run(run_dir, 1, tmp_path / "out.png", prompts, seed=0)
    picture = Image.open(tmp_path / "out.png")
    assert picture.size == (10 * 72, 2 * 72)
    assert {p.name for p in tmp_path.iterdir()} == {"prompts.txt", "out.png"}


def test_grid_clamps_and_keeps_the_order(tmp_path):
    images = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    grid(images, tmp_path / "g.png")
    picture = Image.open(tmp_path / "g.png")
    assert picture.width == 5 * 24
    assert [picture.getpixel((24 * i + 8, 8))[0] for i in range(5)] == [0, 0, 128, 255, 255]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write"):
        grid(images, tmp_path / "file" / "g.png")
