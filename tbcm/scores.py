"""`tbcm eval --images`: FID and CLIP score of a student on a folder like MJHQ-30K.

Protocol (SANA-Sprint, TBCM): one image for each of the folder's prompts. FID is the Fréchet
distance of Inception features between them and the folder's own images, CLIP score the mean of
100 · max(cos, 0) between CLIP's embeddings of image and prompt. torchmetrics and transformers
compute them with the user's weights; figures compare with those of papers if the weights do.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from tbcm.distiller import digest
from tbcm.errors import UserError
from tbcm.files import check_writable, content, write_whole
from tbcm.images import SUFFIXES, opened
from tbcm.progress import tracked
from tbcm.sampling import Run, draw_missing, drawn_by, load_drawing_run

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor

CLIP = "openai/clip-vit-large-patch14"
INCEPTION = "inception-2015-12-05.pt (TorchScript, of NVIDIA's stylegan2-ada-pytorch)"
BATCH, CHUNK = 16, 1024
"""Images at once, and between two records of progress."""


@dataclass
class Item:
    """A prompt and the real image that belongs to it."""

    name: str
    prompt: str
    image: Path


class Inception(nn.Module):
    """A TorchScript file that maps uint8 images [n, 3, H, W] of any size to features [n, d]."""

    def __init__(self, net: torch.jit.ScriptModule):
        super().__init__()
        self.net = net
        names = [argument.name for argument in net.forward.schema.arguments]
        self.options = {"return_features": True} if "return_features" in names else {}

    def forward(self, images: Tensor) -> Tensor:
        """Features [n, d]."""
        return self.net(images, **self.options)


@dataclass
class Judges:
    """The running FID and the CLIP scores so far."""

    fid: FrechetInceptionDistance
    clip: CLIPModel
    processor: CLIPProcessor
    scores: list[float]

    @torch.no_grad()
    def see(self, made: list[Image.Image], real: list[Image.Image], prompts: list[str]) -> None:
        """Take in a batch."""
        device = self.clip.device
        self.fid.update(pixels(made).to(device), real=False)
        self.fid.update(pixels(real).to(device), real=True)
        inputs = self.processor(
            text=prompts, images=made, return_tensors="pt", padding=True, truncation=True
        ).to(device)
        out = self.clip(**inputs)
        cosine = torch.cosine_similarity(out.image_embeds, out.text_embeds)
        self.scores += (100 * cosine.clamp(min=0)).tolist()

    def state(self) -> dict[str, Any]:
        """What a later call continues from: the sums, without the networks' weights."""
        sums = {k: v for k, v in self.fid.state_dict().items() if not k.startswith("inception.")}
        return {"fid": sums, "scores": self.scores}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.fid.load_state_dict(state["fid"], strict=False)
        self.fid.to(self.clip.device)
        self.fid.orig_dtype = torch.float32  # compute() wants it, and only update() sets it
        self.scores = state["scores"]


def pixels(images: list[Image.Image]) -> Tensor:
    """Images of one size as uint8 [n, 3, H, W]."""
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise UserError(f"The images differ in size ({sorted(sizes)}); bring them to one size.")
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images])


def read_items(folder: str | Path) -> list[Item]:
    """The prompts of `meta_data.json` ({id: {"prompt": ...}}) and the images <id>.jpg, .png etc.

    Images may lie in subfolders, as MJHQ-30K's lie in one for each category.

    Raises:
        UserError: the file is missing or unreadable, or a prompt is no string, or has no image or
            several.
    """
    file = Path(folder) / "meta_data.json"
    try:
        prompts = {
            name: entry["prompt"] for name, entry in json.loads(file.read_text("utf-8-sig")).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is not like MJHQ-30K: cannot read {file} ({error}).") from error
    for name, prompt in prompts.items():
        if not isinstance(prompt, str):
            raise UserError(f"The prompt of {name} in {file} is {prompt!r}; make it a string.")
    images: dict[str, Path] = {}
    for path in Path(folder).rglob("*"):
        if path.suffix.lower() not in SUFFIXES or path.stem not in prompts:
            continue
        if path.stem in images:
            raise UserError(
                f"{folder} holds two images of {path.stem}, {images[path.stem]} and {path}; leave "
                "the real one alone there."
            )
        images[path.stem] = path
    missing = [name for name in prompts if name not in images]
    if missing:
        raise UserError(
            f"{folder} lacks the images of {len(missing)} of {len(prompts)} prompts, such as "
            f"{missing[0]}.jpg; unpack mjhq30k_imgs.zip there."
        )
    return [Item(name, prompt, images[name]) for name, prompt in prompts.items()]


def load_judges(inception: str | None, clip: str, device: torch.device) -> Judges:
    """Inception and CLIP. Raises one UserError that names all weights that cannot be read."""
    from transformers import CLIPModel, CLIPProcessor

    missing = []
    try:
        net = torch.jit.load(inception or "", map_location="cpu").eval()
    except (OSError, ValueError, RuntimeError):
        missing.append(f"{INCEPTION} at --inception {inception or 'FILE'}")
    try:
        model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    except Exception:  # the Hub's client has a dozen types for what is not there
        missing.append(f"the CLIP model {clip} at --clip FOLDER, or on the Hub")
    if missing:
        raise UserError(f"Weights are missing or damaged: {'; '.join(missing)}.")
    fid = FrechetInceptionDistance(feature=Inception(net)).to(device)
    fid.persistent(True)
    return Judges(fid, model.to(device).eval(), processor, [])


def score_run(
    run_dir: str | Path,
    images: str | Path,
    out: str | Path,
    json_path: str | Path,
    *,
    inception: str | None,
    clip: str = CLIP,
    steps: int = 1,
    samples: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Draw an image for every prompt of a folder, score them, and write the figures as JSON.

    Args:
        run_dir: a run of `tbcm train`.
        images: the folder with prompts and real images; see `read_items`.
        out: folder for the drawn images and the progress; a later call continues there.
        json_path: file for the figures.
        inception: TorchScript file of the features; see `Inception`.
        clip: folder or Hub id of a CLIPModel with its processor.
        steps: of the student, 1, 2 or 4.
        samples: prompts to take, from the first; None for all.
        seed: of the noise of the first image; image i has seed + i.

    Returns:
        {"fid", "clip_score", "images", "steps", "seed", ...}: the figures and what they are of.

    Raises:
        UserError: anything is missing, unreadable or unwritable, or `out` is of other settings.
    """
    check_writable(json_path)
    if Path(out).resolve().is_relative_to(Path(images).resolve()):
        raise UserError(
            f"--out {out} lies inside --images {images}, where drawn images would be taken for "
            "real ones; give another folder."
        )
    items = read_items(images)[:samples]
    if len(items) < 2 or (samples is not None and samples < 2):
        raise UserError("FID needs at least two images; add some, or raise --samples.")
    run = load_drawing_run(run_dir, steps, seed)
    run.teacher.text.check([item.prompt for item in items])
    judges = load_judges(inception, clip, run.device)
    settings = {
        **drawn_by(run, run_dir), "images_of": str(Path(images).resolve()),
        "steps": steps, "seed": seed, "inception": content(Path(inception)), "clip_model": clip,
        "clip_weights": digest(p.reshape(-1) for p in judges.clip.parameters()),
        "real_images": content(*(item.image for item in items)),
        "images": len(items), "prompts": prompts_digest([item.prompt for item in items]),
    }  # fmt: skip
    out = Path(out)
    claim(out, settings)
    continue_from(out, judges)
    starts = range(len(judges.scores), len(items), BATCH)
    for start in tracked(starts, "images"):
        batch = items[start : start + BATCH]
        made = drawn(run, batch, [seed + start + i for i in range(len(batch))], steps, out)
        judges.see(made, [opened(item.image) for item in batch], [item.prompt for item in batch])
        if (start + BATCH) % CHUNK == 0:
            save_progress(out, judges)
    save_progress(out, judges)
    report = {
        "fid": judges.fid.compute().item(), "clip_score": sum(judges.scores) / len(judges.scores),
        **settings,
    }  # fmt: skip
    write_whole(json_path, (json.dumps(report, indent=2) + "\n").encode())
    return report


def drawn(
    run: Run, batch: list[Item], seeds: list[int], steps: int, out: Path
) -> list[Image.Image]:
    """The images of a batch, as their PNGs under `out` have them; missing ones are drawn."""
    paths = [out / "images" / f"{item.name}.png" for item in batch]
    draw_missing(run, [item.prompt for item in batch], seeds, steps, paths)
    return [opened(path) for path in paths]


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Note what `out` is of. Raises UserError if it is of something else."""
    file = out / "settings.json"
    if not file.exists():
        if next(out.glob("*/**/*.png"), None):
            raise UserError(f"{out} holds images without a {file.name}; give another --out.")
        write_whole(file, json.dumps(settings, indent=2).encode())
    try:
        before = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"Cannot read {file} ({error}); give another --out.") from error
    for name, value in settings.items():
        if name not in before:
            raise UserError(f"{file} does not say {name}, as older ones; give another --out.")
        if before[name] != value:
            raise UserError(
                f"{out} was begun with {name} = {before[name]}, not {value}; give another --out."
            )


def continue_from(out: Path, judges: Judges) -> None:
    """Load the progress under `out`, if there is any."""
    file = out / "progress.pt"
    if not file.exists():
        return
    try:
        judges.load_state(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged archive raises half a dozen types
        raise UserError(
            f"Cannot read {file}; delete it, and the images are scored anew."
        ) from error


def save_progress(out: Path, judges: Judges) -> None:
    """Write the progress under `out`."""
    buffer = io.BytesIO()
    torch.save(judges.state(), buffer)
    write_whole(out / "progress.pt", buffer.getvalue())


def prompts_digest(prompts: list[str]) -> str:
    """SHA-256 of prompts, in their order."""
    return content(salt=json.dumps(prompts))
