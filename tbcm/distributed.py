"""Many processes: how a module, its gradients and its weights are shared.

Every process draws the random numbers of the whole batch and takes its own part, so a run is the
same on any number of processes. Start them with `accelerate launch` or `torchrun`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tbcm.config import PLACES, TrainConfig
from tbcm.errors import UserError, package

Result = TypeVar("Result")
PACKAGES = {
    "report_to": {"tensorboard": "tensorboard", "wandb": "wandb"},
    "optimizer": {"adamw_8bit": "bitsandbytes", "came": "came_pytorch"},
}


def check_device(config: TrainConfig) -> torch.device:
    """The kind of device to compute on. Raises UserError if it is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch finds no GPU here; use --device cpu.")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """This process among the others, and the trackers.

    Raises UserError where the settings need a package that is not installed, are not those of the
    other processes, or do not go together with their number.
    """
    cpu = check_device(config).type == "cpu"
    for option, names in PACKAGES.items():
        if (value := getattr(config, option)) in names:
            package(names[value], f"{option} {value}")
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UserError(f"Leave {name} out of accelerate's own settings; give tbcm --fsdp.")
    # The networks run under the trainer's own autocast.
    accelerator = Accelerator(
        cpu=cpu, mixed_precision="no", log_with=config.report_to, project_dir=config.output_dir
    )
    check_alike({name: value for name, value in vars(config).items() if name not in PLACES})
    check_shares(config, accelerator.num_processes)
    return accelerator


def check_shares(config: TrainConfig, processes: int) -> None:
    """Raises UserError if the batch cannot be shared, or FSDP has nothing to share with."""
    parts = processes * config.gradient_accumulation_steps
    if config.train_batch_size % parts:
        raise UserError(
            f"train_batch_size counts a whole step: {config.train_batch_size} must become a "
            f"multiple of {parts}, that is {processes} processes × gradient_accumulation_steps "
            f"{config.gradient_accumulation_steps}."
        )
    if config.fsdp and processes == 1:
        raise UserError("fsdp shares a model among processes; start several, or leave it out.")
    if config.fsdp and not config.fused and torch.__version__ < (2, 13):
        raise UserError(
            f"fsdp without fused needs PyTorch 2.13: in {torch.__version__} a sharded model has no "
            "torch.func.jvp; give --fused, or update PyTorch."
        )


def on_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """What work() returns on the main process, on all of them; its UserError likewise."""
    told: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            told[0] = work()
        except UserError as error:
            told[1] = str(error)
    broadcast_object_list(told)
    if told[1] is not None:
        raise UserError(told[1])
    return told[0]


def check_alike(found: dict[str, Any]) -> None:
    """Raises UserError on all processes if one of them has found something else than the others."""
    first, *others = gather_object([found])
    for name, value in first.items():
        if any(other[name] != value for other in others):
            raise UserError(
                f"The processes do not have the same {name}; give all the same command, and all "
                "nodes the same files and output_dir."
            )


def spread(module: nn.Module, accelerator: Accelerator, fsdp: bool) -> nn.Module:
    """The module to call so that its gradients are averaged: itself, in DDP, or sharded in place.

    A fused forward reads the parameters of its blocks itself, past their hooks, so a fused model is
    sharded as one unit; another by its blocks.
    """
    if accelerator.num_processes == 1:
        return module
    if not fsdp:
        return accelerator.prepare_model(module)
    if "forward" not in module.__dict__:
        for block in getattr(module, "transformer_blocks", ()):
            fully_shard(block)
    return fully_shard(module, reshard_after_forward=True)


def whole(state: Any, keep: bool) -> Any:
    """The same nested state with every sharded tensor made whole; a collective call.

    Only those who keep it hold more than one tensor at a time.
    """
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value, keep) for value in state]
    if not isinstance(state, DTensor):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if keep else None


def shared_as(state: Any, like: Tensor) -> Any:
    """A whole tensor shared among the processes as `like` is, if it has its shape."""
    if not isinstance(like, DTensor) or not isinstance(state, Tensor) or state.shape != like.shape:
        return state
    return distribute_tensor(state.to(like.device), like.device_mesh, like.placements)


def load_whole(module: nn.Module, state: dict[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors into a module that may be sharded.

    Frozen parameters may be missing and stay. Raises RuntimeError if anything else does not fit.
    """
    own = module.state_dict()
    frozen = {name: own[name] for name, p in module.named_parameters() if not p.requires_grad}
    shared = {k: shared_as(v, own[k]) if k in own else v for k, v in state.items()}
    module.load_state_dict({**frozen, **shared})


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], state: dict[str, Any]
) -> None:
    """`load_state_dict` of whole tensors into an optimiser of `parameters`, in their order."""
    shared = {
        i: {name: shared_as(value, parameters[i]) for name, value in values.items()}
        for i, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shared})
