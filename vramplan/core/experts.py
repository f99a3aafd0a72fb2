"""A mixture of experts: the router and the experts, as transformers 5.17 runs them on CUDA.

Sources: models/mixtral and models/qwen3_moe (`*TopKRouter`, `*SparseMoeBlock`), integrations/moe.py
`grouped_mm_experts_forward`: the default of `get_correct_experts_implementation` wherever the model can choose. Expert
weights are 3-D parameters, [experts, 2 x intermediate, hidden] and [experts, hidden, intermediate]: bitsandbytes does
not quantise them, PEFT's "all-linear" does not see them, and the router's weight is a bare parameter too.

Every token is copied once for each of its k experts and the copies are sorted by expert: S = tokens x k rows. All
tensors here have S rows however the router spreads them, so nothing depends on the data. (The `eager` loop over the
experts does, but nothing chooses it by default.)

`torch.nn.functional.grouped_mm` (ATen native/cuda/GroupedBlas.cpp, GroupedMMUtils.h of torch 2.11 to 2.13) is one
CUTLASS kernel for bf16 on compute capability 9 and 10, with under 100 KiB of scratch that is left out here, and else
one cuBLAS product per expert into the same output. Below 8.0 transformers takes an operator of its own, whose backward
makes the gradient of the frozen weights as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .attention import chunk, softmax
from .ops import BF16, FP32, Grads, _first, cast, linear, mul, unary
from .tape import Node, Tape, Tensor

if TYPE_CHECKING:
    from .blocks import Player

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what configs call the number of experts
SMALL_SORT = 4096  # ATen native/cuda/Sort.cpp: up to here `sort` needs no scratch


def sparse_moe_block(p: Player, hidden_states: Tensor) -> Tensor:
    """`MixtralSparseMoeBlock.forward`, `Qwen3MoeSparseMoeBlock.forward`: [tokens, hidden] to the same."""
    router_logits, top_k_weights, top_k_index = router(p, hidden_states)
    hidden_states = experts(p, hidden_states, top_k_index, top_k_weights)
    del router_logits  # the caller's `_` keeps it until here
    return hidden_states


# ------------------------------------------------------------------------------------------------------- router
def router(p: Player, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`MixtralTopKRouter.forward`, `Qwen3MoeTopKRouter.forward`: logits, weights [tokens, k], experts [tokens, k]."""
    tape, spec = p.tape, p.spec
    weight = tape.constant(spec.num_experts, spec.hidden_size, p.expert_dtype)
    router_logits = linear(tape, hidden_states, weight, "router")
    if spec.model_type == "mixtral":
        router_probs = softmax(tape, cast(tape, router_logits, FP32, "router logits in fp32"), "router softmax")
    else:
        router_probs = softmax(tape, router_logits, "router softmax")
    router_top_value, router_indices = topk(tape, router_probs, spec.num_experts_per_token)
    if spec.norm_topk_prob:
        router_top_value = normalised(tape, router_top_value)
    if spec.model_type != "mixtral":
        router_top_value = cast(tape, router_top_value, router_logits.dtype, "router weights in bf16")
    return router_logits, router_top_value, router_indices


def topk(tape: Tape, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk(x, k)`: values and int64 indices; the gradient is scattered into zeros."""
    node = None
    if x.node is not None:
        rows, columns = x.rows, x.columns

        def backward(g: Grads, n: Node) -> Grads:
            held = n.take(0)
            grad = tape.new("gradient of router probabilities", rows, columns, FP32)
            del held
            return (grad,)

        node = Node(tape, (x,), backward)
    values = tape.new("router weights", x.rows, k, x.dtype)
    indices = tape.new("experts chosen", x.rows, k, "int64")
    if node is not None:
        node.save(tape, indices)
        values.node = node
    return values, indices


def normalised(tape: Tape, x: Tensor) -> Tensor:
    """`x /= x.sum(dim=-1, keepdim=True)`, in place: autograd keeps a clone of x, and the sum."""
    rows, columns, dtype = x.rows, x.columns, x.dtype
    total = tape.new("sum of router weights", rows, 1, dtype)
    if x.node is None:
        return Tensor(x.storage, rows, columns, dtype)
    total.node = Node(tape, (x,), lambda g, n: (Tensor(_first(g).storage, rows, columns, dtype),))  # expand: a view

    def backward(g: Grads, n: Node) -> Grads:
        held = [n.take(0), n.take(1)]
        grad = tape.new("gradient of router weights", rows, columns, dtype)
        quotient = tape.new("x / sum", rows, columns, dtype)
        quotient = tape.new("x / sum / sum", rows, columns, dtype)
        negative = tape.new("- gradient", rows, columns, dtype)
        other = tape.new("gradient of the sum", rows, columns, dtype)
        del held, quotient, negative
        return grad, other

    clone = tape.new("router weights before the division", rows, columns, dtype)
    node = Node(tape, (x, total), backward, (total, clone))
    return Tensor(x.storage, rows, columns, dtype, node)


# ------------------------------------------------------------------------------------------------------ experts
def experts(p: Player, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`grouped_mm_experts_forward`; its locals live until it returns, as they do there."""
    tape, spec = p.tape, p.spec
    inner = spec.moe_intermediate_size or spec.intermediate_size
    rows, hidden = top_k_index.rows * top_k_index.columns, hidden_states.columns
    sample_weights = top_k_weights.view(rows, 1)
    expert_ids_g, perm = sort(tape, rows)
    token_of_row = tape.new("perm // k", 1, rows, "int64")
    selected_hidden_states_g = index_rows(tape, hidden_states, token_of_row, "tokens by expert")
    del token_of_row
    sample_weights_g = index_rows(tape, sample_weights, perm, "router weights by expert")
    histc_input = tape.new("experts in int32", 1, rows, "int32")
    tokens_per_expert = tape.new("tokens per expert", 1, spec.num_experts, "int32")
    offsets = tape.new("expert offsets", 1, spec.num_experts, "int32")
    sentinel_mask = tape.new("sentinel mask", 1, rows, "bool")
    selected_hidden_states_g = masked_fill(tape, selected_hidden_states_g, sentinel_mask, "tokens", in_place=True)
    proj_out = grouped_mm(p, selected_hidden_states_g, 2 * inner, offsets, "expert gate_up")
    proj_out = masked_fill(tape, proj_out, sentinel_mask, "expert gate_up")
    proj_out = gated(tape, proj_out)
    proj_out = grouped_mm(p, proj_out, hidden, offsets, "expert down")
    proj_out = masked_fill(tape, proj_out, sentinel_mask, "expert down")
    weighted_out = mul(tape, proj_out, sample_weights_g, "expert output weighted")
    inv_perm = tape.new("inverse permutation", 1, rows, "int64")
    arange = tape.new("arange", 1, rows, "int64")
    del arange
    weighted_out = index_rows(tape, weighted_out, inv_perm, "expert output by token")
    final_hidden_states = sum_experts(tape, weighted_out, top_k_index.columns)
    final_hidden_states = cast(tape, final_hidden_states, hidden_states.dtype, "expert output")
    del expert_ids_g, perm, histc_input, tokens_per_expert, inv_perm
    return final_hidden_states


def sort(tape: Tape, rows: int) -> tuple[Tensor, Tensor]:
    """`torch.sort` of one int64 vector: values, indices, and for long ones CUB's double buffers (Sort.cu)."""
    values = tape.new("experts sorted", 1, rows, "int64")
    indices = tape.new("permutation by expert", 1, rows, "int64")
    if rows > SMALL_SORT:
        scratch = [tape.new("sort scratch", 1, rows * n, "int64") for n in (1, 2)]
        del scratch
    return values, indices


def index_rows(tape: Tape, x: Tensor, index: Tensor, name: str) -> Tensor:
    """`x[index]` for an int64 index vector; the gradient is `index_put(accumulate=True)`, which sorts (Indexing.cu)."""
    count = index.rows * index.columns
    node = None
    if x.node is not None:
        rows, columns = x.rows, x.columns

        def backward(g: Grads, n: Node) -> Grads:
            held = n.take(0)
            grad = tape.new(f"gradient of {name}", rows, columns, _first(g).dtype)
            # linear, sorted and original indices and their range, then CUB's double buffers
            scratch = [tape.new("index_put scratch", 1, count * size, "int64") for size in (1, 1, 1, 1, 2)]
            del scratch, held
            return (grad,)

        node = Node(tape, (x,), backward, (index,))
    out = tape.new(name, count, x.columns, x.dtype)
    out.node = node
    return out


def masked_fill(tape: Tape, x: Tensor, mask: Tensor, name: str, *, in_place: bool = False) -> Tensor:
    """`x.masked_fill(mask, 0)`: saves the mask; forward (unless in place) and backward each make a full tensor."""
    node = None
    if x.node is not None:
        rows, columns = x.rows, x.columns

        def backward(g: Grads, n: Node) -> Grads:
            held = n.take(0)
            grad = tape.new(f"gradient of {name} masked", rows, columns, _first(g).dtype)
            del held
            return (grad,)

        node = Node(tape, (x,), backward, (mask,))
    if in_place:
        return Tensor(x.storage, x.rows, x.columns, x.dtype, node)
    out = tape.new(name + " masked", x.rows, x.columns, x.dtype)
    out.node = node
    return out


def grouped_mm(p: Player, x: Tensor, n_out: int, offsets: Tensor, name: str) -> Tensor:
    """`_grouped_mm(input.to(weight.dtype), weight)` with frozen weights: [S, in] to [S, out], one group per expert."""
    tape, dtype, experts = p.tape, p.expert_dtype, p.spec.num_experts
    one_kernel = dtype == BF16 and p.capability[0] in (9, 10)
    own_operator = p.capability < (8, 0)
    x = cast(tape, x, dtype, name + " input cast")
    node = None
    if x.node is not None:
        rows, n_in = x.rows, x.columns

        def backward(g: Grads, n: Node) -> Grads:
            held = n.take(0)
            grad = tape.new(f"gradient of {name} input", rows, n_in, dtype)
            if own_operator:
                unused = tape.new(f"gradient of {name} weights", experts * n_out, n_in, dtype)
                del unused
            if not one_kernel:
                tape.product()
            del held
            return (grad,)

        node = Node(tape, (x,), backward, (x,) if own_operator else (offsets,))
    out = tape.new(name, x.rows, n_out, dtype)
    if not one_kernel:
        tape.product()
    out.node = node
    return out


def gated(tape: Tape, gate_up_out: Tensor) -> Tensor:
    """`_default_apply_gate`: `act_fn(gate) * up` of the two halves."""
    gate, up = chunk(tape, gate_up_out, 2, "expert gate_up")
    return mul(tape, unary(tape, gate, "expert activation", saves="input"), up, "expert gate * up")


def sum_experts(tape: Tape, x: Tensor, k: int) -> Tensor:
    """`x.view(tokens, k, hidden).sum(dim=1)`: float32 under autocast; the gradient is one full tensor in x's dtype."""
    node = None
    if x.node is not None:
        rows, columns, dtype = x.rows, x.columns, x.dtype
        node = Node(tape, (x,), lambda g, n: (tape.new("gradient of expert output", rows, columns, dtype),))
    out = tape.new("expert output in fp32", x.rows // k, x.columns, FP32)
    out.node = node
    return out
