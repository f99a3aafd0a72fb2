"""Whole micro-steps as CUDA graphs, where starting kernels takes longer than running them.

With few tokens or a small model the card waits for Python: a Llama layer's forward and backward are some eighty kernels
of a few microseconds each. A graph starts all of them at once. It needs shapes that come back (packed rows, one length)
and memory that stays where it is: gradients are kept and zeroed, and what lives within a micro-step lies in a pool of
the graphs' own. That takes the place of what ordinary micro-steps of the shape had cached: all of them are replays from
then on. Other shapes and evaluations must fit beside the pool. Where they do not, the guard drops the graphs and plays
the same again before it splits anything, so graphs are a luxury and no part of what a plan counts; shapes that come
back may be captured again, until memory did not do for it `TRIES` times.

Whether it pays is seen, not modelled: if the card has finished by the time Python has started the last kernel, Python
is what is slow.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vramplan.core.fused import GRAPH_SPARE_BYTES
from vramplan.train.outcome import first_line
from vramplan.train.pressure import let_go, room_bytes

WATCHED = 2  # ordinary micro-steps of a shape before it is captured
MOST = 8  # shapes that are captured; others run as ever
SHARE = 0.03  # of the time that starting took: the card is no further behind where starting is the slow part
SPARE_BYTES = GRAPH_SPARE_BYTES  # a plan counts on graphs where it leaves so much
TRIES = 3  # times that memory may prove too short, for making graphs or for keeping them

Inputs = dict[str, Any]
Key = tuple[tuple[str, Any], ...]
# (inputs, items in the batch) -> loss, with the gradients added to the parameters'
MicroStep = Callable[[Inputs, Tensor], Tensor]


class Recorder(Protocol):
    """Makes what plays a piece of work again; `CudaGraphs` on a card."""

    reserved_bytes: int  # by what was recorded

    def room(self) -> bool:
        """Whether there is memory for graphs; gives back what is cached."""

    def caught_up(self, patience_s: float) -> bool:
        """Whether the card finishes what it was given within this time."""

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Work that was seen, not done: each call of the result does it."""

    def drop(self) -> None:
        """No graph is played from now on."""


@dataclass
class Graphs:
    """Runs a micro-step, as a graph once its shape has come back and starting it is what takes the time.

    `step` plays a micro-step that depends on nothing but its tensors. `parameters`: whose gradients it adds to.
    `forget`: drops what an interrupted step has left. `tell` gets a line for each graph, and why there are no more.
    `ready` is called before a graph is played: nobody else can say when its backward begins.
    """

    step: MicroStep
    parameters: Sequence[nn.Parameter]
    forget: Callable[[], None]
    tell: Callable[[str], None]
    recorder: Recorder
    ready: Callable[[], None] = lambda: None
    tries: int = TRIES  # that are left
    off: str = ""  # why there will be no more of them
    dropped: int = 0  # times that there were some
    made: dict[Key, _Graph] = field(default_factory=dict)
    seen: dict[Key, int] = field(default_factory=dict)
    gradients: list[Tensor] = field(default_factory=list)

    def run(self, inputs: Inputs, items: Tensor, ordinary: Callable[[], Tensor]) -> Tensor:
        """The loss of a micro-step, which `ordinary` plays where there is no graph of this shape."""
        key = key_of(inputs)
        if self._wants(key):
            self._capture(key, inputs, items)
        if self.made:
            self._hold_gradients()
        graph = self.made.get(key)
        if graph is not None:
            self.ready()
            return graph.replay(inputs, items)
        begun = time.perf_counter()
        loss = ordinary()
        if not self.off and len(self.made) < MOST:
            started = time.perf_counter() - begun
            waits = self.recorder.caught_up(SHARE * started)
            self.seen[key] = self.seen.get(key, 0) + 1 if waits else -2 * WATCHED
        return loss

    def drop(self, reason: str) -> bool:
        """Memory is needed elsewhere; whether graphs held any. Gradients stay where they are until the step is done."""
        self.seen.clear()  # what is cached is given back: what a shape takes must show again
        if not self.made:
            return False
        self.recorder.drop()
        self.made.clear()
        self.gradients = []
        self.dropped += 1
        self.tries -= 1
        if self.tries <= 0:
            self.off = self.off or reason
        then = "no more are made" if self.off else "shapes that come back may get one again"
        self.tell(f"CUDA graphs are dropped, {reason}: {then}")
        return True

    def _wants(self, key: Key) -> bool:
        """Only between two optimizer steps: the gradients are zero then, and what is captured is not computed."""
        if self.off or key in self.made or self.seen.get(key, 0) < WATCHED:
            return False
        return all(p.grad is None for p in self.parameters)

    def _capture(self, key: Key, inputs: Inputs, items: Tensor) -> None:
        self.seen.clear()  # as in `drop`
        if not self.recorder.room():
            # What was cached was everybody's, an evaluation's too. Asked again, it is what came since.
            self.tries -= 1
            if self.tries <= 0:
                self._give_up("the card has no memory to spare for one")
            return
        self._hold_gradients()
        try:
            self.made[key] = _Graph(self.step, inputs, items, self.recorder)
        except Exception as error:  # whatever cannot be captured: a library that waits for the card, for one
            let_go(error)
            self.forget()
            self._give_up(f"{type(error).__name__}: {first_line(error, 160)}")
        else:
            rows, tokens = inputs["input_ids"].shape
            self.tell(f"micro-batches of {rows} x {tokens:,} tokens run as one CUDA graph from now on")
        for gradient in self.gradients:
            gradient.zero_()
        if not self.made:  # nobody needs them to stay where they are
            self.gradients = []

    def _give_up(self, reason: str) -> None:
        self.tell(f"no {'more CUDA graphs are' if self.made or self.dropped else 'CUDA graph is'} made: {reason}")
        self.off = reason

    def _hold_gradients(self) -> None:
        """The graphs add into these very tensors; whoever has replaced one meanwhile gets it back."""
        if not self.gradients:
            self.gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter, kept in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is kept:
                continue
            if parameter.grad is None:
                kept.zero_()
            else:
                kept.copy_(parameter.grad)
            parameter.grad = kept


def key_of(inputs: Inputs) -> Key:
    """What must be the same for a graph to be played again: shapes, and everything that is no tensor."""
    return tuple((name, tuple(v.shape) if isinstance(v, Tensor) else v) for name, v in sorted(inputs.items()))


class _Graph:
    """One captured micro-step and the tensors that it reads."""

    def __init__(self, step: MicroStep, inputs: Inputs, items: Tensor, recorder: Recorder) -> None:
        self.inputs = {name: v.clone() if isinstance(v, Tensor) else v for name, v in inputs.items()}
        self.items = items.clone()
        self.play = recorder.record(lambda: step(self.inputs, self.items).detach())

    def replay(self, inputs: Inputs, items: Tensor) -> Tensor:
        for name, place in self.inputs.items():
            if isinstance(place, Tensor):
                place.copy_(inputs[name], non_blocking=True)
        self.items.copy_(items, non_blocking=True)
        return self.play().clone()


class CudaGraphs:
    """Records with torch's CUDA graphs, all of which share one pool.

    beside: what is still taken in ordinary ways at every step, by clipping and the optimizer.
    """

    def __init__(self, device: torch.device, beside: Callable[[], int] = lambda: 0) -> None:
        self.device, self.beside = device, beside
        self.pool: Any = None
        self.reserved_bytes = 0

    def room(self) -> bool:
        """Whether what ordinary micro-steps have cached, once it is given back, can be reserved again as a pool.

        Cached, not only the highest point of what was allocated: a pool has gaps as the cache had, and the shape was
        played since the cache was last given back, so that what it takes lies there (but for what a full card made
        the allocator give back itself: then the capture may fail, and there is no graph). The pool of earlier graphs
        serves this one too and is no part of it. What cannot be given back, since something resident lies beside it
        in a segment, is nothing that a pool could have: it does not count as room.
        """
        gc.collect()
        cached = max(self._cached() - self.reserved_bytes, 0)
        torch.cuda.empty_cache()
        return room_bytes(self.device) - self._cached() >= cached + self.beside() + SPARE_BYTES

    def _cached(self) -> int:
        return int(torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device))

    def caught_up(self, patience_s: float) -> bool:
        done = torch.cuda.Event()
        done.record()
        until = time.perf_counter() + patience_s
        while not done.query():
            if time.perf_counter() > until:
                return False
        return True

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        # Other threads (the loader's, which pins memory) may go on asking the driver for things meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss = work()
        self.pool = self.pool or graph.pool()
        self.reserved_bytes += torch.cuda.memory_reserved(self.device) - before

        def play() -> Tensor:
            graph.replay()
            return loss

        return play

    def drop(self) -> None:
        torch.cuda.synchronize(self.device)  # one may still be at work
        self.pool = None
        self.reserved_bytes = 0
