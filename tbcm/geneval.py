"""`tbcm sample --geneval`: images in the folder layout that GenEval's scorer reads.

For prompt i of its `evaluation_metadata.jsonl`: OUT/00000/metadata.jsonl, the line itself, and
OUT/00000/samples/0000.png and following. Source: GenEval (arXiv 2310.11513) and its code.
"""

from __future__ import annotations

import json
from pathlib import Path

from tbcm import scores
from tbcm.errors import UserError
from tbcm.files import write_whole
from tbcm.progress import tracked
from tbcm.sampling import draw_missing, drawn_by, load_drawing_run


def read_metadata(path: str | Path) -> list[tuple[str, str]]:
    """(line, prompt) of every line. Raises UserError if one is not JSON with a "prompt" string."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        lines = [line for line in text.split("\n") if line.strip()]
        found = [(line, json.loads(line)["prompt"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not like GenEval's evaluation_metadata.jsonl ({error}); give one JSON "
            'object with a "prompt" per line.'
        ) from error
    if not found:
        raise UserError(f"{path} holds no prompt.")
    for line, prompt in found:
        if not isinstance(prompt, str):
            raise UserError(f'"prompt" is no string in {path}: {line}; make it one.')
    return found


def sample_geneval(
    run_dir: str | Path, metadata: str | Path, out: str | Path, steps: int, seed: int, images: int
) -> None:
    """Draw `images` images for each prompt; what is there already is kept.

    Image j of prompt i has the seed `seed` + i · images + j. OUT/settings.json says what it is of.

    Raises:
        UserError: an unreadable run or metadata file, a place that cannot be written, or one that
            holds images of another student or of other settings.
    """
    if images < 1:
        raise UserError(f"images_per_prompt must be at least 1, not {images}.")
    entries, run = read_metadata(metadata), load_drawing_run(run_dir, steps, seed)
    run.teacher.text.check([prompt for _, prompt in entries])
    settings = {
        **drawn_by(run, run_dir), "steps": steps, "seed": seed, "images_per_prompt": images,
        "prompts": scores.prompts_digest([prompt for _, prompt in entries]),
    }  # fmt: skip
    out = Path(out)
    scores.claim(out, settings)  # in a file that the scorer passes by
    shown = tracked(entries, "prompts")
    for i, (line, prompt) in enumerate(shown):
        folder = out / f"{i:05d}"
        write_whole(folder / "metadata.jsonl", f"{line}\n".encode())
        paths = [folder / "samples" / f"{j:04d}.png" for j in range(images)]
        seeds = [seed + i * images + j for j in range(images)]
        draw_missing(run, [prompt] * images, seeds, steps, paths)
