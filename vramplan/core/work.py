"""What one micro-step gives a card to do: products, attention, bytes moved, kernels started. Counted, not measured,
but for `OUTPUT_BYTES`.

Checked against the kernels of eight steps of three models on one card (docs/decisions/0007-fit.md).
"""

from __future__ import annotations

from typing import NamedTuple

from . import architecture as arch
from .fused import graphed, is_fused, skips_last
from .timeline import checkpoint_period
from .types import ModelSpec, RunSpec
from .unroll import Unrolled

OUTPUT_BYTES = 13  # modelled: moved for each element of a product's result, beyond the one write of a new tensor


class Work(NamedTuple):
    """One micro-step, its share of the optimizer's step included."""

    product_flops: int
    attention_flops: int
    traffic_bytes: float
    kernels: float  # tensors born: each by one kernel or a few
    graphed: bool  # started as one CUDA graph, where the card has room for that


def work(model: ModelSpec, run: RunSpec, unrolled: Unrolled) -> Work:
    """The work of one micro-step, its share of the optimizer's step included."""
    born, kernels = unrolled.births()
    micro_steps = min(run.accumulation, 2)  # what was played
    traffic = born / micro_steps + OUTPUT_BYTES * product_outputs(model, run)
    return Work(product_flops(model, run), attention_flops(model, run), traffic, kernels / micro_steps,
                graphed(model, run))  # fmt: skip


def recomputed_layers(model: ModelSpec, run: RunSpec) -> int:
    """Layers whose forward is done twice."""
    if run.levers.checkpointing == "none":
        return 0
    return -(-model.num_layers // checkpoint_period(run.levers.checkpointing))


def product_flops(model: ModelSpec, run: RunSpec) -> int:
    """Floating-point operations of the matrix products with weights: forward, recomputation, gradients of inputs."""
    tokens, again = run.micro_batch_size * run.seq_len, recomputed_layers(model, run)
    weights = sum(x.in_features * x.out_features for x in arch.layer_linears(model))
    if model.num_experts:  # only the chosen experts of a token are multiplied
        inner = model.moe_intermediate_size or model.intermediate_size
        weights += model.hidden_size * (3 * inner * model.num_experts_per_token + model.num_experts)
    left_out = model.hidden_size * model.intermediate_size if is_fused(model, run) and skips_last(model) else 0
    layers = weights * (2 * model.num_layers + again) - left_out * again
    return 2 * tokens * (layers + 2 * model.vocab_size * model.hidden_size)


def attention_flops(model: ModelSpec, run: RunSpec) -> int:
    """Of attention proper: two products of half a square forward, five backward."""
    causal = 2 * run.seq_len * arch.query_width(model)
    forwards = model.num_layers + recomputed_layers(model, run)
    return run.micro_batch_size * run.seq_len * causal * (2 * forwards + 5 * model.num_layers) // 2


def product_outputs(model: ModelSpec, run: RunSpec) -> int:
    """Elements of all the results of the products with weights: the input's gradient is one, backward."""
    linears = arch.layer_linears(model)
    outs, ins = sum(x.out_features for x in linears), sum(x.in_features for x in linears)
    layers = outs * (model.num_layers + recomputed_layers(model, run)) + ins * model.num_layers
    return run.micro_batch_size * run.seq_len * (layers + model.vocab_size + model.hidden_size)
