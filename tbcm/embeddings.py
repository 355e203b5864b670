"""Prompt embeddings: encoded once, kept on disc, read by memory map while training.

A cache is a folder named after the SHA-256 of all that its content depends on: the prompts, the
instruction before them, the files of tokenizer and text encoder. It holds safetensors files of
CHUNK prompts each: the mask [P, S] and the embeddings of the T tokens under it [T, D], in the
encoder's precision. A file is there whole or not at all, and one process at a time makes it: a
killed run continues where it stopped, and several processes share the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tbcm.errors import UserError, reason
from tbcm.files import content, write_whole
from tbcm.models import Teacher
from tbcm.progress import tracked
from tbcm.rollout import Text
from tbcm.text import SANA_MAX_LENGTH, TextEncoder, sana_instruction

CHUNK, BATCH = 256, 16
NULL = "null.safetensors"


@dataclass
class PromptEmbeddings:
    """The encoded prompts of a file, in a folder."""

    folder: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def text(self, rows: list[int]) -> Text:
        """The prompts of these rows of the prompts file: embeddings [P, S, D] fp32, mask [P, S].

        A mask of truths, not numbers, tells the fused attention that padding costs nothing.
        """
        found = [self._read(chunk_name(row // CHUNK), row % CHUNK) for row in rows]
        return Text(*map(torch.cat, zip(*found, strict=True)))

    def null(self) -> Text:
        """The null prompt [1, S, D] and its own mask [1, S]."""
        return self._read(NULL, 0)

    def _read(self, name: str, row: int) -> Text:
        """Row [1, S, D] of a file. Padding is zeros: what is masked has no weight in attention."""
        try:
            file, masks, starts = opened(self.folder / name)
            tokens = file.get_slice("tokens")[starts[row] : starts[row + 1]].float()
        except (OSError, SafetensorError) as error:
            raise UserError(f"Cannot read {self.folder / name}; delete it ({error}).") from error
        mask = masks[row : row + 1]
        embeds = tokens.new_zeros(*mask.shape, tokens.shape[1])
        embeds[mask] = tokens
        return Text(embeds, mask)


@lru_cache(maxsize=64)
def opened(path: Path) -> tuple[safe_open, Tensor, list[int]]:
    """A file of the cache, kept open: reader, masks, and the first token of each prompt."""
    file = safe_open(path, "pt")
    masks = file.get_tensor("mask")
    return file, masks, [0, *masks.sum(1).cumsum(0).tolist()]


def prompt_embeddings(
    teacher: Teacher, prompts: list[str], device: torch.device | str = "cpu"
) -> PromptEmbeddings:
    """The prompts' embeddings, of which only what the cache lacks is encoded.

    For that alone the text encoder is loaded, on the device, and freed again. The cache is among
    the Hugging Face assets: in HF_ASSETS_CACHE, by default ~/.cache/huggingface/assets.

    Raises:
        UserError: a prompt has too many tokens, the text encoder cannot be read, or the cache
            cannot be made.
    """
    name = fingerprint(teacher, prompts)
    try:
        folder = cached_assets_path("tbcm", namespace="prompts", subfolder=name)
    except (OSError, ValueError) as error:
        raise UserError(f"{reason(error)}; give another folder by HF_ASSETS_CACHE.") from error
    chunks: dict[str, list[str] | None] = {NULL: None}
    for i in range(0, len(prompts), CHUNK):
        chunks[chunk_name(i // CHUNK)] = prompts[i : i + CHUNK]
    missing = {name: chunk for name, chunk in chunks.items() if not (folder / name).exists()}
    if missing:
        teacher.text.check(prompts)
        teacher.text.model.to(device)
        write_missing(teacher.text, missing, folder)
    teacher.free("text")
    return PromptEmbeddings(folder, len(prompts))


def write_missing(text: TextEncoder, missing: dict[str, list[str] | None], folder: Path) -> None:
    """Make the files that no other process makes meanwhile, and wait for those."""
    count = sum(len(chunk) for chunk in missing.values() if chunk)
    print(f"Encoding {count} prompts, to be kept in {folder} (HF_ASSETS_CACHE).")
    # First pass: leave out what another process is making. Second: wait for its lock, and make the
    # file if that process has died.
    for patience in (0, -1):
        jobs = tracked(list(missing.items()), "prompts")
        for name, chunk in jobs:
            try:
                held = FileLock(folder / f"{name}.lock", timeout=patience).acquire()
            except Timeout:
                continue
            except OSError as error:
                raise UserError(
                    f"Cannot write {folder}: {error.strerror}; give another by HF_ASSETS_CACHE."
                ) from error
            with held:
                if not (folder / name).exists():
                    write_whole(folder / name, encoded(text, chunk))


def encoded(text: TextEncoder, prompts: list[str] | None) -> bytes:
    """The content of a cache file; None stands for the null prompt."""
    if prompts is None:
        embeds, mask = text.null()
    else:
        batches = [text.encode(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
        embeds, mask = map(torch.cat, zip(*batches, strict=True))
    return save({"tokens": embeds[mask].to(text.model.dtype).cpu(), "mask": mask.cpu()})


def chunk_name(chunk: int) -> str:
    """The file of prompts chunk·CHUNK and following."""
    return f"{chunk:06d}.safetensors"


def fingerprint(teacher: Teacher, prompts: list[str]) -> str:
    """SHA-256 of all that the embeddings depend on."""
    instruction = sana_instruction() if teacher.instruct else None
    files = teacher.files("tokenizer", "text_encoder")
    names = [path.name for path in files]
    rest = (SANA_MAX_LENGTH, instruction, teacher.variant, prompts, names)
    return content(*files, salt=repr(rest))
