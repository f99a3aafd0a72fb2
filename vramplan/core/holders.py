"""Who asked for memory, by the stack that asked: frames -> the key of a ledger's line.

A stack says where a tensor was made, not what it is for. The rules below follow the libraries' files (torch,
transformers, peft, bitsandbytes and our own); what none of them knows stays unknown.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import islice
from typing import NamedTuple

from .snapshot import Frames

BEFORE, BACKWARD, UNKNOWN = "before", "backward", "unknown"
HOLDERS = {  # in the order of a table with equal sizes
    BEFORE: "no stack: before the recording",
    "weights.loaded": "weights",
    "weights.prepared": "weights turned to float32",
    "adapter.lora": "LoRA adapter",
    "adapter.gradients": "adapter gradients",
    "optimizer.state": "optimizer state",
    "optimizer.scratch": "optimizer scratch",
    "activations.inputs": "batch, embeddings, mask, cos and sin",
    "activations.checkpoints": "checkpointed layer inputs",
    "activations.layers": "saved by the layers",
    "activations.lora": "saved by LoRA in the layers",
    "activations.attention": "saved by attention",
    "activations.head": "final norm",
    "activations.gradients": "gradients in flight",
    BACKWARD: "no Python: made in the backward",
    "loss.logits": "logits",
    "loss.log_softmax": "log_softmax of the logits",
    "loss.fused": "fused loss",
    "workspace.dequantised": "weight dequantised",
    "workspace.cublas": "cuBLAS workspaces",
    UNKNOWN: "code that is not known",
}
GROUPS = {key: key.partition(".")[0] if "." in key else "overhead" for key in HOLDERS}

# The whole stack decides first: what was going on. The first that matches.
_DOING = (
    ("workspace.cublas", r"c\+\+:0 (?:getNewWorkspace|getCUDABlasLtWorkspace|CUDABlasHandle)"),
    ("adapter.gradients", r"c\+\+:0 AccumulateGrad"),
    ("weights.prepared", r" prepare_model_for_kbit_training$"),
    ("adapter.lora", r" (?:get_peft_model|inject_adapter\w*|\w+_adapter|reset_lora_parameters|update_layer|"
                     r"set_peft_model_state_dict)$|vramplan/train/lora\.py:\d+ add_lora$"),
    ("optimizer.state", r" (?:_init_group|init_state|get_state_buffer|_init_state)$"),
    ("optimizer.scratch", r"(?:torch|bitsandbytes)/optim/|transformers/optimization\.py"),
    ("weights.loaded", r" (?:from_pretrained|_load_pretrained_model|caching_allocator_warmup|load_state_dict\w*|"
                       r"quantize_4bit|_quantize)$|vramplan/train/load\.py|core_model_loading\.py|"
                       r"nn/modules\.py:\d+ (?:to|cuda)$"),
)  # fmt: skip
# Then the innermost frame that says something.
_MADE = (
    ("workspace.dequantised", r" _?(?:dequantize_\w+|dequantise|_?dequant_linear_fallback)$"),
    ("loss.fused", r"fused_loss\.py|fused_linear_cross_entropy|linear_cross_entropy$"),
    ("loss.log_softmax", r" (?:cross_entropy|log_softmax|nll_loss)$"),
    ("loss.logits", r"loss_utils\.py"),
    ("activations.gradients", r" backward$"),
    ("adapter.gradients", r"fast/flat\.py:\d+ gradients$"),
    ("activations.attention", r"sdpa_attention\.py|flash_attention|eager_attention_forward|flex_attention|"
                              r" scaled_dot_product_attention$"),
    ("activations.lora", r"tuners/lora/"),
    ("activations.inputs", r"masking_utils\.py|rope_utils\.py|modeling_attn_mask_utils\.py|"
                           r"trainer\.py:\d+ _prepare_input|send_to_device|vramplan/train/collate\.py|data/_utils/"),
)  # fmt: skip
LOOKED_AT = 2000  # stacks, to see whether the model's layers are called through transformers' own
DOING = tuple((key, re.compile(pattern, re.MULTILINE)) for key, pattern in _DOING)
MADE = tuple((key, re.compile(pattern)) for key, pattern in _MADE)
_PRODUCT = re.compile(r":(\d+) _dequant_linear_fallback$")
_MODEL = re.compile(r"modeling_\w+\.py:\d+ forward$")
_CHECKPOINT = re.compile(r"torch/utils/checkpoint\.py|train/fast/checkpoint\.py")
_AGAIN = re.compile(r" (?:backward|recompute\w*|unpack_hook|\w*run_backward)$|c\+\+:0 autograd::Engine", re.MULTILINE)
_LAYER_CALL = "modeling_layers.py:"


class Holder(NamedTuple):
    """The key of a stack; `layer`: the decoder layer's own frame in it, "" outside of the layers and when replayed."""

    key: str
    layer: str = ""


class Holders:
    """Knows each stack once. Given all stacks, as two of its rules compare one with the others."""

    def __init__(self, stacks: Collection[Frames]) -> None:
        lines = [int(found[1]) for frames in stacks if frames and (found := _PRODUCT.search(frames[-1]))]
        # bitsandbytes' function makes the weight, then the product, on its last line that allocates
        self.product = max(lines, default=-1)
        some = islice(stacks, LOOKED_AT)
        self.layers_called = any(_LAYER_CALL in frame for frames in some for frame in frames)
        self.known: dict[Frames, Holder] = {}
        self.seen: dict[int, tuple[Holder, Frames]] = {}  # by identity, as hashing a stack takes longer than all else

    def of(self, frames: Frames) -> Holder:
        seen = self.seen.get(id(frames))
        if seen is not None:
            return seen[0]
        holder = self.known.get(frames)
        if holder is None:
            holder = self.known[frames] = self._judge(frames)
        self.seen[id(frames)] = holder, frames  # kept, so that no other stack gets its identity
        return holder

    def _judge(self, frames: Frames) -> Holder:
        if not frames:
            return Holder(BACKWARD)
        text = "\n".join(frames)
        for key, pattern in DOING:
            if pattern.search(text):
                return Holder(key)
        again = _AGAIN.search(text) is not None
        layer_at = self._layer_index(frames, again)
        layer = "" if layer_at is None or again else frames[layer_at]
        made = self._made(frames)
        if made is None and layer_at == len(frames) - 1 and not again and _CHECKPOINT.search(text):
            return Holder("activations.checkpoints")  # what a layer returns is what the next one starts from
        return Holder(made or _by_model(frames, layer_at, again), layer)

    def _made(self, frames: Frames) -> str | None:
        product = _PRODUCT.search(frames[-1])
        if product is not None and int(product[1]) == self.product:
            frames = frames[:-1]
        played = False
        for frame in reversed(frames):
            played = played or _MODEL.search(frame) is not None
            for key, pattern in MADE:
                if pattern.search(frame) and not (played and key == "activations.gradients"):
                    return key
        return None

    def _layer_index(self, frames: Frames, again: bool) -> int | None:
        """Where the decoder layer's own frame is: the model's code right inside transformers' checkpointing layer, else
        the third of the nested models (causal LM, model, layer); the first in a layer that is played again."""
        models = _models(frames)
        called = next((index for index, frame in enumerate(frames) if _LAYER_CALL in frame), None)
        if called is not None:
            return next((index for index in models if index > called), None)
        if again:
            return models[0] if models else None
        return models[2] if len(models) > 2 and not self.layers_called else None


def _models(frames: Frames) -> list[int]:
    return [index for index, frame in enumerate(frames) if _MODEL.search(frame)]


def _by_model(frames: Frames, layer_at: int | None, again: bool) -> str:
    """What a model's own code made: in a layer, before the layers, after them."""
    models = _models(frames)
    if layer_at is not None:
        return "activations.layers"
    if not models:
        return "activations.gradients" if again else UNKNOWN
    if len(models) == 1:  # the causal LM itself: its head
        return "loss.logits"
    return "activations.inputs" if len(models) == 2 else "activations.head"
