"""Teachers and students on disc: folders in diffusers' layout, checked before they are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from tbcm.errors import UserError
from tbcm.text import TextEncoder, load_text_encoder

if TYPE_CHECKING:
    from diffusers import SanaTransformer2DModel

Loaded = TypeVar("Loaded")
ASSETS = Path(__file__).parent / "assets"
PARTS = ("model_index.json", "transformer/config.json", "scheduler", "text_encoder", "tokenizer")


@dataclass
class Teacher:
    """A frozen flow-matching teacher in fp32, its text encoder and the shape of its latents."""

    transformer: SanaTransformer2DModel
    text: TextEncoder
    path: Path
    latent_shape: tuple[int, int, int]


def load_teacher(name_or_path: str) -> Teacher:
    """The shipped teacher "digits", or one in a folder in diffusers' layout.

    Raises:
        UserError: no such name or folder; a part is missing or unreadable; the transformer is not a
            SanaTransformer2DModel; it embeds guidance, so it is a student.
    """
    shipped = ASSETS / name_or_path
    folder = shipped if shipped.is_dir() else Path(name_or_path)
    if not folder.is_dir():
        raise UserError(
            f"There is no teacher {name_or_path!r}; give 'digits' or a folder in diffusers' layout."
        )
    missing = [part for part in PARTS if not (folder / part).exists()]
    if missing:
        raise UserError(
            f"The teacher folder {folder} lacks {', '.join(missing)}; save the whole pipeline."
        )
    if _config(folder / "transformer").get("guidance_embeds"):
        raise UserError(f"{folder} embeds guidance, so it is a student; give a teacher without it.")
    transformer = load_transformer(folder / "transformer")
    c = transformer.config
    shape = (c.in_channels, c.sample_size, c.sample_size)
    return Teacher(transformer, _readable(load_text_encoder, folder), folder, shape)


def load_transformer(folder: str | Path) -> SanaTransformer2DModel:
    """A saved teacher or student transformer: fp32, eval mode, gradients off.

    Raises:
        UserError: the folder is missing or unreadable, or holds another kind of model.
    """
    kind = _config(Path(folder)).get("_class_name")
    if kind != "SanaTransformer2DModel":
        raise UserError(f"{folder} holds a {kind}; tbcm needs a SanaTransformer2DModel.")
    from diffusers import SanaTransformer2DModel  # seconds to import: after the checks

    def load(path: Path) -> SanaTransformer2DModel:
        return SanaTransformer2DModel.from_pretrained(path, torch_dtype=torch.float32)

    return _readable(load, Path(folder)).eval().requires_grad_(False)


def _config(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(
            f"Cannot read {folder / 'config.json'}; give a saved model's folder."
        ) from e


def _readable(load: Callable[[Path], Loaded], folder: Path) -> Loaded:
    """load(folder), with whatever the libraries raise on damaged files turned into a sentence."""
    try:
        return load(folder)
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"Cannot load {folder}; save it again ({reason}).") from e
