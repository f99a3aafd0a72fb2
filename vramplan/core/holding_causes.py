"""The rules of a diagnosis that a memory snapshot allows: what the holders say by their sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .causes import Finding
from .holders import HOLDERS
from .types import Holdings
from .units import human

if TYPE_CHECKING:
    from .case import Case

MUCH = 0.25  # of what is allocated


def saved_by_layers(case: Case, held: Holdings) -> Iterator[Finding]:
    """More than one layer holds what its forward saved: checkpointed layers hold their inputs alone."""
    holding = [size for size in held.layer_bytes if size]
    if len(holding) < 2 or sum(holding) < MUCH * held.allocated_bytes:
        return
    yield Finding(
        "checkpointing",
        95,
        f"What {len(holding)} layers saved in the forward holds {human(sum(holding))} of "
        f"{human(held.allocated_bytes)}: they are not checkpointed, as then they would keep their inputs alone.",
    )


def loss(case: Case, held: Holdings) -> Iterator[Finding]:
    size = sum(holder.bytes for holder in held.holders if holder.group == "loss")
    if size >= MUCH * held.allocated_bytes > 0:
        yield Finding(
            "logits",
            88,
            f"Logits and what the loss makes of them hold {human(size)} of {human(held.allocated_bytes)}. A fused loss "
            "never makes them.",
        )


def optimizer(case: Case, held: Holdings) -> Iterator[Finding]:
    size = sum(holder.bytes for holder in held.holders if holder.group == "optimizer")
    if size >= MUCH * held.allocated_bytes > 0:
        yield Finding(
            "optimizer",
            70,
            f"The optimizer holds {human(size)} of {human(held.allocated_bytes)}; an 8-bit or paged one needs less.",
        )


def upcast(case: Case, held: Holdings) -> Iterator[Finding]:
    size = sum(holder.bytes for holder in held.holders if holder.key == "weights.prepared")
    if size >= MUCH / 2 * held.allocated_bytes > 0:
        yield Finding(
            "upcast",
            72,
            f"Weights that prepare_model_for_kbit_training turned to float32 hold {human(size)}; the lean recipe "
            "leaves them in bf16.",
        )


def leak(case: Case, held: Holdings) -> Iterator[Finding]:
    growth = held.growth
    if growth is None:
        return
    where = f" at {growth.where}" if growth.where else ""
    yield Finding(
        "leak",
        90,
        f"Memory grows: at each of {growth.steps} starts of a step {human(growth.bytes)} more was held than at the one "
        f"before, most of it by {HOLDERS[growth.key]}{where}. Something keeps tensors of past steps, as a list of "
        "losses that were not detached does.",
    )


HOLDING_RULES: tuple[Callable[[Case, Holdings], Iterator[Finding]], ...] = (
    saved_by_layers, loss, optimizer, upcast, leak,
)  # fmt: skip
