"""Prompts: reading them from a file and encoding them with the teacher's frozen text encoder."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tbcm import digits
from tbcm.config import TrainConfig
from tbcm.errors import UserError, short

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SANA_MAX_LENGTH = 300


@dataclass
class TextEncoder:
    """A tokenizer and a frozen text model; prompts are padded to `max_length` tokens.

    `instruction` holds the lines that stand before every prompt (but not the null prompt).
    """

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    max_length: int
    instruction: list[str] | None = None

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, instruct: bool = False
    ) -> TextEncoder:
        """The encoder as Sana uses it.

        The length is the tokenizer's own `model_max_length` where that is below Sana's 300 tokens;
        `instruct` takes the instruction that diffusers' pipeline takes.

        Raises:
            UserError: the instruction alone is longer than the tokenizer's `model_max_length`.
        """
        length = min(tokenizer.model_max_length, SANA_MAX_LENGTH)
        model.eval().requires_grad_(False)
        encoder = cls(tokenizer, model, length, sana_instruction() if instruct else None)
        if instruct and (tokens := encoder.instruction_length()) > tokenizer.model_max_length:
            raise UserError(
                f"SANA's instruction before every prompt has {tokens} tokens, and this teacher's "
                f"text encoder takes {tokenizer.model_max_length}: it was trained without; pass "
                "--complex_human_instruction false."
            )
        return encoder

    def instruction_length(self) -> int:
        """Tokens of the instruction."""
        return len(self.tokenizer.encode("\n".join(self.instruction), verbose=False))

    def check(self, prompts: list[str]) -> None:
        """Learn before long work whether all prompts fit.

        Raises:
            UserError: a prompt has more than max_length tokens; it is named.
        """
        before, room = "", self.max_length
        if self.instruction:
            # The pipeline keeps the first token and the last max_length − 1, one of them the
            # instruction's.
            before = "\n".join(self.instruction)
            room += self.instruction_length() - 2
        texts = [before + prompt.lower().strip() for prompt in prompts]
        tokens = self.tokenizer(texts, verbose=False).input_ids
        for prompt, ids in zip(prompts, tokens, strict=True):
            if len(ids) > room:
                length = len(ids) - room + self.max_length
                raise UserError(
                    f"The prompt {short(prompt, 80)!r} has {length} tokens, but this teacher's "
                    f"text encoder takes {self.max_length}; shorten it."
                )

    @torch.no_grad()
    def encode(self, prompts: list[str], instruct: bool = True) -> tuple[Tensor, Tensor]:
        """Embeddings and mask of each prompt, as diffusers' pipeline makes them (in lower case).

        Args:
            prompts: P texts; "" is the null prompt, and has a mask of its own.
            instruct: put the encoder's instruction, if it has one, before them.

        Returns:
            Embeddings [P, S, D] fp32 and mask [P, S], true for a token, S = max_length,
            where the model is.

        Raises:
            UserError: a prompt has more than max_length tokens; it is named.
        """
        from diffusers import SanaSprintPipeline

        self.check(prompts)
        pipeline = SanaSprintPipeline(self.tokenizer, self.model, None, None, None)
        embeds, mask = pipeline.encode_prompt(
            prompts, device=self.model.device, max_sequence_length=self.max_length,
            complex_human_instruction=self.instruction if instruct else None,
        )  # fmt: skip
        return embeds.float(), mask.bool()

    def null(self) -> tuple[Tensor, Tensor]:
        """`encode` of the null prompt, which takes no instruction."""
        return self.encode([""], instruct=False)


def sana_instruction() -> list[str]:
    """The "complex human instruction" that SanaSprintPipeline puts before prompts by default."""
    from diffusers import SanaSprintPipeline

    parameters = inspect.signature(SanaSprintPipeline.__call__).parameters
    return parameters["complex_human_instruction"].default


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 text file, one per line; blank lines are ignored.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or holds no prompt.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"Cannot read the prompts file {path}: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise UserError(f"The prompts file {path} is not UTF-8 text; save it as UTF-8.") from e
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"The prompts file {path} holds no prompt; write one per line.")
    return prompts


def load_prompts(config: TrainConfig) -> list[str]:
    """The prompts of a run: its file's, its images' captions, or the built-in teacher's own.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    from tbcm import images

    if config.images:
        return images.captions(config.images)
    if config.prompts:
        return read_prompts(config.prompts)
    if config.teacher == "digits":
        return digits.prompts()
    if config.method != "tbcm":
        raise UserError(f"{config.method} learns from images; give --images FOLDER.")
    raise UserError("This teacher has no prompts of its own; give --prompts FILE, one per line.")
