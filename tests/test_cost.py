"""The cost model's counts against the model itself, and its growth against arithmetic."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench import model
from tbcm import cost
from tbcm.step_bench import SANA, Plan, make_distiller, sana, work_of
from tbcm.train import METHODS

SMALL = cost.Sana(width=1152, layers=1, tokens=64, text=8)
MACHINE = cost.Machine(copy=1e12, matmul=1e14)


class Counting(TorchDispatchMode):
    """FLOPs of products; bytes of all else that is not a view, depthwise convolutions included."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.calls = 0
        self.before = ""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.calls += 1
        name = function._schema.name.split("::")[1]
        views = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        # From PyTorch 2.15 on, a linear with a bias ends in it where it ended in a view before.
        views |= name == "_unsafe_view" and self.before == "addmm"
        self.before = name
        depthwise = "convolution" in name and max(a for a in args if type(a) is int) > 1
        size = function._overloadpacket in flop_registry and name != "attention" and not depthwise
        if size and "scaled_dot" not in name:
            self.flops += flop_registry[function._overloadpacket](*args, out_val=out)
        elif not views and "zerotensor" not in name and "same_s" not in name:
            self.bytes += sum(x.nbytes for x in tree_leaves((args, out)) if torch.is_tensor(x))
        return out


def counted(layers: int) -> dict[tuple[str, str], Counting]:
    """The counts of each pass of both models."""
    sizes = {"model": "sana-0.6b", "layers": layers, "latent": 8, "text": SMALL.text}
    args = SimpleNamespace(**sizes, seed=0, batch=1, dtype="float32", device="cpu")
    found = {}
    for name, student in model.students(args).items():
        for what in model.PASSES:
            with Counting() as found[name, what]:
                getattr(student, what)()
    return found


@pytest.fixture(scope="module")
def counts() -> list[dict[tuple[str, str], Counting]]:
    """Of one layer and of two, so that their difference is a block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield [counted(1), counted(2)]
    torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", cost.STREAMS)
@pytest.mark.parametrize("what", model.PASSES)
def test_bytes_and_launches_of_a_block(mode: str, what: str, counts: list) -> None:
    before, after = (c[mode, what] for c in counts)
    parts = {"step": ("jvp", "forward", "backward") if mode == "stock" else ("jvp", "backward")}
    deep = dataclasses.replace(SMALL, layers=2)
    weights = 4 * (deep.parameters - SMALL.parameters)
    size = sum(
        cost.traffic(deep, mode, p)
        - cost.traffic(SMALL, mode, p)
        - weights * (1 + (p == "backward"))
        for p in parts.get(what, (what,))
    )
    calls = sum(cost.LAUNCHES[mode][p] for p in parts.get(what, (what,)))
    assert after.bytes - before.bytes == pytest.approx(size, rel=0.08)  # and modulations
    assert after.calls - before.calls == pytest.approx(calls, rel=0.05)


def test_flops_of_the_value(counts: list) -> None:
    one, two = counts
    block = two["stock", "forward"].flops - one["stock", "forward"].flops
    deep = dataclasses.replace(SMALL, layers=2)
    formula = cost.flops(deep, "stock", "forward") - cost.flops(SMALL, "stock", "forward")
    assert formula == pytest.approx(block, rel=0.05)


@pytest.mark.usefixtures("counts")  # on one thread
@pytest.mark.parametrize("method", METHODS)
def test_flops_of_a_training_step(method: str) -> None:
    """Of the fused step, whose text is encoded once for all points of a prompt."""
    plan = Plan("sana-0.6b", layers=1, resolution=128, route_steps=3, gpu=False)
    distiller = make_distiller(method, "fused", plan)
    with Counting() as counter:
        distiller.train_step()
    flops, size = work_of(distiller, samples=2)
    assert flops == pytest.approx(counter.flops, rel=0.01)  # a call of the teacher is 4%
    assert size > cost.UPDATE * distiller.student.num_parameters()


@pytest.mark.parametrize(("name", "width"), [("sana-0.6b", 1152), ("sana-1.6b", 2240)])
def test_parameters(name: str, width: int) -> None:
    with torch.device("meta"):
        exact = sum(p.numel() for p in sana(SANA[name][1:], 2, 32, guidance=True).parameters())
    assert cost.Sana(width, 2, 1024).parameters == pytest.approx(exact, rel=0.005)


def test_growth() -> None:
    """A fused step is less work, every size makes it more, and only a slow link costs GPUs time."""
    base = cost.Sana(1152, 28, 1024, batch=15, itemsize=2)
    step = cost.training_step(base, "fused", MACHINE)
    assert step < cost.training_step(base, "stock", MACHINE)
    for name in ("tokens", "batch", "width", "layers"):
        larger = dataclasses.replace(base, **{name: 2 * getattr(base, name)})
        assert cost.training_step(larger, "fused", MACHINE) > 1.5 * step
        assert cost.training_memory(larger, "fused") > cost.training_memory(base, "fused")
    assert cost.training_step(base, "fused", MACHINE, gpus=8) == step
    slow = dataclasses.replace(MACHINE, link=1e9)
    # A ring of 8 sends each gradient 7/8 times in either half; backward hides its own time.
    sent = 2 * 7 / 8 * 4 * base.parameters / 1e9
    shown = sent - cost.seconds(base, "fused", "backward", slow)
    assert cost.training_step(base, "fused", slow, gpus=8) == pytest.approx(step + shown)
    # The student and its two moments in fp32, the teacher in 16 bits.
    weights = cost.training_memory(base, "fused") - cost.step_memory(base, "fused")
    assert weights == (3 * 4 + 2) * base.parameters
