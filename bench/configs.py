"""`python -m bench.configs`: time the configs of attention's Triton kernels on this GPU.

A forward and a backward pass at a shape launch kernels of several kinds; each launch is repeated
with every candidate, blocks of queries and keys, warps and stages, and the times are printed, the
best first. The tables of tbcm_kernels/attention/triton.py are chosen from such rows. A config that
gives another result than the first is wrong and is not timed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from bench import ops, timing
from bench.environment import append, check, check_rows, environment
from tbcm_kernels.attention import triton as kernels
from tbcm_kernels.attention.triton import Config

CANDIDATES: dict[str, list[Config]] = {
    "forward": [
        (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2),
    ],
    "forward tangent": [
        (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2),
        (64, 32, 4, 3), (64, 32, 4, 2),
    ],
    "keys": [
        (64, 128, 8, 3), (128, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2), (32, 128, 8, 3),
        (32, 64, 4, 3),
    ],
    "keys tangent": [
        (64, 128, 8, 2), (32, 128, 8, 3), (32, 128, 8, 2), (16, 128, 8, 3), (32, 64, 4, 3),
        (32, 64, 4, 2), (16, 64, 4, 3),
    ],
    "queries": [
        (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 8, 3),
        (64, 32, 4, 3),
    ],
    "queries tangent": [
        (128, 32, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2),
    ],
}  # fmt: skip
"""Of queries, of keys, warps, stages, for each kind of kernel."""
GRADIENTS = ("gk", "gv", "gtk", "gtv", "gq", "gtq")
DTYPE = torch.bfloat16
SHAPES = ("sd3-1024", "flux-1024", "sana-0.6b-1024", "sana-1.6b-1024", "pixart-1024")
Launch = tuple[tuple[Any, ...], dict[str, Any]]


def launches(shape: str, device: str) -> dict[tuple[str, str], Launch]:
    """The arguments of each launch in the passes of attention, by its kind and what it writes."""
    case = ops.draw("attention", ops.SHAPES[shape], DTYPE, device)
    variant, own, found = ops.ours(case, "triton"), kernels._launch, {}

    def spy(kernel: Any, kind: str, *arguments: Any, **constants: Any) -> None:
        names = [n for n in kernel.arg_names if not n.isupper()]
        present = (n for n, x in zip(names, arguments[3], strict=False) if x is not None)
        made = " ".join(n for n in present if n in GRADIENTS)
        found[kind, made] = (kernel, kind, *arguments), constants
        own(kernel, kind, *arguments, **dict(constants))

    kernels._launch = spy
    try:
        for what in ("forward", "jvp", "backward", "through"):
            ops.call(variant, what, case)()
    finally:
        kernels._launch = own
    return found


def repeated(launch: Launch, config: Config) -> Callable[[], None]:
    """The launch with a config in place of the pinned one."""
    arguments, constants = launch

    def run() -> None:
        own = kernels._pinned
        kernels._pinned = lambda *_: config
        try:
            kernels._launch(*arguments, **dict(constants))
        finally:
            kernels._pinned = own

    return run


def written(launch: Launch) -> list[Tensor]:
    """What a launch writes."""
    kernel, kind, *_, tensors = launch[0][:6]
    names = ("o", "to", "lse", "mu") if kind.startswith("forward") else GRADIENTS
    made = [x for n, x in zip(kernel.arg_names, tensors, strict=False) if n in names]
    return [(x if isinstance(x, Tensor) else x.pointer).detach() for x in made if x is not None]


def work(shapes: list[str], device: str) -> Iterator[tuple[dict[str, Any], Launch, Config]]:
    """Every launch with every candidate."""
    for shape in shapes:
        for (kind, made), launch in launches(shape, device).items():
            about = {"shape": shape, "kind": kind, "makes": made}
            for config in CANDIDATES.get(kind, ()):
                yield about | {"config": config}, launch, config


def compile_share(shapes: list[str], device: str, part: int, parts: int) -> None:
    """Every parts-th config once, so that the compiled kernels are in Triton's cache."""
    for i, (_, launch, config) in enumerate(work(shapes, device)):
        if i % parts == part:
            refusal(repeated(launch, config))  # which its row will say


def refusal(run: Callable[[], None]) -> str | None:
    """Why Triton does not compile or launch it, as for want of shared memory; None if it ran."""
    try:
        run()
    except TritonError as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None


def timed(launch: Launch, config: Config, device: str) -> dict[str, Any]:
    """Microseconds of a launch, or why it has none."""
    run, first = repeated(launch, config), repeated(launch, CANDIDATES[launch[0][1]][0])
    if reason := refusal(first):
        return {"refused": f"the first config: {reason}"}
    expected = [x.clone() for x in written(launch)]
    for x in written(launch):
        x.fill_(torch.nan)  # what a config leaves out must show
    reason, made = refusal(run), [x.clone() for x in written(launch)]
    first()  # which later launches read
    if reason:
        return {"refused": reason}
    for x, y in zip(made, expected, strict=True):
        if not torch.allclose(x.float(), y.float(), rtol=0.05, atol=0.02 * float(y.abs().max())):
            return {"refused": "gives another result"}
    watch, _ = timing.stopwatch([run], device)
    return {"us": 1e6 * statistics.median(watch() for _ in range(15))}


def main(argv: list[str] | None = None) -> None:
    """Print and write the rows."""
    parser = argparse.ArgumentParser("python -m bench.configs", description=__doc__)
    parser.add_argument("--shape", choices=ops.SHAPES, action="append", help="repeatable")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile first (8)")
    parser.add_argument("--json", type=Path, help="file to append JSON lines to")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    args.device = "cuda"
    check(parser, args)
    check_rows(args.json)
    shapes = args.shape or list(SHAPES)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=compile_share, args=(shapes, "cuda", i, args.jobs))
        for i in range(args.jobs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    with torch.cuda.stream(torch.cuda.Stream()):
        about, rows = environment("cuda", DTYPE), []
        for what, launch, config in work(shapes, "cuda"):
            rows.append({**what, **timed(launch, config, "cuda"), **about})
            append(rows[-1], args.json)
    for row in sorted(rows, key=lambda r: (r["shape"], r["kind"], r["makes"], r.get("us", 1e9))):
        time = f"{row['us']:.1f} us" if "us" in row else row["refused"]
        print(f"{row['shape']} {row['kind']} {row['makes']} {tuple(row['config'])} {time}")


if __name__ == "__main__":
    main()
