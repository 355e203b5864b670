"""A cost model of a distillation step of SANA: FLOPs and bytes, and the time and memory they take.

    T = FLOPs / π + bytes / β + launches · τ

with the matmul peak π, the copy bandwidth β and the time τ of a launch. Products of matrices count
by FLOPs and everything else by bytes; that neither hides behind the other is the model's one
assumption. `python -m bench.cost FILE...` holds it against the rows of `python -m bench.model`.

B samples, N tokens, S tokens of text, width C, L layers; u = B N C numbers, a residual stream.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from bench.environment import Row

CAPTION = 2304
"""Width of the text embeddings."""
STREAMS = {
    "stock": {"forward": (103, 9, 0), "jvp": (456, 9, 32.5), "backward": (217, 36, 0)},
    "fused": {"forward": (30.5, 4, 0), "jvp": (52, 4, 0), "backward": (69, 15, 0)},
}
"""What a block reads and writes beside its matrix products, counted in fp32: tensors of u, of the
text's B S C, and of the B H N S logits of attention."""
LAUNCHES = {
    "stock": {"forward": 128, "jvp": 807, "backward": 237},
    "fused": {"forward": 70, "jvp": 189, "backward": 206},
}
"""Calls of the dispatcher in a block, counted."""
SAVED = {"stock": 45, "fused": 17}
"""Tensors u that a block keeps for backward, counted."""


@dataclass(frozen=True)
class Machine:
    """What is measured of a machine, in bytes, FLOPs and seconds."""

    copy: float
    matmul: float
    launch: float = 5e-6
    link: float = 200e9
    """Bytes per second between two GPUs."""


@dataclass(frozen=True)
class Sana:
    """Sizes of a model and its batch."""

    width: int
    layers: int
    tokens: int
    batch: int = 1
    text: int = 300
    itemsize: int = 4
    heads: int = 16
    """Of attention on text."""

    @property
    def stream(self) -> int:
        """Bytes of u."""
        return self.batch * self.tokens * self.width * self.itemsize

    @property
    def parameters(self) -> int:
        """15.5 C² in a block; times, guidance, modulations and text around them."""
        c = self.width
        block = 15.5 * c * c + 66 * c + 2 * c
        return int(self.layers * block + (CAPTION + 1 + 1 + 2 * 256 + 1 + 3 + 6) * c + 9 * c * c)


def flops(m: Sana, mode: str, what: str) -> float:
    """FLOPs of the matrix products of a pass.

    Per sample and block, the value: six linears and two 1×1 convolutions, 12 N C² and 15 N C²; the
    text's keys and values, 4 S C²; attention on text, 4 N S C; linear attention, 132 N C. Its
    tangent is as much again but for the text, whose tangent is zero; stock PyTorch adds a
    convolution with a zero weight tangent. Backward is two products for each of the value.
    """
    n, s, c = m.tokens, m.text, m.width
    linear, convolution, text = 12 * n * c * c, 15 * n * c * c, 4 * s * c * c
    attention, state = 4 * n * s * c, 132 * n * c
    value = linear + convolution + text + attention + state
    zero = convolution if mode == "stock" else 0
    block = {
        "forward": value,
        "jvp": 2 * value - text + zero + state,
        "backward": 2 * value + 0.5 * (attention + state),
    }[what]
    around = 2 * s * (CAPTION * c + c * c) * (2 if what == "backward" else 1)
    return m.batch * (m.layers * block + around)


def traffic(m: Sana, mode: str, what: str) -> float:
    """Bytes of a pass beside the operands of its products, and the weights once each.

    Backward reads the weights and writes their gradients.
    """
    weights = m.parameters * 4 * (2 if what == "backward" else 1)
    tokens, text, logits = STREAMS[mode][what]
    numbers = (tokens * m.tokens + text * m.text) * m.width + logits * m.heads * m.tokens * m.text
    return m.layers * m.batch * numbers * m.itemsize + weights


def seconds(m: Sana, mode: str, what: str, machine: Machine) -> float:
    """Time of a pass; a "step" is a tangent and a gradient, with a second forward in stock."""
    if what == "step":
        passes = ("jvp", "forward", "backward") if mode == "stock" else ("jvp", "backward")
        return sum(seconds(m, mode, p, machine) for p in passes)
    launches = m.layers * LAUNCHES[mode][what] * machine.launch
    compute = flops(m, mode, what) / machine.matmul
    return compute + traffic(m, mode, what) / machine.copy + launches


def floor(m: Sana, what: str, machine: Machine) -> float:
    """No pass takes less at the measured peaks: the fused products, or the fused bytes."""
    passes = ("jvp", "backward") if what == "step" else (what,)
    compute = sum(flops(m, "fused", p) for p in passes) / machine.matmul
    return max(compute, sum(traffic(m, "fused", p) for p in passes) / machine.copy)


def step_memory(m: Sana, mode: str) -> float:
    """Bytes of a student's step beyond its weights: gradients, and what backward needs."""
    return 4 * m.parameters + SAVED[mode] * m.layers * m.stream


def training_memory(m: Sana, mode: str) -> float:
    """Bytes of training in all: teacher and student, two moments, gradients, activations."""
    return 16 * m.parameters + step_memory(m, mode)


def training_step(
    m: Sana, mode: str, machine: Machine, method: str = "tbcm", gpus: int = 1,
    route_steps: int = 16, vae_flops: float = 5.2e12,
) -> float:  # fmt: skip
    """Seconds of a whole step of `m.batch` student samples on each of so many GPUs.

    TBCM's teacher walks route_steps points, guided, and all but the first become samples; sCM's
    sees each sample, guided, and a VAE encodes its image. AdamW moves seven numbers a parameter;
    the all-reduce of gradients hides behind backward as far as it can.
    """
    teacher = replace(m, batch=2 * m.batch)
    guided = seconds(teacher, mode, "forward", machine)
    if method == "tbcm":
        harvest = guided * route_steps / (route_steps - 1)
    else:
        harvest = guided + m.batch * vae_flops / machine.matmul
    reduce = 2 * (gpus - 1) / gpus * 4 * m.parameters / machine.link
    exposed = max(0.0, reduce - seconds(m, mode, "backward", machine))
    update = 7 * 4 * m.parameters / machine.copy
    return harvest + seconds(m, mode, "step", machine) + update + exposed


def of_row(row: Row) -> tuple[Sana, Machine]:
    """The model and the machine of a row of `python -m bench.model`."""
    width, heads = {"digits": (128, 4), "sana-0.6b": (1152, 16), "sana-1.6b": (2240, 20)}[
        row["model"]
    ]
    size = 2 if row["dtype"] == "bfloat16" else 4
    m = Sana(width, row["layers"], row["latent"] ** 2, row["batch"], row["text"], size, heads)
    return m, Machine(row["copy_gb_s"] * 1e9, row["matmul_tflop_s"] * 1e12)


def check(rows: list[Row]) -> list[Row]:
    """Each measured pass, predicted: seconds, and MiB of a step where memory was measured."""
    found = []
    for row in rows:
        m, machine = of_row(row)
        sizes = {k: row[k] for k in ("model", "layers", "latent", "batch")}
        for mode in STREAMS:
            for what in ("forward", "jvp", "step"):
                measured, predicted = row[mode][what]["us"] / 1e6, seconds(m, mode, what, machine)
                made = {"quantity": "s", "measured": measured, "predicted": predicted}
                found.append({**sizes, "mode": mode, "pass": what, **made})
            if (peak := row[mode]["step"]["peak_mb"]) is not None:
                made = {"measured": peak, "predicted": step_memory(m, mode) / 2**20}
                found.append({**sizes, "mode": mode, "pass": "step", "quantity": "MiB", **made})
    return found


def main(argv: list[str] | None = None) -> int:
    """Print each prediction beside its measurement."""
    parser = argparse.ArgumentParser("python -m bench.cost", description=main.__doc__)
    parser.add_argument("rows", type=Path, nargs="+", help="files of `python -m bench.model`")
    args = parser.parse_args(argv)
    lines = [line for path in args.rows for line in path.read_text().splitlines()]
    found = check([row for row in map(json.loads, lines) if "faults" not in row])
    for row in found:
        sizes = f"{row['model']} L={row['layers']} latent={row['latent']} B={row['batch']}"
        print(
            f"{sizes:<36} {row['mode']:<6} {row['pass']:<8} measured {row['measured']:>8.3f} "
            f"predicted {row['predicted']:>8.3f} {row['quantity']:<4} "
            f"x{row['predicted'] / row['measured']:.2f}"
        )
    for quantity in ("s", "MiB"):
        off = [abs(r["predicted"] / r["measured"] - 1) for r in found if r["quantity"] == quantity]
        if off:
            middle, most = statistics.median(off), max(off)
            print(f"{quantity}: off by {middle:.0%}, at most {most:.0%}, in {len(off)} points")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
