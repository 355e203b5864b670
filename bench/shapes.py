"""Shapes of real models in training, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of the residual stream [B, N, C] of a model, of its attention and of its latents."""

    batch: int
    tokens: int
    width: int
    heads: int
    text: int = 0
    """Keys of cross-attention on text, whose tangent is zero; 0 for self-attention."""
    latent: tuple[int, int, int] = (4, 64, 64)
    """Channels, height and width of a latent."""
    sana: bool = False
    """SANA's blocks: linear attention with heads of 32, a gated convolution on a square."""


SHAPES = {
    "digits": Shape(56, 16, 128, 4, 8, (1, 8, 8), sana=True),
    "sana-0.6b-512": Shape(16, 256, 1152, 16, 300, (32, 16, 16), sana=True),
    "sana-0.6b-1024": Shape(16, 1024, 1152, 16, 300, (32, 32, 32), sana=True),
    "sana-1.6b-512": Shape(16, 256, 2240, 20, 300, (32, 16, 16), sana=True),
    "sana-1.6b-1024": Shape(16, 1024, 2240, 20, 300, (32, 32, 32), sana=True),
    "dit-b-512": Shape(1, 1024, 768, 12),
    "dit-xl-512": Shape(1, 1024, 1152, 16),
    "pixart-1024": Shape(1, 4096, 1152, 16, latent=(4, 128, 128)),
    "sd3-1024": Shape(1, 4096, 1536, 24, latent=(16, 128, 128)),
    "flux-1024": Shape(1, 4096, 3072, 24, latent=(16, 128, 128)),
    "wan-1.3b-480p": Shape(1, 32760, 1536, 12, latent=(16, 21 * 60, 104)),
}
"""DiT-XL/2 and PixArt have heads of 72; Wan's latent is 21 frames of 60 × 104."""
