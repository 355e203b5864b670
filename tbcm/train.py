"""The training loop: one step is rollout, student pass, backward, update.

Source of the method: TBCM (arXiv 2511.20410); the parts are in rollout.py and objective.py.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from tbcm import checkpoint, digits, objective, plots
from tbcm.config import TrainConfig
from tbcm.embeddings import prompt_embeddings
from tbcm.errors import UserError
from tbcm.models import Teacher, teacher_of
from tbcm.progress import Display, Metrics, peak_memory_mb
from tbcm.rollout import (
    Samples,
    Text,
    keep_mask,
    rollout,
    student_samples,
    trajectory_step,
    with_null,
)
from tbcm.sampling import consistency_sample, grid, write_whole
from tbcm.student import GUIDANCE_SCALE, build_student
from tbcm.text import read_prompts
from tbcm.trigflow import SIGMA_DATA, TrigFlow, jittered, route


def train(config: TrainConfig) -> None:
    """Run `tbcm train`. Raises UserError for whatever the user can mend."""
    check_device(config)
    teacher = teacher_of(config)
    distiller = Distiller(config, teacher, load_prompts(config))
    state = checkpoint.open_run(config)
    if state:
        distiller.load_state(state)
    run = Path(config.output_dir)
    if not teacher.drawable:
        print(f"{teacher.path} holds no vae/ to draw its latents with, so no grids are drawn.")
    write_whole(run / "config.yaml", config.dump().encode())
    metrics = Metrics(run / "metrics.jsonl", distiller.step)
    with Display(distiller.step, config.max_train_steps, config.logging_steps) as display:
        while distiller.step < config.max_train_steps:
            record = distiller.train_step()
            metrics.write(record)
            display.show(record)
            if due(distiller.step, config.checkpointing_steps, config):
                metrics.flush()
                limit = config.checkpoints_total_limit
                checkpoint.save(run, distiller.step, distiller.state(), limit)
            if due(distiller.step, config.validation_steps, config):
                save_grid(distiller, run)
    finish(distiller, run)


def due(step: int, every: int, config: TrainConfig) -> bool:
    """True at every multiple of a positive interval and at the last step."""
    return step == config.max_train_steps or (every > 0 and step % every == 0)


def finish(distiller: Distiller, run: Path) -> None:
    """Write the student and the loss curve, and say what was made."""
    with distiller.averaged_weights(), checkpoint.whole_folder(run / "student") as folder:
        distiller.student.save_pretrained(folder)
    plots.loss_plot(run / "metrics.jsonl", run / "loss.png")
    print(
        f"{run / 'student'}: the student after {distiller.step} steps, {distiller.skipped} of them "
        f"skipped as not finite; peak memory {peak_memory_mb():.0f} MB."
    )


def save_grid(distiller: Distiller, run: Path) -> None:
    """Images of the first prompts from fixed noise, if the teacher can draw."""
    if not distiller.teacher.drawable:
        return
    latents = distiller.sample(distiller.config.validation_samples, distiller.config.sample_steps)
    images = distiller.teacher.images(latents)
    distiller.teacher.free("vae")
    grid(images, run / "samples" / f"step-{distiller.step:06d}.png")


def check_device(config: TrainConfig) -> torch.device:
    """The device to compute on. Raises UserError if it is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch finds no GPU here; use --device cpu.")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def load_prompts(config: TrainConfig) -> list[str]:
    """The prompts file, or the built-in teacher's own prompts."""
    if config.prompts:
        return read_prompts(config.prompts)
    if config.teacher == "digits":
        return [prompt for prompt, _ in digits.prompts()]
    raise UserError("This teacher has no prompts of its own; give --prompts FILE, one per line.")


def load_filter(config: TrainConfig, teacher: Teacher) -> Tensor | None:
    """The latent of a degenerate image [C, H, W]. Raises UserError if the file holds none."""
    if not config.filter_latent:
        return None
    try:
        latent = torch.load(config.filter_latent, map_location="cpu", weights_only=True)
        if latent.shape == teacher.latent_shape:
            return latent.float()
    except Exception as error:
        raise UserError(f"Cannot read filter_latent {config.filter_latent}: {error}") from error
    raise UserError(
        f"filter_latent {config.filter_latent} has shape {tuple(latent.shape)}, but the teacher's "
        f"latents have {teacher.latent_shape}."
    )


def lr_factor(step: int, config: TrainConfig) -> float:
    """Learning rate at a 0-based step, as a fraction of its peak."""
    warmup, total = config.lr_warmup_steps, config.max_train_steps
    if step < warmup:
        return (step + 1) / warmup
    left = 1 - (step - warmup) / max(total - warmup, 1)
    shapes: dict[str, Callable[[], float]] = {
        "constant": lambda: 1.0,
        "linear": lambda: left,
        "cosine": lambda: 0.5 - 0.5 * math.cos(math.pi * left),
        "constant_then_linear": lambda: min(1.0, 2 * left),
    }
    return shapes[config.lr_scheduler]()


class Distiller:
    """Teacher, student, optimiser and random state of a run, and the four parts of a step.

    Every random draw of the method comes from one CPU generator, in the same order whether fused
    or not, so both give the same curve and a GPU sees the noise that a CPU sees.
    """

    def __init__(self, config: TrainConfig, teacher: Teacher, prompts: list[str]):
        torch.manual_seed(config.seed)
        self.config, self.teacher, self.prompts = config, teacher, prompts
        self.device = check_device(config)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = self.skipped = self.skipped_in_row = 0
        transformer = teacher.transformer
        # Before anything else is on the device: the text encoder is the largest part.
        self.embeddings = prompt_embeddings(teacher, prompts, self.device)
        transformer.to(self.device)
        self.teacher_digest = digest(transformer)
        self.student = build_student(transformer).train().requires_grad_(True)
        self.log_variance = objective.LogVariance().to(self.device) if config.log_variance else None
        self.parameters = list(self.student.parameters())
        decay = config.ema_decay
        self.ema = EMAModel(self.parameters, decay, foreach=True) if decay else None
        if self.log_variance:
            self.parameters += self.log_variance.parameters()
        self.optimizer = make_optimizer(self.parameters, config)
        self.student_pass, self.loss = objective.two_passes, objective.tangent_loss
        self.trajectory_step, self.fused = trajectory_step, None
        if config.fused:
            import tbcm_kernels

            self.student_pass, self.loss = objective.one_pass, tbcm_kernels.tangent_loss
            self.trajectory_step = tbcm_kernels.trajectory_step
            self.fused = tbcm_kernels.fuse(transformer)
            tbcm_kernels.fuse(self.student)
        self.teacher_net = TrigFlow(transformer, config.fused)
        self.student_net = TrigFlow(self.student, config.fused)
        self.route = route(config.route_steps, config.flow_shift)
        self.filter_latent = load_filter(config, teacher)
        self.null = self.embeddings.null().to(self.device)

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
        samples = self.harvest()
        loss, norms = self.forward(samples, r)
        self.backward(loss)
        grad_norm, applied = self.update(loss)
        self.step += 1
        self.count_skips(applied)
        finite = norms[norms.isfinite()]
        rate = self.config.train_batch_size / (time.perf_counter() - start)
        return {
            "step": self.step, "loss": loss.item(), "g_norm": finite.mean().item(), "r": r,
            "lr": lr, "grad_norm": grad_norm, "images_per_s": rate, "skipped": not applied,
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

    def harvest(self) -> Samples:
        """Draw prompts, guidance, noise and times; follow the teacher; keep its path."""
        n, gen, scales = self.config.train_batch_size, self.generator, self.config.scm_cfg_scale
        rows = torch.randint(len(self.prompts), (n,), generator=gen).tolist()
        chosen = torch.randint(len(scales), (n,), generator=gen)
        guidance = torch.tensor(scales, dtype=torch.float32)[chosen].to(self.device)
        noise = SIGMA_DATA * torch.randn(n, *self.teacher.latent_shape, generator=gen)
        times = jittered(self.route, gen) if self.config.jitter else self.route
        uniform, text = torch.rand(n, generator=gen), self.text(rows)
        noise, times = noise.to(self.device), times.float().to(self.device)
        with self.autocast():
            path = rollout(
                self.teacher_net, noise, times, self.guided(text), guidance, self.trajectory_step
            )
        keep = torch.ones_like(guidance)
        if self.filter_latent is not None:
            keep = keep_mask(path.x0.cpu(), self.filter_latent, uniform).to(self.device)
        return student_samples(path, text, GUIDANCE_SCALE * guidance, keep)

    @torch.no_grad()
    def guided(self, text: Text) -> Text:
        """Both branches of guidance; a fused teacher reads them once for the whole route."""
        both = with_null(text, self.null)
        if self.fused is None:
            return both
        return Text(self.fused.encode_text(both.embeds), both.mask)

    def forward(self, samples: Samples, r: float) -> tuple[Tensor, Tensor]:
        """The loss of a student batch and ‖g‖ of its samples."""
        x, t, velocity, text, guidance, keep = samples
        # A fused student reads each prompt once; the stock model wants one text per image.
        text = text if self.fused else text.each(len(x) // len(text.mask))
        with self.autocast():
            out, jvp = self.student_pass(self.student_net, x, t, velocity, *text, guidance)
        weight = objective.time_weight(t) if self.config.time_weighting else torch.ones_like(t)
        lv = self.log_variance(t) if self.log_variance else torch.zeros_like(t)
        c = self.config.tangent_norm_constant
        return self.loss(out, jvp, velocity, x, t, r, c, keep, weight, lv)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss."""
        loss.backward()

    def update(self, loss: Tensor) -> tuple[float, bool]:
        """Clip and apply the gradients; their norm before clipping, and whether all was finite."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip).item()
        finite = math.isfinite(norm) and math.isfinite(loss.item())
        if finite:
            self.optimizer.step()
            if self.ema:
                self.ema.step(self.student.parameters())
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
        self.ema.store(self.student.parameters())
        self.ema.copy_to(self.student.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.student.parameters())

    @torch.no_grad()
    def sample(self, n: int, steps: int) -> Tensor:
        """x0/σ_d of n images from fixed noise; the run's own draws are left alone."""
        gen = torch.Generator(self.device).manual_seed(self.config.seed)
        shape = (n, *self.teacher.latent_shape)
        noise = SIGMA_DATA * torch.randn(shape, generator=gen, device=self.device)
        text = self.text([i % len(self.prompts) for i in range(n)])
        scales = sorted(self.config.scm_cfg_scale)
        guidance = noise.new_full((n,), GUIDANCE_SCALE * scales[len(scales) // 2])
        with self.averaged_weights(), self.autocast():
            return consistency_sample(self.student_net, noise, *text, guidance, steps, gen)

    def state(self) -> dict[str, Any]:
        """All that a checkpoint needs to continue bit for bit; the schedules follow the step."""
        return {
            "step": self.step, "skipped": self.skipped, "skipped_in_row": self.skipped_in_row,
            "config": vars(self.config), "prompts": self.prompts_digest(),
            "teacher": self.teacher_digest,
            "student": self.student.state_dict(),
            "log_variance": self.log_variance.state_dict() if self.log_variance else None,
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "generator": self.generator.get_state(), "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. Raises UserError if prompts or teacher are not the same."""
        if state["prompts"] != self.prompts_digest():
            raise UserError("The prompts are not those of the checkpoint; restore their file.")
        if state["teacher"] != self.teacher_digest:
            raise UserError("The teacher's weights are not those of the checkpoint; restore them.")
        self.step, self.skipped = state["step"], state["skipped"]
        self.skipped_in_row = state["skipped_in_row"]
        try:
            self.student.load_state_dict(state["student"])
        except RuntimeError as error:
            raise UserError("The checkpoint's student does not fit this teacher.") from error
        self.optimizer.load_state_dict(state["optimizer"])
        if self.log_variance:
            self.log_variance.load_state_dict(state["log_variance"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.device)
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    def prompts_digest(self) -> str:
        """Fingerprint of the prompts, the only data."""
        return hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()


def digest(net: torch.nn.Module) -> str:
    """Fingerprint of a network's weights."""
    found = hashlib.sha256()
    for weight in net.parameters():
        found.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def make_optimizer(parameters: list[torch.nn.Parameter], c: TrainConfig) -> torch.optim.AdamW:
    """AdamW on fp32 weights, updated by PyTorch's single fused kernel."""
    return torch.optim.AdamW(
        parameters, c.learning_rate, (c.adam_beta1, c.adam_beta2), c.adam_epsilon,
        c.adam_weight_decay, fused=True,
    )  # fmt: skip
