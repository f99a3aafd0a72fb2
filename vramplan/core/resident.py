"""Exact resident bytes: what stays on the card from step to step.

Every tensor is rounded up to 512 bytes, as `torch.cuda.memory_allocated()` counts it. Layouts: bitsandbytes 0.50.2
`quantize_4bit` (packed weight, absmax per 64, and with double quantisation uint8 absmax with float32 absmax per 256 of
those, a private 256-entry code and an offset); peft 0.21 `prepare_model_for_kbit_training` (every fp16/bf16 parameter
that is not 4-bit becomes float32); QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3.
"""

from __future__ import annotations

from typing import NamedTuple

from . import architecture as arch
from .fused import adapter_shapes
from .parallel import packed_rows, shard_rows, vocabulary_shards
from .tape import GRANULE
from .types import Line, ModelSpec, RunSpec
from .units import round_up

BLOCK, NESTED_BLOCK = 64, 256


def rounded(size: int) -> int:
    return round_up(size, GRANULE)


def packed_bytes(elements: int, parts: int = 1) -> int:
    """Two 4-bit values a byte; of `parts` cards that share them out, one's part."""
    return rounded(-(-elements // 2) if parts == 1 else 2 * shard_rows(packed_rows(elements), parts))


def constants_bytes(elements: int, double_quant: bool) -> int:
    """Quantisation constants of one Linear: 0.5 bit a parameter, 0.127 with double quantisation."""
    blocks = -(-elements // BLOCK)
    code = rounded(16 * 4)
    if not double_quant:
        return rounded(4 * blocks) + code
    nested = -(-blocks // NESTED_BLOCK)
    return rounded(blocks) + rounded(4 * nested) + code + rounded(256 * 4) + rounded(4)


class Weights(NamedTuple):
    """Bytes of the frozen model by kind, before (`float_size` 2) or after an upcast."""

    nf4_bytes: int
    constants_bytes: int
    embeddings_bytes: int
    lm_head_bytes: int
    other_bytes: int
    experts_bytes: int = 0  # the 3-D parameters of a mixture of experts
    plain_bytes: int = 0  # Linears that are not quantised

    @property
    def total_bytes(self) -> int:
        return sum(self)


def weights(spec: ModelSpec, double_quant: bool, upcast: str = "none", parts: int = 1) -> Weights:
    """The frozen model on the card. `upcast`: "all" makes every unquantised parameter float32, "norms" the norms.

    `parts`: into how many its matrices are shared out (`core/parallel.py`); this is one card's part.
    """
    linears = arch.layer_linears(spec)
    wide = 4 if upcast == "all" else 2
    quantised = [x.in_features * x.out_features for x in linears if x.quantised]
    plain = [shard_rows(x.out_features, parts) * x.in_features for x in linears if not x.quantised]
    vectors = arch.layer_vectors(spec)

    def size(name: str) -> int:
        return 4 if upcast == "norms" and "norm" in name else wide

    experts = sum(rounded(wide * expert_elements(spec, n, parts)) for name, n in vectors if arch.is_expert(name))
    others = sum(rounded(size(name) * n) for name, n in vectors if not arch.is_expert(name))
    outer = sum(rounded(size(name) * n) for name, n in arch.outer_vectors(spec))
    buffers = sum(rounded(4 * n) for n in arch.buffer_elements(spec))
    embedding = rounded(wide * shard_rows(spec.vocab_size, vocabulary_shards(spec, parts)) * spec.hidden_size)
    layers = spec.num_layers
    return Weights(
        nf4_bytes=layers * sum(packed_bytes(n, parts) for n in quantised),
        constants_bytes=layers * sum(constants_bytes(n, double_quant) for n in quantised),
        embeddings_bytes=embedding,
        lm_head_bytes=0 if spec.tie_word_embeddings else embedding,
        other_bytes=layers * others + outer + buffers,
        experts_bytes=layers * experts,
        plain_bytes=layers * sum(rounded(wide * n) for n in plain),
    )


def expert_elements(spec: ModelSpec, elements: int, parts: int) -> int:
    """One card's part of a 3-D parameter that holds all experts."""
    return shard_rows(spec.num_experts, parts) * (elements // spec.num_experts)


def lora_bytes(spec: ModelSpec, run: RunSpec) -> int:
    """A [r, in] and B [out, r] of every adapted Linear, in the adapter's dtype; in fused layers as one flat tensor.

    The gradients take the same.
    """
    size = 4 if run.lora.dtype == "float32" else 2
    return sum(rounded(size * rows * columns) for rows, columns in adapter_shapes(spec, run)) * spec.num_layers


# bytes of state per parameter and how bitsandbytes' 8-bit kinds treat small tensors: see optimizer_bytes
_MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2, "paged_adamw_32bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2,
            "lion_32bit": 1, "paged_lion_32bit": 1, "lion_8bit": 1, "paged_lion_8bit": 1,
            "sgd": 0, "adafactor": 0}  # fmt: skip
MIN_8BIT, MIN_PAGED = 4096, 100_000


def optimizer_bytes(spec: ModelSpec, run: RunSpec) -> tuple[int, int]:
    """(bytes on the card, bytes in managed memory) of the optimizer's state.

    bitsandbytes 0.50.2: 8-bit state from 4,096 elements on, one float32 absmax per 256; a tensor is paged only from
    100,000 elements on; two 256-entry code tables once. torch: `step` is on the CPU, fused Adam's on the card.
    """
    name = run.levers.optimizer
    on_card = paged = 0
    for elements in adapter_shapes(spec, run):
        state = _state(name, *elements)
        if name.startswith("paged") and elements[0] * elements[1] >= MIN_PAGED:
            scales = _absmax(name, elements[0] * elements[1])
            paged += state - scales
            on_card += scales
        else:
            on_card += state
    on_card, paged = on_card * spec.num_layers, paged * spec.num_layers
    if name.endswith("_8bit"):
        on_card += moments(name) * rounded(1024)
    return on_card, paged


def moments(optimizer: str) -> int:
    """How many state tensors of the parameter's shape the optimizer keeps."""
    return _MOMENTS[optimizer]


def state_tensor_bytes(optimizer: str, elements: int) -> int:
    """Bytes on the card of one state tensor; 0 if it is paged."""
    if moments(optimizer) == 0 or (optimizer.startswith("paged") and elements >= MIN_PAGED):
        return 0
    return _moment_bytes(optimizer, elements)


def state_births(spec: ModelSpec, run: RunSpec) -> list[int]:
    """Bytes on the card of every tensor of the optimizer's state, in the order of their birth in the first step."""
    name = run.levers.optimizer
    out = [rounded(1024)] * moments(name) if name.endswith("_8bit") else []
    for rows, columns in adapter_shapes(spec, run) * spec.num_layers:
        n = rows * columns
        if name == "adafactor":
            out += [rounded(4 * rows), rounded(4 * columns)]
        elif name == "adamw_torch_fused":
            out.append(rounded(4))
        moment, scales = state_tensor_bytes(name, n), _absmax(name, n)
        out += [moment] * moments(name) if moment else []
        out += [scales // moments(name)] * moments(name) if scales else []
    return out


def _moment_bytes(name: str, elements: int) -> int:
    return rounded((1 if name.endswith("_8bit") and elements >= MIN_8BIT else 4) * elements)


def _absmax(name: str, elements: int) -> int:
    if not name.endswith("_8bit") or elements < MIN_8BIT:
        return 0
    return moments(name) * rounded(4 * -(-elements // 256))


def _state(name: str, rows: int, columns: int) -> int:
    if name == "adafactor":  # row and column means of the squared gradient
        return rounded(4 * rows) + rounded(4 * columns)
    n = rows * columns
    steps = rounded(4) if name == "adamw_torch_fused" else 0
    return moments(name) * _moment_bytes(name, n) + _absmax(name, n) + steps


def weight_lines(spec: ModelSpec, double_quant: bool, upcast: str, parts: int = 1) -> list[Line]:
    """The resident weights as ledger rows, of one card."""
    w = weights(spec, double_quant, upcast, parts)
    params = sum(x.in_features * x.out_features for x in arch.layer_linears(spec) if x.quantised) * spec.num_layers
    wide = "4 (float32)" if upcast == "all" else "2 (bf16)"
    table = f"{spec.vocab_size} x {spec.hidden_size} x {wide}"
    per = "1/64 + 4/16384" if double_quant else "4/64"
    head = "tied" if spec.tie_word_embeddings else "untied"
    experts = sum(n for name, n in arch.layer_vectors(spec) if arch.is_expert(name)) * spec.num_layers
    plain = sum(x.in_features * x.out_features for x in arch.layer_linears(spec) if not x.quantised) * spec.num_layers
    share = f" / {parts} cards" if parts > 1 else ""
    table += f" / {parts} cards" if vocabulary_shards(spec, parts) > 1 else ""
    rows = [
        ("weights.nf4", "4-bit weights (NF4)", w.nf4_bytes, f"{params:,} parameters / 2{share}"),
        ("weights.constants", "quantisation constants", w.constants_bytes, f"{params:,} x ({per}) + code tables"),
        ("weights.embeddings", f"input embedding, {head}", w.embeddings_bytes, table),
        ("weights.lm_head", "output head", w.lm_head_bytes, table),
        ("weights.plain", "Linears, not quantised", w.plain_bytes, f"{plain:,} x {wide}{share}"),
        ("weights.experts", "experts, not quantised", w.experts_bytes, f"{experts:,} x {wide}{share}"),
        ("weights.other", "norms, biases, buffers", w.other_bytes, "each tensor rounded up to 512 bytes"),
    ]
    return [Line(key=k, label=t, bytes=b, formula=f, group="weights") for k, t, b, f in rows if b]
