"""Prompts: reading them from a file and encoding them with the teacher's frozen text encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tbcm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SANA_MAX_LENGTH = 300


@dataclass
class TextEncoder:
    """A tokenizer and a frozen text model; prompts are padded to `max_length` tokens."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    max_length: int

    def check(self, prompts: list[str]) -> None:
        """Learn before long work whether all prompts fit.

        Raises:
            UserError: a prompt has more than max_length tokens; it is named.
        """
        for prompt, ids in zip(prompts, self.tokenizer(prompts).input_ids, strict=True):
            if len(ids) > self.max_length:
                raise UserError(
                    f"The prompt {prompt!r} has {len(ids)} tokens, but this teacher's text encoder "
                    f"takes {self.max_length}; shorten it."
                )

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings and mask of each prompt; "" is the null prompt, and has a mask of its own.

        Returns:
            Embeddings [P, S, D] fp32 and mask [P, S] fp32 (1 = token, 0 = padding), S = max_length.

        Raises:
            UserError: a prompt has more than max_length tokens; it is named.
        """
        self.check(prompts)
        batch = self.tokenizer(
            prompts, padding="max_length", max_length=self.max_length, padding_side="right",
            return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        hidden = self.model(batch.input_ids, attention_mask=batch.attention_mask)[0]
        return hidden.float(), batch.attention_mask.float()


def load_text_encoder(folder: Path) -> TextEncoder:
    """The frozen encoder in `text_encoder/` and `tokenizer/` of a folder in diffusers' layout.

    The length is the tokenizer's own `model_max_length` where that is below Sana's 300 tokens.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    model = AutoModel.from_pretrained(folder / "text_encoder", local_files_only=True)
    model.eval().requires_grad_(False)
    return TextEncoder(tokenizer, model, min(tokenizer.model_max_length, SANA_MAX_LENGTH))


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 text file, one per line; blank lines are ignored.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or holds no prompt.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"Cannot read the prompts file {path}: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise UserError(f"The prompts file {path} is not UTF-8 text; save it as UTF-8.") from e
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"The prompts file {path} holds no prompt; write one per line.")
    return prompts
