"""Time the ops against eager PyTorch, `torch.compile`, SDPA and the two passes people train with.

    python -m bench [run] ...    time ops
    python -m bench list         the ops, their passes, and the shapes
    python -m bench audit ...    compile every GPU kernel without a GPU

An implementation that fails its check is not timed. Bytes and FLOPs are counts: each input read
once, each output written once. The copy bandwidth and the matmul peak that they are held against,
the roofline, are measured in the same run.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch._functorch.config

from bench import audit, guard, ops, peers, timing
from bench.environment import ROOT, Row, append, check, check_rows, environment, machine

BASELINES = ("eager", "two-pass", "compile", "sdpa")


def below(limit: float) -> Callable[[str], float]:
    """The type of a number from 0 to below a limit."""

    def number(text: str) -> float:
        value = float(text)
        if not 0 <= value < limit:
            raise argparse.ArgumentTypeError(f"must be from 0 to below {limit}, not {text}")
        return value

    return number


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line of `run`."""
    parser = argparse.ArgumentParser(
        "python -m bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    every = {"action": "append", "default": None}
    parser.add_argument("--op", choices=ops.OPS, help="op to time, repeatable (all)", **every)
    impls = ops.IMPLEMENTATIONS
    parser.add_argument("--impl", choices=impls, help="repeatable (all that can run)", **every)
    parser.add_argument("--shape", choices=ops.SHAPES, help="repeatable (digits)", **every)
    parser.add_argument("--pass", choices=ops.PASSES, dest="what", help="repeatable", **every)
    parser.add_argument("--batch", type=int, help="samples, in place of the shape's own")
    parser.add_argument("--tokens", type=int, help="tokens, in place of the shape's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument("--seconds", type=below(math.inf), default=2.0, help="for each pass")
    parser.add_argument("--sets", type=int, default=64, help="input sets at most (64)")
    parser.add_argument("--json", type=Path, help="file to append JSON lines to")
    parser.add_argument("--save", action="store_true", help="append to bench/results/<machine>")
    parser.add_argument(
        "--against", type=Path, help="earlier rows, a file or folder, to compare speed-ups with"
    )
    parser.add_argument(
        "--margin", type=below(1), default=0.2, help="by how much a speed-up may fall (0.2)"
    )
    args = parser.parse_args(argv)
    if args.save and args.json:
        parser.error("give --json FILE or --save, not both")
    if args.save and args.tokens:
        parser.error("--save is for shapes as they are: give --json FILE with --tokens")
    check(parser, args, "batch", "tokens", "sets")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.save:
        args.json = ROOT / "bench" / "results" / machine(args.device) / "ops.jsonl"
    return args


def rows(op: str, name: str, shape: ops.Shape, args: argparse.Namespace) -> Iterator[Row]:
    """One row for each pass and variant of an op at a shape, or one that says what is wrong."""
    if args.compile:  # ops share functions that are compiled anew for each, up to a limit
        torch.compiler.reset()
    dtype = getattr(torch, args.dtype)
    about = {"op": op, "shape": name, **asdict(shape), "dtype": args.dtype}
    few = ops.checked(op, shape, dtype, args.device)
    variants = {}
    for impl in ops.implementations(op, args.device, dtype, args.impl):
        if found := ops.wrong(few, impl):
            yield {**about, "variant": impl, "faults": found}
        else:
            variants[impl] = ops.ours(few, impl)
    variants |= ops.baselines(few, args.compile)
    if op == "attention":
        if (absence := peers.absent(few, args.device)) is None:
            absence = ops.off(few, ops.peer())
        if absence:
            yield {**about, "variant": peers.NAME, "skipped": absence}
        else:
            variants[peers.label()] = ops.peer()
    cases = [ops.draw(op, shape, dtype, args.device)]
    sets = min(args.sets, -(-timing.beyond_cache(args.device) // ops.traffic(cases[0], "forward")))
    cases += [ops.draw(op, shape, dtype, args.device) for _ in range(sets - 1)]
    for what in ops.OPS[op].passes:
        if args.what is None or what in args.what:
            able = {n: v for n, v in variants.items() if ops.takes_part(n, v, what)}
            for row in timed(able, cases, what, args):
                yield {**about, "pass": what, **row}


def timed(
    variants: dict[str, ops.Variant], cases: list[ops.Case], what: str, args: argparse.Namespace
) -> Iterator[Row]:
    """Rows of one pass, with each variant's ratio to the best baseline."""
    peaks, watches = {}, {}
    for name, variant in variants.items():
        try:
            calls = [ops.call(variant, what, case) for case in cases]
            watches[name] = timing.stopwatch(calls, args.device)
            peaks[name] = timing.peak_memory(calls[0], args.device)  # torch.compile has compiled
        except torch.OutOfMemoryError:
            yield {"variant": name, "skipped": "does not fit in the GPU's memory"}
        except RuntimeError as error:
            if name != "compile":
                raise
            yield {"variant": name, "skipped": f"torch.compile fails: {str(error).splitlines()[0]}"}
    if not any(name in BASELINES for name in watches):
        yield from ({"variant": name, "skipped": "no baseline ran"} for name in watches)
        return
    samples = timing.interleave({name: w for name, (w, _) in watches.items()}, args.seconds)
    results = {name: timing.summary(s) for name, s in samples.items()}
    best = min((n for n in results if n in BASELINES), key=lambda n: results[n]["us"])
    size, flops = ops.traffic(cases[0], what), ops.counts.operations(cases[0], what)
    for name, result in results.items():
        yield {
            "variant": name, **result, "rounds": len(samples[name]), "sets": len(cases),
            "graph": watches[name][1], "bytes": size, "flops": flops,
            "gb_s": size / result["us"] / 1e3, "tflop_s": flops / result["us"] / 1e6,
            "peak_mb": peaks[name], "warm": True,  # compiled before
            "baseline": best, "speedup": results[best]["us"] / result["us"],
        }  # fmt: skip


def roofline(row: Row) -> Row:
    """What share of a row's time its bytes or its FLOPs take at the measured peaks."""
    memory = row["bytes"] / row["copy_gb_s"] / 1e3
    compute = row["flops"] / row["matmul_tflop_s"] / 1e6
    bound = "memory" if memory > compute else "compute"
    return {"bound": bound, "roofline": max(memory, compute) / row["us"]}


def line(row: Row) -> str:
    """A row for people."""
    start = f"{row['op']:<21} {row['shape']:<15} {row['dtype']:<9}"
    if "faults" in row:
        return f"{start} {row['variant']} FAILS ITS CHECK: {row['faults'][0]}"
    if "skipped" in row:
        return f"{start} {row.get('pass', ''):<9} {row['variant']} is not timed: {row['skipped']}"
    return (
        f"{start} {row['pass']:<9} {row['variant']:<8} {row['us']:>10.1f} us "
        f"[{row['p20_us']:.1f}, {row['p80_us']:.1f}] {100 * row['roofline']:>4.0f}% of "
        f"{row['bound']:<7}  x{row['speedup']:.2f} against {row['baseline']}"
    )


def plan(args: argparse.Namespace, earlier: list[Row]) -> list[tuple[str, str, ops.Shape]]:
    """The ops and shapes to time: those that were asked for, or else those of the earlier rows.

    Raises SystemExit where a model has no such op, an op no such pass, or the tokens make no image.
    """
    for op in args.op or ():
        if args.what and not {*args.what} & {*ops.OPS[op].passes}:
            raise SystemExit(f"{op} has no {' or '.join(args.what)}; see bench list")
    if earlier and not (args.op or args.shape):
        cases = {(r["op"], r["shape"], r["batch"], r["tokens"]): None for r in earlier}
    else:
        pairs = ((op, name) for name in args.shape or ["digits"] for op in args.op or ops.OPS)
        cases = {(op, name, args.batch, args.tokens): None for op, name in pairs}
    work = []
    for op, name, batch, tokens in cases:
        shape = ops.SHAPES[name]
        if ops.has(shape, op):
            shape = replace(shape, batch=batch or shape.batch, tokens=tokens or shape.tokens)
            if op == "conv_glu" and math.isqrt(shape.tokens) ** 2 != shape.tokens:
                raise SystemExit(f"conv_glu needs a square of tokens, not {shape.tokens}")
            work.append((op, name, shape))
    if not work:
        shapes, names = ({case[i]: None for case in cases} for i in (1, 0))
        raise SystemExit(f"{', '.join(shapes)} has no {' or '.join(names)}; see bench list")
    return work


def run(argv: list[str]) -> int:
    """Print and write the rows as they come; 1 where a check failed or a speed-up fell."""
    args = parse(argv)
    earlier = guard.read(args.against, args.device, args.dtype) if args.against else []
    work = plan(args, earlier)
    check_rows(args.json)
    if args.compile:  # its backward would otherwise free the graph that is timed again and again
        torch._functorch.config.donated_buffer = False
    failed, made = False, []
    stream = torch.cuda.stream(torch.cuda.Stream()) if args.device == "cuda" else nullcontext()
    with stream:
        about = environment(args.device, getattr(torch, args.dtype))
        for op, name, shape in work:
            for row in rows(op, name, shape, args):
                row |= about
                row |= roofline(row) if "us" in row else {}
                failed |= "faults" in row
                made.append(row)
                print(line(row), flush=True)
                append(row, args.json)
    if args.against:
        failed |= guard.report(made, earlier, args.margin)
    return int(failed)


def listing(argv: list[str]) -> int:
    """Print the ops and the shapes."""
    argparse.ArgumentParser("python -m bench list", description=listing.__doc__).parse_args(argv)
    for op, about in ops.OPS.items():
        kernels = ", ".join(ops._dispatch.OPS[ops.base(op)]) or "PyTorch's GEMM"
        print(f"{op:<22} {kernels:<18} {', '.join(about.passes)}")
    for name, shape in ops.SHAPES.items():
        heads = f"{shape.heads} heads of {shape.width // shape.heads}"
        text = f" on {shape.text} tokens of text" if shape.text else ""
        sizes = f"B = {shape.batch}, N = {shape.tokens}, C = {shape.width}"
        print(f"{name:<22} {sizes}, {heads}{text}")
    return 0


COMMANDS = {"run": run, "list": listing, "audit": audit.main}


def main(argv: list[str] | None = None) -> int:
    """A command, `run` where none is named."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv and argv[0] in COMMANDS else "run"
    return COMMANDS[command](argv[argv[:1] == [command] :])


if __name__ == "__main__":
    raise SystemExit(main())
