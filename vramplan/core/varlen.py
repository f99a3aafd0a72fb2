"""Attention over packed rows: several documents in a row, none of which sees another.

The trainer (`train/varlen.py`) gives ATen's variable-length flash kernel the batch as one sequence of B x S tokens and
the borders of its documents. Sources: torch 2.11 to 2.13, ATen native/transformers/cuda, flash_attn/flash_api.cpp
(`mha_varlen_fwd`, `mha_varlen_bwd`) and the autograd formula of `_flash_attention_forward` (derivatives.yaml).
"""

from __future__ import annotations

from .attention import Heads
from .ops import BF16, FP32, Grads, _first, cast, clone
from .tape import Node, Tape, Tensor
from .types import ModelSpec, RunSpec, Unplannable
from .units import round_up

BLOCK = 128  # rows that the kernel keeps free between two documents
TOKENS_PER_DOCUMENT = 32
CAPABILITY = (8, 0)  # of a card that runs the kernel
NOT_TOLD = ("falcon", "stablelm")  # their attention is given no more than q, k, v and a mask


def documents_per_row(seq_len: int) -> int:
    """The most documents in a packed row of `seq_len` tokens, its padding counted as one.

    The kernel's scratch grows with their number, so the trainer packs no more: a plan that assumes all of them holds
    for any data. It seldom costs anything, since the peak is elsewhere, and documents of 32 tokens still fill a row.
    """
    return max(seq_len // TOKENS_PER_DOCUMENT, 1) + 1


def refuse_unpackable(spec: ModelSpec, run: RunSpec, capability: tuple[int, int]) -> None:
    """Unplannable where the variable-length kernel cannot do what the model's attention does."""
    if run.levers.attention == "eager":
        raise Unplannable("packing needs attention that keeps documents apart, which eager does not", "use --attn sdpa")
    if spec.attn_logit_softcapping is not None:
        raise Unplannable(f"{spec.name} soft-caps its attention, which cannot be packed", "leave out --packing")
    if spec.model_type in NOT_TOLD:
        raise Unplannable(f"transformers' {spec.model_type} cannot be told of packed documents", "leave out --packing")
    if spec.head_dim % 8 or spec.head_dim > 256:
        raise Unplannable(
            f"heads of {spec.head_dim} channels do not fit the kernel for packed rows", "leave out --packing"
        )
    if capability < CAPABILITY:
        needed, found = (".".join(map(str, each)) for each in (CAPABILITY, capability))
        raise Unplannable(f"packing needs compute capability {needed} or newer, not {found}", "leave out --packing")


def borders(tape: Tape, run: RunSpec) -> list[Tensor]:
    """What a packed batch brings beside ids and labels: position ids, and the borders for queries and for keys."""
    positions = tape.new("position ids", run.micro_batch_size, run.seq_len, "int64")
    edges = documents(run.micro_batch_size, run.seq_len) + 1
    return [positions, *(tape.new(f"cu_seq_lens_{side}", 1, edges, "int32") for side in "qk")]


def documents(batch: int, seq: int) -> int:
    return batch * documents_per_row(seq)


def varlen(tape: Tape, query: Tensor, key: Tensor, value: Tensor, heads: Heads) -> Tensor:
    """One call: saves q, k, v, the output and the log-sum-exp, as flash attention does; key heads are not repeated."""
    q, k, v = (flat(tape, cast(tape, t, BF16, "attention input in bf16"), heads) for t in (query, key, value))
    node = None
    if q.node is not None or k.node is not None or v.node is not None:
        shapes = [(t.rows, t.columns, t.by_head) for t in (q, k, v)]

        def backward(g: Grads, n: Node) -> Grads:
            held = n.take_all()
            incoming = _first(g)
            if incoming.by_head:  # `grad_out.contiguous()`
                incoming = tape.new("gradient by token", incoming.rows, incoming.columns, incoming.dtype)
            out = [tape.new(f"gradient of {name}", r, c, BF16) for name, (r, c, _) in zip("qkv", shapes, strict=True)]
            for grad, (_, _, by_head) in zip(out, shapes, strict=True):  # empty_like of q, k and v
                grad.by_head = by_head
            scratch = [tape.new("attention scratch", 1, s, "uint8") for s in varlen_scratch(heads)]
            del scratch, held, incoming
            return out

        node = Node(tape, (q, k, v), backward, (q, k, v))
    out = tape.new("attention", q.rows, q.columns, BF16)
    out.by_head = q.by_head
    lse = tape.new("attention log-sum-exp", heads.query, heads.batch * heads.seq, FP32)
    rng = [tape.new("attention rng", 1, 2, "int64") for _ in range(2)]
    if node is not None:
        for t in (out, lse, *rng):
            node.save(tape, t)
        out.node = node
    return out


def flat(tape: Tape, x: Tensor, heads: Heads) -> Tensor:
    """[B, h, S, D] as [B * S, h, D]: a view, unless the heads of several rows lie head by head."""
    if not x.by_head or heads.batch == 1:
        return x
    out = clone(tape, x, "heads by token")
    out.by_head = False
    return out


def varlen_scratch(heads: Heads, count: int | None = None) -> list[int]:
    """Bytes that the backward asks for and gives back: softmax_d, dq_accum; dk and dv per query head before the sum
    over the group. `count` documents; None: as many as can be."""
    tokens = heads.batch * heads.seq
    rows = tokens + BLOCK * (documents(heads.batch, heads.seq) if count is None else count)
    dim = round_up(heads.dim, 32 if heads.dim <= 128 else 64)
    grouped = [2 * tokens * heads.query * heads.dim] * 2 if heads.key != heads.query else []
    return [4 * heads.query * rows, 4 * heads.query * rows * dim, *grouped]
