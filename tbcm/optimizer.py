"""The optimiser of a run and its learning rate."""

from __future__ import annotations

import math

import torch

from tbcm.config import TrainConfig


def lr_factor(step: int, config: TrainConfig) -> float:
    """Learning rate at a 0-based step, as a fraction of its peak."""
    warmup, total = config.lr_warmup_steps, config.max_train_steps
    if step < warmup:
        return (step + 1) / warmup
    left = 1 - (step - warmup) / max(total - warmup, 1)
    return {
        "constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left),
        "constant_then_linear": min(1.0, 2 * left),
    }[config.lr_scheduler]  # fmt: skip


def adamw(parameters: list[torch.nn.Parameter], c: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, updated by PyTorch's single fused kernel."""
    return torch.optim.AdamW(
        parameters, c.learning_rate, (c.adam_beta1, c.adam_beta2), c.adam_epsilon,
        c.adam_weight_decay, fused=True,
    )  # fmt: skip


def adamw_8bit(parameters: list[torch.nn.Parameter], c: TrainConfig) -> torch.optim.Optimizer:
    """AdamW whose two moments are stored in 8 bits."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(
        parameters, c.learning_rate, (c.adam_beta1, c.adam_beta2), c.adam_epsilon,
        c.adam_weight_decay,
    )  # fmt: skip


def came(parameters: list[torch.nn.Parameter], c: TrainConfig) -> torch.optim.Optimizer:
    """CAME (arXiv 2307.02047) as in the released settings: β₃ = 0.9999, ε = (1e-30, 1e-16)."""
    from came_pytorch import CAME

    return CAME(
        parameters, c.learning_rate, betas=(c.adam_beta1, c.adam_beta2, 0.9999),
        weight_decay=c.adam_weight_decay,
    )  # fmt: skip


OPTIMIZERS = {"adamw": adamw, "adamw_8bit": adamw_8bit, "came": came}


def make_optimizer(
    parameters: list[torch.nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """The optimiser that the config names, on fp32 weights."""
    return OPTIMIZERS[config.optimizer](parameters, config)
