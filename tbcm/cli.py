"""The `tbcm` command. What the user can mend ends in one sentence and exit code 2."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ActionYesNo, ArgumentParser, Namespace, set_parsing_settings

from tbcm.errors import UserError

FUSED = "Run teacher and student through tbcm_kernels, one dual pass per step instead of two."
# torch and diffusers take seconds to import: each command imports what it needs when it runs.


def add_train(parser: ArgumentParser) -> None:
    from tbcm.config import TrainConfig

    parser.add_argument("--config", action="config", help="YAML file of settings.")
    parser.add_class_arguments(TrainConfig, skip={"fused"})
    parser.add_argument("--fused", action=ActionYesNo, default=False, help=FUSED)


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
    parser.add_argument("--out", required=True, help="PNG to write.")
    parser.add_argument("--prompts", help="Prompts file; else the run's own prompts.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise.")


def sample(args: Namespace) -> None:
    from tbcm.sampling import sample_run

    sample_run(args.run, args.steps, args.out, args.prompts, args.seed)


def add_eval(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="Run folder of `tbcm train`.")
    parser.add_argument("--json", required=True, help="JSON file to write.")
    parser.add_argument("--samples", type=int, default=2000, help="Images per seed.")


def evaluate(args: Namespace) -> None:
    from tbcm.evaluate import evaluate_run

    evaluate_run(Path(args.run), Path(args.json), samples=args.samples)


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
    add("--methods", type=str, nargs="+", default=["tbcm"], help="Methods to step.")
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
    "train": ("Distil a teacher to one step, from prompts alone.", add_train, train),
    "teacher": ("Train the built-in digits teacher.", add_teacher, teacher),
    "sample": ("Draw a grid of images with a student.", add_sample, sample),
    "eval": ("Measure a student against its teacher.", add_eval, evaluate),
    "info": ("Show versions and which implementation of each op runs here.", add_info, info),
    "bench": ("Time one step, plain, compiled and fused.", add_bench, bench),
}


def settings(args: Namespace, config: type) -> dict[str, Any]:
    """The parsed values of a config's fields."""
    return {f.name: args[f.name] for f in fields(config)}


def build_parser(command: str) -> ArgumentParser:
    """The parser, with the arguments of the command that was asked for."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser("tbcm", description=__doc__, exit_on_error=False)
    commands = parser.add_subcommands()
    for name, (says, add, _) in COMMANDS.items():
        sub = ArgumentParser(description=says, exit_on_error=False)
        if name == command:
            add(sub)
        commands.add_subcommand(name, sub, help=says)
    return parser


def parse(argv: list[str]) -> Namespace:
    """Parsed arguments; a built-in teacher without --config gets its preset's defaults."""
    parser = build_parser(argv[0] if argv else "")
    try:
        args = parser.parse_args(argv)
    except ArgumentError as error:
        files = " ".join(word for word in argv if word.endswith((".yaml", ".yml")))
        raise UserError(f"{error} (reading {files})" if files else str(error)) from error
    if args.subcommand == "train" and not args.train.config:
        from tbcm.config import PRESETS

        if not args.train.pretrained_model_name_or_path:
            baseline = "" if args.train.method == "tbcm" else "_baselines"
            preset = PRESETS / f"{args.train.teacher or 'digits'}{baseline}.yaml"
            if preset.exists():
                return parser.parse_args(["train", "--config", str(preset), *argv[1:]])
    return args


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, or 2 after a sentence on stderr for what the user can mend."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        COMMANDS[args.subcommand][2](args[args.subcommand])
    except UserError as error:
        print(f"tbcm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        print(f"tbcm: error: {name}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tbcm: stopped; --resume_from_checkpoint latest continues a run.", file=sys.stderr)
        return 130
    return 0
