"""A cost model of a distillation step of SANA: FLOPs and bytes, and the time and memory they take.

    T = FLOPs / π + bytes / β + launches · τ

with the matmul peak π, the copy bandwidth β and the time τ of a launch. Products of matrices count
by FLOPs and everything else by bytes; that neither hides behind the other is the model's one
assumption. bench/cost.py holds it against the rows of `python -m bench.model`.

B samples, N tokens, S tokens of text, width C, L layers; u = B N C numbers, a residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    "fused": {"forward": 71, "jvp": 192, "backward": 177},
}
"""Calls of the dispatcher in a block, counted."""
UPDATE = 7 * 4
"""Bytes that AdamW moves for a parameter: seven numbers in fp32."""
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

    def best(self, other: Machine) -> Machine:
        """The higher of both peaks: something else may have disturbed one of two measurements."""
        return replace(self, copy=max(self.copy, other.copy), matmul=max(self.matmul, other.matmul))

    def floor(self, flops: float, size: float) -> float:
        """Seconds below which no such machine does so many FLOPs and moves so many bytes."""
        return max(flops / self.matmul, size / self.copy)


@dataclass(frozen=True)
class Sana:
    """Sizes of a model and its batch."""

    width: int
    layers: int
    tokens: int
    batch: float = 1
    text: int = 300
    itemsize: int = 4
    heads: int = 16
    """Of attention on text."""
    caption: int = CAPTION
    texts: float | None = None
    """Prompts that a pass encodes; one for each sample if None."""
    weight: int = 4
    """Bytes of a weight where it is read."""

    @property
    def prompts(self) -> float:
        """Prompts that a pass encodes."""
        return self.batch if self.texts is None else self.texts

    @property
    def stream(self) -> float:
        """Bytes of u."""
        return self.batch * self.tokens * self.width * self.itemsize

    @property
    def parameters(self) -> int:
        """15.5 C² in a block; times, guidance, modulations and text around them."""
        c = self.width
        block = 15.5 * c * c + 66 * c + 2 * c
        around = (self.caption + 1 + 1 + 2 * 256 + 1 + 3 + 6) * c + 9 * c * c
        return int(self.layers * block + around)


def flops(m: Sana, mode: str, what: str) -> float:
    """FLOPs of the matrix products of a pass.

    Per block, the value: six linears and two 1×1 convolutions, 12 N C² and 15 N C² a sample;
    attention on text, 4 N S C; linear attention, 132 N C; the keys and values of a prompt, 4 S C².
    Its tangent is as much again but for the text, whose tangent is zero; stock PyTorch adds a
    convolution with a zero weight tangent. Backward is two products for each of the value, one
    where the embeddings of the prompt come in.
    """
    n, s, c = m.tokens, m.text, m.width
    linear, convolution, text = 12 * n * c * c, 15 * n * c * c, 4 * s * c * c
    attention, state = 4 * n * s * c, 132 * n * c
    value = linear + convolution + attention + state
    zero = convolution if mode == "stock" else 0
    block = {
        "forward": value,
        "jvp": 2 * value + zero + state,
        "backward": 2 * value + 0.5 * attention,
    }[what]
    times = 2 if what == "backward" else 1
    text = times * (m.layers * text + 2 * s * c * c) + 2 * s * m.caption * c
    return m.batch * m.layers * block + m.prompts * text


def traffic(m: Sana, mode: str, what: str) -> float:
    """Bytes of a pass beside the operands of its products, and the weights once each.

    Backward reads the weights and writes their gradients.
    """
    weights = m.parameters * m.weight * (2 if what == "backward" else 1)
    tokens, text, logits = STREAMS[mode][what]
    numbers = tokens * m.tokens * m.width + logits * m.heads * m.tokens * m.text
    numbers = m.batch * numbers + m.prompts * text * m.text * m.width
    return m.layers * numbers * m.itemsize + weights


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
    return machine.floor(
        sum(flops(m, "fused", p) for p in passes), sum(traffic(m, "fused", p) for p in passes)
    )


def step_memory(m: Sana, mode: str) -> float:
    """Bytes of a student's step beyond its weights: gradients, and what backward needs."""
    return 4 * m.parameters + SAVED[mode] * m.layers * m.stream


def training_memory(m: Sana, mode: str) -> float:
    """Bytes of training in all: teacher and student, two moments, gradients, activations."""
    return (12 + m.itemsize) * m.parameters + step_memory(m, mode)


def training_passes(
    m: Sana, mode: str, method: str, route_steps: int, judges: Sequence[int] = (), pairs: int = 0
) -> list[tuple[float, Sana, str]]:
    """How often a step of `m.batch` student samples makes a pass, of what, and which.

    TBCM's teacher walks route_steps points, guided, and all but the first become samples, whose
    prompts the fused models encode once. sCM's and SANA-Sprint's sees each sample, guided.
    SANA-Sprint's student also makes an image of each. The teacher's blocks `judges` see it, the
    true one and, with 1 as `pairs`, a misaligned one; of the gradient the image's half is made.
    """
    prompts = m.batch / (route_steps - 1) if method == "tbcm" else m.batch
    frozen = replace(m, weight=m.itemsize)  # whose products keep their weights as autocast does
    teacher, calls = replace(frozen, batch=2 * prompts), route_steps if method == "tbcm" else 1
    found = [(1, teacher, "forward")]
    if mode == "fused":
        m, teacher = replace(m, texts=prompts), replace(teacher, texts=0)
    found += [(calls - 1, teacher, "forward"), (1, m, "jvp"), (1, m, "backward")]
    if mode == "stock":  # the tangent's pass has no graph
        found.append((1, m, "forward"))
    if judges:
        judge = replace(m, layers=max(judges) + 1, weight=m.itemsize)
        found += [(1, m, "forward"), (1, m, "backward")]
        found += [(2 + pairs, judge, "forward"), (0.5, replace(judge, texts=0), "backward")]
    return found


def training_work(
    m: Sana, mode: str, method: str, route_steps: int, judges: Sequence[int] = (), pairs: int = 0
) -> tuple[float, float]:
    """FLOPs and bytes of a whole step of `m.batch` student samples, without a VAE.

    A head of SANA-Sprint has convolutions of 1 and 9 neighbours, 20 N C² a pass: three passes, the
    image's gradient, and those of the weights twice, which leave out the first layer's input. Pairs
    add a pass and a gradient of the weights.
    """
    passes = training_passes(m, mode, method, route_steps, judges, pairs)
    heads = (20 * (4 + pairs) + 38 * (2 + pairs)) * len(judges) * m.batch * m.tokens * m.width**2
    return (
        heads + sum(times * flops(part, mode, what) for times, part, what in passes),
        UPDATE * m.parameters + sum(n * traffic(part, mode, what) for n, part, what in passes),
    )


def training_step(m: Sana, mode: str, machine: Machine, gpus: int = 1) -> float:
    """Seconds of a whole step of TBCM, `m.batch` student samples on each of so many GPUs.

    A route has 16 steps. The all-reduce of gradients hides behind backward as far as it can.
    """
    passes = training_passes(m, mode, "tbcm", route_steps=16)
    reduce = 2 * (gpus - 1) / gpus * 4 * m.parameters / machine.link
    exposed = max(0.0, reduce - seconds(m, mode, "backward", machine))
    update = UPDATE * m.parameters / machine.copy
    work = sum(times * seconds(part, mode, what, machine) for times, part, what in passes)
    return work + update + exposed
