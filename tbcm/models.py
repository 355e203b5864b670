"""Teachers and students on disc or the Hub in diffusers' layout, checked before they are loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tbcm.config import BUILT_IN
from tbcm.errors import UserError, reason
from tbcm.text import TextEncoder

if TYPE_CHECKING:
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel

    from tbcm.config import TrainConfig

Loaded = TypeVar("Loaded")
ASSETS = Path(__file__).parent / "assets"
NEEDED = (
    "model_index.json", "transformer/config.json", "scheduler/scheduler_config.json",
    "text_encoder/config.json", "tokenizer/tokenizer_config.json",
)  # fmt: skip
PARTS = ("transformer", "text_encoder", "tokenizer", "scheduler", "vae")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
SPRINT = "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers"
MEND = "save it again as safetensors, or give the --variant that its files have"
TIMESTEP_SCALE = 1e-3
"""SanaPipeline's times in [0, 1000] times this are what a SANA-Sprint teacher takes."""


@dataclass
class Teacher:
    """A frozen flow-matching teacher on disc. A part is loaded when it is first asked for.

    `latent_shape` is [C, H, W]; `instruct` puts SANA's instruction before every prompt.
    """

    path: Path
    latent_shape: tuple[int, int, int]
    variant: str | None = None
    instruct: bool = False

    @cached_property
    def transformer(self) -> SanaTransformer2DModel:
        """In fp32, eval mode, gradients off."""
        return load_transformer(self.path / "transformer", self.variant)

    @cached_property
    def text(self) -> TextEncoder:
        """The text encoder in the precision of its file."""
        parts = load_parts(self.path, "text_encoder", "tokenizer", variant=self.variant)
        return TextEncoder.of(parts.tokenizer, parts.text_encoder, self.instruct)

    @cached_property
    def vae(self) -> AutoencoderDC:
        """What encodes and decodes latents, in fp32."""
        parts = load_parts(self.path, "vae", variant=self.variant)
        return parts.vae.float().eval().requires_grad_(False)

    def files(self, *parts: str) -> list[Path]:
        """The files of these parts, in a fixed order."""
        found = (path for part in parts for path in sorted((self.path / part).rglob("*")))
        return [path for path in found if path.is_file()]

    def check_student(self, student: SanaTransformer2DModel, run_dir: str | Path) -> None:
        """Raises UserError unless it is a student, and takes this teacher's latents and text."""
        own, c = _config(self.path / "transformer"), student.config
        alike = all(c[k] == own.get(k) for k in ("in_channels", "caption_channels"))
        if not (c.guidance_embeds and alike):
            raise UserError(
                f"The student in {run_dir} does not fit {self.path}; put back its own student, or "
                "the teacher that config.yaml names."
            )

    def free(self, part: str) -> None:
        """Give back the memory of a part."""
        vars(self).pop(part, None)

    @property
    def has_vae(self) -> bool:
        """True if latents need decoding."""
        return _has_vae(self.path)

    @property
    def drawable(self) -> bool:
        """True if latents can become images: they are grey or colour images, or there is a VAE."""
        return self.has_vae or self.latent_shape[0] in (1, 3)

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """Latents x0/σ_d [n, C, H, W] as images [n, 1 or 3, h, w], about [−1, 1], in fp32."""
        if not self.has_vae:
            return latents
        vae = self.vae.to(latents.device)
        scaled = latents.float() / vae.config.scaling_factor
        # One by one: decoding 1024 x 1024 pixels takes more memory than the student's pass.
        return torch.cat([vae.decode(one, return_dict=False)[0] for one in scaled.split(1)])


def teacher_of(config: TrainConfig) -> Teacher:
    """The teacher that a run's settings name."""
    return load_teacher(
        config.teacher_source, variant=config.variant, revision=config.revision,
        resolution=config.resolution,
        instruct=config.complex_human_instruction and not config.teacher,
    )  # fmt: skip


def load_teacher(
    name_or_path: str,
    *,
    variant: str | None = None,
    revision: str | None = None,
    resolution: int | None = None,
    instruct: bool = False,
) -> Teacher:
    """The shipped teacher "digits", or one on the Hub or in a folder in diffusers' layout.

    Args:
        name_or_path: name, Hub id or folder.
        variant: of the weight files, such as "bf16".
        revision: branch, tag or commit on the Hub.
        resolution: image side in pixels; by default the transformer's `sample_size`.
        instruct: put SANA's instruction before every prompt, as diffusers' pipelines do.

    Raises:
        UserError: no such name, folder or Hub id; a part is missing or unreadable; the teacher does
            not fit the method (see `check_teacher`) or the resolution.
    """
    folder = Path(ASSETS / name_or_path if name_or_path in BUILT_IN else name_or_path)
    if not folder.is_dir():
        folder = fetch(name_or_path, variant, revision)
    elif revision:
        raise UserError(f"{folder} is not on the Hub and has no revision {revision}; leave it out.")
    missing = [part for part in NEEDED if not (folder / part).exists()]
    if missing:
        raise UserError(
            f"The teacher folder {folder} lacks {', '.join(missing)}; save the whole pipeline."
        )
    check_teacher(folder)
    return Teacher(folder, _latent_shape(folder, resolution), variant, instruct)


def fetch(hub_id: str, variant: str | None, revision: str | None) -> Path:
    """The folder that a teacher's files from the Hub are cached in."""
    if not HUB_ID.fullmatch(hub_id):
        raise UserError(
            f"There is no teacher {hub_id!r}; give 'digits', a Hub id or a folder in diffusers' "
            "layout."
        )
    import huggingface_hub
    from diffusers import SanaPipeline

    try:
        # A teacher that does not fit is refused before its gigabytes of weights come.
        found = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns="*.json"
        )
        check_teacher(Path(found))
        return Path(
            SanaPipeline.download(hub_id, variant=variant, revision=revision, use_safetensors=True)
        )
    except UserError:
        raise
    except Exception as error:  # the Hub's client has a dozen types for no network or no such id
        raise UserError(
            f"There is no folder {hub_id}, and neither the Hub nor its cache here gives such a "
            f"teacher ({reason(error)}); without a network, give a folder made elsewhere with "
            f"`hf download {hub_id} --local-dir FOLDER`."
        ) from error


def check_teacher(folder: Path) -> None:
    """Learn from its config files alone whether a teacher can be distilled.

    Raises:
        UserError: it is no SANA; it embeds guidance; it is no flow-matching model; its queries and
            keys have no norm; it takes times in [0, 1000]; or its parts' widths disagree.
    """
    c, text = _config(folder / "transformer"), _config(folder / "text_encoder")
    _check_kind(folder / "transformer", c)
    if c.get("guidance_embeds"):
        raise UserError(f"{folder} embeds guidance, so it is a student; give a teacher without it.")
    _check_flow(folder)
    if c.get("qk_norm") != "rms_norm_across_heads":
        raise UserError(
            f"The teacher {folder} has no RMSNorm of queries and keys (qk_norm is "
            f"{c.get('qk_norm')}), without which the tangent grows out of bounds; the first SANA "
            f"models are such, SANA-Sprint's teachers ({SPRINT}) are not."
        )
    if (scale := c.get("timestep_scale", 1.0)) != TIMESTEP_SCALE:
        raise UserError(
            f"The teacher {folder} takes times in [0, 1000] (timestep_scale is {scale}), but "
            f"SanaSprintPipeline and its students use [0, 1]; give a teacher tuned for that "
            f"({SPRINT}), or, if yours is, say timestep_scale 0.001 in its transformer/config.json."
        )
    vae = _config(folder / "vae") if _has_vae(folder) else {}
    channels = c.get("in_channels")
    for what, own, other in (
        ("out_channels", c.get("out_channels"), channels),
        ("caption_channels", c.get("caption_channels"), text.get("hidden_size")),
        ("in_channels", channels, vae.get("latent_channels", channels)),
    ):
        if own != other:
            raise UserError(
                f"The parts of {folder} do not fit: the transformer's {what} is {own}, but {other} "
                "is needed; save the pipeline again with the parts that it was trained with."
            )


def _check_flow(folder: Path) -> None:
    scheduler = _config(folder / "scheduler", "scheduler_config.json")
    kind, predicts = scheduler.get("_class_name", ""), scheduler.get("prediction_type")
    if not kind.startswith("FlowMatch") and predicts not in ("flow_prediction", "trigflow"):
        raise UserError(
            f"The teacher {folder} is no flow-matching model: its scheduler is {kind} with "
            f"prediction_type {predicts}; give one that predicts the flow."
        )


def _latent_shape(folder: Path, resolution: int | None) -> tuple[int, int, int]:
    """[C, H, W] of the latents of square images of that many pixels a side."""
    c = _config(folder / "transformer")
    vae = _config(folder / "vae") if _has_vae(folder) else {"encoder_block_out_channels": [1]}
    needed = ("patch_size", "sample_size", "encoder_block_out_channels")
    if lacking := [name for name in needed if name not in {**c, **vae}]:
        raise UserError(f"The configs in {folder} lack {', '.join(lacking)}; save them again.")
    blocks = vae["encoder_block_out_channels"]
    pixels = 2 ** (len(blocks) - 1)  # one latent's, by DC-AE's strides
    step = pixels * c["patch_size"]
    resolution = resolution or c["sample_size"] * pixels
    if resolution % step:
        raise UserError(f"resolution {resolution} is not a multiple of {step}, as {folder} needs.")
    return c["in_channels"], resolution // pixels, resolution // pixels


def load_parts(folder: Path, *names: str, variant: str | None = None) -> SanaPipeline:
    """diffusers' pipeline of a folder with these parts and no others."""
    from diffusers import SanaPipeline  # seconds to import: after the checks

    absent: dict[str, Any] = {name: None for name in PARTS if name not in names}
    pipeline = _readable(
        lambda path: SanaPipeline.from_pretrained(
            path, **absent, variant=variant, use_safetensors=True, local_files_only=True
        ),
        folder,
    )
    for name in names:
        if isinstance(part := getattr(pipeline, name), nn.Module):
            _check_weights(folder / name, part)
    return pipeline


def load_transformer(folder: str | Path, variant: str | None = None) -> SanaTransformer2DModel:
    """A saved teacher or student transformer: fp32, eval mode, gradients off.

    Raises:
        UserError: the folder is missing or unreadable, or holds another kind of model, other
            weights than its config.json says, or weights that are not finite.
    """
    folder = Path(folder)
    _check_kind(folder, _config(folder))
    from diffusers import SanaTransformer2DModel

    def load(path: Path) -> tuple[SanaTransformer2DModel, dict[str, list[str]]]:
        return SanaTransformer2DModel.from_pretrained(
            path, torch_dtype=torch.float32, variant=variant, use_safetensors=True,
            local_files_only=True, output_loading_info=True,
        )  # fmt: skip

    net, found = _readable(load, folder)
    if wrong := [*found["missing_keys"], *found["unexpected_keys"]]:
        raise UserError(
            f"{folder} holds other weights than its config.json says ({len(wrong)}, such as "
            f"{wrong[0]}); save the model again."
        )
    if not all(p.isfinite().all() for p in net.parameters()):
        raise UserError(f"{folder} holds weights that are not finite; give another model.")
    return net.eval().requires_grad_(False)


def _check_weights(folder: Path, net: nn.Module) -> None:
    """Raises UserError for weights that no file of the folder has.

    transformers makes them up, diffusers leaves them without storage. A file of a larger model has
    the names of this one's behind a prefix.
    """
    saved: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            saved.update(weights.keys())
    saved.update([name.partition(".")[2] for name in saved])
    if missing := [name for name in net.state_dict() if name not in saved]:
        raise UserError(
            f"{folder} lacks {len(missing)} of its model's weights, such as {missing[0]}; save it "
            "again."
        )


def _check_kind(folder: Path, config: dict) -> None:
    if config.get("_class_name") != "SanaTransformer2DModel":
        raise UserError(
            f"{folder} holds a {config.get('_class_name')}; tbcm needs a SanaTransformer2DModel."
        )


def _has_vae(folder: Path) -> bool:
    return (folder / "vae" / "config.json").exists()


def _config(folder: Path, name: str = "config.json") -> dict:
    try:
        return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"Cannot read {folder / name}; give a saved model's folder.") from e


def _readable(load: Callable[[Path], Loaded], folder: Path) -> Loaded:
    """load(folder), with whatever the libraries raise on damaged files turned into a sentence.

    They draw no bars, and print no error before they raise it.
    """
    from diffusers.utils import logging
    from transformers.utils.logging import disable_progress_bar

    logging.disable_progress_bar()
    disable_progress_bar()
    logging.get_logger("diffusers.models.modeling_utils").setLevel(logging.FATAL)
    try:
        return load(folder)
    except Exception as e:
        mend = "install that" if isinstance(e, ImportError) else MEND
        raise UserError(f"Cannot load {folder} ({reason(e)}); {mend}.") from e
