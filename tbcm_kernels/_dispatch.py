"""Which implementation of an op runs, and why.

`impl="auto"` takes the best one that can run the given tensors; where it must fall back to the
plain PyTorch reference it says so once. An explicit `impl` runs that implementation or raises.
"auto" takes a CUDA C++ kernel only where a GPU of the same compute capability has passed all proofs
in that dtype with the same source, which proofs.json records (`python -m bench.proofs` makes it
from the rows of such runs). A Triton kernel without such a proof runs, and says so once.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import warnings
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from tbcm_kernels._dual import constant_under_compile

_FAST_DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
    "attention cpu": (torch.float32, torch.bfloat16, torch.float16),
    "linear_attention cpu": (torch.float32, torch.bfloat16, torch.float16),
    "linear_attention cuda": (torch.bfloat16, torch.float16),
}
_DEVICES = {"triton": "cuda", "cuda": "cuda", "cpu": "cpu"}
_WIDEST_ROW = {"cuda": 4096, "triton": 8192}  # MAX_WIDTH in csrc/rows.h and in _triton.py
_TOO_WIDE = {kind: f"its rows have at most {n} numbers" for kind, n in _WIDEST_ROW.items()}
_ONLY_ASKED_FOR = {
    ("attention", "triton", torch.float32): "exact fp32 products spill registers; ask by impl",
}
"""What "auto" leaves out, and why."""
_TO_RECORD = (
    "to have that remembered, in a checkout add --record bench/results/NAME/proofs.jsonl, then run "
    "`python -m bench.proofs`"
)
Reasons = tuple[tuple[str, str], ...]
"""Pairs of an implementation and a clause that says why it does not run."""
OPS: dict[str, tuple[str, ...]] = {
    "adaln": ("cuda", "triton", "cpu"),
    "rms_norm": ("cuda", "triton", "cpu"),
    "attention": ("triton", "cpu"),
    "linear_attention": ("cuda", "triton", "cpu"),
    "conv_glu": ("cuda", "cpu"),
    "linear": (),
    "tangent_loss": ("triton", "cpu"),
    "trigflow": ("triton", "cpu"),
}
"""The accelerated implementations of each op; each also has "reference", PyTorch's own GEMM for
linear."""


@functools.cache
def missing(impl: str) -> str | None:
    """Why `impl` cannot run in this installation, in one clause; None where it can."""
    if impl in ("cpu", "cuda"):
        try:
            extension = importlib.import_module("tbcm_kernels._C")
        except ImportError as error:
            return (
                f"the compiled extension is not there ({error}); in the checkout run "
                f"`TBCM_BUILD_CPU=1 pip install --no-build-isolation .`, which tells what it lacks"
            )
        if (own := _sources()) and getattr(extension, "sources", None) != own:
            cuda = "TBCM_BUILD_CUDA=1 " if hasattr(extension, "cuda") else ""
            return (
                f"{extension.__file__} was not built from this checkout's csrc; in the checkout "
                f"run `{cuda}pip install --no-build-isolation -e .`"
            )
        if impl == "cuda" and not hasattr(extension, "cuda"):
            return (
                "the compiled extension was built without CUDA; with nvcc on PATH run in the "
                "checkout `TBCM_BUILD_CUDA=1 pip install --no-build-isolation .`"
            )
    if impl == "triton":
        try:
            importlib.import_module("triton")
        except ImportError:
            return "triton is not installed; pip install triton"
    return None


def _sources() -> str | None:
    """The hash of the csrc beside the package, as setup.py's; None where there is none."""
    root = Path(__file__).parents[1]
    if not ((root / "setup.py").exists() and (root / "csrc" / "registration.cpp").exists()):
        return None
    content = b"".join(p.read_bytes() for p in sorted(root.glob("csrc/[a-z]*.[ch]*")))
    return hashlib.sha256(content).hexdigest()[:12]


def refusal(op: str, impl: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `impl` cannot run `op` on such tensors, in one clause; None where it can."""
    if impl not in OPS[op]:
        return f"{op} has no {impl} implementation"
    if device != _DEVICES[impl] and not (impl == "triton" and _interpreted()):
        return f"it runs on {_DEVICES[impl]} tensors and these are on {device}"
    dtypes = _FAST_DTYPES.get(f"{op} {impl}", _FAST_DTYPES[impl])
    if dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        return f"it takes {names} and these are {str(dtype).removeprefix('torch.')}"
    if (reason := missing(impl)) is None and impl == "cuda" and source(op, impl) is None:
        return "the compiled extension is of an older version; build it again"
    return reason


@functools.cache
def source(op: str, impl: str) -> str | None:
    """The op and the hash of its GPU kernels' sources; a CUDA extension has its own inside.

    None where the extension has no such kernels.
    """
    if impl == "cuda":
        sources = importlib.import_module("tbcm_kernels._C").cuda.split()
        return next((s for s in sources if s.startswith(f"{op}:")), None)
    package = files("tbcm_kernels")
    kernels = sorted(
        (f for f in package.joinpath(op).iterdir() if f.name.startswith("triton")),
        key=lambda f: f.name,
    )
    digest = hashlib.sha256()
    for file in (*kernels, package / "_triton.py", package / "attention" / "triton_tiles.py"):
        digest.update(file.read_bytes())
    return f"{op} triton:{digest.hexdigest()[:12]}"


@functools.cache
def _proved(op: str, impl: str, dtype: torch.dtype) -> bool:
    """Whether a GPU like this one has passed all proofs with these sources in this dtype."""
    table = json.loads(files("tbcm_kernels").joinpath("proofs.json").read_text())
    name = str(dtype).removeprefix("torch.")
    return name in table.get(source(op, impl), {}).get(capability(), {}).get("dtypes", ())


@functools.cache
def capability() -> str | None:
    """The compute capability of the GPUs at hand, such as "9.0"; other ones run other code.

    None where there is no GPU, or where they differ.
    """
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return "{}.{}".format(*found.pop()) if len(found) == 1 else None


def _unproved(op: str, impl: str, dtype: torch.dtype) -> str | None:
    """Why "auto" leaves out a CUDA C++ kernel that can run; None where it is proved."""
    if impl != "cuda" or _proved(op, impl, dtype):
        return None
    return (
        "its source has not passed on a GPU of this compute capability in this dtype yet; `python "
        f'-m tbcm_kernels.testing` tries it on yours and impl="{impl}" runs it; {_TO_RECORD}'
    )


def choose(op: str, impl: str, x: Tensor, *, unfit: Reasons = (), avoid: Reasons = ()) -> str:
    """The name of the implementation that runs `op` on tensors like x.

    Args:
        unfit: the implementations that cannot take these shapes or options, and why, in one clause.
        avoid: those that can, but that "auto" leaves out.

    Raises:
        ValueError: an unknown `impl`, or an explicit one that cannot run here, with the reason.
    """
    chosen, reason = _known_choice(op, impl, x.device.type, x.dtype, unfit, avoid)
    if chosen is None:
        raise ValueError(f"{op}: {reason}.")
    return chosen


def choose_for_rows(op: str, impl: str, x: Tensor) -> str:
    """`choose` for an op whose GPU kernels keep a row of x in registers."""
    if (width := x.shape[-1]) <= _WIDEST_ROW["cuda"]:
        return choose(op, impl, x)
    unfit = tuple((kind, why) for kind, why in _TOO_WIDE.items() if width > _WIDEST_ROW[kind])
    return choose(op, impl, x, unfit=unfit)


@constant_under_compile
def _known_choice(
    op: str, impl: str, device: str, dtype: torch.dtype, unfit: Reasons, avoid: Reasons
) -> tuple[str | None, str]:
    """`_choice`, cached, and a constant to torch.compile."""
    return _remembered(op, impl, device, dtype, unfit, avoid)


def _choice(
    op: str, impl: str, device: str, dtype: torch.dtype, unfit: Reasons = (),
    avoid: Reasons = (), tell: bool = True,
) -> tuple[str | None, str]:  # fmt: skip
    """The chosen implementation, or None and why; `tell` warns the user of a fallback."""
    if impl == "reference":
        return impl, "asked for"
    if impl not in ("auto", *_DEVICES):
        known = ", ".join(("auto", *OPS[op], "reference"))
        return None, f"impl must be one of {known}, got {impl!r}"
    cannot, avoided = dict(unfit), dict(avoid)
    if impl != "auto":
        reason = refusal(op, impl, device, dtype) or cannot.get(impl)
        if reason is None:
            return impl, "asked for"
        return None, f'impl={impl!r} cannot run: {reason}; impl="auto" takes one that can'
    why_not = {}
    for candidate in OPS[op]:
        reason = (
            refusal(op, candidate, device, dtype)
            or cannot.get(candidate)
            or _ONLY_ASKED_FOR.get((op, candidate, dtype))
            or avoided.get(candidate)
            or _unproved(op, candidate, dtype)
        )
        if device == _DEVICES[candidate] and reason is None:
            if tell and candidate == "triton" and not _proved(op, candidate, dtype):
                _notice_unproved(op, dtype)
            return candidate, "available"
        why_not[candidate] = reason or f"it runs on {_DEVICES[candidate]} tensors"
    reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in why_not.items())
    if tell and reasons:
        _notice_fallback(op, device, dtype, reasons)
    return "reference", reasons or "PyTorch's own GEMM is the implementation"


_remembered = functools.cache(_choice)


@constant_under_compile
def fall_back(op: str, device: str, dtype: torch.dtype, reason: str) -> str:
    """The reference's name, after the notice that the op falls back to it for this reason."""
    _notice_fallback(op, device, dtype, reason)
    return "reference"


def may_use_tf32() -> bool:
    """Whether PyTorch is told that its products of fp32 may do with TF32, in either way to say so.

    `torch.get_float32_matmul_precision` raises where the newer of both has been used.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@constant_under_compile
def shared_memory(device: int) -> int:
    """Bytes of shared memory that a block can have on a CUDA device, looked up once."""
    return _shared_memory(device)


@functools.cache
def _shared_memory(device: int) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def implementation(op: str, impl: str) -> ModuleType:
    """The module of one implementation of an op, with the functions that its reference has."""
    return importlib.import_module(f"tbcm_kernels.{op}.{impl}")


@functools.cache
def _interpreted() -> bool:
    """Whether Triton runs its interpreter, so that kernels accept CPU tensors."""
    if missing("triton"):
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _notice_unproved(op: str, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    warnings.warn(
        f"tbcm_kernels.{op}: its Triton kernels passed the interpreter and the static audit but "
        f"have not yet passed on a GPU of this compute capability in {name}; `python -m "
        f"tbcm_kernels.testing` proves them on yours in minutes; {_TO_RECORD}.",
        stacklevel=2,
    )


@functools.cache
def _notice_fallback(op: str, device: str, dtype: torch.dtype, reasons: str) -> None:
    name = str(dtype).removeprefix("torch.")
    warnings.warn(
        f"tbcm_kernels.{op} runs its plain PyTorch reference for {name} on {device} ({reasons}).",
        stacklevel=2,
    )


def implementations() -> list[tuple[str, str, str]]:
    """What runs here: rows (op, implementation chosen for fp32 on a device, reason)."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for op in OPS:
        for device in devices:
            chosen, reason = _choice(op, "auto", device, torch.float32, tell=False)
            rows.append((op, f"{chosen} ({device})", reason))
    return rows
