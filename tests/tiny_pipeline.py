"""A complete SANA-Sprint teacher in miniature, with random weights, in the Hub's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import Gemma2Config, Gemma2Model

from tbcm.config import TrainConfig
from tbcm.teacher import build_tokenizer
from tbcm.train import train

PROMPTS = ["a cat on a mat", "a dog in the fog", "two owls", "a red house by the sea"]
WIDTH = 16
VAE_STAGES = (4, 8, 8)
"""Three stages halve the image twice: 4 pixels to a latent's side."""
QUICK = {
    "train_batch_size": 2, "route_steps": 3, "max_train_steps": 3, "lr_warmup_steps": 0,
    "learning_rate": 1e-2, "tangent_warmup_steps": 0, "validation_samples": 3,
}  # fmt: skip


def save_teacher(
    folder: Path, variant: str | None = None, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Save the pipeline; `changes` are to the transformer's config."""
    torch.manual_seed(0)
    settings = {
        "in_channels": 4, "out_channels": 4, "sample_size": 4, "num_layers": 2,
        "num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": WIDTH,
        "qk_norm": "rms_norm_across_heads", "timestep_scale": 1e-3,
    }  # fmt: skip
    transformer = SanaTransformer2DModel(**{**settings, **changes})
    tokenizer = build_tokenizer(PROMPTS)
    tokenizer.model_max_length = 4096
    pipeline = SanaPipeline(
        tokenizer, text_encoder(tokenizer), vae(), transformer, FlowMatchEulerDiscreteScheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(dtype).save_pretrained(folder, variant=variant)
    return folder


def text_encoder(tokenizer: Any) -> Gemma2Model:
    """SANA's kind of text encoder."""
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8,
        max_position_embeddings=4096, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return Gemma2Model(config)


def vae() -> AutoencoderDC:
    """SANA's kind of autoencoder."""
    return AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=4,
        encoder_block_out_channels=VAE_STAGES, decoder_block_out_channels=VAE_STAGES,
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.41,
    )  # fmt: skip


def distil(teacher: Path, folder: Path, **changes: Any) -> Path:
    """A short fused run on a saved teacher, at 32 x 32 pixels; its folder."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    config = TrainConfig(
        str(folder / "run"), pretrained_model_name_or_path=str(teacher), fused=True, resolution=32,
        prompts=str(folder / "prompts.txt"), **QUICK | changes,
    )  # fmt: skip
    train(config)
    return folder / "run"
