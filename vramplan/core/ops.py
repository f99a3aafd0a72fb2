"""The operations a decoder block is made of: what each allocates, saves for backward and passes back.

Every function plays one call of torch, transformers, PEFT or bitsandbytes as it runs on CUDA under bf16 autocast, in
the order of its kernels. Sources: derivatives.yaml and ATen of torch 2.13, bitsandbytes 0.50.2 autograd/_functions.py
and backends/cuda/ops.py, peft 0.21 tuners/lora/bnb.py. Python variables have the names and lifetimes of the originals:
a local that keeps a tensor alive there keeps it alive here.
"""

from __future__ import annotations

from collections.abc import Sequence

from .tape import Leaf, Node, Tape, Tensor
from .types import Unplannable

Grads = Sequence[Tensor | None]
BF16, FP32 = "bfloat16", "float32"


def wider(a: str, b: str) -> str:
    return FP32 if FP32 in (a, b) else a


# ------------------------------------------------------------------------------------------------- elementwise
def like(tape: Tape, x: Tensor, name: str, columns: int | None = None, dtype: str = "") -> Tensor:
    """A new tensor that lies in memory as x does: what elementwise kernels return (ATen TensorIterator)."""
    out = tape.new(name, x.rows, x.columns if columns is None else columns, dtype or x.dtype)
    out.by_head = x.by_head
    return out


def cast(tape: Tape, x: Tensor, dtype: str, name: str = "cast") -> Tensor:
    """`x.to(dtype)`: a copy, or x itself."""
    if x.dtype == dtype:
        return x
    source = x.dtype
    node = None
    if x.node is not None:
        node = Node(tape, (x,), lambda g, n: (cast_data(tape, _first(g), source, "gradient cast"),))
    out = like(tape, x, name, dtype=dtype)
    out.node = node
    return out


def cast_data(tape: Tape, x: Tensor, dtype: str, name: str) -> Tensor:
    """A cast outside the graph."""
    return x if x.dtype == dtype else like(tape, x, name, dtype=dtype)


def _first(grads: Grads) -> Tensor:
    grad = grads[0]
    assert grad is not None
    return grad


def unary(tape: Tape, x: Tensor, name: str, *, saves: str = "none", columns: int | None = None) -> Tensor:
    """neg, silu, mul by a number, ...: `saves` is "input", "result" or "none"; `columns` for reductions."""
    node = None
    if x.node is not None:
        rows, wide = x.rows, x.columns

        def backward(g: Grads, n: Node) -> Grads:
            grad = _first(g)
            saved = n.take(0) if saves != "none" else None
            result = tape.new("gradient of " + name, rows, wide, grad.dtype)
            result.by_head = grad.by_head
            del saved
            return (result,)

        node = Node(tape, (x,), backward, (x,) if saves == "input" else ())
    out = like(tape, x, name, columns)
    if node is not None:
        if saves == "result":
            node.save(tape, out)
        out.node = node
    return out


def square(tape: Tape, x: Tensor, name: str = "square") -> Tensor:
    """`x.pow(2)`, or of another number; backward is `grad * (2 * x.pow(1))`, three full tensors at once."""
    node = None
    if x.node is not None:
        rows, columns = x.rows, x.columns

        def backward(g: Grads, n: Node) -> Grads:
            held = n.take(0)
            power = tape.new("x to the exponent - 1", rows, columns, FP32)
            twice = tape.new("exponent * that", rows, columns, FP32)
            grad = tape.new("gradient of " + name, rows, columns, FP32)
            grad.by_head = _first(g).by_head
            del power, twice, held
            return (grad,)

        node = Node(tape, (x,), backward, (x,))
    out = like(tape, x, name)
    out.node = node
    return out


def activation(tape: Tape, x: Tensor, kind: str, name: str = "activation") -> Tensor:
    """`ACT2FN[kind](x)`: one kernel that saves its input, or what transformers' activations.py writes out.

    Raises Unplannable for those written out there and not here.
    """
    if kind in ("silu", "gelu", "gelu_tanh"):
        return unary(tape, x, name, saves="input")
    if kind == "relu":
        return unary(tape, x, name, saves="result")
    if kind != "gelu_new":
        raise Unplannable(f"the activation {kind!r} is not described yet", "known: silu, gelu, gelu_new, relu")
    half = unary(tape, x, "0.5 * x")
    inner = unary(tape, square(tape, cast(tape, x, FP32, "x in fp32"), "x^3"), "0.044715 * x^3")
    inner = add(tape, x, inner)
    inner = unary(tape, inner, "sqrt(2/pi) * sum")
    inner = unary(tape, inner, "tanh", saves="result")
    inner = plus_number(tape, inner, "1 + tanh")
    return mul(tape, half, inner, name)


def to_both(grads: Grads, node: Node) -> Grads:
    """The gradient as it is, to each input that wants one."""
    return [_first(grads).detach() if node.needs(i) else None for i in (0, 1)]


def add(tape: Tape, a: Tensor, b: Tensor, name: str = "sum") -> Tensor:
    """`a + b`; both get the same gradient."""
    node = None
    if a.node is not None or b.node is not None:
        node = Node(tape, (a, b), to_both)
    out = like(tape, a, name, dtype=wider(a.dtype, b.dtype))
    out.node = node
    return out


def plus_number(tape: Tape, x: Tensor, name: str) -> Tensor:
    """`x + number`: the gradient goes through as it is."""
    return clone(tape, x, name)


def add_(tape: Tape, a: Tensor, b: Tensor) -> Tensor:
    """`a += b`: the sum takes the place of a, in a's dtype."""
    if a.node is None and b.node is None:
        return a
    out = Tensor(a.storage, a.rows, a.columns, a.dtype, Node(tape, (a, b), to_both))
    out.by_head = a.by_head
    return out


def scale_(tape: Tape, x: Tensor, name: str) -> Tensor:
    """`x /= number`: in place; the gradient is a tensor of its own."""
    if x.node is None:
        return x
    node = Node(tape, (x,), lambda g, n: (like(tape, _first(g), f"gradient of {name}"),))
    out = Tensor(x.storage, x.rows, x.columns, x.dtype, node)
    out.by_head = x.by_head
    return out


def clamp_(tape: Tape, x: Tensor, name: str) -> Tensor:
    """`x.clamp_(min, max)`: autograd keeps a clone of x; the backward makes two masks and the gradient."""
    if x.node is None:
        return x
    rows, columns = x.rows, x.columns

    def backward(g: Grads, n: Node) -> Grads:
        held = n.take(0)
        zero = tape.new("0", 1, 1, _first(g).dtype)
        masks = [tape.new(f"{name} {where}", rows, columns, "bool") for where in (">= min", "<= max")]
        grad = like(tape, _first(g), f"gradient of {name} clamped")
        del held, masks, zero
        return (grad,)

    node = Node(tape, (x,), backward, (tape.new(f"{name} before clamp", rows, columns, x.dtype),))
    return Tensor(x.storage, rows, columns, x.dtype, node)


def mul(tape: Tape, a: Tensor, b: Tensor, name: str = "product") -> Tensor:
    """`a * b`; b may be smaller (broadcast). Saves what the other's gradient needs."""
    result = wider(a.dtype, b.dtype)
    node = None
    if a.node is not None or b.node is not None:
        saved = ([b] if a.node is not None else []) + ([a] if b.node is not None else [])
        count = len(saved)

        def backward(g: Grads, n: Node) -> Grads:
            held = [n.take(i) for i in range(count)]
            grad = _first(g)
            out = [like(tape, grad, "gradient of " + name) if n.needs(i) else None for i in (0, 1)]
            del held
            return out

        node = Node(tape, (a, b), backward, saved)
    out = like(tape, a, name, dtype=result)
    out.node = node
    return out


def dropout(tape: Tape, x: Tensor, p: float) -> Tensor:
    """`native_dropout`: a copy and a bool mask; the mask is saved."""
    if p == 0:
        return x
    node = None
    if x.node is not None:
        rows, columns = x.rows, x.columns

        def backward(g: Grads, n: Node) -> Grads:
            mask = n.take(0)
            grad = tape.new("gradient of dropout", rows, columns, _first(g).dtype)
            del mask
            return (grad,)

        node = Node(tape, (x,), backward)
    mask = tape.new("dropout mask", x.rows, x.columns, "bool")  # the mask first: native/cuda/Dropout.cu
    out = like(tape, x, "dropout")
    if node is not None:
        node.save(tape, mask)
        out.node = node
    return out


# -------------------------------------------------------------------------------------------------------- linear
def linear(tape: Tape, x: Tensor, weight: Tensor, name: str, bias: bool = False) -> Tensor:
    """`F.linear` under bf16 autocast with a weight [out, in] that is frozen (no node) or trainable.

    A float32 input or weight is copied to bf16 first; autocast keeps the copies of trainable weights until it ends.
    """
    source = x  # the caller's, until this returns; the compiler evaluates the arguments from the right
    vector = tape.new(name + " bias in bf16", 1, weight.rows, BF16) if bias and weight.dtype != BF16 else None
    w = _autocast_weight(tape, weight, name)
    x = _autocast_input(tape, x, name)
    node = None
    if x.node is not None or w.node is not None:
        rows, n_in, n_out = x.rows, x.columns, w.rows
        saved = ([w] if x.node is not None else []) + ([x] if w.node is not None else [])
        count = len(saved)

        def backward(g: Grads, n: Node) -> Grads:
            held = [n.take(i) for i in range(count)]
            out: list[Tensor | None] = [None, None]
            if n.needs(1):  # MmBackward0 computes mat2's gradient first
                out[1] = tape.new(f"gradient of {name} weight", n_out, n_in, BF16)
                tape.product()
            if n.needs(0):
                # the product is [tokens, in], and its view [batch, seq, in] goes on
                out[0] = tape.new(f"gradient of {name} input", rows, n_in, BF16).view_of_base()
                tape.product()
            del held
            return out

        node = Node(tape, (x, w), backward, saved)
    out = tape.new(name, x.rows, w.rows, BF16)
    tape.product(bias)
    del vector, source
    out.node = node
    return out


def _autocast_input(tape: Tape, x: Tensor, name: str) -> Tensor:
    """A copy in bf16, kept until autocast ends if x is a leaf that requires a gradient: the embedding's output, where
    a checkpointed first layer has no norm before it (autocast_mode.cpp, `cached_cast`)."""
    leaf = isinstance(x.node, Leaf) and x.node.variable is not None
    if x.dtype == BF16 or not leaf or tape.cast_cache is None:
        return cast(tape, x, BF16, name + " input in bf16")
    if id(x.node) not in tape.cast_cache:
        tape.cast_cache[id(x.node)] = cast(tape, x, BF16, name + " input in bf16")
    return tape.cast_cache[id(x.node)]


def _autocast_weight(tape: Tape, weight: Tensor, name: str) -> Tensor:
    if weight.dtype == BF16:
        return weight
    trainable = weight.node is not None and tape.cast_cache is not None
    if trainable and tape.cast_cache is not None and id(weight) in tape.cast_cache:
        return tape.cast_cache[id(weight)]
    key, tape.rec.scope = tape.rec.scope, "adapter.casts" if trainable else tape.rec.scope
    copy = cast(tape, weight, BF16, name + " weight in bf16")
    tape.rec.scope = key
    if trainable and tape.cast_cache is not None:
        tape.cast_cache[id(weight)] = copy
    return copy


def dequantised(tape: Tape, n_out: int, n_in: int, double_quant: bool, name: str, forward: bool) -> list[Tensor]:
    """A 4-bit weight in bf16 and the float32 absmax made on the way (bitsandbytes `dequantize_4bit`)."""
    key = "workspace.dequantised"
    held = []
    if double_quant:
        blocks = -(-n_out * n_in // 64)
        held.append(tape.new(name + " absmax in fp32", 1, blocks, FP32, key))
        if forward:  # the fallback of gemm_4bit adds the offset out of place and keeps both, dequantize_4bit in place
            held.append(tape.new(name + " absmax in fp32", 1, blocks, FP32, key))
    held.append(tape.new(name + " dequantised", n_out, n_in, BF16, key))
    return held


def linear4bit(
    tape: Tape, x: Tensor, n_out: int, *, name: str, double_quant: bool, fused: bool, bias: bool = False
) -> Tensor:
    """bitsandbytes `Linear4bit.forward` with compute dtype bf16: cast, `MatMul4Bit`, cast back.

    The forward dequantises unless the fused kernel is chosen; the backward always does. No activation is saved.
    """
    inp_dtype = x.dtype
    n_in = x.columns
    x = cast(tape, x, BF16, name + " input in bf16")
    node = None
    if x.node is not None:
        rows = x.rows

        def backward(g: Grads, n: Node) -> Grads:
            weight = dequantised(tape, n_out, n_in, double_quant, name, forward=False)
            if len(weight) > 1:
                del weight[0]  # dequantize_4bit returns: its absmax dies before the product
            grad = tape.new(f"gradient of {name} input", rows, n_in, BF16)
            tape.product()
            return (grad,)

        node = Node(tape, (x,), backward)
    weight = None if fused else dequantised(tape, n_out, n_in, double_quant, name, forward=True)
    out = tape.new(name, x.rows, n_out, BF16)
    if not fused:
        tape.product(bias)
    del weight
    out.node = node
    return cast(tape, out, inp_dtype, name + " in fp32")


def lora_linear4bit(
    tape: Tape,
    x: Tensor,
    n_out: int,
    lora: tuple[Tensor, Tensor] | None,
    *,
    name: str,
    p: float,
    double_quant: bool,
    fused: bool,
    bias: bool = False,
) -> Tensor:
    """peft `lora.bnb.Linear4bit.forward`: base, clone, B(A(dropout(x))) * scaling, sum."""
    result = linear4bit(tape, x, n_out, name=name, double_quant=double_quant, fused=fused, bias=bias)
    if lora is None:
        return result
    result = clone(tape, result, name + " clone")
    output = lora_output(tape, x, lora, name, p)
    return add(tape, result, output, name)


def lora_linear(
    tape: Tape,
    x: Tensor,
    weight: Tensor,
    lora: tuple[Tensor, Tensor] | None,
    *,
    name: str,
    p: float,
    bias: bool = False,
) -> Tensor:
    """peft `lora.Linear.forward` around Falcon's `FalconLinear`, which is not quantised.

    The base is `input @ weight.T` and a separate addition of the bias (modeling_falcon.py); there is no clone. PEFT
    casts x to the adapter's float32 also under autocast, which casts it back.
    """
    result = linear(tape, x, weight, name)
    if bias:
        result = add(tape, result, tape.constant(1, weight.rows, weight.dtype), name + " with bias")
    if lora is None:
        return result
    result_dtype = result.dtype
    x = cast(tape, x, lora[0].dtype, name + " input in the adapter's dtype")
    result = add(tape, result, lora_output(tape, x, lora, name, p), name)
    return cast(tape, result, result_dtype, name)


def lora_output(tape: Tape, x: Tensor, lora: tuple[Tensor, Tensor], name: str, p: float) -> Tensor:
    """`lora_B(lora_A(dropout(x))) * scaling`."""
    down = name + " lora_A"
    return unary(
        tape,
        linear(tape, linear(tape, dropout(tape, x, p), lora[0], down), lora[1], name + " lora_B"),
        name + " lora scaled",
    )


def clone(tape: Tape, x: Tensor, name: str) -> Tensor:
    """`x.clone()`, or a `reshape` that has to copy: the gradient goes through as it is."""
    node = None if x.node is None else Node(tape, (x,), lambda g, n: (_first(g).detach(),))
    out = like(tape, x, name)
    out.node = node
    return out
