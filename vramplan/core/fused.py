"""What `vramplan.train.fast` does, tensor by tensor: norms, rotary embedding, Linears with LoRA, the gated MLP.

Written like the code it imitates, with its variable names, because a name that is rebound frees a tensor. Which pieces
of a model are fused is said here once; the trainer asks its modules the same questions (`fast/install.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from . import architecture as arch
from .ops import BF16, FP32, Grads, _first, cast, like
from .parallel import shards
from .tape import Node, Tape, Tensor
from .types import Lora, ModelSpec, RunSpec

if TYPE_CHECKING:
    from .blocks import Player

# Families whose layer returns its residual plus its MLP's result: a recomputation need not know the latter.
SKIPS_LAST = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3", "granite", "ministral", "seed_oss")
TOGETHER = ("q_proj", "k_proj", "v_proj")  # Linears that attention calls with the same tensor
MLP_PARTS = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
OTHER_ROTARY = ("cohere", "cohere2", "glm", "glm4")  # turn neighbours, not halves
SHAPED = ("adafactor",)  # optimizers whose state depends on a parameter's shape: it must not be flat

# A huge weight is dequantised in pieces of at most this size, so that it never stands in bf16 as a whole.
SLICE_BYTES = 128 * 2**20
GRAPH_SPARE_BYTES = 256 * 2**20  # CUDA graphs are made where so much is left beside the activations that they hold
_ROWS = 64  # slices begin at multiples of it, so that every block of 64 weights lies in one


# --------------------------------------------------------------------------------------------- what is fused
def is_fused(spec: ModelSpec, run: RunSpec) -> bool:
    """Whether the layers of this run are fused; else they are transformers' and PEFT's own."""
    return (
        run.levers.kernels == "fused"
        and shards(run) == 1
        and run.levers.upcast == "none"
        and run.levers.optimizer not in SHAPED
        and run.lora.dropout == 0
        and not spec.num_experts
        and all(x.quantised for x in arch.layer_linears(spec))
    )


def graphed(spec: ModelSpec, run: RunSpec) -> bool:
    """Whether micro-steps that are short to run are started as one CUDA graph (`train/fast/graphs.py`).

    Rows of changing lengths seldom have the same shape twice, and what draws random numbers is not captured. Whether
    the card has room for it is another question: `speed.graphs_fit`.
    """
    one_shape = run.packing or not run.padding
    dropout = spec.residual_dropout or spec.embedding_dropout or spec.attention_dropout
    wanted = run.schedule.cuda_graphs and not run.schedule.full_determinism and run.levers.loss == "fused"
    return wanted and one_shape and not dropout and run.gpus == 1 and run.driver == "trainer" and is_fused(spec, run)


def fuses_norm(spec: ModelSpec) -> bool:
    return spec.norm in ("rmsnorm", "gemma_rmsnorm")


def fuses_rotary(spec: ModelSpec) -> bool:
    return spec.partial_rotary_factor == 1.0 and spec.model_type not in OTHER_ROTARY


def fuses_mlp(spec: ModelSpec) -> bool:
    names = {x.short for x in arch.layer_linears(spec)}
    dropout = spec.model_type == "seed_oss" and spec.residual_dropout > 0  # within the MLP
    return set(MLP_PARTS) <= names and spec.activation in ACTIVATIONS and not dropout


def skips_last(spec: ModelSpec) -> bool:
    """Whether a recomputation leaves out the MLP's last product."""
    return spec.model_type in SKIPS_LAST and fuses_mlp(spec)


def groups(spec: ModelSpec) -> list[tuple[str, ...]]:
    """The Linears of a layer, by those that are one operation."""
    names = [x.short for x in arch.layer_linears(spec)]
    out: list[tuple[str, ...]] = [part for part in (MLP_PARTS[:2], MLP_PARTS[2:]) if fuses_mlp(spec)]
    if set(TOGETHER) <= set(names):
        out.append(TOGETHER)
    taken = {name for group in out for name in group}
    return [*out, *((name,) for name in names if name not in taken)]


def adapter_shapes(spec: ModelSpec, run: RunSpec) -> list[tuple[int, int]]:
    """Shapes of what the optimizer steps in one layer: one flat tensor, or A and B of every adapted Linear."""
    shapes = lora_shapes(spec, run.lora)
    if shapes and is_fused(spec, run):
        return [(1, sum(rows * columns for rows, columns in shapes))]
    return shapes


def lora_shapes(spec: ModelSpec, lora: Lora) -> list[tuple[int, int]]:
    """A [r, in], then B [out, r], of every adapted Linear of a layer."""
    out = []
    for x in arch.lora_linears(spec, lora):
        out += [(lora.r, x.in_features), (x.out_features, lora.r)]
    return out


def slices(outputs: int, inputs: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the rows in which a weight [outputs, inputs] is dequantised to bf16."""
    most = max(_ROWS, SLICE_BYTES // (2 * inputs) // _ROWS * _ROWS)
    pieces = -(-outputs // most)
    rows = -(-outputs // pieces // _ROWS) * _ROWS
    for start in range(0, outputs, rows):
        yield start, min(start + rows, outputs)


# ------------------------------------------------------------------------------------- fast/flat.py, linear.py
class FlatLora:
    """All LoRA parameters of a layer in one tensor, whose gradient the backward writes itself."""

    def __init__(self, tape: Tape, spec: ModelSpec, lora: Lora) -> None:
        self.tape, self.lora = tape, lora
        self.adapted = {x.short for x in arch.lora_linears(spec, lora)}
        self.elements = sum(rows * columns for rows, columns in lora_shapes(spec, lora))
        self.grad: Tensor | None = None

    def gradients(self) -> None:
        if self.grad is None:
            self.grad = self.tape.new("gradient of the adapter", 1, self.elements, self.lora.dtype, "adapter.gradients")


class Group:
    """Linears with one input. `shapes` are theirs, `outs` those of the adapted ones."""

    def __init__(self, p: Player, names: Sequence[str]) -> None:
        self.p, self.tape, self.flat = p, p.tape, p.flat
        self.shapes = [p.linears[name] for name in names]
        self.inputs = self.shapes[0].in_features
        self.outs = [x.out_features for x in self.shapes if x.short in self.flat.adapted]
        self.rank = self.flat.lora.r

    def weights(self) -> Tensor:
        """A and B of the group in bf16."""
        elements = self.rank * (self.inputs * len(self.outs) + sum(self.outs))
        return self.tape.new("A and B in bf16", 1, elements, BF16, "adapter.casts")

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        halves = inner = None
        if self.outs:
            halves = self.weights()
            inner = self.tape.new("x A", x.rows, self.rank * len(self.outs), BF16)
            self.tape.product()
        outs = []
        for shape in self.shapes:
            outs.append(self.tape.new(shape.short, x.rows, shape.out_features, BF16))
            for _ in self._dequantised(shape):
                self.tape.product()
        del halves
        return outs, inner

    def _dequantised(self, shape: arch.Linear) -> Iterator[None]:
        for start, stop in slices(shape.out_features, shape.in_features):
            name = shape.short + " dequantised"
            weight = self.tape.new(name, stop - start, shape.in_features, BF16, "workspace.dequantised")
            yield
            del weight

    def inner_gradient(self, rows: int) -> Tensor:
        inner = self.tape.new("gradient of x A", rows, self.rank * len(self.outs), BF16)
        self.tape.product()
        return inner

    def input_gradient(self, rows: int) -> Tensor:
        total = self.tape.new(f"gradient of {self.shapes[0].short} input", rows, self.inputs, BF16)
        for shape in self.shapes:
            for _ in self._dequantised(shape):
                self.tape.product()
        return total

    def backward(self, rows: int, source: Tensor | None, normed: bool, needs_input: bool) -> Tensor | None:
        halves = inner_grad = None
        if self.outs:
            halves = self.weights()
            inner_grad = self.inner_gradient(rows)
            self.add_gradients(again(self.tape, source, normed))
        dx = self.input_gradient(rows) if needs_input else None
        del halves, inner_grad
        return dx

    def add_gradients(self, x: Tensor | None) -> None:
        self.flat.gradients()
        self.tape.product()


def again(tape: Tape, source: Tensor | None, normed: bool) -> Tensor | None:
    """The input of a product: what was saved, or the norm of it."""
    if not normed or source is None:
        return source
    y = tape.new("norm again", source.rows, source.columns, source.dtype)
    inverse = tape.new("1 / rms", 1, source.rows, FP32)
    del inverse
    return y


def linears(p: Player, names: Sequence[str], x: Tensor) -> list[Tensor]:
    """`fast/linear.py`: all results of a group for x."""
    tape, group = p.tape, Group(p, names)
    x = cast(tape, x, BF16, "input in bf16")
    source, normed = (x, False) if x.made_of is None else (x.made_of, True)
    rows, needed = x.rows, x.node is not None
    node = None
    if tape.recording and (group.outs or needed):

        def backward(g: Grads, n: Node) -> Grads:
            held = n.take_all()
            dx = group.backward(rows, held[0] if held else None, normed, n.needs(0))
            del held
            return (dx,)

        node = Node(tape, (x,), backward, outputs=len(names))
    outs, inner = group.forward(x)
    if node is not None and inner is not None:
        node.save(tape, source)
        node.save(tape, inner)
    for i, y in enumerate(outs):
        y.node, y.output = node, i
    return outs


# --------------------------------------------------------------------------------------------- fast/mlp.py
def gated_mlp(p: Player, x: Tensor) -> Tensor:
    """gate, up, act(gate) * up and down as one operation."""
    tape, first, second = p.tape, Group(p, MLP_PARTS[:2]), Group(p, MLP_PARTS[2:])
    x = cast(tape, x, BF16, "input in bf16")
    source, normed = (x, False) if x.made_of is None else (x.made_of, True)
    rows, skip = x.rows, p.skip
    saved_inner = bool(first.outs)
    node = None
    if tape.recording and (first.outs or second.outs or x.node is not None):

        def backward(g: Grads, n: Node) -> Grads:
            held = n.take_all()
            halves = inner_grad = product_inner = None
            if second.outs:
                halves = second.weights()
                inner_grad = second.inner_gradient(rows)
            product = second.input_gradient(rows)
            if second.outs:
                if skip:
                    product_inner = tape.new("(gate * up) A", rows, second.rank, BF16)
                    tape.product()
                second.add_gradients(product)
            del product, product_inner, inner_grad, halves
            dx = first.backward(rows, held[0], normed, n.needs(0))
            del held
            return (dx,)

        node = Node(tape, (x,), backward)
    (gate, up), inner = first.forward(x)
    product_inner = None
    if skip:
        y = tape.new("nothing in the place of down_proj", 1, 1, BF16)
        y = Tensor(y.storage, rows, second.shapes[0].out_features, BF16)
    else:
        (y,), product_inner = second.forward(tape.new("gate * up", rows, gate.columns, BF16))
    if node is not None:
        for t in (source, gate, up, inner if saved_inner else None, product_inner):
            if t is not None:
                node.save(tape, t)
        y.node = node
    return y


# --------------------------------------------------------------------------------- fast/norm.py, fast/rotary.py
def rms_norm(tape: Tape, x: Tensor) -> Tensor:
    """The norm of x, remembering what it was made of."""
    node = None
    if x.node is not None:
        rows, columns, dtype = x.rows, x.columns, x.dtype

        def backward(g: Grads, n: Node) -> Grads:
            held = n.take_all()
            grad = _first(g)
            if grad.by_head:
                grad = tape.new("gradient by token", rows, columns, grad.dtype)
            dx = tape.new("gradient of norm", rows, columns, dtype)
            del held, grad
            return (dx,)

        node = Node(tape, (x,), backward)
    y = tape.new("norm", x.rows, x.columns, x.dtype)
    inverse = tape.new("1 / rms", 1, x.rows, FP32)
    if node is not None:
        node.save(tape, x)
        node.save(tape, inverse)
        y.node = node
    y.made_of = x.detach()
    return y


def rotate(p: Player, x: Tensor, name: str) -> Tensor:
    """The halves of every head turned; saves the tables."""
    tape, node = p.tape, None
    if x.node is not None:

        def backward(g: Grads, n: Node) -> Grads:
            held = n.take_all()
            dx = like(tape, _first(g), f"gradient of {name}")
            del held
            return (dx,)

        node = Node(tape, (x,), backward)
    y = like(tape, x, name)
    if node is not None:
        node.save(tape, p.shared.cos)
        node.save(tape, p.shared.sin)
    y.node = node
    return y


# ------------------------------------------------------------------------------------------- fast/checkpoint.py
class HostInputs:
    """Layer inputs that wait in host memory: which of them are on the card."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.sent: list[int] = []
        self.leaving: tuple[int, Tensor] | None = None
        self.coming: tuple[int, Tensor] | None = None

    def send(self, index: int, x: Tensor) -> None:
        self.leaving = None
        self.leaving = (index, x.detach())
        self.sent.append(index)

    def fetch(self, index: int, like: Tensor) -> Tensor:
        if self.leaving is not None and self.leaving[0] == index:
            x = self.leaving[1]
            self.leaving = None
        else:
            assert self.coming is not None
            x = self.coming[1]
        self.coming = None
        self.sent.remove(index)
        if self.sent:
            name = "layer input back from the host"
            back = self.tape.new(name, like.rows, like.columns, like.dtype, "activations.checkpoints")
            self.coming = (self.sent[-1], back)
        return x


def checkpoint(p: Player, index: int, layer: object, x: Tensor, host: HostInputs | None) -> Tensor:
    """Run `layer` without a graph, keeping its input; its backward runs it again."""
    assert callable(layer)
    tape = p.tape
    shape = Tensor(None, x.rows, x.columns, x.dtype)

    def backward(g: Grads, n: Node) -> Grads:
        saved = n.take(0) if host is None else host.fetch(index, shape)
        again = saved.detach()
        leaf = again.node = tape.leaf(again) if n.needs(0) else None
        scope, tape.rec.scope = tape.rec.scope, "activations.layers"
        p.skip = skips_last(p.spec)
        out = layer(again)
        p.skip = False
        tape.rec.scope = scope
        end = out.node
        del out
        tape.backward_from(end, _first(g))
        dx = leaf.grad if leaf is not None else None
        del saved, again, leaf
        return (dx,)

    node = Node(tape, (x,), backward)
    if host is None:
        node.save(tape, x)
    else:
        host.send(index, x)
    tape.recording = False
    try:
        out: Tensor = layer(x.detach())
    finally:
        tape.recording = True
    out = Tensor(out.storage, out.rows, out.columns, out.dtype, node)
    return out
