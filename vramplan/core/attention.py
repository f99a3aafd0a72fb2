"""Attention as CUDA runs it: rotary embedding, the kernels behind `scaled_dot_product_attention`, and eager.

Sources: transformers 5.17 (`apply_rotary_pos_emb`, `eager_attention_forward`, `sdpa_attention_forward`), ATen
native/transformers/cuda (sdp_utils.cpp for the choice of kernel; flash_api.cpp `mha_bwd` for its scratch), checked
against the measured rows.
"""

from __future__ import annotations

from typing import NamedTuple

from .ops import BF16, FP32, Grads, _first, add, cast, clone, dropout, like, mul, unary
from .tape import GRANULE, Backward, Node, Tape, Tensor
from .units import round_up


class Heads(NamedTuple):
    """Shape of one attention call: B sequences of S tokens, `query` heads on `key` heads of `dim` channels."""

    batch: int
    seq: int
    query: int
    key: int
    dim: int


# ------------------------------------------------------------------------------------------------------- views
def heads_of(tape: Tape, x: Tensor, count: int) -> Tensor:
    """`x.view(B, S, h, D).transpose(1, 2)`: a view; a gradient that lies head by head is copied on its way back."""
    if x.node is None or count == 1:
        return x

    def backward(g: Grads, n: Node) -> Grads:
        grad = _first(g)
        return (tape.new("gradient by token", grad.rows, grad.columns, grad.dtype) if grad.by_head else grad.detach(),)

    return Tensor(x.storage, x.rows, x.columns, x.dtype, Node(tape, (x,), backward))


def narrow(tape: Tape, x: Tensor, columns: int, name: str, by_head: bool = False) -> Tensor:
    """`x[..., a:b]`: a view; its backward writes the gradient into a full tensor of zeros.

    `by_head`: x is [B, h, S, D], and so are the zeros in memory. An empty part gets no gradient.
    """
    node = None
    if x.node is not None and columns:
        rows, wide = x.rows, x.columns

        def backward(g: Grads, n: Node) -> Grads:
            zeros = tape.new(f"gradient of {name} slice", rows, wide, _first(g).dtype)
            zeros.by_head = by_head
            return (zeros,)

        node = Node(tape, (x,), backward)
    part = Tensor(x.storage, x.rows, columns, x.dtype, node)
    part.by_head = x.by_head
    return part


def pick(tape: Tape, x: Tensor, columns: int, name: str) -> Tensor:
    """`x[..., [i], :]`: an index list copies; its backward is `index_put(accumulate=True)` into zeros, which sorts."""
    index = tape.new("index", 1, 1, "int64")
    node = None
    if x.node is not None:
        rows, wide = x.rows, x.columns

        def backward(g: Grads, n: Node) -> Grads:
            held = n.take(0)
            zeros = tape.new(f"gradient of {name}", rows, wide, _first(g).dtype)
            scratch = [tape.new("index_put scratch", 1, 1, "int64") for _ in range(5)]
            del scratch, held
            return (zeros,)

        node = Node(tape, (x,), backward, (index,))
    out = tape.new(name, x.rows, columns, x.dtype)
    out.node = node
    return out


def chunk(tape: Tape, x: Tensor, parts: int, name: str, by_head: bool = False) -> list[Tensor]:
    """`x.chunk(parts, -1)`: views; the backward concatenates the gradients, `by_head` if x is [B, h, S, D]."""
    columns = x.columns // parts
    node = None
    if x.node is not None:
        rows, wide, dtype = x.rows, x.columns, x.dtype

        def backward(g: Grads, n: Node) -> Grads:
            joined = tape.new(f"gradient of {name}", rows, wide, dtype)
            joined.by_head = by_head
            return (joined,)

        node = Node(tape, (x,), backward, outputs=parts)
    return [Tensor(x.storage, x.rows, columns, x.dtype, node, i) for i in range(parts)]


def concatenate(tape: Tape, parts: list[Tensor], name: str) -> Tensor:
    """`torch.cat(parts, -1)` of [B, h, S, D], contiguous; the gradients of the parts are views of one tensor."""
    node = None
    if any(t.node is not None for t in parts):
        widths = [(t.rows, t.columns) for t in parts]

        def backward(g: Grads, n: Node) -> Grads:
            views = [Tensor(_first(g).storage, r, c, _first(g).dtype) for r, c in widths]
            for view in views:
                view.by_head = _first(g).by_head
            return views

        node = Node(tape, parts, backward)
    out = tape.new(name, parts[0].rows, sum(t.columns for t in parts), parts[0].dtype)
    out.by_head = True
    out.node = node
    return out


def contiguous(tape: Tape, x: Tensor, name: str) -> Tensor:
    """`x.transpose(1, 2).contiguous()` of [B, h, S, D]: x itself where it lies token by token."""
    if not x.by_head:
        return x
    out = clone(tape, x, name)
    out.by_head = False
    return out


# ------------------------------------------------------------------------------------------------------ rotary
def rotate_half(tape: Tape, x: Tensor) -> Tensor:
    x1 = narrow(tape, x, x.columns // 2, "rotary", by_head=True)
    x2 = narrow(tape, x, x.columns // 2, "rotary", by_head=True)
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
    in_turn: bool = False,
    held: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb`; `share` of each head is turned (GPT-NeoX, StableLM, Phi turn a part).

    `joined`: turned and other part are concatenated, also where the other part is empty (Phi-3).

    `cast_back`: cos and sin are float32 and the result is cast to the type of q and k (OLMo-2); with `in_fp32`, q and k
    are first cast themselves (Cohere).

    `interleaved`: every call makes tables of its own, each entry twice (GLM). `in_turn`: q is done before k is begun
    (Phi-3). `held`: where the caller has names for the turned parts (StableLM, Phi).
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
    q_rot, q_pass = (narrow(tape, q, n, "q rotary", by_head=True) for n in (turned[0], q.columns - turned[0]))
    k_rot, k_pass = (narrow(tape, k, n, "k rotary", by_head=True) for n in (turned[1], k.columns - turned[1]))
    q_embed = add(tape, mul(tape, q_rot, cos, "q cos"), mul(tape, rotate_half(tape, q_rot), sin, "q sin"), "q rotary")
    if in_turn:
        q_embed = concatenate(tape, [q_embed, q_pass], "q rotary")
    k_embed = add(tape, mul(tape, k_rot, cos, "k cos"), mul(tape, rotate_half(tape, k_rot), sin, "k sin"), "k rotary")
    if held is not None:
        held += [q_embed, k_embed]
    if not in_turn:
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
    bias = None
    key, value = k, v
    if mask is not None and kernel != "math":  # use_gqa_in_sdpa: a mask turns grouped queries off
        key, value = repeat_kv(tape, k, heads), repeat_kv(tape, v, heads)
        heads = heads._replace(key=heads.query)
    q, k, v = (cast(tape, t, BF16, "attention input in bf16") for t in (q, key, value))
    if kernel == "math":
        return sdpa_math(tape, q, k, v, heads, mask)
    if mask is not None:
        bias = additive_mask(tape, mask, heads, kernel)
    node = None
    if q.node is not None or k.node is not None or v.node is not None:
        shapes = [(t.rows, t.columns, t.by_head and kernel != "efficient") for t in (q, k, v)]

        def backward(g: Grads, n: Node) -> Grads:
            held = n.take_all()
            out = [tape.new(f"gradient of {name}", r, c, BF16) for name, (r, c, _) in zip("qkv", shapes, strict=True)]
            for grad, (_, _, by_head) in zip(out, shapes, strict=True):  # empty_like of q, k and v
                grad.by_head = by_head
            scratch = [tape.new("attention scratch", 1, s, "uint8") for s in kernel_scratch(kernel, heads)]
            del scratch, held
            return out

        node = Node(tape, (q, k, v), backward, (q, k, v) if bias is None else (q, k, v, bias))
    out = tape.new("attention", q.rows, q.columns, BF16)
    out.by_head = q.by_head and kernel != "efficient"
    lse_seq = round_up(heads.seq, 32) if kernel == "efficient" else heads.seq  # kAlignLSE of kernel_forward.h
    lse = tape.new("attention log-sum-exp", heads.batch * heads.query, lse_seq, FP32)
    # the efficient kernel's seed and offset are in host memory (attention.cu, Note [Seed and Offset Device])
    rng = [tape.new("attention rng", 1, 2, "int64") for _ in range(0 if kernel == "efficient" else 2)]
    if node is not None:
        for t in (out, lse, *rng):
            node.save(tape, t)
        out.node = node
    del rng, key, value
    return out


def additive_mask(tape: Tape, mask: Tensor, heads: Heads, kernel: str) -> Tensor:
    """`convert_boolean_attn_mask`, one `where`: every call makes its own [B, 1, S, S] in bf16 and keeps it."""
    scalars = [tape.new(name, 1, 1, BF16) for name in ("0", "-inf")]
    rows = heads.batch * heads.seq  # the bool mask was expanded to every sequence
    bias = tape.new("mask in bf16", rows, heads.seq, BF16)
    del scalars
    if kernel == "efficient" and heads.seq % 16:  # sdp_utils `pad_bias`
        return tape.new("mask in bf16 padded", rows, round_up(heads.seq, 16), BF16)
    return bias


def sdpa_math(tape: Tape, query: Tensor, key: Tensor, value: Tensor, heads: Heads, mask: Tensor | None) -> Tensor:
    """`_scaled_dot_product_attention_math`: q, k, v bf16 to bf16, everything between in float32, autocast off.

    The kernel for what no other takes: Falcon-7B's 71 query heads on one key head, given without `enable_gqa`. The
    probabilities are also cast to bf16, before the product, for a second result that nobody wants.
    """
    rows, group = heads.batch * heads.query * heads.seq, heads.query // heads.key
    bias = None if mask is None else additive_mask(tape, mask, heads, "math")
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
    node = Node(tape, (x,), summed_over_group(tape, x)) if x.node is not None else None
    return Tensor(x.storage, x.rows, x.columns * group, x.dtype, node)


def summed_over_group(tape: Tape, x: Tensor) -> Backward:
    """The backward of repeating the heads of x: a sum, which lies head by head."""
    rows, columns = x.rows, x.columns

    def backward(g: Grads, n: Node) -> Grads:
        total = tape.new("gradient summed", rows, columns, _first(g).dtype)
        total.by_head = True
        return (total,)

    return backward


def batched(tape: Tape, x: Tensor, heads: Heads, name: str) -> Tensor:
    """The `reshape` to [B * heads, S, D] inside `matmul`: of heads that lie token by token a copy, or for one sequence
    a view."""
    if heads.batch == 1 or x.by_head:
        return x
    out = clone(tape, x, name + " by head")
    out.by_head = True
    return out


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
    node = Node(tape, (x,), summed_over_group(tape, x)) if x.node is not None else None
    if heads.key == 1:  # one head repeated is a view
        return Tensor(x.storage, x.rows, columns, x.dtype, node)
    out = tape.new("k, v repeated", x.rows, columns, x.dtype)
    out.by_head = True
    out.node = node
    return out


# -------------------------------------------------------------------------------------------------------- eager
def matmul(
    tape: Tape, a: Tensor, b: Tensor, heads: Heads, rows: int, columns: int, name: str, group: int = 1
) -> Tensor:
    """`torch.matmul` of [B, h, S, *] under autocast; saves both factors, head by head.

    Each head of b serves `group` heads of a.
    """
    b = cast(tape, b, BF16, name + " input in bf16")  # the compiler evaluates the arguments from the right
    a = cast(tape, a, BF16, name + " input in bf16")
    a_by_head = batched(tape, a, heads, name + " input")
    b_by_head = batched(tape, expand_heads(tape, b, group), heads, name + " input")
    return by_batch(tape, bmm(tape, a_by_head, b_by_head, rows, columns, name), heads)


def by_batch(tape: Tape, x: Tensor, heads: Heads) -> Tensor:
    """[B * h, S, D] as [B, h, S, D]: a view; a gradient that lies token by token is copied on its way back."""
    if x.node is None:
        return x
    node = Node(tape, (x,), lambda g, n: (batched(tape, _first(g).detach(), heads, "gradient"),))
    view = Tensor(x.storage, x.rows, x.columns, x.dtype, node)
    view.by_head = True
    return view


def bmm(tape: Tape, a: Tensor, b: Tensor, rows: int, columns: int, name: str) -> Tensor:
    """A batched product of two factors of one dtype; saves what the other's gradient needs."""
    dtype = a.dtype
    node = None
    if a.node is not None or b.node is not None:
        shapes = [(a.rows, a.columns), (b.rows, b.columns)]

        def backward(g: Grads, n: Node) -> Grads:
            held = n.take_all()
            out: list[Tensor | None] = [None, None]
            for i in (1, 0):
                if n.needs(i):
                    grad = out[i] = tape.new(f"gradient of {name} input", *shapes[i], dtype)
                    grad.by_head = True
            del held
            return out

        saved = ([b] if a.node is not None else []) + ([a] if b.node is not None else [])
        node = Node(tape, (a, b), backward, saved)
    out = tape.new(name, rows, columns, dtype)
    out.by_head = True
    out.node = node
    return out


def softmax(tape: Tape, x: Tensor, name: str) -> Tensor:
    """`softmax(x, dtype=float32)`: saves its float32 result; the backward makes a product and the gradient.

    A bf16 input is converted first: only float16 has a fused kernel (ATen native/SoftMax.cpp).
    """
    source = x  # the caller's, until this returns
    x = cast(tape, x, FP32, name + " input in fp32")
    node = None
    if x.node is not None:
        rows, columns, dtype = x.rows, x.columns, x.dtype

        def backward(g: Grads, n: Node) -> Grads:
            held = n.take(0)
            product = tape.new(f"{name} gradient product", rows, columns, FP32)
            grad = tape.new(f"gradient of {name}", rows, columns, dtype)
            grad.by_head = True
            del held, product
            return (grad,)

        node = Node(tape, (x,), backward)
    out = like(tape, x, name)
    if node is not None:
        node.save(tape, out)
        out.node = node
    del source
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
    attn_weights = matmul(tape, query, key_states, heads, rows, heads.seq, "q k")
    attn_weights = unary(tape, attn_weights, "attention scores scaled")
    if softcap:
        attn_weights = unary(tape, attn_weights, "attention scores / cap")
        attn_weights = unary(tape, attn_weights, "tanh", saves="result")
        attn_weights = unary(tape, attn_weights, "attention scores * cap")
    if mask is not None:
        attn_weights = add(tape, attn_weights, mask, "attention scores masked")
    attn_weights = cast(tape, softmax(tape, attn_weights, "attention softmax"), query.dtype, "attention probabilities")
    attn_weights = dropout(tape, attn_weights, p)
    attn_output = matmul(tape, attn_weights, value_states, heads, query.rows, query.columns, "attention")
    return contiguous(tape, attn_output, "attention contiguous"), attn_weights
