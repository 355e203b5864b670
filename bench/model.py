"""`python -m bench.model`: a whole SANA transformer, fused against stock diffusers.

Random weights at SANA's widths, fewer layers where asked. Timed are the value; value and tangent;
and a student's step, which is a tangent and the gradient of the value: two passes of the stock
model, one of the fused, both as the trainer has them. Where the models disagree nothing is timed.
bfloat16 runs under autocast, as in training, and the casts of weights then count as saved.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tbcm_kernels
from bench import timing
from bench.cost import of_row
from bench.environment import Row, append, check, check_rows, environment
from tbcm import cost, objective
from tbcm.step_bench import SANA, sana, saved_bytes

HEADS = {"digits": (4, 4, 32)} | {name: heads for name, (_, *heads) in SANA.items()}
"""Heads of linear attention, 32 wide each; heads of cross-attention and their width."""
PASSES = ("forward", "jvp", "step")
DRAWS = 3


@dataclass(frozen=True)
class Student:
    """A model's forward on inputs, and how it takes a step."""

    model_forward: Callable[..., tuple[Tensor]]
    pair: Callable[..., tuple[Tensor, Tensor]]
    """Value with its graph and tangent, from `tbcm.objective`."""
    weights: dict[str, Tensor]
    inputs: list[Tensor]
    """x, t, velocity, and what `names` says."""
    dtype: torch.dtype
    names: tuple[str, ...] = ("encoder_hidden_states", "encoder_attention_mask", "guidance")
    """Of the inputs after the velocity."""
    constants: dict[str, Any] = field(default_factory=dict)

    def net(self, x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        """The model as `tbcm.objective` calls it."""
        named = {**dict(zip(self.names, condition, strict=True)), **self.constants}
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype == torch.bfloat16):
            return self.model_forward(hidden_states=x, timestep=t, return_dict=False, **named)[0]

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The value."""
        x, t, _, *condition = self.inputs
        return self.net(x / objective.SIGMA_DATA, t, *condition)

    def jvp(self) -> tuple[Tensor, Tensor]:
        """Value and tangent along the trajectory."""
        return objective.no_graph(self.net, *self.inputs)

    def graph(self) -> tuple[Tensor, Tensor]:
        """Value with its graph, and tangent."""
        return self.pair(self.net, *self.inputs)

    def step(self) -> list[Tensor]:
        """Value, tangent and the gradients of Σ value · velocity."""
        value, tangent = self.graph()
        loss = (value * self.inputs[2]).sum()
        return [value.detach(), tangent, *torch.autograd.grad(loss, list(self.weights.values()))]

    def saved_bytes(self) -> int:
        """What the graph keeps for backward, each storage once, weights not counted."""
        return saved_bytes(self.graph, list(self.weights.values()))[1]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m bench.model", description=__doc__)
    parser.add_argument("--model", choices=HEADS, default="sana-0.6b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--latent", type=int, default=32, help="side in pixels, a token each")
    parser.add_argument("--text", type=int, default=300, help="tokens of a prompt")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    return parse_common(parser, argv, "layers", "latent", "text")


def parse_common(
    parser: argparse.ArgumentParser, argv: list[str] | None, *sizes: str
) -> argparse.Namespace:
    """The command line, with the options of every benchmark of a model."""
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=60.0, help="for all passes of a model")
    parser.add_argument("--json", type=Path, help="file to append JSON lines to")
    args = parser.parse_args(argv)
    check(parser, args, "batch", *sizes)
    check_rows(args.json)
    return args


def students(args: argparse.Namespace) -> dict[str, Student]:
    """One model with random weights as diffusers has it, and as `fuse` makes it."""
    torch.manual_seed(args.seed)
    model = sana(HEADS[args.model], args.layers, args.latent, guidance=True).to(args.device)
    image = (args.batch, model.config.in_channels, args.latent, args.latent)
    inputs = [
        torch.randn(image), torch.linspace(0.4, 1.2, args.batch), torch.randn(image),
        torch.randn(args.batch, args.text, cost.CAPTION),
        torch.ones(args.batch, args.text, dtype=torch.long), torch.full((args.batch,), 0.45),
    ]  # fmt: skip
    stock = Student(
        model.forward, objective.two_passes, dict(model.named_parameters()),
        [v.to(args.device) for v in inputs], getattr(torch, args.dtype),
    )  # fmt: skip
    fused = tbcm_kernels.fuse(model).model  # a forward of its own; the stock one stays callable
    return {
        "stock": stock,
        "fused": replace(stock, model_forward=fused.forward, pair=objective.one_pass),
    }


def disagreement(stock: Student, fused: Student) -> list[str]:
    """Where the fused model is wrong: what `_off` finds in each of DRAWS draws of x.

    In one draw that can be chance: a ReLU whose argument is zero but for rounding opens in one
    model alone, which moves a gradient by one element of all. A wrong kernel is wrong in all.
    """
    model = copy.deepcopy(stock.model_forward.__self__).double()
    exact = replace(
        stock, model_forward=partial(type(model).forward, model), dtype=torch.float64,
        weights=dict(model.named_parameters()),
    )  # fmt: skip
    found = _off(stock, fused, exact)
    for _ in range(DRAWS - 1):
        if not found:
            break
        inputs = [torch.randn_like(stock.inputs[0]), *stock.inputs[1:]]
        again = _off(*(replace(s, inputs=inputs) for s in (stock, fused, exact)))
        found = {name: text for name, text in found.items() if name in again}
    return list(found.values())


def _off(stock: Student, fused: Student, exact: Student) -> dict[str, str]:
    """What is more than twice as far from fp64 in the fused model as in stock, in words."""
    few = [v[:2] for v in stock.inputs]
    with fp64_stays():
        precise = [v.double() if v.is_floating_point() else v for v in few]
        truth = replace(exact, inputs=precise).step()
    results = (replace(s, inputs=few).step() for s in (stock, fused))
    found = {}
    for name, e, s, f in zip(("value", "tangent", *stock.weights), truth, *results, strict=True):
        if e.ndim == 1:  # gradients of vectors may be zero but for rounding, as the keys' bias has
            continue
        limit = 2 * distance(s, e)
        if not (off := distance(f, e)) <= limit:
            found[name] = f"{name}: off by {off:.3g} where {limit:.3g} is the limit"
    return found


@contextmanager
def fp64_stays() -> Iterator[None]:
    """Stock linear attention casts to fp32, which here leaves fp64 as it is."""
    cast = Tensor.float
    Tensor.float = lambda x: x if x.dtype == torch.float64 else cast(x)
    try:
        yield
    finally:
        Tensor.float = cast


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖, or ‖a‖ where b is zero."""
    return float((a - b).norm() / (b.norm() if b.any() else 1))


def measure(models: dict[str, Student], stream: int, args: argparse.Namespace) -> Row:
    """Time and peak memory of every pass, all in turns, and what a step keeps for backward.

    That is in units u of `stream` = B · N · C numbers of the dtype, a tensor of the residual
    stream.
    """
    passes = {(m, what): getattr(s, what) for m, s in models.items() for what in PASSES}
    peaks = {key: timing.peak_memory(call, args.device) for key, call in passes.items()}
    clocks = {k: partial(timing.seconds, call, args.device) for k, call in passes.items()}
    samples = timing.interleave(clocks, args.seconds)
    unit = stream * models["stock"].dtype.itemsize
    return {
        name: {
            **{
                what: {**timing.summary(samples[name, what]), "peak_mb": peaks[name, what]}
                for what in PASSES
            },
            "saved_u_per_block": student.saved_bytes() / unit / args.layers,
            "rounds": len(samples[name, "step"]),
        }
        for name, student in models.items()
    }


def ratios(row: Row) -> Row:
    """The two ratios that the README shows."""
    return {
        "jvp_over_forward": {m: row[m]["jvp"]["us"] / row[m]["forward"]["us"] for m in row},
        "step_speedup": row["stock"]["step"]["us"] / row["fused"]["step"]["us"],
    }


def roofline(row: Row) -> None:
    """Beside each pass, what share of its time the cost model's floor is at the measured peaks."""
    m, machine = of_row(row)
    for mode in ("stock", "fused"):
        for what in PASSES:
            floor = cost.floor(m, what, machine)
            row[mode][what]["roofline"] = 1e6 * floor / row[mode][what]["us"]


def report(row: Row) -> str:
    """A row for people."""
    lines = [f"{row['model']}, {row['layers']} layers, B = {row['batch']}, {row['dtype']}"]
    for name in ("stock", "fused"):
        for what in PASSES:
            r = row[name][what]
            spread = f"[{r['p20_us'] / 1e3:.1f}, {r['p80_us'] / 1e3:.1f}]"
            peak = "" if r["peak_mb"] is None else f"  peak {r['peak_mb']:.0f} MiB"
            share = f"  {100 * r['roofline']:.0f}% of the roofline"
            lines.append(f"{name}  {what:<8} {r['us'] / 1e3:>9.1f} ms {spread}{share}{peak}")
        lines.append(
            f"{name}  jvp / forward {row['jvp_over_forward'][name]:.2f}, saved for backward "
            f"{row[name]['saved_u_per_block']:.1f} u per block"
        )
    return "\n".join([*lines, f"step x{row['step_speedup']:.2f}"])


def main(argv: list[str] | None = None) -> int:
    """Print the figures and append them to a file; 1 where the models disagree."""
    args = parse(argv)
    models = students(args)
    row = {k: v for k, v in vars(args).items() if k not in ("json", "seconds", "device")}
    if found := disagreement(**models):
        row["faults"] = found
        print("The fused model is wrong here and is not timed.", *found, sep="\n")
    else:
        row |= environment(args.device, models["stock"].dtype)
        stream = args.batch * args.latent**2 * 32 * HEADS[args.model][0]
        figures = measure(models, stream, args)
        row |= {**figures, **ratios(figures)}
        roofline(row)
        print(report(row))
    append(row, args.json)
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
