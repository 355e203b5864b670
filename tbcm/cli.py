"""The `tbcm` command. What the user can mend ends in one sentence and exit code 2."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ActionYesNo, ArgumentParser, Namespace, set_parsing_settings

from tbcm.errors import UserError

# torch and diffusers take seconds to import: each command imports what it needs when it runs.


def add_train(parser: ArgumentParser) -> None:
    from tbcm.config import PRESETS, TrainConfig

    presets = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    parser.add_argument(
        "--preset", choices=presets, help="Settings that ship with tbcm. Default: digits, or "
        "digits_baselines, with the built-in teacher; the defaults below hold where a preset sets "
        "nothing.",
    )  # fmt: skip
    parser.add_argument("--config", action="config", help="YAML file of settings.")
    # What is off by default is switched on by its name alone.
    flags = {f.name for f in fields(TrainConfig) if f.default is False}
    parser.add_class_arguments(TrainConfig, skip=flags)
    for field in parse_from_object(TrainConfig).params:
        if (name := field.arg_name) in flags:
            off = {"action": ActionYesNo, "nargs": "?", "default": False}
            parser.add_argument(f"--{name}", help=field.description, **off)


def train(args: Namespace) -> None:
    from tbcm.config import TrainConfig

    config = TrainConfig(**settings(args, TrainConfig))
    from tbcm.train import train as run

    run(config)


def add_teacher(parser: ArgumentParser) -> None:
    from tbcm.teacher import TeacherConfig

    parser.add_argument("--config", action="config", help="YAML file of settings.")
    parser.add_class_arguments(TeacherConfig)


def teacher(args: Namespace) -> None:
    from tbcm.teacher import TeacherConfig, train_teacher

    print(train_teacher(TeacherConfig(**settings(args, TeacherConfig))))


def add_sample(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="Run folder of `tbcm train`.")
    parser.add_argument("--steps", type=int, default=1, help="Sampling steps: 1, 2 or 4.")
    parser.add_argument("--out", required=True, help="PNG to write; a folder with --geneval.")
    parser.add_argument("--prompts", help="Prompts file; else the first 80 of the run's own.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the first image's noise.")
    parser.add_argument("--geneval", help="GenEval's evaluation_metadata.jsonl, to be drawn.")
    parser.add_argument("--images_per_prompt", type=int, help="With --geneval: 4 by default.")


def sample(args: Namespace) -> None:
    if args.geneval:
        if args.prompts:
            raise UserError("--geneval brings its own prompts; leave --prompts out.")
        from tbcm.geneval import sample_geneval

        images = 4 if args.images_per_prompt is None else args.images_per_prompt
        sample_geneval(args.run, args.geneval, args.out, args.steps, args.seed, images)
    else:
        only_with("geneval", args, images_per_prompt=None)
        from tbcm.sampling import sample_run

        sample_run(args.run, args.steps, args.out, args.prompts, args.seed)
    print(args.out)


def add_export(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="Run folder of `tbcm train`.")
    parser.add_argument("out", help="Folder to write; it must not be there yet.")


def export(args: Namespace) -> None:
    from tbcm.export import export_run

    print(export_run(args.run, args.out))


def add_eval(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="Run folder of `tbcm train`.")
    parser.add_argument("--json", required=True, help="JSON file to write.")
    parser.add_argument(
        "--samples", type=int, help="Images: 2000 per seed for digits, else all of the folder's."
    )
    parser.add_argument("--images", help="Folder like MJHQ-30K: score by FID and CLIP against it.")
    parser.add_argument("--out", help="With --images: folder for the images drawn, to continue in.")
    parser.add_argument("--inception", help="With --images: TorchScript file of the features.")
    parser.add_argument("--clip", help="With --images: folder or Hub id; else OpenAI's ViT-L/14.")
    parser.add_argument("--steps", type=int, default=1, help="With --images: sampling steps.")
    parser.add_argument("--seed", type=int, default=0, help="With --images: seed of the noise.")


def evaluate(args: Namespace) -> None:
    if not args.images:
        only_with("images", args, out=None, inception=None, clip=None, steps=1, seed=0)
        from tbcm.evaluate import evaluate_run

        samples = 2000 if args.samples is None else args.samples
        return evaluate_run(Path(args.run), Path(args.json), samples=samples)
    if not args.out:
        raise UserError("--images needs --out, a folder for the images to be drawn.")
    from tbcm.scores import CLIP, score_run

    report = score_run(
        args.run, args.images, args.out, args.json, inception=args.inception,
        clip=args.clip or CLIP, steps=args.steps, samples=args.samples, seed=args.seed,
    )  # fmt: skip
    print(f"{report['images']} images: FID {report['fid']:.2f}, CLIP {report['clip_score']:.2f}")


def add_info(parser: ArgumentParser) -> None:
    """`tbcm info` has no settings."""


def info(args: Namespace) -> None:
    from tbcm.info import show

    show()


def add_bench(parser: ArgumentParser) -> None:
    models = Literal["digits", "sana-0.6b", "sana-1.6b"]
    add = parser.add_argument
    add("what", choices=["step"], help="What to time: one distillation step.")
    add("--json", required=True, help="JSON file to write.")
    add("--steps", type=int, default=40, help="Steps of each variant to time, at least 2.")
    add("--model", type=models, default="digits", help="digits, or a SANA with random weights.")
    add("--methods", type=str, nargs="+", default=["tbcm"],
        help="tbcm; scm and sana_sprint, whose images are latents that were encoded before; and "
        "scm_vae and sana_sprint_vae (of SANA), which encode images in each step.")  # fmt: skip
    add("--modes", type=str, nargs="+", default=["eager", "fused"],
        help="eager, fused and compile; compiling takes minutes.")  # fmt: skip
    add("--layers", type=int, help="SANA's layers (on a GPU all of them, else 2).")
    add("--resolution", type=int, help="SANA's pixels a side (on a GPU 1024, else 512).")
    add("--route_steps", type=int, help="SANA's teacher steps (on a GPU 16, else 4).")
    add("--batch", type=int, help="SANA's prompts of a step (1).")


def bench(args: Namespace) -> None:
    from tbcm.step_bench import Plan, bench_step, lines

    plan = Plan(args.model, args.layers, args.resolution, args.route_steps, args.batch)
    result = bench_step(args.json, args.steps, plan, args.methods, args.modes)
    print("\n".join(lines(result)))


Adds, Runs = Callable[[ArgumentParser], None], Callable[[Namespace], None]
COMMANDS: dict[str, tuple[str, Adds, Runs]] = {
    "train": (
        "Distil a teacher to one step, from prompts alone or (--method) images.",
        add_train,
        train,
    ),
    "teacher": ("Train the built-in digits teacher.", add_teacher, teacher),
    "sample": ("Draw a grid of images with a student.", add_sample, sample),
    "export": ("Write a SanaSprintPipeline folder for diffusers.", add_export, export),
    "eval": ("Measure a student against its teacher.", add_eval, evaluate),
    "info": ("Show versions and which implementation of each op runs here.", add_info, info),
    "bench": ("Time one step, plain, compiled and fused.", add_bench, bench),
}


def only_with(option: str, args: Namespace, **defaults: Any) -> None:
    """Raises UserError for an option that was given without the one that it belongs to."""
    for name, default in defaults.items():
        if args[name] != default:
            raise UserError(f"--{name} is for --{option} alone; give that too, or leave it out.")


def settings(args: Namespace, config: type) -> dict[str, Any]:
    """The parsed values of a config's fields."""
    return {f.name: args[f.name] for f in fields(config)}


def build_parser(command: str) -> ArgumentParser:
    """The parser, with the arguments of the command that was asked for."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    strict = {"exit_on_error": False, "allow_abbrev": False}
    parser = ArgumentParser("tbcm", description=__doc__, **strict)
    commands = parser.add_subcommands()
    for name, (says, add, _) in COMMANDS.items():
        sub = ArgumentParser(description=says, **strict)
        if name == command:
            add(sub)
        commands.add_subcommand(name, sub, help=says)
    return parser


def parse(argv: list[str]) -> Namespace:
    """Parsed arguments, over the defaults of a preset."""
    command = argv[0] if argv else ""
    parser = build_parser(command)
    try:
        argv = line = config_first(argv)
        refuse_repeated_keys(argv)
        if printing := command == "train" and any(map(prints_config, argv)):
            # Printing ends the parsing, so the preset is found without; no folder is needed.
            line = [*(word for word in argv if not prints_config(word)), "--output_dir="]
        args = parser.parse_args(line)
        preset = preset_of(args.train) if args.subcommand == "train" else None
        if not (preset or printing):
            return args
        # Before the rest of the line, which overrides it.
        over = ["--config", str(preset)] if preset else []
        return parser.parse_args(["train", *over, *argv[1:]])
    except (ArgumentError, ValueError) as error:
        says = as_typed(command, str(error))
        words = (word.removeprefix("--config=") for word in argv)
        files = " ".join(word for word in words if word.endswith((".yaml", ".yml")))
        raise UserError(f"{says} (reading {files})" if files else says) from error


def prints_config(word: str) -> bool:
    """Whether a word of the line asks for the settings in place of a run."""
    return word.partition("=")[0] == "--print_config"


def as_typed(command: str, says: str) -> str:
    """A message of the parser with missing arguments as they are typed: --json for bench.json."""
    known, found, missing = says.partition("arguments are required: ")
    if not found:
        return says
    parser = ArgumentParser(exit_on_error=False)
    COMMANDS[command][1](parser)
    names = [name.removeprefix(f"{command}.") for name in missing.split(", ")]
    usage = parser.format_usage()
    return known + found + ", ".join(f"--{n}" if f"--{n} " in usage else n for n in names)


def config_first(argv: list[str]) -> list[str]:
    """The line with each --config=FILE in front: flags override it wherever they stand."""
    moved, rest, words = [], [], iter(argv)
    for word in words:
        name, given, value = word.partition("=")
        if name == "--config" and (given or (value := next(words, None)) is not None):
            moved.append(f"--config={read_pipe(value)}")
        else:
            rest.append(word)
    return rest[:1] + moved + rest[1:]


def read_pipe(name: str) -> str:
    """A pipe's contents in place of its name: the line is parsed twice, a pipe read once."""
    if not os.path.exists(name) or os.path.isfile(name) or os.path.isdir(name):
        return name
    return Path(name).read_text("utf-8")


def refuse_repeated_keys(argv: list[str]) -> None:
    """Raises UserError for a key that a --config file has twice: YAML would take the last.

    A word may also be YAML itself, of any length.
    """
    for word in (w.removeprefix("--config=") for w in argv if w.startswith("--config=")):
        named = os.path.isfile(word)
        with suppress(yaml.YAMLError, UnicodeDecodeError):  # which the parser names
            top = yaml.compose(Path(word).read_text("utf-8") if named else word)
            keys = [key.value for key, _ in top.value] if isinstance(top, yaml.MappingNode) else []
            if twice := [key for n, key in enumerate(keys) if key in keys[:n]]:
                name = word if named else "--config"
                raise UserError(f"{name} has {twice[0]} twice; leave one.")


def preset_of(args: Namespace) -> Path | None:
    """The preset asked for; else a built-in teacher's own."""
    from tbcm.config import PRESETS

    name = args.preset
    if not (name or args.pretrained_model_name_or_path):
        name = (args.teacher or "digits") + ("" if args.method == "tbcm" else "_baselines")
    path = PRESETS / f"{name}.yaml"
    return path if path.exists() else None


def going_on(args: Namespace | None) -> str:
    """How a command that was stopped is continued."""
    if args is None or args.subcommand != "train":
        return ""
    if (Path(args.train.output_dir) / "config.yaml").exists():
        return "; --resume_from_checkpoint latest continues"
    return " before the first step; the same command starts again, with what is encoded already"


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, or 2 after a sentence on stderr for what the user can mend."""
    argv, args = sys.argv[1:] if argv is None else argv, None
    if hasattr(sys.stdout, "reconfigure"):  # names that it cannot show stop no run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = parse(argv)
        COMMANDS[args.subcommand][2](args[args.subcommand])
    except UserError as error:
        print(f"tbcm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        print(f"tbcm: stopped, as nothing reads its output{going_on(args)}.", file=sys.stderr)
        return 2
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        print(f"tbcm: error: {name}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"tbcm: stopped{going_on(args)}.", file=sys.stderr)
        return 130
    return 0
