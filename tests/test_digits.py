"""The built-in data, the prompts, and the shipped teacher with its text encoder."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from tbcm import digits
from tbcm import teacher as training
from tbcm.errors import UserError
from tbcm.models import Teacher, load_teacher, load_transformer
from tbcm.teacher import Batches, TeacherConfig, save_teacher, train_teacher
from tbcm.text import read_prompts


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("digits")


def test_split_is_stratified_disjoint_and_free_of_the_global_seed():
    digits.load_digits.cache_clear()
    torch.manual_seed(1)
    (train, labels), (held_out, held_labels) = digits.load_digits()
    digits.load_digits.cache_clear()
    torch.manual_seed(2)
    assert torch.equal(held_out, digits.load_digits()[1][0])
    assert train.shape == (1437, 1, 8, 8) and held_out.shape == (360, 1, 8, 8)
    assert train.min() == held_out.min() == -1 and train.max() == held_out.max() == 1
    assert torch.bincount(labels).min() >= 139 and torch.bincount(held_labels).min() >= 35
    pixels = torch.cat([train, held_out]).flatten(1).unique(dim=0)
    assert len(pixels) == 1797  # no digit is in the data twice, so none is in both halves


def test_prompts_name_their_digit():
    prompts = digits.prompts()
    assert len(set(prompts)) == len(prompts) == 80
    for i, prompt in enumerate(prompts):
        named = [n for n, word in enumerate(digits.WORDS) if word in prompt or str(n) in prompt]
        assert named == [i % 10]


def test_prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    with pytest.raises(UserError, match="Cannot read"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe7")
    with pytest.raises(UserError, match="UTF-8"):
        read_prompts(path)
    path.write_text("\n  \n")
    with pytest.raises(UserError, match="no prompt"):
        read_prompts(path)
    path.write_text("a seven\n\n  the digit 7 \n", encoding="utf-8")
    assert read_prompts(path) == ["a seven", "the digit 7"]
    path.write_bytes("\ufeffa seven\r\nthe\u2028digit\f7\r\n".encode())
    assert read_prompts(path) == ["a seven", "the\u2028digit\f7"]


def test_text_encoder_pads_right_and_gives_the_null_prompt_its_own_mask(teacher):
    embeds, mask = teacher.text.encode(["a handwritten seven", "", "Ünseen ☃"])
    assert (
        embeds.shape == (3, 12, 64) and embeds.dtype == torch.float32 and mask.dtype == torch.bool
    )
    assert mask.sum(1).tolist()[:2] == [4, 1]
    assert (mask[:, 1:] <= mask[:, :-1]).all()
    alone, _ = teacher.text.encode(["a handwritten seven"])
    assert torch.allclose(alone[0, :4], embeds[0, :4], atol=1e-5)
    with pytest.raises(UserError, match="xylophone"):
        teacher.text.encode(["a seven", "a xylophone quartz seven"])


def test_teacher_folder_round_trips(teacher, tmp_path):
    assert teacher.latent_shape == (1, 8, 8) and not teacher.transformer.training
    again = load_transformer(teacher.path / "transformer")
    save_teacher(tmp_path / "t", again, teacher.text)
    saved = load_teacher(str(tmp_path / "t"))
    assert next(saved.transformer.parameters()).dtype == torch.float32
    for a, b in zip(teacher.transformer.parameters(), saved.transformer.parameters(), strict=True):
        assert torch.equal(a, b) and not b.requires_grad
    prompts = digits.prompts()
    assert torch.equal(teacher.text.encode(prompts)[0], saved.text.encode(prompts)[0])
    assert sum(f.stat().st_size for f in teacher.path.rglob("*") if f.is_file()) < 4 * 2**20


def test_damaged_and_foreign_teachers_are_refused(teacher, tmp_path):
    with pytest.raises(UserError, match="no teacher 'nobody'"):
        load_teacher("nobody")
    folder = tmp_path / "t"
    shutil.copytree(teacher.path, folder)
    config = folder / "transformer" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"guidance_embeds": false', '"guidance_embeds": true'))
    with pytest.raises(UserError, match="student"):
        load_teacher(str(folder))
    config.write_text(text.replace("SanaTransformer2DModel", "UNet2DModel"))
    with pytest.raises(UserError, match="UNet2DModel"):
        load_teacher(str(folder))
    config.write_text(text)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="Cannot load"):
        _ = load_teacher(str(folder)).transformer
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match="lacks tokenizer"):
        load_teacher(str(folder))


def test_training_is_reproducible_and_never_overwrites(tmp_path):
    def trained(name: str) -> list[torch.Tensor]:
        torch.rand(1)  # the global state must not matter
        cfg = TeacherConfig(str(tmp_path / name), max_train_steps=3, train_batch_size=4)
        return list(load_transformer(train_teacher(cfg) / "transformer").parameters())

    assert all(map(torch.equal, trained("a"), trained("b")))
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}
    with pytest.raises(UserError, match="is there already"):
        trained("a")
    with pytest.raises(UserError, match="learning_rate"):
        TeacherConfig(learning_rate=0)
    with pytest.raises(UserError, match="loss is not finite"):
        train_teacher(TeacherConfig(str(tmp_path / "c"), max_train_steps=3, learning_rate=1e30))
    assert not (tmp_path / "c").exists()


def test_the_teachers_batches_are_drawn_as_its_settings_say():
    cfg = TeacherConfig(
        proportion_empty_prompts=0.25, proportion_uniform=0.0, logit_mean=2.0, logit_std=0.5
    )
    rows = torch.arange(81)
    batches = Batches(cfg, rows, rows, torch.Generator().manual_seed(0))
    logits = batches.times(4000).logit()
    assert logits.mean() == pytest.approx(2, abs=0.05)
    assert logits.std() == pytest.approx(0.5, abs=0.05)
    cfg.proportion_uniform = 1.0
    assert batches.times(4000).std() == pytest.approx(12**-0.5, abs=0.01)
    labels = torch.arange(10).repeat(400)
    found = batches.prompt_rows(labels)
    asked = found != 80
    assert asked.float().mean() == pytest.approx(0.75, abs=0.03)
    assert torch.equal(found[asked] % 10, labels[asked]) and len(found.unique()) == 81


def test_the_teacher_learns_the_velocity_from_data_to_noise():
    x0, z, s = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([0.0, 0.25])

    def net(x: torch.Tensor, timestep: torch.Tensor, **_: object) -> SimpleNamespace:
        assert torch.equal(timestep, s) and torch.equal(x[0], x0[0])
        assert torch.allclose(x[1], 0.75 * x0[1] + 0.25 * z[1])
        return SimpleNamespace(sample=z - x0)

    assert training.flow_matching_loss(net, x0, z, s, None, None) == 0


def test_the_teachers_steps_are_warmed_up_clipped_and_averaged(teacher, monkeypatch):
    step, loss, seen, noise = torch.optim.AdamW.step, training.flow_matching_loss, [], []

    def spy(self, *args, **options):
        grads = [p.grad for p in self.param_groups[0]["params"]]
        norm = torch.nn.utils.get_total_norm(grads).item()
        seen.append((self.param_groups[0]["lr"], norm))
        return step(self, *args, **options)

    def loss_of(net, x0, z, *rest):
        assert all(p.grad is None for p in net.parameters())
        noise.append(z)
        return loss(net, x0, z, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    monkeypatch.setattr(training, "flow_matching_loss", loss_of)
    settings = {"max_train_steps": 3, "train_batch_size": 2, "num_layers": 1, "lr_warmup_steps": 2}
    nets = []
    for change in ({}, {"ema_decay": 0.0}, {"seed": 1}):
        cfg = TeacherConfig("", max_grad_norm=1e-3, **settings, **change)
        nets.append(training.train_transformer(cfg, teacher.text).proj_out.weight)
    assert [lr for lr, _ in seen[:3]] == pytest.approx([0, 1e-3, 2e-3])
    assert all(norm == pytest.approx(1e-3, rel=1e-2) for _, norm in seen)
    assert torch.equal(noise[0], noise[3]) and not torch.equal(noise[0], noise[6])
    assert not torch.equal(nets[0], nets[1])


def test_the_teachers_seed_is_its_encoders_and_its_scheduler_has_the_shift(
    teacher, tmp_path, monkeypatch
):
    net = load_transformer(teacher.path / "transformer")
    save_teacher(tmp_path / "t", net, teacher.text)
    saved = json.loads((tmp_path / "t" / "scheduler" / "scheduler_config.json").read_text())
    assert saved["shift"] == 2.5
    seeds = []
    monkeypatch.setattr(training, "build_text_encoder", seeds.append)
    monkeypatch.setattr(training, "train_transformer", lambda cfg, text: None)
    monkeypatch.setattr(training, "save_teacher", lambda *_: None)
    train_teacher(TeacherConfig(str(tmp_path / "new"), seed=7))
    assert seeds == [7]


def test_a_prompt_in_capitals_is_one_in_lower_case(teacher):
    prompt = "a handwritten seven"
    for capitals, plain in zip(
        teacher.text.encode([prompt.upper()]), teacher.text.encode([prompt]), strict=True
    ):
        assert torch.equal(capitals, plain)
