"""Output head and loss: the whole logits of `ForCausalLMLoss`, or ours in chunks."""

from __future__ import annotations

from .loss import chunk_tokens
from .ops import BF16, FP32, Grads, cast, linear, unary
from .tape import Node, Tape, Tensor
from .types import ModelSpec


def full_loss(tape: Tape, spec: ModelSpec, hidden_states: Tensor, head_dtype: str) -> list[Tensor]:
    """`LlamaForCausalLM.forward` from its hidden states: [loss, logits]; the bf16 logits live as long as the output."""
    weight = tape.constant(spec.vocab_size, spec.hidden_size, head_dtype)
    logits = linear(tape, hidden_states, weight, "logits", bias=spec.lm_head_bias)
    if spec.final_logit_softcapping is not None:
        logits = unary(tape, logits, "logits / cap")
        logits = unary(tape, logits, "tanh of the logits", saves="result")
        logits = unary(tape, logits, "logits * cap")
    if spec.logits_scaling is not None:
        logits = unary(tape, logits, "logits / scaling")
    return [causal_lm_loss(tape, logits), logits]


def causal_lm_loss(tape: Tape, logits: Tensor) -> Tensor:
    """transformers `ForCausalLMLoss`: logits in float32, labels padded and shifted, cross entropy."""
    labels = tape.new("labels padded", 1, logits.rows + 1, "int64", "activations.inputs")
    shift_labels = tape.new("labels shifted", 1, logits.rows, "int64", "activations.inputs")
    logits = cast(tape, logits, FP32, "logits in fp32")
    loss = nll_loss(tape, log_softmax(tape, logits), shift_labels)
    del labels
    return loss


def log_softmax(tape: Tape, x: Tensor) -> Tensor:
    """Saves its result; the gradient is one more tensor of that size."""
    rows, columns = x.rows, x.columns

    def backward(g: Grads, n: Node) -> Grads:
        held = n.take(0)
        grad = tape.new("gradient of log_softmax", rows, columns, FP32, "loss.gradients")
        del held
        return (grad,)

    node = Node(tape, (x,), backward) if x.node is not None else None
    out = tape.new("log_softmax of the logits", rows, columns, FP32, "loss.log_softmax")
    if node is not None:
        node.save(tape, out)
        out.node = node
    return out


def nll_loss(tape: Tape, log_probs: Tensor, labels: Tensor) -> Tensor:
    rows, columns = log_probs.rows, log_probs.columns

    def backward(g: Grads, n: Node) -> Grads:
        held = [n.take(0), n.take(1)]
        grad = tape.new("gradient of nll_loss", rows, columns, FP32, "loss.gradients")
        del held
        return (grad,)

    node = Node(tape, (log_probs,), backward, (log_probs, labels)) if log_probs.node is not None else None
    loss = tape.new("loss", 1, 1, FP32)
    total_weight = tape.new("total weight", 1, 1, FP32)
    del total_weight
    loss.node = node
    return loss


def chunked_loss(tape: Tape, spec: ModelSpec, hidden_states: Tensor, head_dtype: str, sequences: int) -> Tensor:
    """`vramplan.train.fused_loss`: loss and gradient of the hidden states, chunk by chunk, in the forward.

    Counts every token that can carry a loss as labelled (all but the last of each sequence): an upper bound, exact for
    plain text.
    """
    hidden, vocab, dtype = spec.hidden_size, spec.vocab_size, hidden_states.dtype
    tokens, rows = hidden_states.rows, hidden_states.rows - sequences
    chunk = chunk_tokens(max(rows, 1), hidden, vocab)

    def backward(g: Grads, n: Node) -> Grads:
        picked = n.take(0)
        full = tape.new("gradient of the hidden states", tokens, hidden, dtype, "loss.gradients")
        copy = cast(tape, picked, dtype, "gradient of the labelled rows")
        del copy, picked
        return (full,)

    node = Node(tape, (hidden_states,), backward) if hidden_states.node is not None else None
    indices = [tape.new(name, 1, rows, "int64", "activations.inputs") for name in ("labelled rows", "next tokens")]
    picked = tape.new("labelled rows of the hidden states", rows, hidden, dtype, "loss.gradients")
    if dtype != BF16:
        picked = tape.new("labelled rows of the hidden states", rows, hidden, BF16, "loss.gradients")
    weight = None
    if head_dtype != BF16:
        weight = tape.new("head in bf16", vocab, hidden, BF16, "loss.logits")
    for _ in range(min(2, -(-rows // chunk))):  # all but the last are alike
        logits = tape.new("logits of a chunk", chunk, vocab, BF16, "loss.logits")
        tape.product()
        wide = tape.new("logits of a chunk in fp32", chunk, vocab, FP32, "loss.logits")
        del logits, wide
    del weight
    loss = tape.new("loss", 1, 1, FP32)
    if node is not None:
        node.save(tape, picked)
        node.save(tape, indices[0])
        loss.node = node
    return loss
