"""Optimizer state from a checkpoint, put where it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch

PAGED_ELEMENTS = 100_000  # from here on bitsandbytes pages a state tensor (Optimizer8bit.get_state_buffer)


@contextmanager
def state_where_it_belongs(optimizer: Any) -> Iterator[None]:
    """Inside, `optimizer.load_state_dict` leaves the state on the host; afterwards each tensor goes to its place.

    bitsandbytes itself would load all of it onto the card, paged states too, and give every parameter its own copy of
    the code tables: a resumed run would need more memory than it did before. Other optimizers load as they always do.
    """
    if not isinstance(optimizer, bnb.optim.optimizer.Optimizer8bit):
        yield
        return
    optimizer.load_state_dict = partial(optimizer.load_state_dict, move_to_device=False)
    try:
        yield
    finally:
        del optimizer.load_state_dict
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name in [name for name, value in state.items() if isinstance(value, torch.Tensor)]:
                state[name] = _placed(optimizer, parameter, name, state[name])


def _placed(optimizer: Any, parameter: torch.Tensor, name: str, value: torch.Tensor) -> torch.Tensor:
    if name in ("qmap1", "qmap2"):
        table = "dynamic" if name == "qmap1" else "udynamic"
        if table not in optimizer.name2qmap:
            optimizer.fill_qmap()
        optimizer.name2qmap[table] = optimizer.name2qmap[table].to(parameter.device)
        shared: torch.Tensor = optimizer.name2qmap[table]
        return shared
    pages = optimizer.is_paged and parameter.device.type != "cpu" and parameter.numel() >= PAGED_ELEMENTS
    if not (pages and name in ("state1", "state2")):
        return value.to(parameter.device)
    managed: torch.Tensor = optimizer.get_state_buffer(parameter, dtype=value.dtype)
    torch.cuda.synchronize()  # it is being filled with zeros
    managed.copy_(value)
    return managed
