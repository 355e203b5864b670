"""A student that shares its teacher's weights and learns low-rank adapters (LoRA).

The weights are in memory once: the student's frozen parameters are the teacher's. Only adapters of
the attention layers and the guidance embedder learn. An adapter is a parametrization of a layer's
weight, which the stock and the fused forward read alike; each pass makes W + BA anew, and keeps it
for backward.
"""

from __future__ import annotations

import math

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tbcm.student import build_student, student_key

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class LowRank(nn.Module):
    """W + BA of rank r, for W [O, I]; it starts as W (arXiv 2106.09685)."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def build_lora_student(teacher: SanaTransformer2DModel, rank: int) -> SanaTransformer2DModel:
    """A student whose frozen parameters are the teacher's own tensors; it starts as the teacher.

    Raises UserError if the teacher's weights do not fit.
    """
    student = build_student(teacher).requires_grad_(False)
    shared = {student_key(name): weight for name, weight in teacher.named_parameters()}
    student.load_state_dict(shared, strict=False, assign=True)
    for name, layer in list(student.named_modules()):
        if name.endswith(TARGETS):
            low_rank = LowRank(layer.weight, rank)
            parametrize.register_parametrization(layer, "weight", low_rank)
    student.time_embed.guidance_embedder.requires_grad_(True)
    return student


@torch.no_grad()
def merged(student: nn.Module) -> dict[str, Tensor]:
    """The state of a student, its adapters added to its weights."""
    state = student.state_dict()
    for name, layer in student.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            for part in [key for key in state if key.startswith(f"{name}.parametrizations.")]:
                del state[part]
            state[f"{name}.weight"] = layer.weight
    return state


def learnt(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module without its frozen parameters."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}
