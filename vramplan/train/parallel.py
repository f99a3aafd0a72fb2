"""Several processes that train one adapter, each on its own GPU, and what they say to each other.

Every rank holds the whole adapter and its optimizer, computes the gradient of its own examples, and steps by the sum:
the same step that one GPU would take on all of them, because the loss is divided by the labelled tokens of all ranks.
No wrapper of torch's is around the model. Inside a forward and backward "ddp" sends nothing, so a rank that runs out of
memory there can do that micro-batch again in pieces while the others wait for it. The ranks meet once per optimizer
step (`World.sync`), on the CPU first: there a rank that cannot go on says so, and all end the same way; there they
agree to stop. "fsdp" gathers weights inside the forward (`fsdp.py`); a rank that fails there can only end, and takes
the others with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vramplan.core.parallel import BUCKET_BYTES
from vramplan.core.types import RunSpec
from vramplan.errors import InputError
from vramplan.train.outcome import Outcome, PeerFailed, outcome_of
from vramplan.train.place import Place

TIMEOUT = timedelta(minutes=30)  # for a rank that is silent, but not gone: torchrun ends all when one is gone
T = TypeVar("T")


class Stop(Protocol):
    """Whether a signal has asked this process to end."""

    asked: bool


class Agreed:
    """What all ranks have agreed on when they last met: whether any of them has been asked to end."""

    asked = False


def join(run: RunSpec, place: Place, stop: Stop | None = None) -> World:
    """Meet the other processes of the run. InputError if this machine has no GPU for this one."""
    if not torch.cuda.is_available():
        device = torch.device("cpu")
    elif place.local_rank >= torch.cuda.device_count():
        raise InputError(
            f"there is no GPU for process {place.local_rank} of this machine: torch sees {torch.cuda.device_count()}",
            "start one process per GPU, and look at CUDA_VISIBLE_DEVICES",
        )
    else:
        device = torch.device("cuda", place.local_rank)
    if place.size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            _without_peer_access_where_it_fails()
        # gloo carries what is said on the CPU, so that no word waits for a GPU that hangs
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return World(place, device, sharded=place.size > 1 and run.parallel == "fsdp", stop=stop)


def _without_peer_access_where_it_fails() -> None:
    """What `accelerate launch` sets for the RTX 40 series, and accelerate asks for elsewhere."""
    from accelerate.utils import check_cuda_p2p_ib_support

    if not check_cuda_p2p_ib_support():
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")


class World:
    """All processes of a run, seen from one of them. Where it is the only one, nothing is sent."""

    def __init__(
        self,
        place: Place | None = None,
        device: torch.device | None = None,
        *,
        sharded: bool = False,
        stop: Stop | None = None,
    ) -> None:
        self.place = place or Place()
        self.size, self.rank, self.main = self.place.size, self.place.rank, self.place.main
        self.device = device or torch.device("cpu")
        self.sharded = sharded
        self.stop = stop
        self.agreed: Stop = Agreed() if self.size > 1 or stop is None else stop

    def leave(self) -> None:
        """After the last word. A failure ends the process without it: the others may never come."""
        if self.size > 1:
            self.meet()
            dist.destroy_process_group()

    # ------------------------------------------------------------------------------------------------- training
    def together(self, work: Callable[[], T]) -> T:
        """Do this rank's part of what all do. If it fails here, the others hear of it where they meet next.

        `work` must not send anything. Of sharded weights it does, so there the failure is left to end the process.
        """
        if self.size == 1 or self.sharded:
            return work()
        try:
            return work()
        except BaseException as error:
            with suppress(Exception):  # whatever happens to the message, this is the error to raise
                self._exchange(outcome_of(error))
            raise

    def meet(self) -> None:
        """All ranks are here. PeerFailed if one of them failed in its last part. Agrees on whether to stop."""
        if self.size > 1:
            self._exchange(None)

    def sync(self, parameters: Sequence[nn.Parameter], divisor: int = 1) -> None:
        """The end of a step's last micro-batch: meet, then sum the gradients over all ranks (and divide, for means)."""
        if self.size > 1:
            self.meet()
            sum_gradients(parameters)
            for parameter in parameters if divisor > 1 else ():
                if parameter.grad is not None:
                    parameter.grad /= divisor

    def _exchange(self, outcome: Outcome | None) -> None:
        asked = self.stop is not None and self.stop.asked
        flags = torch.tensor([outcome is not None, asked], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        failed, stopping = flags.tolist()
        if failed:
            outcomes: list[Outcome | None] = [None] * self.size
            dist.all_gather_object(outcomes, outcome)
            raise next(PeerFailed(rank, each) for rank, each in enumerate(outcomes) if each is not None)
        self.agreed.asked = bool(stopping)

    # ------------------------------------------------------------------------------------------------- numbers
    def sum(self, *numbers: float) -> tuple[float, ...]:
        """Each number summed over all ranks."""
        if self.size == 1:
            return numbers
        totals = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(totals)
        return tuple(totals.tolist())

    def sum_items(self, count: Tensor | int | None) -> Tensor | int | None:
        """Labelled tokens of a step, summed over all ranks where they are. None stays."""
        if self.size == 1 or count is None:
            return count
        total = torch.as_tensor(count).to(self.device)
        dist.all_reduce(total)
        return total

    # ------------------------------------------------------------------------------------------------- objects
    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on the main rank, on all ranks. If it raises there, the others raise PeerFailed."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        failure: BaseException | None = None
        if self.main:
            try:
                box[0] = make()
            except BaseException as error:
                failure, box[1] = error, outcome_of(error)
        dist.broadcast_object_list(box, 0)
        if failure is not None:
            raise failure
        if box[1] is not None:
            raise PeerFailed(0, box[1])
        value: T = box[0]
        return value

    def main_first(self, make: Callable[[], T], then: Callable[[], T]) -> T:
        """`make` on the main rank and, once that is done, `then` on the others. If the main one fails, all do."""
        made: list[T] = []
        self.from_main(lambda: made.append(make()))
        return made[0] if made else then()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def same(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give all ranks the main rank's parameters: an adapter begins the same everywhere."""
        if self.size > 1:
            for parameter in parameters:
                dist.broadcast(parameter.data, 0)


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients over all ranks, in place. A parameter without one counts as zero, and gets one.

    Small gradients go side by side in flat buckets of `BUCKET_BYTES`; a large one is sent as it is.
    """
    gradients = [_gradient(parameter) for parameter in parameters]
    for bucket in buckets(gradients):
        if len(bucket) == 1:
            dist.all_reduce(bucket[0])
            continue
        flat = torch.cat([gradient.view(-1) for gradient in bucket])
        dist.all_reduce(flat)
        pieces = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(pieces, bucket, strict=True)])
        del flat, pieces  # before the next one is made


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif not parameter.grad.is_contiguous():
        parameter.grad = parameter.grad.contiguous()
    return parameter.grad


def buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together at most `BUCKET_BYTES`; larger ones alone."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        now = gradient.numel() * gradient.element_size()
        if now >= BUCKET_BYTES:
            yield [gradient]
            continue
        if bucket and (size + now > BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += now
    if bucket:
        yield bucket
