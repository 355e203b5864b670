"""`tbcm export`: a run as a complete SanaSprintPipeline folder, which diffusers opens by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tbcm.config import read_config
from tbcm.errors import UserError
from tbcm.files import check_new, whole_folder
from tbcm.models import load_parts, load_transformer, teacher_of
from tbcm.sampling import student_folder
from tbcm.trigflow import SIGMA_DATA

if TYPE_CHECKING:
    from diffusers import SanaSprintPipeline


def export_run(run_dir: str | Path, out: str | Path) -> Path:
    """Write the student with its teacher's VAE, text encoder and tokenizer, whole or not at all.

    Source of the layout: diffusers' SanaSprintPipeline and SCMScheduler.

    Raises:
        UserError: the run has no student, its teacher has no VAE or cannot be read, or `out` is
            there already or cannot be written.
    """
    out = Path(out)
    check_new(out)
    pipeline = assembled(run_dir)
    with whole_folder(out, new=True) as folder:
        pipeline.save_pretrained(folder)
    return out


def assembled(run_dir: str | Path) -> SanaSprintPipeline:
    """The pipeline of a run's student and the other parts of its teacher."""
    config, student = read_config(run_dir), load_transformer(student_folder(run_dir))
    teacher = teacher_of(config)
    teacher.check_student(student, run_dir)
    if not teacher.has_vae:
        raise UserError(
            f"{teacher.path} holds no vae/, so its students cannot become a pipeline; the student "
            f"itself is in {student_folder(run_dir)}."
        )
    from diffusers import SanaSprintPipeline, SCMScheduler

    parts = load_parts(teacher.path, "text_encoder", "tokenizer", "vae", variant=config.variant)
    scheduler = SCMScheduler(prediction_type="trigflow", sigma_data=SIGMA_DATA)
    return SanaSprintPipeline(parts.tokenizer, parts.text_encoder, parts.vae, student, scheduler)
