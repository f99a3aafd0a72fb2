"""Plays what FSDP2 allocates: weights gathered from all cards when a layer runs, and let go after it.

torch 2.13, distributed/fsdp/_fully_shard. A gather is one flat buffer (`foreach_all_gather`), copied out into a tensor
for each weight (`foreach_all_gather_copy_out`). In the forward the flat buffer lives until the next layer has been
gathered and copied out, so that the two overlap; in the backward it dies at once, and the layer that comes next is
gathered ahead (`_backward_prefetch`). Hooks on the gradients of a layer's output and input begin and end its backward.
Input embedding and head are gathered where they are used, without FSDP2 and its second buffer.
"""

from __future__ import annotations

from collections.abc import Callable

from .ops import Grads
from .parallel import Matrix, layer_matrices, shard_rows, shards, vocabulary_matrix, vocabulary_shards
from .tape import Node, Tape, Tensor
from .types import ModelSpec, RunSpec

KEY = "weights.gathered"


class Gathering:
    """What is gathered at the moment. Without shards nothing ever is."""

    def __init__(self, tape: Tape, spec: ModelSpec, run: RunSpec) -> None:
        self.tape = tape
        self.parts = shards(run)
        upcast = run.levers.upcast
        self.layer = layer_matrices(spec, upcast) if self.parts > 1 else []
        self.vocabulary = [vocabulary_matrix(spec, upcast)] if vocabulary_shards(spec, self.parts) > 1 else []
        self.flat: Tensor | None = None  # of the last gather in the forward
        self.ahead: Tensor | None = None  # flat buffer of the next layer of the backward
        self.whole_layer: list[Tensor] = []  # the weights of the layer that runs

    # ------------------------------------------------------------------------------------------------ decoder layers
    def enter(self, hidden_states: Tensor) -> Tensor:
        """`FSDPParamGroup.pre_forward` of a decoder layer, with the node that ends its backward."""
        if not self.layer:
            return hidden_states
        before, self.flat = self.flat, self._flat()
        self.whole_layer = self._copied_out()
        del before  # a local variable of `wait_for_unshard`, until that returns
        return self._hooked(hidden_states, self._post_backward)

    def leave(self, index: int, hidden_states: Tensor) -> Tensor:
        """`post_forward`, with the hook that begins its backward."""
        if not self.layer:
            return hidden_states
        self.whole_layer = []

        def pre_backward() -> None:
            flat, self.ahead = self.ahead or self._first_of_backward(index), None
            self.whole_layer = self._copied_out()
            del flat
            if index:
                self.ahead = self._flat()

        return self._hooked(hidden_states, pre_backward)

    def _first_of_backward(self, index: int) -> Tensor:
        """Nobody has gathered the last layer ahead. In a section of its own, so that all layers' births are alike."""
        self.tape.rec.mark("backward gather")
        flat = self._flat()
        self.tape.rec.mark(f"backward {index}")
        return flat

    def _post_backward(self) -> None:
        self.whole_layer = []

    def end_forward(self) -> None:
        """The decoder has returned."""
        self.flat = None

    def end_backward(self) -> None:
        """The callback at the end of the backward: a first layer whose input wants no gradient is let go here."""
        self.whole_layer = []

    # ------------------------------------------------------------------------------------------- embedding and head
    def whole(self, name: str) -> Tensor | None:
        """The embedding or the head, gathered into one buffer by `vramplan.train.fsdp`; None where it is not shared."""
        if not self.vocabulary:
            return None
        return self.tape.new(f"{name} gathered", *self._padded(self.vocabulary[0]), self.vocabulary[0].dtype, KEY)

    # ---------------------------------------------------------------------------------------------------- in general
    def _flat(self) -> Tensor:
        size = self.parts * sum(matrix.shard_bytes(self.parts) for matrix in self.layer)
        return self.tape.new("weights gathered, flat", 1, size, "uint8", KEY)

    def _copied_out(self) -> list[Tensor]:
        return [self.tape.new(f"{m.name} gathered", *self._padded(m), m.dtype, KEY) for m in self.layer]

    def _padded(self, matrix: Matrix) -> tuple[int, int]:
        return self.parts * shard_rows(matrix.rows, self.parts), matrix.columns

    def _hooked(self, x: Tensor, hook: Callable[[], None]) -> Tensor:
        """`x` with `hook` run when its gradient comes by."""
        if x.node is None:
            return x

        def backward(grads: Grads, node: Node) -> Grads:
            assert grads[0] is not None
            hook()
            return (grads[0].detach(),)

        out = x.detach()
        out.node = Node(self.tape, (x,), backward)
        return out
