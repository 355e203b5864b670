"""What autograd keeps for backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def saved() -> Iterator[dict[int, Tensor]]:
    """What is kept within, by the address of its storage; held, so that no address returns."""
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if not x._is_zerotensor():
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


def size(kept: dict[int, Tensor], but: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages, those of some tensors not counted."""
    own = {x.untyped_storage().data_ptr() for x in but}
    return sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in own)
