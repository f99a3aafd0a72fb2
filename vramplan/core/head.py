"""Output head and loss: the whole logits of `ForCausalLMLoss`, or ours in chunks."""

from __future__ import annotations

from .formulas import applied
from .loss import chunk_tokens
from .ops import BF16, FP32, Grads, cast, linear, unary
from .tape import Node, Tape, Tensor
from .types import ModelSpec, RunSpec


def full_loss(tape: Tape, spec: ModelSpec, run: RunSpec, hidden_states: Tensor, weight: Tensor) -> list[Tensor]:
    """`LlamaForCausalLM.forward` from its hidden states: [loss, logits]; the bf16 logits live as long as the output."""
    logits = linear(tape, hidden_states, weight, "logits", bias=spec.lm_head_bias)
    if spec.final_logit_softcapping is not None:
        logits = unary(tape, logits, "logits / cap")
        logits = unary(tape, logits, "tanh of the logits", saves="result")
        logits = unary(tape, logits, "logits * cap")
    if spec.logits_scaling is not None:
        logits = unary(tape, logits, "logits / scaling")
    return [causal_lm_loss(tape, logits, run.micro_batch_size, run.driver == "trainer"), logits]


def causal_lm_loss(tape: Tape, logits: Tensor, sequences: int, summed: bool) -> Tensor:
    """transformers `ForCausalLMLoss`: logits in float32, labels padded and shifted, cross entropy.

    `summed`: the trainer says how many labels the batch has, and the sum of the losses is divided by it.
    """
    logits = cast(tape, logits, FP32, "logits in fp32")
    padded = tape.new("labels padded", sequences, logits.rows // sequences + 1, "int64", "activations.inputs")
    shift_labels = padded.view(1, logits.rows + 1)  # of one sequence a view: it is contiguous
    if sequences > 1:
        shift_labels = tape.new("labels shifted", 1, logits.rows, "int64", "activations.inputs")
    loss = nll_loss(tape, log_softmax(tape, logits), shift_labels)
    if summed:
        loss = unary(tape, loss, "loss / items in the batch")
    del padded
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
        held = n.take_all()
        grad = tape.new("gradient of nll_loss", rows, columns, FP32, "loss.gradients")
        del held
        return (grad,)

    node = Node(tape, (log_probs,), backward, (log_probs, labels)) if log_probs.node is not None else None
    loss = tape.new("loss", 1, 1, FP32)
    total_weight = tape.new("total weight", 1, 1, FP32)
    if node is not None:
        node.save(tape, total_weight)
        loss.node = node
    return loss


def labelled_rows(tape: Tape, run: RunSpec) -> tuple[Tensor, Tensor]:
    """`vramplan.train.fused_loss.labelled_rows`: which rows carry a loss, and their next tokens.

    Counts every token that can (all but the last of each sequence): an upper bound, exact for plain text.
    """
    rows = run.micro_batch_size * (run.seq_len - 1)
    return tape.new("labelled rows", 1, rows, "int64"), tape.new("next tokens", 1, rows, "int64")


def chunked_loss(
    tape: Tape,
    spec: ModelSpec,
    hidden_states: Tensor,
    labelled: tuple[Tensor, Tensor],
    head_dtype: str,
    fused: bool = False,
) -> Tensor:
    """`vramplan.train.fused_loss`: loss and gradient of the hidden states, chunk by chunk, in the forward.

    `fused`: loss and gradient of a chunk by one kernel, in the place of its logits.
    """
    hidden, vocab, dtype = spec.hidden_size, spec.vocab_size, hidden_states.dtype
    tokens, rows = hidden_states.rows, labelled[0].columns
    chunk = applied(lambda rows: chunk_tokens(max(rows, 1), hidden, vocab, fused), rows)

    def backward(g: Grads, n: Node) -> Grads:
        held = n.take_all()
        full = tape.new("gradient of the hidden states", tokens, hidden, dtype, "loss.gradients")
        copy = cast(tape, held[0], dtype, "gradient of the labelled rows")
        del copy, held
        return (full,)

    node = Node(tape, (hidden_states,), backward) if hidden_states.node is not None else None
    picked = tape.new("labelled rows of the hidden states", rows, hidden, dtype, "loss.gradients")
    if dtype != BF16:
        picked = tape.new("labelled rows of the hidden states", rows, hidden, BF16, "loss.gradients")
    weight = None
    if head_dtype != BF16:
        weight = tape.new("head in bf16", vocab, hidden, BF16, "loss.logits")
    vector = tape.new("head bias in bf16", 1, vocab, BF16) if spec.lm_head_bias and head_dtype != BF16 else None
    total = tape.new("sum of the losses", 1, 1, FP32)
    scale = None
    if fused:
        one = tape.new("1", 1, 1, FP32)
        scale = tape.new("1 / items", 1, 1, FP32)
        del one
    locals_: dict[str, Tensor] = {}
    for part in chunk_lengths(rows, chunk):
        if fused:
            chunk_by_kernel(tape, spec, part)
        else:
            loss_of_chunk(tape, spec, part, locals_)
    loss = tape.new("loss", 1, 1, FP32)
    del total, locals_, weight, vector, scale
    if node is not None:
        node.save(tape, picked)
        node.save(tape, labelled[0])
        loss.node = node
    return loss


def chunk_lengths(rows: int, chunk: int) -> list[int]:
    """Of the chunks that are played, at most three: those in the middle are alike."""
    rest = [rows % chunk] if rows % chunk > 0 else []
    return [chunk for n in range(1, 4 - len(rest)) if rows // chunk >= n] + rest


def loss_of_chunk(tape: Tape, spec: ModelSpec, rows: int, held: dict[str, Tensor]) -> None:
    """One turn of the loop in `_loss_and_gradient`; `held` are its locals, which live on until they are rebound."""
    key = "loss.logits"
    logits = tape.new("logits of a chunk", rows, spec.vocab_size, BF16, key)
    tape.product(spec.lm_head_bias)
    z = tape.new("logits of a chunk in fp32", rows, spec.vocab_size, FP32, key)
    highest = tape.new("highest logits", rows, 1, FP32)
    del highest
    held["at_target"] = tape.new("logits of the targets", rows, 1, FP32)
    held["normal"] = tape.new("sum of exp", rows, 1, FP32)
    log = tape.new("log of the sum", rows, 1, FP32)
    losses = tape.new("losses", rows, 1, FP32)
    del log
    summed = tape.new("loss of a chunk", 1, 1, FP32)
    del losses, summed
    ones = tape.new("minus ones", rows, 1, FP32)
    del ones, logits, z


def chunk_by_kernel(tape: Tape, spec: ModelSpec, rows: int) -> None:
    """One turn of the loop in `_by_kernel`."""
    logits = tape.new("logits of a chunk", rows, spec.vocab_size, BF16, "loss.logits")
    tape.product(spec.lm_head_bias)
    losses = tape.new("losses", rows, 1, FP32)
    summed = tape.new("loss of a chunk", 1, 1, FP32)
    del losses, summed, logits
