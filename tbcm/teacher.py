"""`tbcm teacher`: trains the built-in teacher, a small SANA, on the handwritten digits.

Flow matching: x = (1−s) x0 + s z with z ~ N(0, I), velocity v = z − x0, s in [0, 1]; the network is
given s itself as its timestep. x0 is the image in [−1, 1], which is x0/σ_d in TrigFlow's terms.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from tbcm import digits
from tbcm.config import Range, check_ranges, check_seed, check_set
from tbcm.errors import UserError
from tbcm.files import check_new, check_writable, whole_folder
from tbcm.text import TextEncoder

if TYPE_CHECKING:
    from diffusers import SanaTransformer2DModel
    from transformers import PreTrainedTokenizerBase

TEXT_WIDTH = 64
MAX_LENGTH = 12
FLOW_SHIFT = 2.5
RANGES: list[Range] = [
    ("above 0", lambda v: v > 0, "max_train_steps train_batch_size learning_rate max_grad_norm "
     "logit_std num_layers num_attention_heads attention_head_dim"),
    ("at least 0", lambda v: v >= 0, "lr_warmup_steps"),
    ("finite", lambda v: True, "logit_mean"),
    ("between 0 and 1", lambda v: 0 <= v <= 1, "proportion_empty_prompts ema_decay "
     "proportion_uniform"),
]  # fmt: skip


@dataclass
class TeacherConfig:
    """Settings of the teacher's training; the defaults are the shipped teacher's."""

    output_dir: str = "teachers/digits"
    """Folder to write, in diffusers' layout; it must not exist yet."""
    seed: int = 0
    """Seed of the weights, the frozen text encoder and every draw of the training."""
    max_train_steps: int = 4000
    """Number of optimizer steps."""
    train_batch_size: int = 64
    """Images per step."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW; it falls to 0 along a half cosine."""
    lr_warmup_steps: int = 100
    """Steps of linear warm-up."""
    max_grad_norm: float = 1.0
    """Norm to which the gradient is clipped."""
    proportion_empty_prompts: float = 0.1
    """Share of the images trained with the null prompt, so that CFG works."""
    ema_decay: float = 0.999
    """Largest decay of the averaged weights that are saved; after n steps it is (1+n)/(10+n)."""
    logit_mean: float = 0.2
    """Mean of logit s."""
    logit_std: float = 1.2
    """Standard deviation of logit s."""
    proportion_uniform: float = 0.15
    """Share of the times s drawn from U(0, 1) instead, so that both ends are learned."""
    num_layers: int = 4
    """Number of SANA blocks."""
    num_attention_heads: int = 4
    """Heads of the linear self-attention and of the cross-attention."""
    attention_head_dim: int = 32
    """Channels per head; the width is heads × this."""

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range."""
        check_set(self)
        check_seed(self.seed)
        check_ranges(self, RANGES)


def build_tokenizer(prompts: list[str]) -> PreTrainedTokenizerBase:
    """A Gemma tokenizer whose byte-pair merges make one token of every word in the prompts.

    Words it never saw fall back to letters and bytes, so every prompt can be encoded.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GemmaTokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = ["▁", *map(chr, range(ord("!"), ord("~") + 1))]
    trainer = trainers.BpeTrainer(
        special_tokens=special, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    bpe.train_from_iterator((prompt.replace(" ", "▁") for prompt in prompts), trainer)
    vocab = bpe.get_vocab()
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return GemmaTokenizer(
        vocab, [tuple(m) for m in merges], mask_token=None, padding_side="right",
        model_max_length=MAX_LENGTH, add_bos_token=True,
    )  # fmt: skip


def build_text_encoder(seed: int) -> TextEncoder:
    """A frozen Gemma-2 of two layers with random weights: SANA's kind of encoder, made tiny.

    Unit-scale embeddings (initial std 1/8 × Gemma's sqrt(64)) keep the words well apart, which is
    all that the teacher's trained caption projection needs.
    """
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = build_tokenizer(digits.prompts())
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        query_pre_attn_scalar=16, initializer_range=TEXT_WIDTH**-0.5, max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Gemma2Model(config).eval().requires_grad_(False)
    return TextEncoder(tokenizer, model, MAX_LENGTH)


def build_transformer(cfg: TeacherConfig) -> SanaTransformer2DModel:
    """The untrained network; 1.2 million parameters at the default settings."""
    from diffusers import SanaTransformer2DModel

    heads, dim = cfg.num_attention_heads, cfg.attention_head_dim
    torch.manual_seed(cfg.seed)
    return SanaTransformer2DModel(
        in_channels=1, out_channels=1, sample_size=8, patch_size=2, num_layers=cfg.num_layers,
        num_attention_heads=heads, attention_head_dim=dim, num_cross_attention_heads=heads,
        cross_attention_head_dim=dim, cross_attention_dim=heads * dim, caption_channels=TEXT_WIDTH,
        mlp_ratio=2.5, qk_norm="rms_norm_across_heads", guidance_embeds=False,
        # SanaPipeline multiplies its 0..1000 timesteps by this: the network is trained on [0, 1].
        timestep_scale=1e-3,
    )  # fmt: skip


@dataclass
class Batches:
    """Endless training batches, drawn from one generator."""

    cfg: TeacherConfig
    embeds: Tensor
    mask: Tensor
    generator: torch.Generator

    def times(self, n: int) -> Tensor:
        """s [n]: logit-normal, with a share of uniform ones."""
        normal = torch.randn(n, generator=self.generator)
        s = torch.sigmoid(self.cfg.logit_mean + self.cfg.logit_std * normal)
        uniform, pick = torch.rand(2, n, generator=self.generator)
        return torch.where(pick < self.cfg.proportion_uniform, uniform, s)

    def prompt_rows(self, labels: Tensor) -> Tensor:
        """Row of `embeds` for each label: a random phrasing, or the null prompt in the last row."""
        phrasing = torch.randint(len(digits.PHRASINGS), labels.shape, generator=self.generator)
        rows = phrasing * len(digits.WORDS) + labels
        u = torch.rand(labels.shape, generator=self.generator)
        return torch.where(u < self.cfg.proportion_empty_prompts, len(self.embeds) - 1, rows)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yields x0 [B, 1, 8, 8], s [B], embeddings [B, S, D] and mask [B, S]."""
        (images, labels), _ = digits.load_digits()
        n = self.cfg.train_batch_size
        while True:
            pick = torch.randint(len(images), (n,), generator=self.generator)
            rows = self.prompt_rows(labels[pick])
            yield images[pick], self.times(n), self.embeds[rows], self.mask[rows]


def flow_matching_loss(
    net: SanaTransformer2DModel, x0: Tensor, z: Tensor, s: Tensor, text: Tensor, mask: Tensor
) -> Tensor:
    """mean (v(x, s) − (z − x0))² at x = (1−s) x0 + s z."""
    at = s.view(-1, 1, 1, 1)
    x = (1 - at) * x0 + at * z
    v = net(x, encoder_hidden_states=text, timestep=s, encoder_attention_mask=mask).sample
    return torch.nn.functional.mse_loss(v, z - x0)


def train_transformer(cfg: TeacherConfig, text: TextEncoder) -> SanaTransformer2DModel:
    """Trains with AdamW and returns the averaged weights; the seed fixes every number."""
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    net = build_transformer(cfg)
    ema = EMAModel(net.parameters(), decay=cfg.ema_decay)
    optimizer = torch.optim.AdamW(net.parameters(), lr=cfg.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, cfg.lr_warmup_steps, cfg.max_train_steps)
    generator = torch.Generator().manual_seed(cfg.seed)
    embeds, mask = text.encode([*digits.prompts(), ""])
    batches = Batches(cfg, embeds, mask, generator)
    with _progress() as progress:
        task = progress.add_task("", total=cfg.max_train_steps, loss=0.0, rate=0.0)
        for x0, s, *condition in islice(batches, cfg.max_train_steps):
            z = torch.randn(x0.shape, generator=generator)
            loss = flow_matching_loss(net, x0, z, s, *condition)
            if not loss.isfinite():
                raise UserError("The loss is not finite; lower learning_rate.")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            ema.step(net.parameters())
            rate = (progress.tasks[task].speed or 0.0) * cfg.train_batch_size
            progress.update(task, advance=1, loss=loss.item(), rate=rate)
    ema.copy_to(net.parameters())
    return net


def _progress() -> Progress:
    return Progress(
        TextColumn("teacher"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} images/s  ETA"),
        TimeRemainingColumn(),
    )  # fmt: skip


def save_teacher(folder: Path, transformer: SanaTransformer2DModel, text: TextEncoder) -> None:
    """Writes a folder that `load_teacher` and `SanaPipeline` (without a VAE) open.

    The weights are stored in fp16, which halves the folder and does not move the metrics.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
    from diffusers.utils.logging import set_verbosity_error

    set_verbosity_error()  # it would warn that there is no VAE to save
    scheduler = FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
    SanaPipeline(text.tokenizer, text.model, None, transformer.half(), scheduler).save_pretrained(
        folder
    )


def train_teacher(cfg: TeacherConfig) -> Path:
    """Trains the teacher and writes it to `cfg.output_dir`, whole or not at all.

    Raises:
        UserError: the folder exists already, or cannot be written.
    """
    out = Path(cfg.output_dir)
    check_new(out)
    check_writable(out)
    text = build_text_encoder(cfg.seed)
    transformer = train_transformer(cfg, text)
    with whole_folder(out, new=True) as folder:
        save_teacher(folder, transformer, text)
    return out
