"""The cases that every implementation of an op is checked on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each argument, in the order of the op's arguments."""
ACTIVATIONS = {"x", "h", "a", "q", "k", "v"}


@dataclass
class Case:
    """Inputs of one call in the order of the op's arguments; None where an input is absent."""

    op: str
    name: str
    arguments: list[str]
    primals: list[Tensor | None]
    tangents: list[Tensor | None]
    options: dict[str, Any]


def cases(op: str, dtype: torch.dtype, device: str = "cpu", few: bool = False) -> Iterator[Case]:
    """All cases of one op; `few` leaves out most shapes, for slow implementations."""
    torch.manual_seed(0)
    if op == "attention":
        for name, plan in _attention_plans(few):
            yield attention_case(name, dtype, device, **plan)
        return
    if op in OBJECTIVE:
        yield from _objective_cases(op, dtype, device, few)
        return
    for name, layout, options, change in _plans(op, dtype, device, few):
        yield _draw(op, name, layout, options, device, **change)


def _plans(
    op: str, dtype: torch.dtype, device: str, few: bool
) -> Iterator[tuple[str, Layout, dict, dict]]:
    shapes, layout_of, _ = OPS[op]
    for shape in shapes[2:5] + shapes[-1:] if few else shapes:
        layout, options = layout_of(shape, dtype)
        yield f"shape {shape}", layout, options, {}
    yield from _variants(op, shapes[1], dtype)
    if op == "linear_attention" and not few:
        for shape in HEADS_OF_32 + (MANY_TOKENS if device == "cuda" else []):
            yield f"shape {shape}", *layout_of(shape, dtype), {}
        for name, *plan in _variants(op, HEADS_OF_32[0], dtype):
            yield f"{name}, heads of 32", *plan
        layout, options = layout_of(HEADS_OF_32[0], dtype)
        yield "eps 0", layout, options | {"eps": 0.0}, {}


def _variants(
    op: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[tuple[str, Layout, dict, dict]]:
    _, layout_of, subsets = OPS[op]
    layout, options = layout_of(shape, dtype)
    for factor in (1e-2, 1e2):
        yield f"tangents at {factor}", layout, options, {"tangent_scale": factor}
    yield "values at 30", layout, options, {"value_scale": 30.0}
    yield "slices of larger buffers", layout, options, {"order": "sliced"}
    yield "tangents of none", layout, options, {"moving": ()}
    for moving in _movable(op, layout):
        yield f"tangent of {moving}", layout, options, {"moving": (moving,)}
    yield from subsets(layout, options, dtype)


def _movable(op: str, layout: Layout) -> list[str]:
    """The arguments that may have a tangent.

    linear_attention takes none of its norms' weights, nor do conv_glu's kernels of its weight and
    bias; its reference does, which alone takes fp64.
    """
    fixed = {
        "linear_attention": ("q_weight", "k_weight"),
        "conv_glu": () if layout.get("a", (0, 0))[1] == torch.float64 else ("weight", "bias"),
    }
    return [n for n in layout if n not in fixed.get(op, ())]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _adaln_layout(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Layout, dict]:
    small = ((shape[0], 1, shape[2]), _wide(dtype))
    layout = {"x": (shape, dtype), "h": (shape, dtype)}
    return layout | {"gate": small, "scale": small, "shift": small}, {"eps": 1e-6}


def _adaln_subsets(
    layout: Layout, options: dict, dtype: torch.dtype
) -> Iterator[tuple[str, Layout, dict, dict]]:
    shape = layout["x"][0]
    variants = {"per token": (shape, _wide(dtype)), "shared": (shape[-1:], _wide(dtype))}
    variants["narrow"] = ((shape[0], 1, shape[2]), dtype)
    for name, small in variants.items():
        changed = layout | dict.fromkeys(("gate", "scale", "shift"), small)
        yield f"{name} modulation", changed, options, {}
    mixed = {"gate": (shape, _wide(dtype)), "shift": (shape[-1:], _wide(dtype))}
    yield "mixed modulation", layout | mixed, options, {}
    for names in ("x", "x h", "x h gate", "x scale shift", "x h scale shift", "x scale", "x shift"):
        change = {"present": names.split(), "moving": names.split()}
        yield f"inputs {names}", layout, options, change
    for names in ("scale shift", "x h", "gate scale shift"):
        yield f"tangents of {names}", layout, options, {"moving": names.split()}


def _rms_norm_layout(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Layout, dict]:
    return {"x": (shape, dtype), "weight": (shape[-1:], _wide(dtype))}, {"eps": 1e-5}


def _rms_norm_subsets(
    layout: Layout, options: dict, dtype: torch.dtype
) -> Iterator[tuple[str, Layout, dict, dict]]:
    yield "no weight", layout, options, {"present": ["x"], "moving": ["x"]}


def _conv_glu_layout(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Layout, dict]:
    batch, height, width, channels = shape
    layout = {
        "a": ((batch, height * width, 2 * channels), dtype),
        "weight": ((2 * channels, 1, 3, 3), _wide(dtype)),
        "bias": ((2 * channels,), _wide(dtype)),
    }
    return layout, {"height": height, "width": width}


def _conv_glu_subsets(
    layout: Layout, options: dict, dtype: torch.dtype
) -> Iterator[tuple[str, Layout, dict, dict]]:
    change = {"present": ["a", "weight"], "moving": ["a"]}
    yield "no bias", layout, options, change


def _linear_attention_layout(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Layout, dict]:
    batch, heads, queries, keys, width, value_width = shape
    layout = {
        "q": ((batch, heads, queries, width), dtype),
        "k": ((batch, heads, keys, width), dtype),
        "v": ((batch, heads, keys, value_width), dtype),
        "q_weight": ((heads * width,), _wide(dtype)),
        "k_weight": ((heads * width,), _wide(dtype)),
    }
    return layout, {"feature_map": "relu", "eps": 1e-15, "q_eps": 1e-5, "k_eps": 1e-5}


def _linear_attention_subsets(
    layout: Layout, options: dict, dtype: torch.dtype
) -> Iterator[tuple[str, Layout, dict, dict]]:
    each = dict.fromkeys(("q_weight", "k_weight"), (layout["q"][0][-1:], _wide(dtype)))
    yield "norm of each head", layout | each, options, {}
    for names in ("q k v", "q k v q_weight", "q k v k_weight"):
        yield f"inputs {names}", layout, options, {"present": names.split()}
    for feature_map in ("elu+1", "identity"):
        changed = options | {"feature_map": feature_map}
        yield feature_map, layout, changed, {"positive": feature_map == "identity"}
        plain = {"present": ["q", "k", "v"], "positive": feature_map == "identity"}
        yield f"{feature_map}, no norm", layout, changed, plain
    yield "eps 1e-8", layout, options | {"eps": 1e-8}, {}
    yield "eps 1", layout, options | {"eps": 1.0}, {"order": "heads"}
    for names in ("q k", "k v", "q v"):
        yield f"tangents of {names}", layout, options, {"moving": names.split()}
    for order in ("heads", "features", "shared"):
        yield f"order of {order}", layout, options, {"order": order}
    yield "weights of 0", layout, options, {"zeros": True}


ROWS = [
    (2, 3, 4), (2, 5, 48), (2, 15, 127), (1, 16, 128), (2, 17, 129), (1, 33, 320), (1, 2, 1152),
    (1, 2, 2240), (2, 150, 320), (3, 7, 31), (1, 1, 8), (2, 17, 1152), (1, 3, 1284), (1, 3, 4096),
    (1, 2, 4095), (1, 17, 1), (2, 0, 16), (0, 4, 16),
]  # fmt: skip
"""One tile, one less, one more, SANA's widths, enough for several threads, primes, the widest that
CUDA's kernels hold, one number, nothing."""
MANY_ROWS = [*ROWS[:-2], (1, 4130, 8), (1, 4113, 5), *ROWS[-2:]]
"""Also enough that CUDA adds the parts of a gradient another way."""
GRIDS = [
    (1, 1, 1, 4), (2, 3, 5, 24), (1, 4, 4, 16), (2, 5, 3, 15), (1, 2, 7, 17), (1, 4, 4, 320),
    (2, 8, 8, 33), (2, 16, 16, 40), (1, 1, 6, 8), (1, 34, 36, 24), (1, 3, 65, 5), (2, 33, 9, 16),
    (1, 1, 32, 160), (0, 2, 2, 4),
]  # fmt: skip
"""Square and not, narrower than the stencil, around a block, for several threads, several of the
tiles and strips that GPUs cut images into, nothing."""
HEADS = [
    (2, 2, 2, 1, 1, 16, 16), (2, 3, 3, 15, 15, 8, 8), (1, 4, 1, 28, 31, 32, 32),
    (1, 2, 2, 33, 28, 64, 16), (2, 4, 2, 31, 33, 40, 40), (1, 8, 1, 49, 48, 72, 80),
    (1, 1, 1, 48, 49, 80, 72), (2, 2, 2, 1, 300, 96, 96), (1, 8, 2, 165, 212, 32, 64),
    (1, 2, 2, 300, 165, 112, 112), (1, 1, 1, 33, 515, 256, 256), (1, 1, 1, 515, 15, 128, 128),
    (1, 2, 1, 999, 28, 8, 8), (1, 1, 1, 165, 999, 64, 64), (1, 1, 1, 1000, 300, 16, 16),
    (1, 1, 1, 300, 1024, 32, 32), (1, 1, 1, 1024, 49, 16, 16), (0, 2, 2, 4, 5, 16, 16),
    (2, 2, 2, 0, 5, 16, 16), (2, 2, 1, 5, 0, 16, 16), (2, 2, 2, 3, 7, 256, 8),
]  # fmt: skip
"""(B, H, Hk, N, S, D, Dv): head dims of known models, ragged lengths, shared keys, nothing."""
LINEAR_HEADS = [
    (2, 2, 1, 1, 16, 16), (2, 2, 5, 7, 4, 12), (1, 3, 15, 15, 8, 8), (1, 4, 63, 63, 32, 32),
    (2, 2, 65, 64, 32, 32), (1, 2, 28, 131, 16, 40), (1, 1, 33, 31, 64, 128),
    (1, 2, 40, 17, 112, 7), (1, 1, 20, 300, 72, 72), (1, 1, 9, 70, 256, 256),
    (2, 4, 257, 257, 32, 32), (0, 2, 4, 5, 8, 8), (2, 2, 0, 5, 8, 8), (2, 2, 5, 1, 8, 1),
]  # fmt: skip
"""(B, H, N, S, D, Dv): around a tile of tokens, widths that no vector divides, nothing."""
HEADS_OF_32 = [
    (2, 3, 21, 35, 32, 32), (1, 13, 165, 190, 32, 32), (2, 25, 17, 35, 32, 32),
    (1, 36, 33, 18, 32, 32), (2, 2, 0, 5, 32, 32), (2, 2, 5, 0, 32, 32), (0, 2, 4, 5, 32, 32),
]  # fmt: skip
"""Heads as SANA's, which CUDA's kernels take: in one block, in two, in three, nothing."""
MANY_TOKENS = [(7, 13, 1509, 33, 32, 32), (5, 25, 33, 1349, 32, 32), (8, 1, 2650, 2650, 32, 32)]
"""Enough that each cluster of a large GPU has many tiles."""
SUBSETS = ["", "q", "k v", "k", "v", "q k", "q v"]
VARIANTS: dict[str, dict[str, Any]] = {
    "tangents at 0.01": {"tangent_scale": 1e-2},
    "tangents at 100": {"tangent_scale": 1e2},
    "values at 30": {"value_scale": 30.0, "scale": 0.006},  # and logits: no more, or all is one-hot
    "negative scale": {"scale": -0.2},
    "zero scale": {"scale": 0.0},
    "buffers of tokens": {"orders": ("tokens",)},
    "slices of larger buffers": {"orders": ("sliced",)},
    "strides of features": {"orders": ("features", "heads", "features")},
    "one buffer for all heads": {"orders": ("shared", "shared", "heads")},
    "tangents in another order": {"orders": ("tokens",) * 3 + ("heads", "sliced", "features")},
    **{f"mask {m}": {"mask": m} for m in (
        "bias BHNS", "bias NS", "bias 1H1S", "bias B1N1", "holes BHNS", "holes H1S", "bool BHNS",
        "bool NS", "bool B11S", "bool 1HN1",
    )},
    "key mask": {"key_mask": True},
    "key mask, holes": {"key_mask": True, "mask": "holes 1HNS"},
    "key mask, bool, causal": {"key_mask": True, "mask": "bool B1NS", "causal": "upper_left"},
    "causal": {"causal": "upper_left"},
    "causal, lower right": {"causal": "lower_right"},
    "causal, key mask": {"causal": "lower_right", "key_mask": True},
    "norm of each head": {"q_norm": "each", "k_norm": "each"},
    "norm of all heads": {"q_norm": "all", "k_norm": "all", "orders": ("tokens",)},
    "norm of k, tangent of k": {"k_norm": "all", "moving": "k"},
    "norm of k, key mask": {"k_norm": "all", "key_mask": True, "q_norm": "each"},
    "norm of q, values at 30": {"q_norm": "each", "value_scale": 30.0, "key_mask": True},
}  # fmt: skip
FEW = [
    "tangents at 100", "values at 30", "tangents in another order", "mask holes BHNS",
    "mask bool B11S", "key mask, bool, causal", "causal, lower right", "norm of all heads",
]  # fmt: skip


def _attention_plans(few: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    for sizes in [HEADS[i] for i in (6, 17, 18, 19)] if few else HEADS:
        yield f"shape {sizes}", {"sizes": sizes}
    for moving in SUBSETS[:3] if few else SUBSETS:
        plan = {"sizes": (1, 2, 1, 19, 35, 24, 40), "moving": moving}
        yield f"tangents of {moving or 'none'}", plan
    sizes = (1, 2, 1, 20, 34, 16, 24) if few else (2, 4, 2, 20, 34, 32, 24)
    for name in FEW if few else VARIANTS:
        yield name, {"sizes": sizes, **VARIANTS[name]}
        if "causal" in name and not few:
            yield f"{name}, more queries", {"sizes": (2, 2, 2, 37, 17, 16, 16), **VARIANTS[name]}
        if "norm of" in name and not few:
            yield f"{name}, one key head", {"sizes": (1, 8, 1, 33, 31, 40, 40), **VARIANTS[name]}


OPS: dict[str, tuple[list[tuple[int, ...]], Callable, Callable]] = {
    "adaln": (ROWS, _adaln_layout, _adaln_subsets),
    "rms_norm": (MANY_ROWS, _rms_norm_layout, _rms_norm_subsets),
    "conv_glu": (GRIDS, _conv_glu_layout, _conv_glu_subsets),
    "linear_attention": (LINEAR_HEADS, _linear_attention_layout, _linear_attention_subsets),
}


def op_case(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", **change: Any
) -> Case:
    """A call of another op at a shape as its list has them."""
    layout, options = OPS[op][1](shape, dtype)
    return _draw(op, f"shape {shape}", layout, options, device, **change)


def attention_case(
    name: str, dtype: torch.dtype, device: str = "cpu", *, sizes: Sequence[int],
    moving: str = "q k v", mask: str = "", key_mask: bool = False, causal: str = "",
    q_norm: str = "", k_norm: str = "", orders: Sequence[str] = ("heads",),
    scale: float | None = None, tangent_scale: float = 1.0, value_scale: float = 1.0,
) -> Case:  # fmt: skip
    """A call of attention of sizes (B, H, Hk, N, S, D, Dv).

    `mask` names a kind and what it does not broadcast over: "bias BHNS", "bool NS", "holes 1HNS"
    for a bias with −∞. A norm is "each" head or "all" heads. `orders` are the memory orders of q,
    k, v, tq, tk, tv in turn.
    """
    batch, heads, groups, queries, keys, width, value_width = sizes
    shapes = [(batch, heads, queries, width), (batch, groups, keys, width)]
    shapes.append((batch, groups, keys, value_width))
    norms = {"": 0, "each": 1, "all": heads}, {"": 0, "each": 1, "all": groups}
    weights = [
        1 + 0.3 * _random((n * width,), _wide(dtype), device, 1.0) if n else None
        for n in (norms[0][q_norm], norms[1][k_norm])
    ]
    hidden = None
    if key_mask:
        hidden = torch.rand(batch, keys, device=device) < 0.3
        hidden[-1:] |= keys % 2 == 0  # the last sample sees no key at all, or some
    values = []
    for i, shape in enumerate(shapes * 2):
        x = _random(shape, dtype, device, tangent_scale if i > 2 else value_scale)
        if hidden is not None and i % 3:
            x = x.masked_fill(hidden[:, None, :, None], float("nan"))
        values.append(_ordered(x, orders[i % len(orders)]))
    primals, tangents = values[:3], values[3:]
    tangents = [t if n in moving.split() else None for n, t in zip("qkv", tangents, strict=True)]
    options = {
        "attn_mask": _mask(
            mask, dict(zip("BHNS", (batch, heads, queries, keys), strict=True)), dtype, device
        ),
        "key_mask": None if hidden is None else ~hidden,
        "is_causal": bool(causal),
        "causal_alignment": causal or "upper_left",
        "scale": scale,
        "enable_gqa": heads != groups,
    }
    arguments = ["q", "k", "v", "q_weight", "k_weight"]
    return Case("attention", name, arguments, primals + weights, [*tangents, None, None], options)


def _ordered(x: Tensor, order: str) -> Tensor:
    """The same values as [B, H, N, D] in another memory order."""
    if order == "tokens":  # a [B, N, H, D] buffer
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if order == "features":  # the feature axis strides
        return x.mT.contiguous().mT
    if order == "shared":  # one buffer for all heads
        return x[:, :1].expand_as(x)
    return _window(x) if order == "sliced" else x


def _mask(what: str, sizes: dict[str, int], dtype: torch.dtype, device: str) -> Tensor | None:
    """A mask such as "bool B1NS", whose first query sees no key where it can; "" is none."""
    if not what:
        return None
    kind, axes = what.split()
    shape = [sizes.get(a, 1) for a in axes]
    bias = torch.randn(shape, device=device).to(dtype)
    seen = torch.rand(shape, device=device) < 0.7
    if "N" in axes:
        seen[..., :1, :] = False
    if kind == "bool":
        return seen
    return bias if kind == "bias" else bias.masked_fill(~seen, -torch.inf)


def _draw(
    op: str, name: str, layout: Layout, options: dict, device: str, *,
    present: list[str] | None = None, moving: list[str] | None = None,
    tangent_scale: float = 1.0, value_scale: float = 1.0, order: str = "", positive: bool = False,
    zeros: bool = False,
) -> Case:  # fmt: skip
    present = list(layout) if present is None else present
    moving = _movable(op, {n: layout[n] for n in present}) if moving is None else moving
    order = order or ("tokens" if op == "linear_attention" else "")

    def tensors(names: list[str], factor: Callable[[str], float]) -> list[Tensor | None]:
        drawn = [
            _random(shape, dtype, device, factor(n)) if n in names else None
            for n, (shape, dtype) in layout.items()
        ]
        return [
            _ordered(x, order) if x is not None and n in ACTIVATIONS else x
            for n, x in zip(layout, drawn, strict=True)
        ]

    primals = tensors(present, lambda n: value_scale if n in ACTIVATIONS else 1.0)
    if positive:  # features that need no map
        primals = [None if p is None else p.abs() for p in primals]
    if zeros:  # of q's weights and of k's not the same ones, which would hide each other
        for i, argument in enumerate(layout):
            if argument.endswith("weight"):
                primals[i][i % 3 :: 3] = 0
    tangents = tensors(moving, lambda _: tangent_scale)
    return Case(op, name, list(layout), primals, tangents, options)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: str, factor: float) -> Tensor:
    """Normal values."""
    return (factor * torch.randn(shape, dtype=torch.float64)).to(device, dtype)


def _window(x: Tensor) -> Tensor:
    """x as a slice of a larger buffer whose other elements are NaN."""
    buffer = x.new_full([s + 3 for s in x.shape], float("nan"))
    return buffer[tuple(slice(1, s + 1) for s in x.shape)].copy_(x)


SAMPLES = [
    (3, 2, 5), (1, 1), (2, 4, 32, 32), (1, 4097), (2, 2047), (3, 2049), (150, 3), (2, 3, 37, 101),
    (17, 1023), (40, 31), (0, 3, 4),
]  # fmt: skip
"""Around the blocks of elements and of samples, one number, enough for several threads, nothing."""
OBJECTIVE: dict[str, dict[str, str]] = {
    "tangent_loss": {"tangent_loss": "out jvp velocity x t keep weight log_variance"},
    "trigflow": {
        "flow_input": "x t", "flow_output": "v x t", "trajectory_step": "x out t s guidance",
    },
}  # fmt: skip
"""The functions of the ops that are called with samples [B, ...] and numbers [B]."""


def _objective_cases(op: str, dtype: torch.dtype, device: str, few: bool) -> Iterator[Case]:
    """Cases of each function of an op; a case's `op` is the function."""
    other = torch.float16 if dtype.itemsize > 2 else torch.float32
    for function, names in OBJECTIVE[op].items():
        arguments = names.split()
        plans: dict[str, dict[str, Any]] = {
            f"shape {s}": {"shape": s} for s in (SAMPLES[1:7] + SAMPLES[-1:] if few else SAMPLES)
        }
        plans |= {
            "values at 30": {"value_scale": 30.0},
            "slices of larger buffers": {"sliced": True},
            "mixed dtypes": {"dtypes": dict.fromkeys(("jvp", "velocity", "v", "t"), other)},
            "ends of the time axis": {"ends": True},
        }
        if op == "tangent_loss":
            for absent in ("keep", "weight", "log_variance", "keep weight log_variance"):
                plans[f"without {absent}"] = {"present": set(arguments) - set(absent.split())}
            plans |= {"a sample of NaN": {"spoiled": True}, "r of 0": {"r": 0.0}}
        elif function != "trajectory_step":
            for n in range(len(arguments) + 1):
                for moving in itertools.combinations(arguments, n):
                    plans[f"tangents of {' '.join(moving) or 'none'}"] = {"moving": moving}
            plans["tangents at 100"] = {"tangent_scale": 100.0}
        for name, plan in plans.items():
            yield _objective_case(function, name, arguments, dtype, device, **plan)


def objective_case(
    function: str, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> Case:
    """A call of a function of `OBJECTIVE` with samples of a shape [B, ...]."""
    arguments = next(f[function] for f in OBJECTIVE.values() if function in f).split()
    return _objective_case(function, f"shape {shape}", arguments, dtype, device, shape=shape)


def _objective_case(
    function: str, name: str, arguments: list[str], dtype: torch.dtype, device: str, *,
    shape: tuple[int, ...] = (5, 3, 14), present: Sequence[str] | None = None,
    moving: Sequence[str] | None = None, dtypes: dict[str, torch.dtype] | None = None,
    value_scale: float = 1.0, tangent_scale: float = 1.0, sliced: bool = False,
    ends: bool = False, spoiled: bool = False, r: float = 0.7,
) -> Case:  # fmt: skip
    """Times in [0, π/2], weights above 0, and one sample in four that is not kept."""

    def draw(argument: str, factor: float) -> Tensor:
        number = argument in ("t", "s", "keep", "weight", "log_variance", "guidance")
        size = (shape[0] * (2 if function == "trajectory_step" and argument == "out" else 1),)
        size = size if number else (*size, *shape[1:])
        own = (dtypes or {}).get(argument, _wide(dtype) if number else dtype)
        x = _random(size, own, device, factor)
        return _window(x) if sliced and not number else x

    def primal(argument: str) -> Tensor:
        x = draw(argument, value_scale if argument in ("x", "out", "v", "jvp") else 1.0)
        if argument in ("t", "s"):
            inside = torch.pi / 2 * torch.sigmoid(2 * x)
            return torch.pi / 2 * (x > 0).to(x.dtype) if ends and argument == "t" else inside
        return {"keep": lambda: (x < 0.7).to(x.dtype), "weight": x.abs}.get(argument, lambda: x)()

    primals = [primal(a) if present is None or a in present else None for a in arguments]
    if spoiled:
        primals[1][0].fill_(float("nan"))
    moves = arguments if moving is None else moving
    tangents: list[Tensor | None] = [None] * len(arguments)
    if function.startswith("flow"):
        drawn = {a: draw(a, tangent_scale) for a in moves}
        tangents = [drawn.get(a) for a in arguments]
    options: dict[str, float] = {} if function.startswith("flow") else {"sigma_data": 0.5}
    options |= {"r": r, "c": 0.1} if function == "tangent_loss" else {}
    return Case(function, name, arguments, primals, tangents, options)
