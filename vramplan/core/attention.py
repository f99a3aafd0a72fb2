"""Attention as CUDA runs it: rotary embedding, the kernels behind `scaled_dot_product_attention`, and eager.

Sources: transformers 5.17 (`apply_rotary_pos_emb`, `eager_attention_forward`, `sdpa_attention_forward`), ATen
native/transformers/cuda (sdp_utils.cpp for the choice of kernel; flash_api.cpp `mha_bwd` for its scratch), checked
against the measured rows.
"""

from __future__ import annotations

from typing import NamedTuple

from .ops import BF16, FP32, Grads, _first, add, cast, clone, dropout, mul, unary
from .tape import GRANULE, Node, Tape, Tensor
from .units import round_up


class Heads(NamedTuple):
    """Shape of one attention call: B sequences of S tokens, `query` heads on `key` heads of `dim` channels."""

    batch: int
    seq: int
    query: int
    key: int
    dim: int


# ------------------------------------------------------------------------------------------------------- views
def narrow(tape: Tape, x: Tensor, columns: int, name: str) -> Tensor:
    """`x[..., a:b]`: a view; its backward writes the gradient into a full tensor of zeros."""
    node = None
    if x.node is not None:
        rows, wide = x.rows, x.columns
        node = Node(tape, (x,), lambda g, n: (tape.new(f"gradient of {name} slice", rows, wide, _first(g).dtype),))
    return Tensor(x.storage, x.rows, columns, x.dtype, node)


def pick(tape: Tape, x: Tensor, columns: int, name: str) -> Tensor:
    """`x[..., [i], :]`: a list as index copies; its backward adds the gradient into a full tensor of zeros."""
    return clone(tape, narrow(tape, x, columns, name), name)


def chunk(tape: Tape, x: Tensor, parts: int, name: str) -> list[Tensor]:
    """`x.chunk(parts, -1)`: views; the backward concatenates the gradients."""
    columns = x.columns // parts
    node = None
    if x.node is not None:
        rows, wide, dtype = x.rows, x.columns, x.dtype
        node = Node(tape, (x,), lambda g, n: (tape.new(f"gradient of {name}", rows, wide, dtype),), outputs=parts)
    return [Tensor(x.storage, x.rows, columns, x.dtype, node, i) for i in range(parts)]


def concatenate(tape: Tape, parts: list[Tensor], name: str) -> Tensor:
    """`torch.cat(parts, -1)`; the gradients of the parts are views of one tensor."""
    node = None
    if any(t.node is not None for t in parts):
        widths = [(t.rows, t.columns) for t in parts]
        node = Node(tape, parts, lambda g, n: [Tensor(_first(g).storage, r, c, _first(g).dtype) for r, c in widths])
    out = tape.new(name, parts[0].rows, sum(t.columns for t in parts), parts[0].dtype)
    out.node = node
    return out


# ------------------------------------------------------------------------------------------------------ rotary
def rotate_half(tape: Tape, x: Tensor) -> Tensor:
    x1 = narrow(tape, x, x.columns // 2, "rotary")
    x2 = narrow(tape, x, x.columns // 2, "rotary")
    return concatenate(tape, [unary(tape, x2, "rotary -x2"), x1], "rotary rotated")


def rotary(
    tape: Tape,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    share: float = 1.0,
    joined: bool = False,
    cast_back: bool = False,
    in_fp32: bool = False,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb`; `share` of each head is turned (GPT-NeoX, StableLM, Phi turn a part).

    `joined`: turned and other part are concatenated, also where the other part is empty (Phi-3).

    `cast_back`: cos and sin are float32 and the result is cast to the type of q and k (OLMo-2); with `in_fp32`, q and k
    are first cast themselves (Cohere).

    `interleaved`: every call makes tables of its own, each entry twice (GLM).
    """
    if interleaved:
        cos = tape.new("cos interleaved", cos.rows, cos.columns, cos.dtype)
        sin = tape.new("sin interleaved", sin.rows, sin.columns, sin.dtype)
    if cast_back:
        q_type, k_type = q.dtype, k.dtype
        if in_fp32:
            q, k = cast(tape, q, FP32, "q in fp32"), cast(tape, k, FP32, "k in fp32")
        q_embed, k_embed = rotary(tape, q, k, cos, sin, share=share)
        return cast(tape, q_embed, q_type, "q rotary"), cast(tape, k_embed, k_type, "k rotary")
    if share == 1.0 and not joined:
        q_embed = add(tape, mul(tape, q, cos, "q cos"), mul(tape, rotate_half(tape, q), sin, "q sin"), "q rotary")
        k_embed = add(tape, mul(tape, k, cos, "k cos"), mul(tape, rotate_half(tape, k), sin, "k sin"), "k rotary")
        return q_embed, k_embed
    turned = [round(t.columns * share) for t in (q, k)]
    q_rot, q_pass = narrow(tape, q, turned[0], "q rotary"), narrow(tape, q, q.columns - turned[0], "q pass")
    k_rot, k_pass = narrow(tape, k, turned[1], "k rotary"), narrow(tape, k, k.columns - turned[1], "k pass")
    q_embed = add(tape, mul(tape, q_rot, cos, "q cos"), mul(tape, rotate_half(tape, q_rot), sin, "q sin"), "q rotary")
    k_embed = add(tape, mul(tape, k_rot, cos, "k cos"), mul(tape, rotate_half(tape, k_rot), sin, "k sin"), "k rotary")
    q_embed = concatenate(tape, [q_embed, q_pass], "q rotary")
    k_embed = concatenate(tape, [k_embed, k_pass], "k rotary")
    return q_embed, k_embed


# ------------------------------------------------------------------------------------------------------ kernels
def kernel_for(
    capability: tuple[int, int], heads: Heads, masked: bool, *, gqa: bool = True, dropout: float = 0.0
) -> str:
    """Which backend `scaled_dot_product_attention` takes for bf16 inputs (torch 2.11 to 2.13, sdp_utils.cpp).

    cuDNN takes a dropout of whole sixteenths only. Without `gqa` (Falcon does not say `enable_gqa`) no fused kernel
    takes fewer key heads than query heads.
    """
    if not gqa and heads.query != heads.key:
        return "math"
    if capability[0] in (9, 10) and heads.dim <= 128 and heads.dim % 8 == 0 and dropout * 16 % 1 == 0:
        return "cudnn"
    if capability[0] >= 8 and not masked and heads.dim <= 256:
        return "flash"
    if heads.dim % 8 == 0 and (masked or heads.query == heads.key):
        return "efficient"
    return "math"


def sdpa(tape: Tape, q: Tensor, k: Tensor, v: Tensor, heads: Heads, kernel: str, mask: Tensor | None) -> Tensor:
    """One fused attention call: saves q, k, v, the output and the log-sum-exp; its backward needs scratch."""
    q, k, v = (cast(tape, t, BF16, "attention input in bf16") for t in (q, k, v))
    bias = None
    if kernel == "math":
        return sdpa_math(tape, q, k, v, heads, mask)
    if mask is not None:  # use_gqa_in_sdpa: a mask turns grouped queries off
        k, v = repeat_kv(tape, k, heads), repeat_kv(tape, v, heads)
        bias = additive_mask(tape, mask, heads)
    node = None
    if q.node is not None or k.node is not None or v.node is not None:
        shapes = [(t.rows, t.columns) for t in (q, k, v)]

        def backward(g: Grads, n: Node) -> Grads:
            held = n.take_all()
            out = [tape.new(f"gradient of {name}", r, c, BF16) for name, (r, c) in zip("qkv", shapes, strict=True)]
            scratch = [tape.new("attention scratch", 1, s, "uint8") for s in kernel_scratch(kernel, heads)]
            del scratch, held
            return out

        node = Node(tape, (q, k, v), backward, (q, k, v) if bias is None else (q, k, v, bias))
    out = tape.new("attention", q.rows, q.columns, BF16)
    lse = tape.new("attention log-sum-exp", heads.batch * heads.query, heads.seq, FP32)
    rng = [tape.new("attention rng", 1, 2, "int64") for _ in range(2 if kernel == "cudnn" else 1)]
    if node is not None:
        for t in (out, lse, *rng):
            node.save(tape, t)
        out.node = node
    del rng
    return out


def additive_mask(tape: Tape, mask: Tensor, heads: Heads) -> Tensor:
    """`convert_boolean_attn_mask`, one `where`: every call makes its own [B, 1, S, S] in bf16 and keeps it."""
    return tape.new("mask in bf16", heads.batch * heads.seq, heads.seq, BF16)


def sdpa_math(tape: Tape, query: Tensor, key: Tensor, value: Tensor, heads: Heads, mask: Tensor | None) -> Tensor:
    """`_scaled_dot_product_attention_math`: q, k, v bf16 to bf16, everything between in float32, autocast off.

    The kernel for what no other takes: Falcon-7B's 71 query heads on one key head, given without `enable_gqa`. The
    probabilities are also cast to bf16, before the product, for a second result that nobody wants.
    """
    rows, group = heads.batch * heads.query * heads.seq, heads.query // heads.key
    bias = None if mask is None else additive_mask(tape, mask, heads)
    query_acc = cast(tape, query, FP32, "q in fp32")
    key_acc = cast(tape, key, FP32, "k in fp32")
    value_acc = cast(tape, value, FP32, "v in fp32")
    q = unary(tape, query_acc, "q scaled")
    if bias is None:
        bias = tape.new("causal mask in fp32", heads.seq, heads.seq, FP32)
    k = unary(tape, key_acc, "k scaled")
    attn = bmm(
        tape,
        batched(tape, q, heads, "q"),
        batched(tape, expand_heads(tape, k, group), heads, "k"),
        rows,
        heads.seq,
        "attention scores",
    )
    del k
    attn = safe_softmax(tape, attn, "attention softmax")  # the mask was added in place
    unwanted = cast(tape, attn.detach(), BF16, "attention probabilities")
    v = batched(tape, expand_heads(tape, value_acc, group), heads, "v")
    out = bmm(tape, attn, v, query.rows, query.columns, "attention in fp32")
    del v
    out = cast(tape, out, BF16, "attention")
    del unwanted, bias, query_acc, key_acc, value_acc, q
    return out


def expand_heads(tape: Tape, x: Tensor, group: int) -> Tensor:
    """`x.expand(...)` to `group` heads each: a view whose gradient is summed."""
    if group == 1:
        return x
    node = Node(tape, (x,), lambda g, n: (_first(g).detach(),)) if x.node is not None else None
    return Tensor(x.storage, x.rows, x.columns * group, x.dtype, node)


def batched(tape: Tape, x: Tensor, heads: Heads, name: str) -> Tensor:
    """The `reshape` to [B * heads, S, D] inside `matmul`, of heads that lie token by token: a copy, or for one sequence
    a view."""
    return x if heads.batch == 1 else clone(tape, x, name + " by head")


def safe_softmax(tape: Tape, x: Tensor, name: str) -> Tensor:
    """`_safe_softmax`: as softmax, with a bool mask of the input's -inf for a moment."""
    out = softmax(tape, x, name)
    masked = tape.new(name + " is -inf", x.rows, x.columns, "bool")
    del masked
    return out


def kernel_scratch(kernel: str, heads: Heads) -> list[int]:
    """Bytes that the kernel's backward asks for and gives back."""
    rows = heads.batch * heads.query
    if kernel == "cudnn":  # one piece: float32 dq, row sums, dk and dv per query head, and a little more (measured)
        per_element = 8 if heads.key != heads.query else 4
        return [per_element * rows * heads.seq * heads.dim + 4 * rows * heads.seq + GRANULE]
    if kernel == "flash":  # softmax_d, dq_accum; dk and dv per query head before the sum over the group
        seq = round_up(heads.seq, 128)
        dim = round_up(heads.dim, 32 if heads.dim <= 128 else 64)
        grouped = [2 * rows * heads.seq * heads.dim] * 2 if heads.key != heads.query else []
        return [4 * rows * seq, 4 * rows * seq * dim, *grouped]
    return [4 * rows * heads.seq, 4 * rows * heads.seq * heads.dim]


def repeat_kv(tape: Tape, x: Tensor, heads: Heads) -> Tensor:
    """`repeat_kv`: expand and copy; the gradient is summed over the group."""
    if heads.query == heads.key:
        return x
    columns = x.columns * heads.query // heads.key
    node = Node(tape, (x,), lambda g, n: (_first(g).detach(),)) if x.node is not None else None
    if heads.key == 1:  # one head repeated is a view
        return Tensor(x.storage, x.rows, columns, x.dtype, node)
    out = tape.new("k, v repeated", x.rows, columns, x.dtype)
    out.node = node
    return out


# -------------------------------------------------------------------------------------------------------- eager
def matmul(tape: Tape, a: Tensor, b: Tensor, rows: int, columns: int, name: str) -> Tensor:
    """A batched product under autocast; saves both factors."""
    a, b = cast(tape, a, BF16, name + " input in bf16"), cast(tape, b, BF16, name + " input in bf16")
    return bmm(tape, a, b, rows, columns, name)


def bmm(tape: Tape, a: Tensor, b: Tensor, rows: int, columns: int, name: str) -> Tensor:
    """A batched product of two factors of one dtype; saves both."""
    dtype = a.dtype
    node = None
    if a.node is not None or b.node is not None:
        shapes = [(a.rows, a.columns), (b.rows, b.columns)]

        def backward(g: Grads, n: Node) -> Grads:
            held = [n.take(i) for i in (0, 1)]
            out = [tape.new(f"gradient of {name} input", r, c, dtype) for r, c in shapes]
            del held
            return out

        node = Node(tape, (a, b), backward, (a, b))
    out = tape.new(name, rows, columns, dtype)
    out.node = node
    return out


def softmax(tape: Tape, x: Tensor, name: str) -> Tensor:
    """`softmax(x, dtype=float32)`: saves its float32 result; the backward makes a product and the gradient.

    A bf16 input is converted first: only float16 has a fused kernel (ATen native/SoftMax.cpp).
    """
    x = cast(tape, x, FP32, name + " input in fp32")
    node = None
    if x.node is not None:
        rows, columns, dtype = x.rows, x.columns, x.dtype

        def backward(g: Grads, n: Node) -> Grads:
            held = n.take(0)
            product = tape.new(f"{name} gradient product", rows, columns, FP32)
            grad = tape.new(f"gradient of {name}", rows, columns, dtype)
            del held, product
            return (grad,)

        node = Node(tape, (x,), backward)
    out = tape.new(name, x.rows, x.columns, FP32)
    if node is not None:
        node.save(tape, out)
        out.node = node
    return out


def eager(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Heads,
    mask: Tensor | None,
    softcap: bool = False,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`eager_attention_forward`: (output, probabilities); every [B, h, S, S] step is a tensor of its own."""
    key_states = repeat_kv(tape, key, heads)
    value_states = repeat_kv(tape, value, heads)
    rows = heads.batch * heads.query * heads.seq
    attn_weights = unary(tape, matmul(tape, query, key_states, rows, heads.seq, "q k"), "attention scores scaled")
    if softcap:
        attn_weights = unary(tape, attn_weights, "attention scores / cap")
        attn_weights = unary(tape, attn_weights, "tanh", saves="result")
        attn_weights = unary(tape, attn_weights, "attention scores * cap")
    if mask is not None:
        attn_weights = add(tape, attn_weights, mask, "attention scores masked")
    attn_weights = cast(tape, softmax(tape, attn_weights, "attention softmax"), query.dtype, "attention probabilities")
    attn_weights = dropout(tape, attn_weights, p)
    attn_output = matmul(tape, attn_weights, value_states, query.rows, query.columns, "attention")
    return unary(tape, attn_output, "attention contiguous"), attn_weights
