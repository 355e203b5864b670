"""A student that shares its teacher's weights and learns low-rank adapters (LoRA) through peft.

The weights are in memory once: the student's frozen parameters are the teacher's. Only adapters of
the attention layers and the guidance embedder learn. The fused forward reads weights itself, past
adapters, so such a student runs the stock forward; its teacher may be fused.
"""

from __future__ import annotations

import copy

from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from tbcm.errors import package
from tbcm.student import build_student, student_key

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def build_lora_student(teacher: SanaTransformer2DModel, rank: int) -> SanaTransformer2DModel:
    """A student whose frozen parameters are the teacher's own tensors; it starts as the teacher.

    Raises UserError if peft is not installed or the teacher's weights do not fit.
    """
    peft = package("peft", "lora_rank")
    student = build_student(teacher).requires_grad_(False)
    shared = {student_key(name): weight for name, weight in teacher.named_parameters()}
    student.load_state_dict(shared, strict=False, assign=True)
    student.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    student.time_embed.guidance_embedder.requires_grad_(True)
    return student


def merged(student: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """A copy on the CPU with the adapters added to its weights: an ordinary student."""
    own = copy.deepcopy(student).cpu()
    own.fuse_lora()
    own.unload_lora()
    return own


def learnt(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module without its frozen parameters."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}
