"""Images and their captions for the baselines: latents, encoded once and kept on disc.

A folder holds `name.jpg` (or .jpeg, .png, .webp) and its caption `name.txt`. A latent's file is
named after the content of its image, of the VAE and the resolution, and written whole, so an
encoding that was stopped continues and several processes share the work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from tbcm import digits
from tbcm.config import TrainConfig
from tbcm.distributed import check_alike
from tbcm.errors import UserError
from tbcm.files import can_make, content, write_whole
from tbcm.models import Teacher
from tbcm.progress import tracked

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Latents(NamedTuple):
    """M images: the row of each one's caption in the prompts [M], and a way to read them.

    load(picks [n]) gives x0/σ_d [n, C, H, W] fp32 on the CPU; `digest` is the data's fingerprint.
    """

    rows: Tensor
    load: Callable[[Tensor], Tensor]
    digest: str


def captioned(folder: str | Path) -> list[tuple[Path, str]]:
    """Every image of a folder, in the order of the names, with its caption.

    Raises:
        UserError: there is no such folder, it holds no image, or an image lacks a caption that can
            be read.
    """
    if not Path(folder).is_dir():
        raise UserError(f"images {folder} is no folder; give the one that holds them.")
    found = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"images {folder} holds no {', '.join(SUFFIXES)} file.")
    return [(path, _caption(path.with_suffix(".txt"))) for path in found]


def _caption(path: Path) -> str:
    try:
        text = " ".join(path.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the caption {path} ({error}); write it as UTF-8.") from error
    if not text:
        raise UserError(f"The caption {path} is empty; write what the image shows.")
    return text


def captions(folder: str | Path) -> list[str]:
    """The different captions of a folder."""
    return sorted({caption for _, caption in captioned(folder)})


def open_latents(
    config: TrainConfig, teacher: Teacher, prompts: list[str], accelerator: Accelerator
) -> Latents:
    """The images of a run; those that are not in the cache are encoded first.

    Raises:
        UserError: there is no folder of images, no VAE for them, or an image that cannot be read;
            or a resolution that the built-in images have not.
    """
    if config.images is None:
        if config.resolution not in (None, 8):
            raise UserError(
                f"The built-in images have 8 pixels a side, not resolution {config.resolution}; "
                "leave it out."
            )
        return built_in(prompts)
    pairs = captioned(config.images)
    files = encoded([path for path, _ in pairs], config, teacher, accelerator)
    rows = {caption: row for row, caption in enumerate(prompts)}
    digest = content(salt="".join(file.name for file in files))

    def load(picks: Tensor) -> Tensor:
        return torch.stack([_latent(files[i]) for i in picks.tolist()])

    return Latents(torch.tensor([rows[caption] for _, caption in pairs]), load, digest)


def _latent(file: Path) -> Tensor:
    try:
        return load_file(file)["latent"]
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"Cannot read {file}; delete it ({error}).") from error


def built_in(prompts: list[str]) -> Latents:
    """The training digits, which are their own latents, asked for in each phrasing in turn."""
    (images, labels), _ = digits.load_digits()
    phrasings = torch.arange(len(labels)) % (len(prompts) // len(digits.WORDS))
    return Latents(phrasings * len(digits.WORDS) + labels, images.__getitem__, "digits")


def encoded(
    images: list[Path], config: TrainConfig, teacher: Teacher, accelerator: Accelerator
) -> list[Path]:
    """The files of the images' latents, all of them there.

    Raises UserError for a teacher without VAE, or a folder that is not written or not shared.
    """
    vae = teacher.path / "vae"
    if not teacher.has_vae:
        raise UserError(
            f"{teacher.path} has no vae/ to encode images with; save the whole pipeline."
        )
    folder = Path(config.latents_cache or Path(config.images) / "tbcm_latents")
    salt = content(vae) + repr(teacher.latent_shape)
    names = [content(image, salt=salt) for image in images]
    check_alike({"images": content(salt="".join(names))})
    files = [folder / f"{name}.safetensors" for name in names]
    unique = dict(zip(files, images, strict=True))
    missing = [(image, file) for file, image in unique.items() if not file.exists()]
    if missing and not can_make(folder):
        raise UserError(f"Cannot write latents to {folder}; give another folder by latents_cache.")
    # Every process has listed what is missing before one of them makes a file.
    accelerator.wait_for_everyone()
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    if mine:
        encode(mine, teacher, accelerator.device)
    accelerator.wait_for_everyone()
    if not unique.keys() <= set(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} lacks latents that another process made; give as latents_cache a folder "
            "that all nodes see."
        )
    return files


@torch.no_grad()
def encode(pairs: list[tuple[Path, Path]], teacher: Teacher, device: torch.device) -> None:
    """Write the latent of each (image, file), of images cut to a square in the middle."""
    from diffusers.image_processor import VaeImageProcessor

    vae = teacher.vae.to(device)
    ratio = vae.spatial_compression_ratio
    processor = VaeImageProcessor(vae_scale_factor=ratio)
    height, width = (ratio * side for side in teacher.latent_shape[1:])
    for path, file in tracked(pairs, "latents"):
        pixels = processor.preprocess(opened(path), height, width, resize_mode="crop").to(device)
        latent = vae.encode(pixels).latent[0] * vae.config.scaling_factor
        write_whole(file, save({"latent": latent.cpu().contiguous()}))
    teacher.free("vae")


def opened(path: Path) -> Image.Image:
    """An image file in RGB: upright, 16-bit greys in 8 bits, on white where it is transparent.

    Raises UserError if it cannot be read, or its pixels are in floating point.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"Cannot read the image {path} ({error}); put it back, or remove it."
        ) from error
    if image.mode == "F":
        raise UserError(f"The image {path} has floating-point pixels; save it in 8 or 16 bits.")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
