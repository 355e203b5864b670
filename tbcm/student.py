"""The student: the teacher's transformer with a guidance embedding that starts silent."""

from __future__ import annotations

import re

from diffusers import SanaTransformer2DModel
from torch import nn

from tbcm.errors import UserError

GUIDANCE_SCALE = 0.1
"""The student's guidance embedding is given 0.1·s (SANA-Sprint)."""


def build_student(teacher: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """A copy of the teacher in fp32, with `guidance_embeds`, that computes the same function.

    Raises UserError if the teacher's weights do not fit (it has a guidance embedding already).
    """
    changes = {"guidance_embeds": True, "guidance_embeds_scale": GUIDANCE_SCALE}
    # Without the private keys: by `_use_default_values` from_config would take its own defaults for
    # what the teacher's file leaves out.
    settings = {name: v for name, v in teacher.config.items() if not name.startswith("_")}
    student = SanaTransformer2DModel.from_config({**settings, **changes})
    state = {student_key(name): weight for name, weight in teacher.state_dict().items()}
    missing, unexpected = student.load_state_dict(state, strict=False)
    if unexpected or any(not name.startswith("time_embed.guidance_embedder") for name in missing):
        raise UserError(f"The teacher's weights do not fit a student: {[*missing, *unexpected]}.")
    nn.init.zeros_(student.time_embed.guidance_embedder.linear_2.weight)
    nn.init.zeros_(student.time_embed.guidance_embedder.linear_2.bias)
    return student.to(teacher.device)


def student_key(name: str) -> str:
    """A teacher's parameter name as the student has it."""
    return re.sub(r"^time_embed\.emb\.timestep_embedder\.", "time_embed.timestep_embedder.", name)
