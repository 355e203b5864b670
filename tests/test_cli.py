"""The command line: bad input ends in one sentence that names the thing, and exit code 2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tbcm import cli
from tbcm.config import TrainConfig
from tbcm.errors import UserError


def parsed(*argv: str) -> TrainConfig:
    """The config that a `tbcm train` line makes."""
    args = cli.parse(["train", *argv]).train
    return TrainConfig(**cli.settings(args, TrainConfig))


def test_built_in_teacher_takes_its_preset_and_the_line_overrides_it():
    config = parsed("--output_dir", "o", "--teacher", "digits", "--learning_rate", "1e-5")
    assert (config.route_steps, config.scm_cfg_scale, config.learning_rate) == (8, [1.5], 1e-5)
    assert config.teacher == "digits" and not config.fused


@pytest.mark.parametrize("flag", ["fused", "gradient_checkpointing", "fsdp"])
def test_plain_flags(flag: str):
    assert getattr(parsed("--output_dir", "o", f"--{flag}"), flag)
    assert not getattr(parsed("--output_dir", "o"), flag)


def test_baselines_of_the_built_in_teacher_take_a_preset_of_their_own():
    config = parsed("--output_dir", "o", "--method", "sana_sprint")
    assert (config.train_batch_size, config.scm_cfg_scale) == (56, [1.5])


def test_other_teacher_takes_the_released_settings():
    config = parsed("--output_dir", "o", "--pretrained_model_name_or_path", "folder")
    assert (config.route_steps, config.scm_cfg_scale) == (16, [4.0, 4.5, 5.0])


def test_preset_by_name_under_config_under_line(tmp_path: Path):
    line = ("--output_dir", "o", "--preset", "sana_sprint_0.6b_512", "--route_steps", "9")
    config = parsed(*line)
    assert config.pretrained_model_name_or_path.endswith("Sprint_0.6B_1024px_teacher_diffusers")
    assert (config.resolution, config.route_steps, config.learning_rate) == (512, 9, 3.5e-6)
    path = tmp_path / "c.yaml"
    path.write_text("pretrained_model_name_or_path: here\nresolution: 256\n")
    config = parsed(*line, "--config", str(path))
    assert (config.pretrained_model_name_or_path, config.resolution) == ("here", 256)
    assert (config.route_steps, config.learning_rate) == (9, 3.5e-6)


def test_config_file_goes_over_the_preset_and_round_trips(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("route_steps: 5\noutput_dir: there\nfused: true\n")
    for line in (("--config", str(path), "--seed", "3"), ("--seed", "3", f"--config={path}")):
        config = parsed(*line)
        assert (config.route_steps, config.output_dir, config.seed) == (5, "there", 3)
    later = tmp_path / "later.yaml"
    later.write_text("route_steps: 6\n")
    assert parsed("--config", str(path), f"--config={later}").route_steps == 6
    assert parsed(f"--config={later}", "--config", str(path)).route_steps == 5
    assert config.fused and config.learning_rate == 4e-4
    for run in (config, TrainConfig("there")):
        path.write_text(replace(run, resume_from_checkpoint="latest").dump())
        assert parsed("--config", str(path)) == run
    with pytest.raises(UserError, match="mixed_precision must be no or bf16, not fp16"):
        parsed("--output_dir", "o", "--mixed_precision", "fp16")
    path.write_text("mixed_precision: no\n")
    assert parsed("--output_dir", "o", "--config", str(path)).mixed_precision == "no"


def test_a_run_is_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files and folders are kept by their whole path; a folder goes before a name."""
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("an owl")
    Path("digits").mkdir()
    config = parsed(
        "--output_dir", "o", "--prompts", "p.txt", "--pretrained_model_name_or_path", "digits"
    )
    assert config.prompts == str(tmp_path / "p.txt")
    assert config.pretrained_model_name_or_path == str(tmp_path / "digits")


@pytest.mark.parametrize(
    ("line", "rate"),
    [
        ("--preset sana_sprint_0.6b_1024 --output_dir o --print_config", 3.5e-6),
        ("--print_config --preset sana_sprint_0.6b_1024", 3.5e-6),
        ("--print_config= --preset sana_sprint_0.6b_1024 --learning_rate 2", 2.0),
        ("--output_dir o --print_config", 4e-4),
        ("--pretrained_model_name_or_path p --print_config", 1e-5),
    ],
)
def test_printed_settings_are_those_of_the_run(
    line: str, rate: float, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *line.split()])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["learning_rate"] == rate


def test_every_field_is_documented(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for sentence in ("Weigh the loss with w(t)", "Peak learning rate", "one dual pass per step"):
        assert sentence in said


BAD_FILES = {
    "rate.yaml": "learning_rate: null\n", "kind.yaml": "optimizer: null\n",
    "key.yaml": "lerning_rate: 1\n", "type.yaml": "learning_rate: fast\n", "torn.yaml": "a: [1\n",
    "empty.txt": "\n \n", "latin.txt": b"\xff\xfe caf\xe9", "long.txt": "seven " * 400,
    "wide.yaml": "seed: 1".encode("utf-16"), "file": "not a folder",
    "twice.yaml": "seed: 1\nfused: true\nseed: 2\n", "number.jsonl": '{"prompt": 5}',
    "word.txt": "seven" * 400, "one.txt": "a",
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "train,teacher,sample,export,eval"),
        ("distil", "invalid choice: 'distil'"),
        ("train", "required: --output_dir$"),
        ("bench step", "required: --json$"),
        ("sample", "required: run, --out$"),
        ("export {d}/none", "required: out$"),
        ("train --output_dir {d}/o --lerning_rate 1", "--lerning_rate"),
        ("train --output_dir {d}/o --learning_rate fast", '"learning_rate".*fast'),
        ("train --output_dir {d}/o --learning_rate -1", "learning_rate must be above 0"),
        ("train --output_dir {d}/o --learning_rate .nan", "learning_rate must be above 0"),
        ("train --output_dir {d}/o --ema_decay 1", "ema_decay must be at least 0 and below 1"),
        ("train --output_dir {d}/o --route_steps 1", "route_steps must be at least 2"),
        ("train --output_dir {d}/o --scm_cfg_scale []", "scm_cfg_scale must be a list"),
        ("train --output_dir {d}/o --max_train_steps 0", "max_train_steps must be at least 1"),
        ("train --output_dir {d}/o --seed -1", "seed must be between"),
        ("train --output_dir {d}/o --sample_steps 3", '"sample_steps".*3'),
        ("train --output_dir {d}/o --config {d}/none.yaml", "none.yaml"),
        ("train --output_dir {d}/o --config {d}/key.yaml", "lerning_rate"),
        ("train --output_dir {d}/o --config {d}/type.yaml", "learning_rate"),
        ("train --output_dir {d}/o --config {d}/torn.yaml", "torn.yaml"),
        ("train --output_dir {d}/o --config {d}/twice.yaml", "twice.yaml has seed twice"),
        ("train --output_dir {d}/o --config={d}/twice.yaml", "twice.yaml has seed twice"),
        (
            "train --output_dir {d}/o --config {{seed:-1,prompts:" + 300 * "x" + "}}",
            "^(?!.*too long).*seed",
        ),
        ("train --output_dir {d}/o --conf {d}/torn.yaml --see 5", "--conf"),
        ("train --output_dir {d}/o --config {d}/wide.yaml", "wide.yaml"),
        ("train --output_dir {d}/o --config {d}/rate.yaml", "learning_rate must have a value"),
        ("train --output_dir {d}/o --config {d}/kind.yaml", "optimizer must have a value"),
        ("train --output_dir {d}/o --preset sana", "preset.*'sana'.*sana_sprint_0.6b_1024"),
        ("train --output_dir {d}/o --resolution 0", "resolution must be at least 1"),
        ("train --output_dir {d}/o --resolution 9", "resolution 9 is not a multiple of 2"),
        ("train --output_dir {d}/o --variant bf16", "variant"),
        ("train --output_dir {d}/o --revision main", "no revision main"),
        ("train --output_dir {d}/o --teacher letters", "letters"),
        ("train --output_dir {d}/o --teacher {d}", r"teacher names a built-in one \(digits\)"),
        ("train --output_dir {d}/o --teacher=", r"built-in one \(digits\), not ''"),
        ("train --output_dir {d}/o --method scm --resolution 16", "8 pixels a side"),
        (
            "train --output_dir {d}/o --pretrained_model_name_or_path {d}/no --prompts {d}/one.txt",
            "no teacher '.*no'",
        ),
        ("train --output_dir {d}/o --teacher digits --pretrained_model_name_or_path x", "not both"),
        ("train --output_dir {d}/o --prompts {d}/none.txt", "none.txt"),
        ("train --output_dir {d}/o --preset sana_sprint_0.6b_1024 --prompts {d}/no.txt", "no.txt"),
        ("train --output_dir {d}/o --preset sana_sprint_0.6b_1024", "give --prompts FILE"),
        ("train --output_dir {d}/o --preset sana_sprint_0.6b_1024_baselines", "give --images"),
        ("train --output_dir {d}/o --fused=perhaps", "fused.*: 'perhaps'"),
        ("train --output_dir {d}/o --prompts {d}/empty.txt", "empty.txt"),
        ("train --output_dir {d}/o --prompts {d}/latin.txt", "latin.txt"),
        ("train --output_dir {d}/o --prompts {d}/long.txt", "tokens"),
        ("train --output_dir {d}/o --prompts {d}/word.txt", "prompt 'sevenseven.*…' has"),
        ("train --output_dir {d}/o --filter_latent {d}/none.pt", "filter_latent .*none.pt"),
        ("train --output_dir {d}/file", "output_dir .*file"),
        ("train --output_dir {d}/file/run", "output_dir .*file/run"),
        ("train --output_dir {d}", "is not empty"),
        ("train --output_dir {d}/o --resume_from_checkpoint latest", "no run in .* yet"),
        ("sample {d}/none --out {d}/x.png", "none"),
        ("sample {d}/none --geneval {d}/none.jsonl --out {d}/x", "none.jsonl"),
        ("sample {d}/none --geneval {d}/number.jsonl --out {d}/x", '"prompt" is no string'),
        ("sample {d}/none --geneval {d}/x --out {d}/x --prompts {d}/y", "leave --prompts out"),
        ("sample {d}/none --out {d}/x.png --images_per_prompt 3", "is for --geneval alone"),
        ("sample {d}/none --out {d}/x.jpg", "end its name in .png"),
        ("sample {d}/none --out {d}/x.png --steps 3", "no 3-step sampler"),
        ("sample {d}/none --out {d}/x.png --seed 99999999999999999999", "seed must be between"),
        ("teacher --output_dir . --max_train_steps 1", "is there already"),
        ("teacher --output_dir {d}/o --learning_rate .nan", "learning_rate must be above 0, not"),
        ("teacher --output_dir {d}/o --lr_warmup_steps -1", "lr_warmup_steps .* at least 0"),
        ("teacher --output_dir {d}/o --seed -1", "seed must be between"),
        ("export {d}/none {d}/x", "none"),
        ("eval {d}/none --json {d}/x.json", "none"),
        ("eval {d}/none --json {d}/x.json --images {d}/none", "--out"),
        ("eval {d}/none --json {d}/x.json --samples 0", "samples must be at least 2, not 0"),
        ("eval {d}/none --json {d}/x.json --clip c", "--clip is for --images alone"),
        ("eval {d}/none --json {d}/x.json --seed 1", "--seed is for --images alone"),
        ("bench step --json {d}", "it is a folder"),
        ("bench loss --json {d}/x.json", "invalid choice: 'loss'"),
    ],
)
def test_bad_input(line: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, content in BAD_FILES.items():
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
    assert cli.main(line.format(d=tmp_path).split()) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("tbcm: error: ")
    assert re.search(says, error[0]), error[0]
    assert {p.name for p in tmp_path.iterdir() if p.name != "o"} == set(BAD_FILES)
    assert not any((tmp_path / "o").glob("*"))


@pytest.mark.parametrize(("line", "begun", "says"), [
    ("train --output_dir {d}", True, "--resume_from_checkpoint latest continues"),
    ("train --output_dir {d}", False, "before the first step; the same command starts again"),
    ("sample {d} --out {d}/x.png", True, "tbcm: stopped.$"),
])  # fmt: skip
def test_ctrl_c_tells_how_to_go_on(
    line: str, begun: bool, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    if begun:
        (tmp_path / "config.yaml").touch()

    def stop(args: object) -> None:
        raise KeyboardInterrupt

    name = line.split()[0]
    monkeypatch.setitem(cli.COMMANDS, name, (*cli.COMMANDS[name][:2], stop))
    assert cli.main(line.format(d=tmp_path).split()) == 130
    assert re.search(says, capsys.readouterr().err)


def test_a_reader_that_goes_away_is_named(tmp_path: Path):
    line = [sys.executable, "-m", "tbcm", "train", "--output_dir", "run", "--logging_steps", "1"]
    with subprocess.Popen(
        line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        run.stdout.close()
        said = run.stderr.read()
    assert run.returncode == 2 and "Traceback" not in said
    assert "nothing reads its output" in said and said.rstrip().endswith("continues.")


def test_a_terminal_that_knows_few_letters_stops_no_run(tmp_path: Path):
    quick = "--max_train_steps 1 --train_batch_size 1 --route_steps 2 --validation_samples 1"
    line = [sys.executable, "-m", "tbcm", "train", *quick.split(), "--output_dir", "run"]
    latin = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(line, cwd=tmp_path, env=latin, capture_output=True, text=True)
    assert done.returncode == 0 and r"\u2016g\u2016" in done.stdout, done.stderr


@pytest.mark.parametrize(("settings", "says"), [
    (b"seed: 3\n", r"^seed: 3$"),
    (b"seed: 3\nseed: 4\n", "--config has seed twice"),
    (b"seed: 3 \xff", "error: .*decode"),
])  # fmt: skip
def test_settings_come_from_a_pipe(settings: bytes, says: str):
    line = [sys.executable, "-m", "tbcm", "train", "--config", "/dev/stdin", "--print_config"]
    done = subprocess.run(line, input=settings, capture_output=True)
    out, error = done.stdout.decode(), done.stderr.decode()
    assert re.search(says, out + error, re.M) and "Traceback" not in error, out + error


def test_help_needs_no_torch():
    code = "import sys; from tbcm import cli; cli.build_parser(''); exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_preset_is_valid():
    for path in (Path(cli.__file__).parent / "presets").glob("*.yaml"):
        TrainConfig("o", **yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("preset", ["digits_baselines", "sana_sprint_0.6b_1024_baselines"])
@pytest.mark.parametrize("method", ["scm", "sana_sprint"])
def test_the_presets_of_the_baselines_train_both(method: str, preset: str, capsys):
    line = ["train", "--preset", preset, "--output_dir", "o", "--method", method]
    config = TrainConfig(**cli.settings(cli.parse(line).train, TrainConfig))
    assert config.method == method and config.train_batch_size > 1


def test_info_lists_versions_and_ops(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert "torch" in said and "adaln" in said and "in float32" in said
