"""Every setting of a distillation run, in one dataclass read from YAML and the command line.

Names follow diffusers' Sana-Sprint training script where it has them. `presets/` holds the
settings for SANA-Sprint and for the built-in digits; a default holds where a preset sets nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from tbcm.errors import UserError

PRESETS = Path(__file__).parent / "presets"
BUILT_IN = sorted(path.parent.name for path in PRESETS.parent.glob("assets/*/model_index.json"))
PATHS = (
    "pretrained_model_name_or_path", "prompts", "validation_prompts", "images", "filter_latent",
)  # fmt: skip
"""What may name files or folders of the user's."""
Range = tuple[str, Callable[[Any], bool], str]
"""What a value must be (in words and as a test) and the fields it binds."""


@dataclass
class TrainConfig:
    """Settings of `tbcm train`."""

    output_dir: str
    """Run folder: config, metrics, checkpoints, samples and the student are written here."""
    teacher: str | None = None
    """Name of a built-in teacher ("digits", the default if no other teacher is given)."""
    pretrained_model_name_or_path: str | None = None
    """Hub id or folder of a flow-matching teacher in diffusers' layout, in place of --teacher."""
    variant: str | None = None
    """Variant of the teacher's weight files, such as "bf16"; by default those without one."""
    revision: str | None = None
    """Branch, tag or commit of a teacher on the Hub."""
    resolution: int | None = None
    """Side of the images in pixels; by default the teacher's own."""
    complex_human_instruction: bool = True
    """Put SANA's instruction before every prompt, as SanaSprintPipeline does by default; built-in
    teachers know none."""
    method: Literal["tbcm", "scm", "sana_sprint"] = "tbcm"
    """TBCM, or a baseline that learns from images: sCM, or SANA-Sprint (sCM and a GAN)."""
    images: str | None = None
    """Folder of images, each with its caption beside it (a.jpg, a.txt), for the baselines; those in
    folders inside it are not read."""
    latents_cache: str | None = None
    """Folder where the images' latents are kept (none: tbcm_latents in the folder of images)."""
    prompts: str | None = None
    """Text file with one prompt per line, the only data of tbcm (built-in teachers bring their
    own)."""
    fused: bool = False
    """Run teacher and student through tbcm_kernels, with one dual pass per step instead of two."""
    cuda_graphs: bool = True
    """On a GPU, replay a fused teacher's whole route as one CUDA graph; not with fsdp."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes the GPU if there is one."""
    mixed_precision: str | bool = "no"
    """bf16 runs the networks under autocast; weights, optimiser and loss stay in fp32. YAML reads a
    plain no as false, which is taken for it."""
    seed: int = 0
    """Seed of every random draw of the run."""
    resume_from_checkpoint: str | None = None
    """"latest", or the path of a checkpoint, to continue a run in its own folder."""

    train_batch_size: int = 1
    """Prompts of a whole step, over all processes and accumulation steps, so that a run does not
    depend on their number; each gives route_steps − 1 student samples. Images for the
    baselines, each one sample."""
    gradient_accumulation_steps: int = 1
    """Micro-batches into which each process splits its share of the batch; `train_batch_size` must
    be a multiple of this times the processes."""
    points_per_pass: int | None = None
    """Points of a prompt's trajectory in one student pass, to save memory (none: all)."""
    gradient_checkpointing: bool = False
    """Compute the student's blocks again in backward, without tangents, to save memory."""
    fsdp: bool = False
    """Shard the student over the processes (FSDP2); without it each holds all of it (DDP)."""
    max_train_steps: int = 30000
    """Steps of the whole run."""
    checkpointing_steps: int = 1000
    """Steps between two checkpoints; the last step always has one."""
    checkpoints_total_limit: int | None = None
    """Keep at most this many checkpoints, removing the oldest (none: keep all)."""
    validation_steps: int = 1000
    """Steps between two sample grids; 0 makes one at the end only."""
    validation_samples: int = 16
    """Images in a sample grid."""
    validation_prompts: str | None = None
    """Text file with one prompt per line for the sample grids (none: the first of the run's)."""
    sample_steps: Literal[1, 2, 4] = 1
    """Sampling steps for the images in a grid."""
    logging_steps: int = 50
    """Steps between two printed lines when the output is not a terminal."""
    report_to: Literal["tensorboard", "wandb"] | None = None
    """Also send metrics and sample grids to a tracker, where a resumed run stays one; tensorboard
    writes to output_dir/tbcm, wandb to output_dir/wandb."""

    learning_rate: float = 1e-5
    """Peak learning rate, used as it stands: never rescaled by the batch size."""
    lr_scheduler: Literal["constant", "linear", "cosine", "constant_then_linear"] = "constant"
    """Shape after the warm-up; constant_then_linear decays to 0 over the second half."""
    lr_warmup_steps: int = 5000
    """Steps over which the learning rate rises linearly from 0."""
    adam_beta1: float = 0.9
    """β₁ of AdamW and CAME."""
    adam_beta2: float = 0.999
    """β₂ of AdamW and CAME."""
    adam_weight_decay: float = 0.0
    """Weight decay of AdamW and CAME."""
    adam_epsilon: float = 1e-8
    """AdamW ε."""
    lora_rank: int | None = None
    """Learn LoRA adapters of this rank on the teacher's own weights, held once (none: learn all
    weights)."""
    optimizer: Literal["adamw", "adamw_8bit", "came"] = "adamw"
    """AdamW, AdamW with 8-bit moments (needs bitsandbytes) or CAME (needs came-pytorch)."""
    gradient_clip: float = 0.1
    """Largest gradient norm applied in a step."""
    ema_decay: float = 0.0
    """Largest decay of the running average of the weights that is saved as the student; after n
    steps it is (1+n)/(10+n) at most. 0 is off."""
    max_skipped_steps: int = 20
    """Stop after this many non-finite steps in a row; each is skipped and counted."""

    route_steps: int = 16
    """N, the teacher steps of a trajectory."""
    flow_shift: float = 2.5
    """S of the flow shift that spaces the route."""
    jitter: bool = True
    """Redraw every time of the route between its neighbours at each step."""
    jitter_each_prompt: bool = True
    """Redraw it for each prompt, not once for all prompts of a step."""
    scm_cfg_scale: list[float] = field(default_factory=lambda: [4.0, 4.5, 5.0])
    """Guidance scales, as in [4.5] or "[4, 5]"; one is drawn per prompt and kept along its
    trajectory."""
    filter_latent: str | None = None
    """File (torch.save of one [C, H, W] latent x0/σ_d): trajectories that end near it are dropped
    with probability 1 − mse."""

    tangent_warmup_steps: int = 4000
    """Steps over which r, the weight of the tangent, rises from 0 to 1."""
    tangent_calm_start: int = 15000
    """Step at which r begins to fall from 1."""
    tangent_calm_steps: int = 2000
    """Steps over which r falls."""
    tangent_calm_value: float = 0.75
    """Where r ends; 1 switches the calm-down off."""
    tangent_norm_constant: float = 0.1
    """c of ĝ = g / (‖g‖ + c)."""
    time_weighting: bool = True
    """Weigh the loss with w(t) = 1/(σ_d tan t)."""
    log_variance: bool = True
    """Learn the log-variance of the loss over t with a linear head."""

    logit_mean: float = 0.2
    """Baselines: mean of τ in t = arctan(e^τ/σ_d)."""
    logit_std: float = 1.6
    """Baselines: standard deviation of τ."""
    adv_lambda: float = 0.5
    """sana_sprint: weight of the adversarial loss."""
    largest_timestep_prob: float = 0.5
    """sana_sprint: share of the images that the GAN sees made from pure noise, t = π/2."""
    misaligned_pairs_D: bool = True
    """sana_sprint: the heads learn that images beside each other's captions are wrong too, in steps
    of two or more."""
    head_block_ids: list[int] | None = None
    """sana_sprint: teacher blocks whose features the discriminator reads, from 0 (none: 2, 8, 14
    and 19, as far as the teacher has them)."""
    logit_mean_discriminator: float = -0.6
    """sana_sprint: mean of τ for the noise that the discriminator sees."""
    logit_std_discriminator: float = 1.0
    """sana_sprint: its standard deviation."""

    def __post_init__(self) -> None:
        """Raises UserError, naming the field and its range, for the first value out of range."""
        check_set(self)
        check_seed(self.seed)
        self.mixed_precision = self.mixed_precision or "no"
        if self.mixed_precision not in ("no", "bf16"):
            raise UserError(f"mixed_precision must be no or bf16, not {self.mixed_precision}.")
        for name in PATHS:
            path = getattr(self, name)
            if path and Path(path).exists():  # so that a run is the same from any folder
                setattr(self, name, str(Path(path).absolute()))
        check_ranges(self, RANGES)
        if self.teacher and self.pretrained_model_name_or_path:
            raise UserError(
                "Give --teacher or --pretrained_model_name_or_path, not both; a preset other than "
                "digits and a --config may name a teacher too."
            )
        if self.teacher not in (None, *BUILT_IN):
            raise UserError(
                f"teacher names a built-in one ({', '.join(BUILT_IN)}), not {self.teacher!r}; give "
                "a folder or Hub id as --pretrained_model_name_or_path."
            )
        if not self.pretrained_model_name_or_path:
            self.teacher = self.teacher or "digits"
        self._check_method()
        if self.fsdp and (self.lora_rank or self.optimizer != "adamw"):
            raise UserError(
                "fsdp shards all weights of a student that adamw updates; leave out lora_rank, and "
                "take --optimizer adamw."
            )

    def _check_method(self) -> None:
        """Data and passes that the chosen method would not look at are refused."""
        if self.method == "tbcm":
            if self.images:
                raise UserError("images are for --method scm and sana_sprint; tbcm needs prompts.")
            return
        if self.prompts:
            raise UserError(f"{self.method} takes the images' captions; give images, not prompts.")
        if self.points_per_pass:
            raise UserError(
                f"points_per_pass splits a trajectory, and {self.method} has none; use "
                "gradient_accumulation_steps."
            )
        if self.filter_latent:
            raise UserError(f"filter_latent drops trajectories, and {self.method} has none.")

    @property
    def teacher_source(self) -> str:
        """What `tbcm.models.load_teacher` is asked for."""
        return self.pretrained_model_name_or_path or self.teacher

    def dump(self) -> str:
        """The settings as YAML that --config reads, for a run of its own."""
        kept = {name: v for name, v in asdict(self).items() if name != "resume_from_checkpoint"}
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def check_set(config: Any) -> None:
    """Raises UserError for a None in a dataclass where the field's annotation has none."""
    for f in fields(config):
        if getattr(config, f.name) is None and "None" not in f.type:
            raise UserError(f"{f.name} must have a value, not null; leave it out for its default.")


def check_seed(seed: int) -> None:
    """Raises UserError for a seed that PyTorch's generators would not take."""
    if not 0 <= seed < 2**63:
        raise UserError(f"seed must be between 0 and 2**63 − 1, not {seed}.")


def check_ranges(config: Any, ranges: list[Range]) -> None:
    """Raises UserError, naming the field and its range, for the first value out of range."""
    for says, holds, names in ranges:
        for name in names.split():
            if not _within(getattr(config, name), holds):
                raise UserError(f"{name} must be {says}, not {getattr(config, name)}.")


def _within(value: Any, holds: Callable[[Any], bool]) -> bool:
    """True if the value, or every item of a non-empty list, is finite and holds; None is unset."""
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(v is None or (abs(v) < math.inf and holds(v)) for v in items)


RANGES: list[Range] = [
    ("at least 2", lambda v: v >= 2, "route_steps"),
    ("at least 1", lambda v: v >= 1, "train_batch_size gradient_accumulation_steps "
     "points_per_pass lora_rank max_train_steps checkpointing_steps "
     "checkpoints_total_limit validation_samples logging_steps max_skipped_steps resolution"),
    ("at least 0", lambda v: v >= 0, "validation_steps lr_warmup_steps adam_weight_decay "
     "tangent_warmup_steps tangent_calm_start tangent_calm_steps adv_lambda head_block_ids"),
    ("finite", lambda v: True, "logit_mean logit_mean_discriminator"),
    ("above 0", lambda v: v > 0, "learning_rate adam_epsilon gradient_clip flow_shift "
     "tangent_norm_constant logit_std logit_std_discriminator"),
    ("at least 0 and below 1", lambda v: 0 <= v < 1, "adam_beta1 adam_beta2 ema_decay"),
    ("between 0 and 1", lambda v: 0 <= v <= 1, "tangent_calm_value largest_timestep_prob"),
    ("a list of at least one number, each 0 or more", lambda v: v >= 0, "scm_cfg_scale"),
]  # fmt: skip
LOOKED_AT: list[tuple[str, tuple[Any, ...], str]] = [
    ("jitter", (True,), "jitter_each_prompt"),
    ("fused", (True,), "cuda_graphs"),
    ("method", ("tbcm",), "route_steps flow_shift jitter jitter_each_prompt cuda_graphs"),
    ("method", ("scm", "sana_sprint"), "latents_cache logit_mean logit_std"),
    ("method", ("sana_sprint",), "adv_lambda largest_timestep_prob misaligned_pairs_D "
     "head_block_ids logit_mean_discriminator logit_std_discriminator"),
    ("optimizer", ("adamw", "adamw_8bit"), "adam_epsilon"),
]  # fmt: skip
"""A choice, its values, and the settings that have an effect only with one of these values."""


DEFAULTS = vars(TrainConfig(output_dir=""))


def unused(config: TrainConfig) -> dict[str, str]:
    """Settings off their default that this run ignores, and the choice that is why."""
    found = passed_by(vars(config)).items()
    return {name: why for name, why in found if getattr(config, name) != DEFAULTS[name]}


def passed_by(config: dict[str, Any]) -> dict[str, str]:
    """All settings that a run with these ignores, and the choice that is why."""
    return {
        name: f"{choice} {config[choice]}"
        for choice, values, names in LOOKED_AT
        for name in names.split()
        if config[choice] not in values
    }


PLACES = (
    "output_dir", "pretrained_model_name_or_path", "revision", "prompts", "images", "latents_cache",
    "filter_latent", "validation_prompts",
)  # fmt: skip
"""Settings that say where a run is and what it is made from, which has fingerprints."""
MAY_CHANGE = (
    *PLACES, "fused", "cuda_graphs", "device", "gradient_accumulation_steps",
    "points_per_pass", "gradient_checkpointing", "fsdp", "resume_from_checkpoint",
    "max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "validation_steps",
    "validation_samples", "sample_steps", "logging_steps", "report_to",
    "max_skipped_steps",
)  # fmt: skip
"""Settings that a resumed run may change; any other would make it a different run."""


def changed_fields(old: dict[str, Any], new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, as {name: (old, new)}, without those that neither run looks at."""
    # A setting that did not exist yet had what is now its default.
    old = {**DEFAULTS, **old}
    inert = passed_by(old).keys() & passed_by(vars(new)).keys()
    pairs = {name: (old[name], now) for name, now in vars(new).items() if name not in inert}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def read_config(run_dir: str | Path) -> TrainConfig:
    """The settings of an existing run. Raises UserError if the folder holds no run."""
    path = Path(run_dir) / "config.yaml"
    try:
        return TrainConfig(**yaml.safe_load(path.read_text("utf-8")))
    except (OSError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{run_dir} is not a run of `tbcm train`: {path}: {error}.") from error
