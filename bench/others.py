"""`python -m bench.others`: diffusers models whose forward stays their own, fused against stock.

`bench.model` for PixArt, SD3, Flux and Wan at the widths of their releases, with random weights and
a few layers. Timed are the same passes, after the same check.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import tbcm_kernels
from bench.environment import append, environment
from bench.model import PASSES, Student, disagreement, measure, parse_common, ratios
from tbcm import objective


@dataclass(frozen=True)
class Kind:
    """A model, and what it is asked."""

    make: Callable[[int], nn.Module]
    """From the number of layers."""
    width: int
    text: int
    latent: Callable[[int], tuple[int, ...]]
    """Shape of a sample without its batch, from the side in tokens."""
    pooled: int = 0
    constants: Callable[[int, int], dict[str, Any]] = lambda side, text: {}
    """From side and tokens of text."""


def places(side: int, text: int) -> dict[str, Tensor]:
    """Flux's coordinates of the tokens of image and text."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    return {"img_ids": image.float(), "txt_ids": torch.zeros(text, 3)}


KINDS = {
    "pixart": Kind(
        lambda n: diffusers.PixArtTransformer2DModel(
            num_layers=n, out_channels=4, caption_channels=4096, use_additional_conditions=False
        ),
        1152, 4096, lambda side: (4, 2 * side, 2 * side),
    ),
    "sd3": Kind(
        lambda n: diffusers.SD3Transformer2DModel(
            num_layers=n, num_attention_heads=24, caption_projection_dim=1536,
        ),
        1536, 4096, lambda side: (16, 2 * side, 2 * side), pooled=2048,
    ),
    "flux": Kind(
        lambda n: diffusers.FluxTransformer2DModel(num_layers=n, num_single_layers=n),
        3072, 4096, lambda side: (side * side, 64), pooled=768, constants=places,
    ),
    "wan-1.3b": Kind(
        lambda n: diffusers.WanTransformer3DModel(
            num_layers=n, num_attention_heads=12, ffn_dim=8960
        ),
        1536, 4096, lambda side: (16, 1, 2 * side, 2 * side),
    ),
}  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m bench.others", description=__doc__)
    parser.add_argument("--model", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--layers", type=int, default=1, help="Flux: of either sort")
    parser.add_argument("--side", type=int, default=16, help="of the image, in tokens")
    parser.add_argument("--text", type=int, default=77, help="tokens of a prompt")
    return parse_common(parser, argv, "layers", "side", "text")


def students(kind: Kind, args: argparse.Namespace) -> dict[str, Student]:
    """One model with random weights as diffusers has it, and a copy with its parts fused."""
    torch.manual_seed(0)
    model = kind.make(args.layers).to(args.device)
    for parameter in model.parameters():
        if not parameter.any():  # weights that start at zero would hide what is behind them
            nn.init.normal_(parameter, 0.0, 0.02)
    sample = (args.batch, *kind.latent(args.side))
    condition = {"encoder_hidden_states": torch.randn(args.batch, args.text, kind.text)}
    if kind.pooled:
        condition["pooled_projections"] = torch.randn(args.batch, kind.pooled)
    inputs = [torch.randn(sample), torch.linspace(0.4, 1.2, args.batch), torch.randn(sample)]
    constants = kind.constants(args.side, args.text)
    if model.config.get("guidance_embeds"):
        condition["guidance"] = torch.full((args.batch,), 3.5)
    stock = Student(
        model.forward, objective.two_passes, dict(model.named_parameters()),
        [v.to(args.device) for v in (*inputs, *condition.values())], getattr(torch, args.dtype),
        tuple(condition), {k: v.to(args.device) for k, v in constants.items()},
    )  # fmt: skip
    twin = tbcm_kernels.fuse(copy.deepcopy(model)).model
    fused = replace(
        stock, model_forward=twin.forward, pair=objective.one_pass,
        weights=dict(twin.named_parameters()),
    )  # fmt: skip
    return {"stock": stock, "fused": fused}


def main(argv: list[str] | None = None) -> int:
    """Print the figures and append them to a file; 1 where a model disagrees with its stock."""
    args, wrong = parse(argv), 0
    for name in args.model:
        kind = KINDS[name]
        models = students(kind, args)
        sizes = {k: getattr(args, k) for k in ("layers", "side", "text", "batch", "dtype")}
        row = {"model": name, **sizes}
        if found := disagreement(**models):
            row["faults"], wrong = found, 1
            print(f"The fused {name} is wrong here and is not timed.", *found, sep="\n")
        else:
            stream = args.batch * args.side**2 * kind.width
            figures = measure(models, stream, args)
            row |= {**environment(args.device, models["stock"].dtype), **figures}
            row |= ratios(figures)
            times = "  ".join(
                f"{what} {figures['stock'][what]['us'] / 1e3:.0f} -> "
                f"{figures['fused'][what]['us'] / 1e3:.0f} ms" for what in PASSES
            )  # fmt: skip
            print(f"{name}, {args.layers} layers: {times}, step x{row['step_speedup']:.2f}")
        append(row, args.json)
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
