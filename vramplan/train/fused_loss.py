"""Linear cross entropy in chunks: the loss of a frozen lm_head without ever holding all logits.

`logits = hidden @ weight.T` is the largest tensor of a training step (10 to 12 bytes a token and vocabulary entry in
the stock step). Here a chunk of rows is turned into logits, loss and the gradient with respect to `hidden` at once, as
liger-kernel does, so that what lives is one chunk of logits, one float32 chunk, and the gradient. The head is frozen,
so nothing else needs a gradient. Only labelled rows take part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vramplan.core.loss import chunk_tokens
from vramplan.errors import InputError
from vramplan.train.fast import kernels
from vramplan.train.store import IGNORED


@dataclass(frozen=True)
class Head:
    """A frozen output layer. logits = softcap * tanh((hidden @ weight.T + bias) * multiplier / softcap).

    `weight` is [vocab, hidden], `bias` [vocab] or None. `softcap` None: no tanh. `fused`: on a card, loss and gradient
    of a chunk are one kernel in the place of the logits.
    """

    weight: Tensor
    bias: Tensor | None = None
    multiplier: float = 1.0
    softcap: float | None = None
    fused: bool = False
    gather: Callable[[], Tensor] | None = None  # makes the whole weight, where `weight` is one rank's part of it


def head_of(model: nn.Module, fused: bool = False) -> Head:
    """The head of a causal language model of transformers, with what its config says is done to the logits.

    InputError if the output layer is not one plain, frozen linear layer.
    """
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    if type(layer) is not nn.Linear or any(p.requires_grad for p in layer.parameters()):
        kind = type(layer).__name__
        raise InputError(
            f"the fused loss needs a plain frozen lm_head, this model's is a {kind}",
            "train with --loss full, or leave lm_head out of --lora-targets",
        )
    multiplier = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    multiplier /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    gather = getattr(layer, "whole_weight", None)  # set by `fsdp.py`
    return Head(layer.weight, layer.bias, multiplier, float(softcap) if softcap else None, fused, gather)


def decoder_of(causal_lm: Any) -> Any:
    """The part of a causal language model that makes the hidden states, without the head."""
    decoder = getattr(causal_lm, causal_lm.base_model_prefix, None)
    if decoder is None or decoder is causal_lm:
        raise InputError(f"{type(causal_lm).__name__} has no separate decoder", "train with --loss full")
    return decoder


def labelled_rows(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the loss is: labels [batch, seq] -> (rows of hidden.view(batch * seq, -1) [n], their next tokens [n]).

    Position s predicts the label of s + 1, so the last position of a row of the batch never counts.
    """
    target = torch.full_like(labels, IGNORED)
    target[:, :-1] = labels[:, 1:]
    target = target.reshape(-1)
    rows = (target != IGNORED).nonzero().squeeze(1)
    return rows, target[rows]


def every_row(labels: Tensor) -> tuple[Tensor, Tensor]:
    """As `labelled_rows`, without asking which those are, so that no shape depends on the data: for CUDA graphs.

    All rows but the last of each sequence; the kernel leaves out those whose label is IGNORED.
    """
    batch, seq = labels.shape
    places = torch.arange(batch * seq, device=labels.device).view(batch, seq)
    return places[:, :-1].reshape(-1), labels[:, 1:].reshape(-1)


def fused_cross_entropy(
    hidden: Tensor, rows: Tensor, targets: Tensor, head: Head, normaliser: Tensor | float
) -> Tensor:
    """Sum of the cross entropies of the given rows divided by `normaliser`, as a float32 scalar (float64 of float64).

    hidden [..., hidden_size]; rows, targets [n] from `labelled_rows`. Without rows the loss and its gradient are zero.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    loss: Tensor = _FusedCrossEntropy.apply(flat, rows, targets, head, normaliser)
    return loss


class _FusedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, rows: Tensor, targets: Tensor, head: Head, normaliser: Tensor | float
    ) -> Tensor:
        dtype = _compute_dtype(head, hidden.device.type)
        with torch.autocast(hidden.device.type, enabled=False):  # the dtypes below are chosen, not cast
            picked = hidden.index_select(0, rows).to(dtype)
            whole = head.weight if head.gather is None else head.gather()
            weight = whole.to(dtype)  # a copy only where the recipe made the head float32
            bias = None if head.bias is None else head.bias.to(dtype)
            cast = replace(head, weight=weight, bias=bias)
            loss = _loss_and_gradient(picked, targets, cast, normaliser, ctx.needs_input_grad[0])
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(picked, rows)  # `picked` holds the gradient now
            ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        gradient, rows = ctx.saved_tensors
        full = gradient.new_zeros(ctx.shape, dtype=ctx.dtype)
        full.index_copy_(0, rows, gradient.to(ctx.dtype))
        full.mul_(outputs[0])
        return full, None, None, None, None


def _compute_dtype(head: Head, device: str) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, else the head's own."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype


def _loss_and_gradient(picked: Tensor, targets: Tensor, head: Head, normaliser: Tensor | float, grad: bool) -> Tensor:
    """The loss; when `grad`, `picked` [n, hidden_size] is overwritten by the loss's gradient, chunk by chunk."""
    if head.fused and kernels.on_card(picked):
        return _by_kernel(picked, targets, head, normaliser, grad)
    wide = torch.promote_types(picked.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=picked.device)
    size = chunk_tokens(max(picked.shape[0], 1), picked.shape[1], head.weight.shape[0])
    for start in range(0, picked.shape[0], size):
        part = picked[start : start + size]
        target = targets[start : start + size].unsqueeze(1)
        logits = torch.nn.functional.linear(part, head.weight, head.bias)
        z = logits.to(wide, copy=True)  # from here on everything happens in these two buffers
        z.mul_(head.multiplier)
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        z.sub_(z.amax(dim=1, keepdim=True))
        at_target = z.gather(1, target)
        normal = z.exp_().sum(dim=1, keepdim=True)
        total += (normal.log() - at_target).sum()
        if grad:
            z.div_(normal)
            z.scatter_add_(1, target, torch.full_like(at_target, -1.0))
            z.mul_(head.multiplier / normaliser)
            if head.softcap is not None:  # d tanh = 1 - tanh^2, in the dtype of the logits, as autograd has it
                logits.mul_(head.multiplier / head.softcap).tanh_().square_().neg_().add_(1)
                z.mul_(logits)
            logits.copy_(z)
            torch.mm(logits, head.weight, out=part)
        del logits, z
    return total / normaliser


def _by_kernel(picked: Tensor, targets: Tensor, head: Head, normaliser: Tensor | float, grad: bool) -> Tensor:
    """The same with one kernel for each chunk, which writes the gradient over the logits."""
    total = torch.zeros((), dtype=torch.float32, device=picked.device)
    scale = torch.ones((), dtype=torch.float32, device=picked.device) / normaliser
    size = chunk_tokens(max(picked.shape[0], 1), picked.shape[1], head.weight.shape[0], fused=True)
    for start in range(0, picked.shape[0], size):
        part = picked[start : start + size]
        logits = torch.nn.functional.linear(part, head.weight, head.bias)
        target = targets[start : start + size]
        total += kernels.cross_entropy_(logits, target, scale, head.multiplier, head.softcap, grad).sum()
        if grad:
            torch.mm(logits, head.weight, out=part)
        del logits
    return total * scale
