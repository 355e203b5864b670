"""One step of TBCM: draw, follow the teacher, student pass, backward, update; and its state.

Source of the method: TBCM (arXiv 2511.20410); the parts are in rollout.py and objective.py. The
baselines change the parts that differ: scm.py and sprint.py.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from statistics import median_high
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.tensor import DTensor

from tbcm import distributed, objective
from tbcm.config import TrainConfig
from tbcm.embeddings import prompt_embeddings
from tbcm.errors import UserError
from tbcm.files import content
from tbcm.graphed import Graphed
from tbcm.lora import build_lora_student, learnt, merged
from tbcm.models import Teacher
from tbcm.optimizer import lr_factor, make_optimizer
from tbcm.rollout import (
    Draw,
    Samples,
    Text,
    Trajectory,
    by_points,
    keep_mask,
    rollout,
    student_samples,
    trajectory_step,
    with_null,
)
from tbcm.sampling import consistency_sample
from tbcm.student import GUIDANCE_SCALE, build_student
from tbcm.text import read_prompts
from tbcm.trigflow import SIGMA_DATA, TrigFlow, jittered, route


def load_filter(config: TrainConfig, teacher: Teacher) -> Tensor | None:
    """The latent of a degenerate image [C, H, W]. Raises UserError if the file holds none."""
    if not config.filter_latent:
        return None
    try:
        latent = torch.load(config.filter_latent, map_location="cpu", weights_only=True)
        fits = latent.shape == teacher.latent_shape and not latent.is_complex()
        if fits and latent.isfinite().all():
            return latent.float()
    except Exception as error:
        why = getattr(error, "strerror", None) or "it holds no saved tensor"
        raise UserError(
            f"Cannot read filter_latent {config.filter_latent}: {why}; give a file made by "
            f"torch.save of one [C, H, W] tensor."
        ) from error
    raise UserError(
        f"filter_latent {config.filter_latent} is {tuple(latent.shape)} in {latent.dtype}; it must "
        f"have the shape of the teacher's latents, {teacher.latent_shape}, and finite real numbers."
    )


class Distiller:
    """Teacher, student, optimiser and random state of a run, and the parts of a step.

    Every random draw of the method comes from one CPU generator, in the same order whether fused
    or not and on however many processes, so all give the same curve and a GPU sees the noise that
    a CPU sees. Each process draws the whole batch and works off its share.
    """

    embed = staticmethod(prompt_embeddings)
    """How prompts become embeddings."""

    def __init__(self, config: TrainConfig, teacher: Teacher, prompts: list[str]):
        torch.manual_seed(config.seed)
        self.config, self.teacher, self.prompts = config, teacher, prompts
        self.accelerator = distributed.make_accelerator(config)
        self.device = self.accelerator.device
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = self.skipped = self.skipped_in_row = 0
        self.transformer = transformer = teacher.transformer.to(self.device)
        self.teacher_digest = digest(transformer.parameters())
        distributed.check_alike({"teacher's weights": self.teacher_digest})  # before they are used
        self.student = make_student(transformer, config).train()
        self.log_variance = objective.LogVariance().to(self.device) if config.log_variance else None
        if config.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()
        self.student_pass, self.loss = objective.two_passes, objective.tangent_loss
        self.trajectory_step, self.fused = trajectory_step, None
        if config.fused:
            import tbcm_kernels

            self.loss = tbcm_kernels.tangent_loss
            self.trajectory_step = tbcm_kernels.trajectory_step
            self.fused = tbcm_kernels.fuse(transformer)
            self.student_pass = objective.one_pass
            tbcm_kernels.fuse(self.student)
        if config.mixed_precision == "bf16" and not config.lora_rank:
            narrow_products(transformer)
            teacher.free("transformer")  # who asks for it again wants it in fp32
        self.teacher_net, self.rollout = TrigFlow(transformer, config.fused), self.follow
        if config.fused and config.cuda_graphs and self.device.type == "cuda" and not config.fsdp:
            self.rollout = Graphed(self.follow)
        self.student_net = TrigFlow(self.spread(self.student), config.fused)
        self.log_variance_net = self.spread(self.log_variance) if self.log_variance else None
        self.learning = [p for p in self.student.parameters() if p.requires_grad]
        decay = config.ema_decay
        # Sharded tensors have no foreach copy.
        self.ema = EMAModel(self.learning, decay, foreach=not config.fsdp) if decay else None
        head = self.log_variance.parameters() if self.log_variance else ()
        self.parameters = [*self.learning, *head]
        self.optimizer = make_optimizer(self.parameters, config)
        self.route = route(config.route_steps, config.flow_shift)
        self.filter_latent = load_filter(config, teacher)
        # Encoding comes last, the short list first: other mistakes are told before minutes of work.
        shown = read_prompts(config.validation_prompts) if config.validation_prompts else None
        shown = shown and self.embed(teacher, shown, self.device)
        self.embeddings = self.embed(teacher, prompts, self.device)
        self.shown = shown or self.embeddings
        self.null = self.embeddings.null().to(self.device)

    @property
    def main(self) -> bool:
        """True on the one process that writes files."""
        return self.accelerator.is_main_process

    def spread(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module to call so that its gradients are shared by all processes."""
        return distributed.spread(module, self.accelerator, self.config.fsdp)

    def text(self, rows: list[int]) -> Text:
        """The encoded prompts of these rows of the prompts file."""
        return self.embeddings.text(rows).to(self.device)

    def autocast(self) -> AbstractContextManager:
        """bf16 for the networks if asked for; master weights and loss stay in fp32."""
        if self.config.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def train_step(self) -> dict[str, Any]:
        """One step: its record for metrics.jsonl. A step that is not finite is not applied.

        Samples whose ‖g‖ is not finite are counted; in fused mode the others still make a step, if
        the student's own output is finite.
        """
        start = time.perf_counter()
        r, lr = self.schedule()
        loss, norms = self.gradients(r)
        grad_norm, applied = self.update(loss)
        self.step += 1
        self.count_skips(applied)
        finite = norms[norms.isfinite()]
        rate = self.config.train_batch_size / (time.perf_counter() - start)
        return {
            "step": self.step, "loss": loss.item(), "g_norm": finite.mean().item(), "r": r,
            "lr": lr, "grad_norm": grad_norm, "prompts_per_s": rate, "skipped": not applied,
            "bad_samples": len(norms) - len(finite),
        }  # fmt: skip

    def schedule(self) -> tuple[float, float]:
        """r of this step, and its learning rate, which is set."""
        c = self.config
        lr = c.learning_rate * lr_factor(self.step, c)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        r = objective.tangent_weight(
            self.step, c.tangent_warmup_steps, c.tangent_calm_start, c.tangent_calm_steps,
            c.tangent_calm_value,
        )  # fmt: skip
        return r, lr

    def gradients(self, r: float) -> tuple[Tensor, Tensor]:
        """Gradients of the whole batch, pass by pass: its loss, and ‖g‖ of all its samples."""
        passes = [p for draw in self.shares(self.draw()) for p in self.split(self.harvest(draw))]
        total, losses, norms = sum(len(p.x) for p in passes), [], []
        for samples in passes:
            with self.averaging(last=samples is passes[-1]):
                loss, norm = self.forward(samples, r)
                loss = loss * (len(samples.x) / total)
                self.backward(loss)
            losses.append(loss.detach())
            norms.append(norm)
        loss = self.accelerator.reduce(torch.stack(losses).sum(), "mean")
        return loss, self.accelerator.gather(torch.cat(norms))

    def draw(self) -> Draw:
        """The random choices of this step, for the whole batch."""
        n, gen, scales = self.config.train_batch_size, self.generator, self.config.scm_cfg_scale
        rows = torch.randint(self.choices, (n,), generator=gen)
        chosen = torch.randint(len(scales), (n,), generator=gen)
        guidance = torch.tensor(scales, dtype=torch.float32)[chosen]
        noise = SIGMA_DATA * torch.randn(n, *self.teacher.latent_shape, generator=gen)
        return Draw(rows, guidance, noise, self.times(n), torch.rand(n, generator=gen))

    @property
    def choices(self) -> int:
        """How many prompts a step draws from."""
        return len(self.prompts)

    def times(self, n: int) -> Tensor:
        """The route of n prompts [n, N]: one for all of them, or each its own."""
        if not self.config.jitter:
            times = [self.route]
        elif self.config.jitter_each_prompt:
            times = [jittered(self.route, self.generator) for _ in range(n)]
        else:
            times = [jittered(self.route, self.generator)]
        return torch.stack(times).float().expand(n, -1)

    def shares(self, draw: Draw) -> list[Draw]:
        """This process's share of the batch, in one part for each accumulation step."""
        parts, rank = self.config.gradient_accumulation_steps, self.accelerator.process_index
        n = len(draw.rows) // (parts * self.accelerator.num_processes)
        starts = range(rank * parts * n, (rank + 1) * parts * n, n)
        return [type(draw)(*(a[start : start + n] for a in draw)) for start in starts]

    def harvest(self, draw: Draw) -> Samples:
        """Follow the teacher from the noise of these prompts; keep its path."""
        text = self.text(draw.rows.tolist())
        _, guidance, noise, times, _ = (a.to(self.device) for a in draw)
        with self.autocast(), torch.no_grad():
            path = self.rollout(noise, times.T, guidance, *with_null(text, self.null))
        keep = torch.ones_like(guidance)
        if self.filter_latent is not None:
            keep = keep_mask(path.x0.cpu(), self.filter_latent, draw.uniform).to(self.device)
        return student_samples(path, text, GUIDANCE_SCALE * guidance, keep)

    def split(self, samples: Samples) -> list[Samples]:
        """The batch in passes of points_per_pass points of each prompt, to save memory."""
        points = self.config.points_per_pass
        return by_points(samples, points) if points else [samples]

    @contextmanager
    def averaging(self, last: bool) -> Iterator[None]:
        """Processes exchange gradients in the last backward of a step alone.

        Under FSDP in each, so that none holds a whole gradient.
        """
        nets = () if last else (self.student_net.transformer, self.log_variance_net)
        with ExitStack() as stack:
            for net in filter(None, nets):
                stack.enter_context(self.accelerator.no_sync(net))
            yield

    def follow(
        self, noise: Tensor, times: Tensor, guidance: Tensor, embeds: Tensor, mask: Tensor
    ) -> Trajectory:
        """The teacher's path from noise [P, ...] along times [N, P]; the text is `with_null`'s."""
        both = self.read(Text(embeds, mask))
        return rollout(self.teacher_net, noise, times, both, guidance, self.trajectory_step)

    def guided(self, text: Text) -> Text:
        """Both branches of guidance, as the teacher takes them."""
        return self.read(with_null(text, self.null))

    def read(self, text: Text) -> Text:
        """A fused teacher reads prompts once for a whole route; the stock model every time."""
        if self.fused is None:
            return text
        return Text(self.fused.encode_text(text.embeds), text.mask)

    def forward(self, samples: Samples, r: float) -> tuple[Tensor, Tensor]:
        """The loss of a student batch and ‖g‖ of its samples."""
        x, t, velocity, text, guidance, keep = samples
        # A fused student reads each prompt once; the stock model wants one text per image.
        text = text if self.config.fused else text.each(len(x) // len(text.mask))
        with self.autocast():
            out, jvp = self.student_pass(self.student_net, x, t, velocity, *text, guidance)
        weight = objective.time_weight(t) if self.config.time_weighting else torch.ones_like(t)
        lv = self.log_variance_net(t) if self.log_variance else torch.zeros_like(t)
        c = self.config.tangent_norm_constant
        return self.loss(out, jvp, velocity, x, t, r, c, keep, weight, lv)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss."""
        loss.backward()

    def update(self, loss: Tensor) -> tuple[float, bool]:
        """Clip and apply the gradients; their norm before clipping, and whether all was finite."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        finite = math.isfinite(norm) and math.isfinite(loss.item())
        if finite:
            self.optimizer.step()
            if self.ema:
                self.ema.step(self.learning)
        self.optimizer.zero_grad()
        return norm, finite

    def count_skips(self, finite: bool) -> None:
        """Count a skipped step. Raises UserError after too many in a row."""
        self.skipped += not finite
        self.skipped_in_row = 0 if finite else self.skipped_in_row + 1
        if self.skipped_in_row >= self.config.max_skipped_steps:
            raise UserError(
                f"The loss was not finite for {self.skipped_in_row} steps in a row, up to step "
                f"{self.step}; lower learning_rate or raise tangent_warmup_steps."
            )

    @contextmanager
    def averaged_weights(self):
        """Within, the student has its averaged weights, if the run keeps them."""
        if not self.ema:
            yield
            return
        self.ema.store(self.learning)
        self.ema.copy_to(self.learning)
        try:
            yield
        finally:
            self.ema.restore(self.learning)

    def whole_student(self) -> SanaTransformer2DModel | None:
        """The student with its averaged weights, on the CPU; None but on the main process."""
        with self.averaged_weights():
            state = distributed.whole(merged(self.student), self.main)
            if not self.main:
                return None
            state = {name: weight.cpu().clone() for name, weight in state.items()}
        with torch.device("meta"):
            student = SanaTransformer2DModel.from_config(self.student.config)
        student.load_state_dict(state, assign=True)
        return student

    @torch.no_grad()
    def sample(self, n: int, steps: int) -> Tensor:
        """x0/σ_d of n images from fixed noise, of the validation prompts or the first of the run's.

        The run's own draws are left alone. All processes must ask for it.
        """
        gen = torch.Generator(self.device).manual_seed(self.config.seed)
        shape = (n, *self.teacher.latent_shape)
        noise = SIGMA_DATA * torch.randn(shape, generator=gen, device=self.device)
        text = self.shown.text([i % len(self.shown) for i in range(n)]).to(self.device)
        scale = median_high(self.config.scm_cfg_scale)
        guidance = noise.new_full((n,), GUIDANCE_SCALE * scale)
        with self.averaged_weights(), self.autocast():
            return consistency_sample(self.student_net, noise, *text, guidance, steps, gen)

    def state(self) -> dict[str, Any]:
        """All that a checkpoint needs to continue bit for bit; the schedules follow the step.

        It does not depend on the number of processes, all of which must ask for it; the main one
        gets it.
        """
        return distributed.whole({
            "step": self.step, "skipped": self.skipped, "skipped_in_row": self.skipped_in_row,
            "config": vars(self.config), "made_from": self.made_from(),
            "student": learnt(self.student),
            "log_variance": self.log_variance.state_dict() if self.log_variance else None,
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "generator": self.generator.get_state(), "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }, self.main)  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. Raises UserError if it was made from something else."""
        for name, found in self.made_from().items():
            if state["made_from"].get(name) != found:
                raise UserError(f"The {name} are not those of the checkpoint; restore them.")
        self.step, self.skipped = state["step"], state["skipped"]
        self.skipped_in_row = state["skipped_in_row"]
        try:
            distributed.load_whole(self.student, state["student"])
        except RuntimeError as error:
            raise UserError(
                "The checkpoint's student does not fit this teacher, or is of another version."
            ) from error
        distributed.load_optimizer(self.optimizer, self.parameters, state["optimizer"])
        if self.log_variance:
            distributed.load_whole(self.log_variance, state["log_variance"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.device)
            pairs = zip(self.ema.shadow_params, self.learning, strict=True)
            self.ema.shadow_params = [distributed.shared_as(*pair) for pair in pairs]
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])

    def made_from(self) -> dict[str, str]:
        """Fingerprints of all that a run is made from beside its settings, by what they are of."""
        given = [] if self.filter_latent is None else [self.filter_latent]
        made = sorted(i for i in self.transformer.config.items() if not i[0].startswith("_"))
        return {
            "prompts or the text encoder": self.embeddings.folder.name,
            "teacher's weights": self.teacher_digest,
            "teacher's settings": content(salt=repr((made, self.teacher.latent_shape))),
            "numbers of filter_latent": digest(given),
        }


def make_student(teacher: SanaTransformer2DModel, config: TrainConfig) -> SanaTransformer2DModel:
    """A student that learns whole, or by adapters."""
    if config.lora_rank:
        return build_lora_student(teacher, config.lora_rank)
    return build_student(teacher).requires_grad_(True)


def narrow_products(net: torch.nn.Module) -> None:
    """Weights in bf16 where autocast would make them so at every use: the same results.

    A frozen one is cast anew each time. A fused depthwise convolution reads its own in fp32.
    """
    for layer in net.modules():
        dense = isinstance(layer, torch.nn.Conv2d) and layer.groups == 1
        if dense or isinstance(layer, torch.nn.Linear):
            layer.to(torch.bfloat16)


def digest(tensors: Iterable[Tensor]) -> str:
    """Fingerprint of tensors, such as a network's weights."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()
