"""Norms as transformers 5.17 writes them out, and `F.layer_norm`: what each allocates, saves and passes back."""

from __future__ import annotations

from .ops import BF16, FP32, Grads, _first, cast, like, mul, plus_number, square, unary
from .tape import Node, Tape, Tensor


def mean_last(tape: Tape, x: Tensor) -> Tensor:
    """`x.mean(-1, keepdim=True)`; its backward expands (a view) and divides (a full tensor)."""
    return unary(tape, x, "mean", columns=1)


def rsqrt(tape: Tape, x: Tensor) -> Tensor:
    """`torch.rsqrt(x)`; the backward is `-0.5 * grad * result.pow(3)`."""
    node = None
    if x.node is not None:
        rows, columns = x.rows, x.columns

        def backward(g: Grads, n: Node) -> Grads:
            result = n.take(0)
            power = tape.new("rsqrt^3", rows, columns, FP32)
            half = tape.new("-0.5 * gradient", rows, columns, FP32)
            grad = tape.new("gradient of rsqrt", rows, columns, FP32)
            del result, power, half
            return (grad,)

        node = Node(tape, (x,), backward)
    out = tape.new("rsqrt", x.rows, x.columns, FP32)
    if node is not None:
        node.save(tape, out)
        out.node = node
    return out


def rmsnorm(tape: Tape, hidden_states: Tensor, weight: str, gemma: bool = False, late_cast: bool = False) -> Tensor:
    """`LlamaRMSNorm.forward`, `Gemma2RMSNorm.forward`, `Olmo2RMSNorm.forward` (`late_cast`: weight first, then cast).

    `weight` is the dtype of the norm's weight.
    """
    input_dtype = hidden_states.dtype
    if gemma:
        output = _gemma_norm(tape, cast(tape, hidden_states, FP32, "norm input in fp32"))
        copy = tape.new("norm weight in fp32", 1, output.columns, FP32) if weight == BF16 else None
        scale = tape.new("1 + weight", 1, output.columns, FP32)
        del copy
        output = mul(tape, output, scale, "norm scaled")
        del scale
        return cast(tape, output, input_dtype, "norm")
    hidden_states = cast(tape, hidden_states, FP32, "norm input in fp32")
    variance = mean_last(tape, square(tape, hidden_states))
    hidden_states = mul(tape, hidden_states, rsqrt(tape, plus_number(tape, variance, "variance + eps")), "normed")
    frozen = tape.constant(1, hidden_states.columns, weight)
    if late_cast:
        return cast(tape, mul(tape, hidden_states, frozen, "norm in fp32"), input_dtype, "norm")
    return mul(tape, cast(tape, hidden_states, input_dtype, "normed in bf16"), frozen, "norm")


def _gemma_norm(tape: Tape, x: Tensor) -> Tensor:
    return mul(tape, x, rsqrt(tape, plus_number(tape, mean_last(tape, square(tape, x)), "variance + eps")), "normed")


def cohere_norm(tape: Tape, hidden_states: Tensor, weight: str, heads: int = 1) -> Tensor:
    """`CohereLayerNorm.forward`: a layer norm without bias written out in float32 and cast back.

    `heads`: how many rows of weights there are, for the norm of q or k.
    """
    input_dtype, columns = hidden_states.dtype, hidden_states.columns
    hidden_states = cast(tape, hidden_states, FP32, "norm input in fp32")
    mean = mean_last(tape, hidden_states)
    variance = mean_last(tape, square(tape, subtract(tape, hidden_states, mean, "centred")))
    hidden_states = mul(
        tape,
        subtract(tape, hidden_states, mean, "centred"),
        rsqrt(tape, plus_number(tape, variance, "variance + eps")),
        "normed",
    )
    scale = tape.constant(1, columns, FP32)
    if weight == BF16:
        scale = tape.new("norm weight in fp32", heads, columns, FP32)
    hidden_states = mul(tape, hidden_states, scale, "norm in fp32")
    del scale
    return cast(tape, hidden_states, input_dtype, "norm")


def subtract(tape: Tape, a: Tensor, b: Tensor, name: str) -> Tensor:
    """`a - b` with b [rows, 1]: its gradient is negated in full before it is summed."""
    node = None
    if a.node is not None or b.node is not None:

        def backward(g: Grads, n: Node) -> Grads:
            grad = _first(g)
            negative = like(tape, grad, f"- gradient of {name}") if n.needs(1) else None
            return grad.detach() if n.needs(0) else None, negative

        node = Node(tape, (a, b), backward)
    out = like(tape, a, name)
    out.node = node
    return out


def layernorm(tape: Tape, x: Tensor, weight: str, bias: bool = True) -> Tensor:
    """`F.layer_norm` under autocast: float32 in and out on CUDA; saves its float32 arguments, mean and 1/std.

    `weight` is the dtype of weight and bias; "" if there is neither (OLMo).
    """
    source = x  # the caller's, until this returns; the compiler evaluates the arguments from the right
    casts = [tape.new("norm weight in fp32", 1, x.columns, FP32) for _ in range(1 + bias) if weight == BF16]
    x = cast(tape, x, FP32, "norm input in fp32")
    node = None
    if x.node is not None:
        rows, columns = x.rows, x.columns

        def backward(g: Grads, n: Node) -> Grads:
            held = n.take_all()
            grad = tape.new("gradient of norm", rows, columns, FP32)
            del held
            return (grad,)

        node = Node(tape, (x,), backward, (x, *casts))
    out = tape.new("norm", x.rows, x.columns, FP32)
    stats = [tape.new("norm statistics", x.rows, 1, FP32) for _ in range(2)]
    if node is not None:
        for t in stats:
            node.save(tape, t)
        out.node = node
    del source
    return out
