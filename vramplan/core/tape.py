"""A miniature autograd: shapes without data, so that a training step can be played in plain Python.

The player's code reads like the code it imitates, and its objects die when the real ones die: a `Storage` writes its
own birth and, when CPython drops the last reference to it, its death. `backward` walks the graph in the order of
torch's engine (highest sequence number first, gradients of one input summed in place where torch does) and releases
each node's saved tensors after the node has run (torch/csrc/autograd/engine.cpp).
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Sequence

GRANULE = 512  # the CUDA caching allocator rounds every request up to this

# Workspace of one cuBLAS handle and stream (aten/src/ATen/cuda/CublasHandlePool.cpp): 32 MiB on Hopper, else
# ":4096:2:16:8"; the one cuBLASLt uses for a bias.
CUBLAS_WORKSPACE_BYTES = {9: 32 * 2**20}
DEFAULT_CUBLAS_WORKSPACE_BYTES = 8_519_680
CUBLASLT_WORKSPACE_BYTES = 2**20
WORKSPACE_KEY = "workspace.cublas"

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}


class Recorder:
    """The list of events: +i is the birth of storage i, -i its death. `info[i]` tells what it is.

    `info` rows are (key, name, rows, columns, dtype, bytes): key is the ledger line, bytes are rounded to 512.
    `marks` are (position in events, phase or section name) pairs.
    """

    def __init__(self) -> None:
        self.events: list[int] = []
        self.info: list[tuple[str, str, int, int, str, int]] = [("", "", 0, 0, "", 0)]
        self.marks: list[tuple[int, str]] = []
        self.sizes: dict[tuple[int, int, str], int] = {}  # bytes by rows, columns and dtype
        self.scope = ""  # the ledger key that new tensors get
        self.module = ""  # prefix of their names
        self.sequence = 0

    def relabel(self, tensor: Tensor, key: str, name: str = "") -> None:
        """Count a tensor under another ledger line, once it turns out what it is kept for."""
        if tensor.storage is not None:
            row = self.info[tensor.storage.ident]
            self.info[tensor.storage.ident] = (key, name or row[1], *row[2:])

    def mark(self, name: str) -> None:
        self.marks.append((len(self.events), name))


class Storage:
    __slots__ = ("__weakref__", "events", "ident")

    def __init__(self, rec: Recorder, name: str, rows: int, columns: int, dtype: str, key: str) -> None:
        size = rec.sizes.get((rows, columns, dtype))
        if size is None:
            size = -(-(rows * columns * DTYPE_BYTES[dtype]) // GRANULE) * GRANULE
            rec.sizes[rows, columns, dtype] = size
        ident = self.ident = len(rec.info)
        rec.info.append((key or rec.scope, rec.module + name, rows, columns, dtype, size))
        events = self.events = rec.events
        events.append(ident)

    def __del__(self) -> None:
        self.events.append(-self.ident)


class Tensor:
    """A tensor of `rows` x `columns` elements. `node` made it; None for constants, a leaf's node accumulates.

    `base` is the tensor that a view of torch's keeps alive, and by which it does not own its storage alone. `by_head`:
    [B, h, S, D] lies so in memory; else it is the transposed view of heads that lie token by token, [B, S, h, D].
    """

    __slots__ = ("__weakref__", "base", "by_head", "columns", "dtype", "made_of", "node", "output", "rows", "storage")

    def __init__(
        self, storage: Storage | None, rows: int, columns: int, dtype: str, node: Node | None = None, output: int = 0
    ) -> None:
        self.storage = storage  # None: resident, counted elsewhere
        self.base: Tensor | None = None
        self.made_of: Tensor | None = None  # the input of the fused norm whose result it is
        self.by_head = False
        self.rows = rows
        self.columns = columns
        self.dtype = dtype
        self.node = node
        self.output = output

    def view(self, rows: int, columns: int) -> Tensor:
        """The same storage in another shape; the view node saves nothing and is left out."""
        return Tensor(self.storage, rows, columns, self.dtype, self.node, self.output)

    def view_of_base(self) -> Tensor:
        """`self.view(...)` outside the graph, which refers to `self`."""
        view = Tensor(self.storage, self.rows, self.columns, self.dtype)
        view.base = self
        return view

    def detach(self) -> Tensor:
        tensor = Tensor(self.storage, self.rows, self.columns, self.dtype)
        tensor.by_head = self.by_head
        return tensor


class Slot:
    """A saved tensor: held directly, or (checkpointing) found again by recomputing."""

    __slots__ = ("frame", "index", "tensor")

    def __init__(self, tensor: Tensor | None, frame: Frame | None = None, index: int = 0) -> None:
        self.tensor = tensor
        self.frame = frame
        self.index = index

    def get(self) -> Tensor:
        if self.frame is not None:
            return self.frame.unpack(self.index)
        assert self.tensor is not None
        return self.tensor


Backward = Callable[[Sequence["Tensor | None"], "Node"], "Sequence[Tensor | None]"]


class Node:
    """One backward function. `edges` are (node, output, rows, columns, dtype) per input, None where none goes."""

    __slots__ = ("edges", "fn", "layer", "outputs", "saved", "sequence")

    def __init__(
        self, tape: Tape, inputs: Sequence[Tensor | None], fn: Backward, saved: Sequence[Tensor] = (), outputs: int = 1
    ) -> None:
        self.layer = tape.layer
        self.edges = [
            None if t is None or t.node is None else (t.node, t.output, t.rows, t.columns, t.dtype) for t in inputs
        ]
        self.fn: Backward | None = fn
        self.saved: list[Slot] | None = [tape.pack(t) for t in saved]
        self.outputs = outputs
        tape.rec.sequence += 1
        self.sequence = tape.rec.sequence

    def save(self, tape: Tape, tensor: Tensor) -> None:
        """Save a result: torch packs those after the kernel has run, arguments before."""
        assert self.saved is not None
        self.saved.append(tape.pack(tensor))

    def take(self, index: int) -> Tensor:
        """Saved tensor number `index`, unpacked (which may recompute a checkpointed layer)."""
        assert self.saved is not None
        return self.saved[index].get()

    def take_all(self) -> list[Tensor]:
        assert self.saved is not None
        return [slot.get() for slot in self.saved]

    def needs(self, index: int) -> bool:
        return self.edges[index] is not None


class Leaf(Node):
    """AccumulateGrad: keeps the gradient of a parameter, or of inputs that were told to require one."""

    __slots__ = ("grad", "name", "tape", "variable")

    def __init__(self, tape: Tape, name: str = "", variable: Tensor | None = None) -> None:
        super().__init__(tape, (), _no_backward)
        self.sequence = sys.maxsize  # torch runs these first
        self.grad: Tensor | None = None
        self.name = name
        self.tape = tape
        self.variable = variable  # the graph keeps its leaves alive

    def accumulate(self, grad: Tensor) -> None:
        """The first gradient is kept as it is (stolen), later ones are added to it."""
        if self.grad is None:
            self.grad = grad
            if self.name:
                self.tape.rec.relabel(grad, "adapter.gradients", f"gradient of {self.name}")


def _no_backward(grads: Sequence[Tensor | None], node: Node) -> Sequence[Tensor | None]:
    raise AssertionError("a leaf has no backward function")


class StopRecomputation(Exception):
    """Raised when the last tensor that the backward needs has been recomputed (checkpoint's early stop)."""


class Frame:
    """One non-reentrant checkpoint (torch/utils/checkpoint.py, _CheckpointFrame)."""

    __slots__ = ("count", "done", "fn", "input", "offloaded", "recomputed", "tape")

    def __init__(self, tape: Tape, fn: Callable[[Tensor], Tensor], x: Tensor, offload: bool) -> None:
        self.tape = tape
        self.fn = fn
        self.input = Tensor(None, x.rows, x.columns, x.dtype, x.node) if offload else x
        self.offloaded = offload
        self.count = 0
        self.recomputed: dict[int, Tensor] = {}
        self.done = False

    def unpack(self, index: int) -> Tensor:
        if not self.done:
            self.done = True
            self.tape.recompute(self)
        return self.recomputed.pop(index)


def workspace_bytes(capability: tuple[int, int]) -> int:
    """Of one cuBLAS handle and stream."""
    return CUBLAS_WORKSPACE_BYTES.get(capability[0], DEFAULT_CUBLAS_WORKSPACE_BYTES)


class Tape:
    """Plays operations and their gradients against a `Recorder`."""

    def __init__(self, rec: Recorder, capability: tuple[int, int] = (8, 9)) -> None:
        self.rec = rec
        self.workspace_bytes = workspace_bytes(capability)
        self.workspaces: dict[tuple[str, bool], Tensor] = {}
        self.in_backward = False  # torch runs it in a thread with cuBLAS handles of its own
        self.frame: Frame | None = None  # being run for the first time: saved tensors are dropped
        self.replay: tuple[Frame, list[int]] | None = None  # being recomputed
        self.cast_cache: dict[int, Tensor] | None = None  # autocast's copies of trainable weights
        self.recording = True  # False: under no_grad, fused operations make no nodes
        self.layer = -1  # decoder layer being played; -1 outside

    # ------------------------------------------------------------------------------------------------- birth
    def new(self, name: str, rows: int, columns: int, dtype: str, key: str = "") -> Tensor:
        return Tensor(Storage(self.rec, name, rows, columns, dtype, key), rows, columns, dtype)

    def constant(self, rows: int, columns: int, dtype: str) -> Tensor:
        """A tensor that is resident anyway: a frozen weight, an embedding table."""
        return Tensor(None, rows, columns, dtype)

    def parameter(self, rows: int, columns: int, dtype: str, name: str) -> Tensor:
        return Tensor(None, rows, columns, dtype, Leaf(self, name))

    def leaf(self, variable: Tensor) -> Leaf:
        """What makes a detached input collect its gradient."""
        return Leaf(self, variable=variable.detach())

    def product(self, bias: bool = False) -> None:
        """Note a matrix product: a thread's first one makes a cuBLAS workspace that stays (cuBLASLt's for a bias)."""
        for name, size in (("cublas", self.workspace_bytes), ("cublaslt", CUBLASLT_WORKSPACE_BYTES)):
            if (name == "cublas" or bias) and (name, self.in_backward) not in self.workspaces:
                thread = "backward" if self.in_backward else "forward"
                text = f"{name} workspace, {thread} thread"
                self.workspaces[name, self.in_backward] = self.new(text, 1, size, "uint8", WORKSPACE_KEY)

    # ---------------------------------------------------------------------------------------------- checkpoints
    def pack(self, tensor: Tensor) -> Slot:
        if self.frame is not None:
            slot = Slot(None, self.frame, self.frame.count)
            self.frame.count += 1
            return slot
        if self.replay is not None:
            frame, counter = self.replay
            frame.recomputed[counter[0]] = tensor.detach()
            counter[0] += 1
            if counter[0] == frame.count:
                raise StopRecomputation
        return Slot(tensor.detach())

    def checkpoint(self, fn: Callable[[Tensor], Tensor], x: Tensor, offload: bool = False) -> Tensor:
        """Run `fn`, keeping only its input: on the card, or (`offload`) in pinned host memory."""
        frame = Frame(self, fn, x, offload)
        self.frame = frame
        try:
            return fn(x)
        finally:
            self.frame = None

    def recompute(self, frame: Frame) -> None:
        cache, self.cast_cache = self.cast_cache, {}
        scope = self.rec.scope
        x = frame.input.detach()
        if frame.offloaded:
            x = self.new("layer input back from the host", x.rows, x.columns, x.dtype, "activations.checkpoints")
        if frame.input.node is not None:
            # the recomputation has no history beyond its input; a leaf is one here too
            x.node = Leaf(self, variable=getattr(frame.input.node, "variable", None))
        self.replay = (frame, [0])
        try:
            frame.fn(x)
        except StopRecomputation:
            pass
        finally:
            self.replay = None
        self.cast_cache = cache
        self.rec.scope = scope

    # ------------------------------------------------------------------------------------------------- backward
    def backward(self, root: Tensor, grad: Tensor) -> None:
        """Run the graph behind `root`. The caller must hold no other reference to `grad`."""
        node, output = root.node, root.output
        assert node is not None and output == 0
        del root
        self.backward_from(node, grad)

    def backward_from(self, root: Node, grad: Tensor) -> None:
        """Run the graph behind a node of one output; also within the backward of another node."""
        waiting = _dependencies(root)
        buffers: dict[Node, list[Tensor | None]] = {root: [grad]}
        del grad
        ready = [(-root.sequence, id(root), root)]
        while ready:
            node = heapq.heappop(ready)[2]
            if node.layer != self.layer:
                self.layer = node.layer
                self.rec.mark(f"backward {node.layer}")
            for edge, result in zip(node.edges, self._run(node, buffers), strict=True):
                if edge is None:
                    continue
                target = edge[0]
                if result is not None:
                    _accumulate(self, buffers, target, edge[1], result)
                waiting[target] -= 1
                if waiting[target] == 0 and target in buffers:
                    if isinstance(target, Leaf):
                        (kept,) = buffers.pop(target)
                        assert kept is not None
                        target.accumulate(kept)
                        kept = None
                    else:
                        heapq.heappush(ready, (-target.sequence, id(target), target))
                result = None

    def _run(self, node: Node, buffers: dict[Node, list[Tensor | None]]) -> list[Tensor | None]:
        assert node.fn is not None
        grads = buffers.pop(node)  # call_function of the engine keeps them until it has validated the outputs
        results = list(node.fn(grads, node))
        for i, edge in enumerate(node.edges):  # validate_outputs: reduce to the input's shape, cast to its dtype
            grad = results[i] if i < len(results) else None
            if edge is None or grad is None:
                continue
            same = grad.rows is edge[2] and grad.columns is edge[3]  # mostly, and quickly said
            if not same and grad.rows * grad.columns != edge[2] * edge[3]:
                by_head = grad.by_head
                grad = self.new("gradient summed", edge[2], edge[3], grad.dtype)
                grad.by_head = by_head
            if grad.dtype != edge[4]:
                by_head = grad.by_head
                grad = self.new("gradient cast", edge[2], edge[3], edge[4])
                grad.by_head = by_head
            results[i] = grad
        node.saved = None
        node.fn = None
        return results


def _dependencies(root: Node) -> dict[Node, int]:
    """How many gradients each node waits for."""
    counts = {root: 0}
    stack = [root]
    while stack:
        for edge in stack.pop().edges:
            if edge is not None:
                target = edge[0]
                if target not in counts:
                    counts[target] = 0
                    stack.append(target)
                counts[target] += 1
    return counts


# references to a gradient that only a buffer holds: the list, the local name, getrefcount's argument
_SOLE = 3


def _accumulate(tape: Tape, buffers: dict[Node, list[Tensor | None]], node: Node, output: int, grad: Tensor) -> None:
    slots = buffers.setdefault(node, [None] * node.outputs)
    held = slots[output]
    if held is None:
        slots[output] = grad
        return
    # in place when nobody else sees the first gradient (input_buffer.cpp, can_accumulate_inplace)
    if sys.getrefcount(held) <= _SOLE and sys.getrefcount(held.storage) <= _SOLE - 1:
        return
    total = tape.new("gradient sum", held.rows, held.columns, held.dtype)
    total.by_head = held.by_head
    slots[output] = total
