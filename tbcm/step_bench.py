"""`tbcm bench step`: one distillation step of each method, plain, compiled and fused.

Every variant has a process of its own, hence a peak memory of its own. On a CPU, and for digits,
all stay alive and only one computes at a time, in blocks of a few steps, so that drift of the
machine falls on all alike; on a GPU, whose memory one variant may fill, they run one after another.
SANA has its real widths and random weights: all its layers at 1024 px with 16 teacher steps on a
GPU, and on a CPU 2 layers at 512 px with 4, unless it is told otherwise. The report says which.

The baselines' images are latents that were encoded before, as `tbcm train` has them. scm_vae and
sana_sprint_vae encode images with a whole DC-AE in each step, as those of the TBCM paper do; it is
diffusers' own in every mode, with random weights in the precision of the step.

`roofline` is the share of a step's time that its FLOPs or bytes (tbcm/cost.py, fused) would take at
the matmul peak and the copy bandwidth of the same run, the better of those before and after it.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tbcm import cost, objective, peaks
from tbcm.config import PRESETS, TrainConfig
from tbcm.digits import WORDS
from tbcm.distiller import Distiller
from tbcm.errors import UserError
from tbcm.files import check_writable, write_whole
from tbcm.images import Latents
from tbcm.info import environment
from tbcm.models import Teacher, load_teacher
from tbcm.progress import peak_memory_mb
from tbcm.rollout import Text
from tbcm.sprint import HEAD_BLOCKS, head_blocks
from tbcm.text import SANA_MAX_LENGTH, load_prompts
from tbcm.train import METHODS

MODES = ("eager", "compile", "fused")
VAE = "_vae"
"""Ends the name of a baseline that encodes its images in the step."""
BASELINES = tuple(method for method in METHODS if method != "tbcm")
STEPPED = (*METHODS, *(method + VAE for method in BASELINES))
PHASES = {
    "encode": "images", "rollout": "harvest", "dual": "forward", "backward": "backward",
    "optimizer": "update",
}  # fmt: skip
"""The method of a distiller that each phase times. `rollout` calls `encode`, which only the _vae
baselines have, and is given without it."""
BLOCK, WARM_UP = 4, 3
TOLERANCE = {"no": 1e-3, "bf16": 5e-2}
"""How far the losses of two modes may be apart; under autocast each layer rounds to 8 bits."""
PAPER = {"memory": -0.641, "time": -0.417}
"""TBCM against sCM in the same configuration, which encodes its images (arXiv 2511.20410)."""
AGAINST = {
    "against_scm": "with latents encoded before", "against_scm_vae": "encoding images in the step",
}  # fmt: skip
"""Where a report compares TBCM with sCM, and with which."""
SANA = {"sana-0.6b": (28, 36, 16, 72), "sana-1.6b": (20, 70, 20, 112)}
"""Layers; heads of linear attention, 32 wide each; heads of cross-attention and their width."""
Timings = dict[str, float]


@dataclass(frozen=True)
class Plan:
    """What is stepped; a size that is not given is that of the real model, or of a CPU's share."""

    model: str = "digits"
    layers: int | None = None
    resolution: int | None = None
    route_steps: int | None = None
    batch: int | None = None
    """Prompts of a step."""
    gpu: bool = field(default_factory=torch.cuda.is_available)

    @property
    def precision(self) -> str:
        """Autocast to bf16 on a GPU, but for digits."""
        return "bf16" if self.gpu and self.model != "digits" else "no"

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def check(self, steps: int, methods: Sequence[str], modes: Sequence[str]) -> None:
        """Raises UserError, naming the argument, for what cannot be stepped."""
        for name, given, known in (("methods", methods, STEPPED), ("modes", modes, MODES)):
            if not given or set(given) - set(known) or len(set(given)) < len(given):
                raise UserError(f"{name} must be some of {', '.join(known)}, each once.")
        if self.model not in ("digits", *SANA):
            raise UserError(f"model must be digits or one of {', '.join(SANA)}, not {self.model}.")
        if steps < 2:
            raise UserError(f"steps must be at least 2, not {steps}.")
        if self.model == "digits" and any(method.endswith(VAE) for method in methods):
            raise UserError("digits has no VAE; take methods without _vae, or a SANA as model.")
        own = {"layers": 1, "resolution": 32, "route_steps": 2, "batch": 1}
        for name, least in own.items():
            value = getattr(self, name)
            if value is not None and self.model == "digits":
                raise UserError(f"{name} is for the SANA models; digits has its own.")
            if value is not None and (value < least or (name == "resolution" and value % 32)):
                rest = " and a multiple of 32" if name == "resolution" else ""
                raise UserError(f"{name} must be at least {least}{rest}, not {value}.")

    def sizes(self) -> dict[str, Any]:
        """The sizes in use, and whether they are those of the real model."""
        if self.model == "digits":
            return {"model": "digits", "reduced": False}
        layers = self.layers or (SANA[self.model][0] if self.gpu else 2)
        resolution = self.resolution or (1024 if self.gpu else 512)
        return {
            "model": self.model, "layers": layers, "of_layers": SANA[self.model][0],
            "resolution": resolution, "route_steps": self.route_steps or (16 if self.gpu else 4),
            "batch": self.batch or 1, "reduced": layers < SANA[self.model][0],
        }  # fmt: skip

    def machine(self) -> cost.Machine:
        """What the step runs on, measured in a process of its own, whose memory then is free."""
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(peaks.machine, "cuda" if self.gpu else "cpu", self.dtype).result()


class RandomText:
    """Random embeddings in place of an encoder's, whose work no step contains."""

    def __init__(self, teacher: Teacher, prompts: list[str], device: torch.device):
        self.embeds = torch.randn(len(prompts) + 1, SANA_MAX_LENGTH, cost.CAPTION)

    def __len__(self) -> int:
        return len(self.embeds) - 1

    def text(self, rows: list[int]) -> Text:
        """Of these prompts, with no padding."""
        embeds = self.embeds[rows]
        return Text(embeds, embeds.new_ones(embeds.shape[:2], dtype=torch.bool))

    def null(self) -> Text:
        """The null prompt's."""
        return self.text([-1])


def sana(
    widths: tuple[int, int, int], layers: int, latent: int, guidance: bool
) -> SanaTransformer2DModel:
    """A SANA transformer of the heads and width that SANA names, with random weights."""
    heads, cross_heads, cross_width = widths
    return SanaTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=32, num_cross_attention_heads=cross_heads,
        cross_attention_head_dim=cross_width, cross_attention_dim=32 * heads,
        caption_channels=cost.CAPTION, num_layers=layers, mlp_ratio=2.5, patch_size=1,
        sample_size=latent, qk_norm="rms_norm_across_heads", guidance_embeds=guidance,
    )  # fmt: skip


def sana_vae() -> AutoencoderDC:
    """SANA's DC-AE (mit-han-lab/dc-ae-f32c32-sana-1.0) with random weights.

    It is 32 pixels to a latent's side, 32 channels. What is not named here is diffusers' default.
    """
    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    return AutoencoderDC(
        encoder_block_types=kinds, decoder_block_types=kinds, downsample_block_type="conv",
        upsample_block_type="interpolate", scaling_factor=0.41407,
    )  # fmt: skip


def bench_step(
    json_path: str | Path, steps: int = 40, plan: Plan | None = None,
    methods: Sequence[str] = ("tbcm",), modes: Sequence[str] = ("eager", "fused"),
) -> dict[str, Any]:  # fmt: skip
    """Time `steps` steps of each method and mode and write the figures as JSON.

    Times are in ms, memory in MiB, flops and bytes of a step as such, rooflines a share of 1.

    Raises UserError for what cannot be stepped, and if two modes disagree on loss or ‖g‖: what is
    wrong is not timed.
    """
    plan = plan or Plan()
    plan.check(steps, methods, modes)
    check_writable(json_path)
    machine = plan.machine()
    variants = [(method, mode) for method in methods for mode in modes]
    alone = plan.gpu and plan.model != "digits"
    first, rows, totals = {}, {}, {}

    def write() -> dict[str, Any]:
        result = report(rows, totals, machine) | plan.sizes()
        write_whole(json_path, (json.dumps(result, indent=2) + "\n").encode())
        return result

    for part in [[v] for v in variants] if alone else [variants]:
        new_rows, new_totals = measured(part, plan, steps, first)
        rows |= new_rows
        totals |= new_totals
        write()  # a later variant may fail
    machine = machine.best(plan.machine())
    return write()


Variant = tuple[str, str]
Rows = dict[Variant, list[Timings]]


def measured(
    variants: list[Variant], plan: Plan, steps: int, first: Rows
) -> tuple[Rows, dict[Variant, dict[str, Any]]]:
    """Timed steps and totals of each variant, whose processes take turns.

    Their first steps are added to `first`, those of other variants, and must agree with them.
    """
    workers = {v: start_worker(v, plan) for v in variants}
    try:
        first |= {v: ask(pipe, WARM_UP) for v, (_, pipe) in workers.items()}
        check_agreement(first, TOLERANCE[plan.precision])
        rows: Rows = {v: [] for v in variants}
        for block in range(-(-steps // BLOCK)):
            for v in variants if block % 2 == 0 else reversed(variants):
                rows[v] += ask(workers[v][1], min(BLOCK, steps - block * BLOCK))
        totals = {v: ask(pipe, 0) for v, (_, pipe) in workers.items()}
    finally:
        for process, _ in workers.values():
            process.kill()
            process.join()
    return rows, totals


def start_worker(variant: Variant, plan: Plan) -> tuple[Any, Connection]:
    """A process of its own that runs steps on demand, and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(variant, plan, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def ask(pipe: Connection, steps: int) -> Any:
    """The timings of that many steps; for 0 the peak memory and the counts."""
    try:
        pipe.send(steps)
        return pipe.recv()
    except (EOFError, BrokenPipeError) as error:
        raise UserError("A benchmark process died; its message is above.") from error


def work(variant: Variant, plan: Plan, pipe: Connection) -> None:
    """The process: a distiller, stepped when asked. Ctrl-C is for the one that asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    distiller = make_distiller(*variant, plan)
    counts = Counts(distiller)
    seconds: Timings = {}
    vae = variant[0].endswith(VAE)
    for phase, method in PHASES.items():
        if phase != "encode" or vae:
            setattr(distiller, method, timed(getattr(distiller, method), seconds, phase))
    step = timed(distiller.train_step, seconds, "step")
    while steps := pipe.recv():
        rows = []
        for _ in range(steps):
            seconds.clear()
            row = {**step(), **seconds}
            rows.append(row | {"rollout": row["rollout"] - row.get("encode", 0.0)})
        pipe.send(rows)
    peak = peak_memory_mb()  # before the counts, which take memory themselves
    found = counts.of_a_step(variant[1])
    flops, size = work_of(distiller, found["samples"])
    if vae:
        encoder = vae_work(found["samples"], plan)
        flops, size = flops + encoder[0], size + encoder[1]
    pipe.send({"peak_mb": peak, **found, "flops": flops, "bytes": size})


def make_distiller(method: str, mode: str, plan: Plan) -> Distiller:
    """A distiller of a method, in a mode; every method has as many student samples in a step."""
    # r = 1 from the start, so that the check of the losses sees the whole tangent.
    base = method.removesuffix(VAE)
    settings = {"method": base, "fused": mode == "fused", "output_dir": "unused"}
    settings |= {"tangent_warmup_steps": 0, "tangent_calm_value": 1.0}
    make = digits_distiller if plan.model == "digits" else sana_distiller
    distiller = make(settings, plan)
    if method != base:
        distiller.latents = encoded_latents(distiller, plan)
    if mode == "compile":
        distiller.student_pass = torch.compile(objective.two_passes)
        distiller.teacher_net = torch.compile(distiller.teacher_net)
    return distiller


def digits_distiller(settings: dict[str, Any], plan: Plan) -> Distiller:
    """The built-in teacher, as in its preset."""
    name = "digits" if settings["method"] == "tbcm" else "digits_baselines"
    preset = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    config = TrainConfig(**{**preset, **settings})
    return METHODS[config.method](config, load_teacher("digits"), load_prompts(config))


def sana_distiller(settings: dict[str, Any], plan: Plan) -> Distiller:
    """A SANA with random weights; the baselines' images are random latents."""
    sizes = plan.sizes()
    points = 1 if settings["method"] == "tbcm" else sizes["route_steps"] - 1
    settings |= {"mixed_precision": plan.precision, "route_steps": sizes["route_steps"]}
    if sizes["layers"] <= min(HEAD_BLOCKS):  # the discriminator reads what there is
        settings["head_block_ids"] = [sizes["layers"] - 1]
    config = TrainConfig(**settings, train_batch_size=points * sizes["batch"])
    torch.manual_seed(0)
    latent = sizes["resolution"] // 32
    with torch.device("cuda" if plan.gpu else "cpu"):  # a GPU draws the weights in no time
        transformer = sana(SANA[plan.model][1:], sizes["layers"], latent, guidance=False)
    shape = (transformer.config.in_channels, latent, latent)
    teacher = Teacher(Path(), shape)
    teacher.transformer = transformer.eval().requires_grad_(False)
    kind = type("RandomDistiller", (METHODS[config.method],), {"embed": RandomText})
    distiller = kind(config, teacher, list(WORDS))
    if config.method != "tbcm":
        rows = torch.zeros(1, dtype=torch.long)
        distiller.latents = Latents(rows, lambda picks: torch.randn(len(picks), *shape), "random")
    return distiller


def encoded_latents(distiller: Distiller, plan: Plan) -> Latents:
    """Random images on the device that a VAE encodes each time they are asked for."""
    torch.manual_seed(1)
    side, n = plan.sizes()["resolution"], distiller.config.train_batch_size
    images = torch.randn(n, 3, side, side).to(distiller.device, plan.dtype)
    vae = sana_vae().to(images).eval().requires_grad_(False)

    @torch.no_grad()
    def load(picks: Tensor) -> Tensor:
        return vae.encode(images[: len(picks)]).latent.float() * vae.config.scaling_factor

    return distiller.latents._replace(load=load)


def work_of(distiller: Distiller, samples: int) -> tuple[float, float]:
    """FLOPs and bytes of a fused step of so many samples, without a VAE."""
    config, net = distiller.config, distiller.student.config
    _, height, width = distiller.teacher.latent_shape
    m = cost.Sana(
        width=net.num_attention_heads * net.attention_head_dim, layers=net.num_layers,
        tokens=height * width // net.patch_size**2, batch=samples,
        text=distiller.null.mask.shape[1], itemsize=4 if config.mixed_precision == "no" else 2,
        heads=net.num_cross_attention_heads, caption=net.caption_channels,
    )  # fmt: skip
    sprint = config.method == "sana_sprint"
    judges = head_blocks(config, distiller.transformer) if sprint else ()
    pairs = sprint and config.misaligned_pairs_D
    return cost.training_work(m, "fused", config.method, config.route_steps, judges, pairs)


def vae_work(images: int, plan: Plan) -> tuple[float, float]:
    """FLOPs of encoding so many images, as PyTorch counts them; bytes of the images and weights."""
    side = plan.sizes()["resolution"]
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:  # sizes without numbers
        vae, pixels = sana_vae(), torch.empty(images, 3, side, side)
        vae.encode(pixels)
    numbers = pixels.numel() + sum(weight.numel() for weight in vae.encoder.parameters())
    return counter.get_total_flops(), numbers * plan.dtype.itemsize


class Counts:
    """What a step of a distiller launches, and what its graph keeps for backward."""

    def __init__(self, distiller: Distiller):
        self.distiller, self.forward = distiller, distiller.forward
        self.saved = self.samples = 0

    def of_a_step(self, mode: str) -> dict[str, Any]:
        """Both counts; launches are GPU kernels, or on a CPU calls of PyTorch's dispatcher.

        Compiled code on a CPU calls no dispatcher, so there the count is None. What is saved is
        counted in a step of its own, for the hook that counts it is calls too.
        """
        cuda = self.distiller.device.type == "cuda"
        launches = None
        if cuda or mode != "compile":
            launches = (kernels if cuda else calls)(self.distiller.train_step)
        self.distiller.forward = self.hooked
        self.distiller.train_step()
        kind = "GPU kernels" if cuda else "dispatcher calls"
        return {
            "samples": self.samples, "launches": launches, "launches_are": kind,
            "saved_mb": self.saved / 2**20,
        }  # fmt: skip

    def hooked(self, *args: Any) -> Any:
        """The forward pass; its samples and the size of what it saved are kept."""
        result, size = saved_bytes(lambda: self.forward(*args), self.distiller.parameters)
        self.saved = max(self.saved, size)
        self.samples += len(args[0].x)
        return result


def saved_bytes(forward: Callable[[], Any], weights: Sequence[Tensor]) -> tuple[Any, int]:
    """A forward pass, and the bytes its graph keeps, each storage once, weights not counted."""
    packed = []

    def pack(x: Tensor) -> Tensor:
        x = x.detach()
        packed.append(weakref.ref(x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    kept = [x for ref in packed if (x := ref()) is not None]  # not what only a tangent needed
    sizes = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in kept)}
    own = {w.untyped_storage().data_ptr() for w in weights}
    return result, sum(size for address, size in sizes.items() if address not in own)


def calls(step: Callable[[], Any]) -> int:
    """The operators that PyTorch's dispatcher runs in a step."""

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += 1
            return function(*args, **(kwargs or {}))

    with Counting() as mode:
        step()
    return mode.count


def kernels(step: Callable[[], Any]) -> int:
    """The GPU kernels, copies and fills that a step launches."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in trace.events())


def timed(call: Callable, seconds: Timings, phase: str) -> Callable:
    """The same call, adding its duration to seconds[phase]."""

    def run(*args: Any, **options: Any) -> Any:
        synchronize()
        start = time.perf_counter()
        result = call(*args, **options)
        synchronize()
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
        return result

    return run


def synchronize() -> None:
    """Wait for the GPU, if one is used."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check_agreement(first: Rows, tolerance: float) -> None:
    """Same seed, same losses. Raises UserError where modes of a method differ by more."""
    chosen = {method: mode for method, mode in reversed(first)}
    for (method, mode), rows in first.items():
        for other, row in zip(first[method, chosen[method]], rows, strict=True):
            for key in ("loss", "g_norm", "grad_norm"):
                if not abs(other[key] - row[key]) <= tolerance * abs(other[key]):
                    raise UserError(
                        f"{key} of step {row['step']} of {method} is {other[key]} "
                        f"{chosen[method]} and {row[key]} {mode}: one of them is wrong here."
                    )


def report(
    rows: Rows, totals: dict[Variant, dict[str, Any]], machine: cost.Machine
) -> dict[str, Any]:
    """Medians with p20 and p80 of every variant, by phase too, and their ratios.

    TBCM's variants are named by their mode alone, a baseline's by method and mode.
    """
    result: dict[str, Any] = {}
    for (method, mode), timings in rows.items():
        ms = [1000 * row["step"] for row in timings]
        low, *_, high = statistics.quantiles(ms, n=5, method="inclusive")
        shown = [phase for phase in PHASES if phase in timings[0]]
        phases = {p: statistics.median(1000 * row[p] for row in timings) for p in shown}
        found = {"ms": statistics.median(ms), "p20": low, "p80": high, **totals[method, mode]}
        found["samples_s"] = 1000 * found["samples"] / found["ms"]
        found["roofline"] = 1000 * machine.floor(found["flops"], found["bytes"]) / found["ms"]
        result[mode if method == "tbcm" else f"{method} {mode}"] = {**found, "phases": phases}
    if {"eager", "fused"} <= set(result):
        result["speedup"] = result["eager"]["ms"] / result["fused"]["ms"]
    for key in AGAINST:
        if saved := against(result, key.removeprefix("against_")):
            result[key] = {"paper": PAPER, **saved}
    return result | {
        "copy_gb_s": machine.copy / 1e9, "matmul_tflop_s": machine.matmul / 1e12,
        "steps": len(next(iter(rows.values()))),
        **environment("cuda" if torch.cuda.is_available() else "cpu"),
    }  # fmt: skip


def against(result: dict[str, Any], baseline: str) -> dict[str, dict[str, float]]:
    """TBCM's change of peak memory and time against a baseline's in the same mode, as in PAPER."""
    both = [mode for mode in MODES if {mode, f"{baseline} {mode}"} <= set(result)]
    pairs = {mode: (result[mode], result[f"{baseline} {mode}"]) for mode in both}
    return {
        mode: {"memory": ours["peak_mb"] / scm["peak_mb"] - 1, "time": ours["ms"] / scm["ms"] - 1}
        for mode, (ours, scm) in pairs.items()
    }


def variants_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The timed variants of a step."""
    return {n: r for n, r in result.items() if isinstance(r, dict) and "phases" in r}


def title(result: dict[str, Any]) -> str:
    """What was stepped."""
    if "layers" not in result:
        return result["model"]
    return (
        f"{result['model']}, {result['layers']} of {result['of_layers']} layers, "
        f"{result['resolution']} px, {result['route_steps']} teacher steps"
    )


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    found = [title(result)]
    for name, row in variants_of(result).items():
        phases = ", ".join(f"{phase} {ms:.0f}" for phase, ms in row["phases"].items())
        launches = row["launches"] or "no count of"
        found.append(
            f"{name}: {row['ms']:.1f} ms ({phases}), {row['samples_s']:.1f} samples/s, peak "
            f"{row['peak_mb']:.0f} MiB, {launches} {row['launches_are']}, "
            f"{row['saved_mb']:.0f} MiB saved for backward; {row['flops'] / 1e12:.2f} TFLOP, "
            f"{row['bytes'] / 1e9:.1f} GB, {row['roofline']:.0%} of the roofline"
        )
    found.append(
        f"measured peaks: {result['copy_gb_s']:.1f} GB/s copied, "
        f"{result['matmul_tflop_s']:.2f} TFLOP/s of products"
    )
    if "fused" in result:
        for mode in ("eager", "compile"):
            if mode in result:
                ratio = result[mode]["ms"] / result["fused"]["ms"]
                found.append(f"fused is {ratio:.2f} times as fast as {mode}")
    for key, images in AGAINST.items():
        for mode, ours in result.get(key, {}).items():
            found.append(
                f"tbcm against scm, {images}, {mode}: memory {ours['memory']:+.1%}, "
                f"time {ours['time']:+.1%}"
            )
    return found
