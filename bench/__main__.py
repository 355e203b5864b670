"""Time the ops against eager PyTorch, and against torch.compile where asked.

An implementation that fails its check is not timed. Bytes and FLOPs are counts: each input read
once, each output written once. The copy bandwidth that they are held against is measured in the
same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench import ops, timing
from bench.environment import Row, environment, source_hash

BASELINES = ("eager", "compile", "sdpa")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    every = {"action": "append", "default": None}
    parser.add_argument("--op", choices=ops.OPS, help="op to time, repeatable (all)", **every)
    impls = ops.IMPLEMENTATIONS
    parser.add_argument("--impl", choices=impls, help="repeatable (all that can run)", **every)
    parser.add_argument("--shape", choices=ops.SHAPES, help="repeatable (digits)", **every)
    parser.add_argument("--batch", type=int, help="samples, in place of the shape's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each pass of each op")
    parser.add_argument("--json", type=Path, help="file to append JSON lines to")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


def rows(op: str, name: str, args: argparse.Namespace) -> Iterator[Row]:
    """One row for each pass and variant of an op at a shape, or one that says what is wrong."""
    shape, dtype = ops.SHAPES[name], getattr(torch, args.dtype)
    shape = replace(shape, batch=args.batch or shape.batch)
    about = {"op": op, "shape": name, **asdict(shape), "dtype": args.dtype}
    about["source"] = source_hash(ops.base(op))
    few = ops.checked(op, shape, dtype, args.device)
    right = []
    for impl in ops.implementations(op, args.device, dtype, args.impl):
        if found := ops.wrong(few, impl):
            yield {**about, "variant": impl, "faults": found}
        else:
            right.append(impl)
    cases = [ops.draw(op, shape, dtype, args.device)]
    sets = min(64, -(-timing.beyond_cache(args.device) // ops.traffic(cases[0], "jvp")))
    cases += [ops.draw(op, shape, dtype, args.device) for _ in range(sets - 1)]
    variants = {impl: ops.ours(few, impl) for impl in right} | {"eager": ops.eager(few)}
    if args.compile:
        compiled = (torch.compile(f, dynamic=False) for f in variants["eager"])
        variants["compile"] = tuple(compiled)
    variants |= ops.peers(few)
    for what in ops.passes(op):
        able = {n: f for n, f in variants.items() if f[what in ("jvp", "through")] is not None}
        for row in timed(able, cases, what, args):
            yield {**about, "pass": what, **row}


def timed(
    variants: dict[str, tuple[ops.Function, ops.Function]], cases: list[ops.Case], what: str,
    args: argparse.Namespace,
) -> Iterator[Row]:  # fmt: skip
    """Rows of one pass, with each variant's ratio to the best baseline."""
    peaks, watches = {}, {}
    for name, functions in variants.items():
        calls = [ops.call(functions, what, case) for case in cases]
        peaks[name] = timing.peak_memory(calls[0], args.device)
        watches[name] = timing.stopwatch(calls, args.device)
    samples = timing.interleave({name: w for name, (w, _) in watches.items()}, args.seconds)
    results = {name: timing.summary(s) for name, s in samples.items()}
    best = min((n for n in results if n in BASELINES), key=lambda n: results[n]["us"])
    size, flops = ops.traffic(cases[0], what), ops.operations(cases[0], what)
    for name, result in results.items():
        yield {
            "variant": name, **result, "rounds": len(samples[name]), "sets": len(cases),
            "graph": watches[name][1], "bytes": size, "flops": flops,
            "gb_s": size / result["us"] / 1e3, "tflop_s": flops / result["us"] / 1e6,
            "peak_mb": peaks[name], "baseline": best, "speedup": results[best]["us"] / result["us"],
        }  # fmt: skip


def line(row: Row) -> str:
    """A row for people."""
    start = f"{row['op']:<21} {row['shape']:<15} {row['dtype']:<9}"
    if "faults" in row:
        return f"{start} {row['variant']} FAILS ITS CHECK: {row['faults'][0]}"
    share = f"{100 * row['gb_s'] / row['copy_gb_s']:>4.0f}% of copy"
    if row["flops"]:
        share = f"{100 * row['tflop_s'] / row['matmul_tflop_s']:>4.0f}% of matmul"
    return (
        f"{start} {row['pass']:<9} {row['variant']:<8} {row['us']:>10.1f} us "
        f"[{row['p20_us']:.1f}, {row['p80_us']:.1f}] {share}  "
        f"x{row['speedup']:.2f} against {row['baseline']}"
    )


def main(argv: list[str] | None = None) -> int:
    """Print and write the rows as they come; 1 where an implementation failed its check."""
    args = parse(argv)
    if args.compile:  # its backward would otherwise free the graph that is timed again and again
        torch._functorch.config.donated_buffer = False
    failed = False
    stream = torch.cuda.stream(torch.cuda.Stream()) if args.device == "cuda" else nullcontext()
    with stream, args.json.open("a") if args.json else nullcontext() as file:
        about = environment(args.device, getattr(torch, args.dtype))
        for name in args.shape or ["digits"]:
            for op in args.op or ops.OPS:
                for row in rows(op, name, args):
                    row |= about
                    failed |= "faults" in row
                    print(line(row), flush=True)
                    if file:
                        print(json.dumps(row), file=file, flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
