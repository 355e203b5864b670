"""tbcm: distil a text-to-image diffusion teacher to one step, from prompts alone."""

__version__ = "0.1.0"
