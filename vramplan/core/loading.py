"""Replays loading, preparing and wrapping through the allocator, tensor by tensor.

The order matters: a block whose rest is too small to split keeps it, so the same tensors can count a few MiB more or
less. Played is a model built Linear by Linear (a bf16 weight on the card, quantised there, dropped), which is what
`vramplan train --random-weights` does and what the measurements were made with; `from_pretrained` differs by about
1 MiB (5,443.07 against 5,442.07 MiB for Llama-3.1-8B, docs/measurements).
"""

from __future__ import annotations

from . import architecture as arch
from .allocator import Handle, Native
from .types import Lora, ModelSpec

NF4_CODE_BYTES, NESTED_CODE_BYTES = 64, 1024


class Loader:
    """Holds the resident blocks of one model in `memory`."""

    def __init__(self, memory: Native, spec: ModelSpec, double_quant: bool) -> None:
        self.memory = memory
        self.spec = spec
        self.double_quant = double_quant
        self.plain: list[tuple[str, int, Handle]] = []  # unquantised parameters: name, elements, block

    def load(self) -> None:
        """Everything that `memory_allocated()` shows after the 4-bit load."""
        spec = self.spec
        for _ in range(spec.num_layers):
            for linear in arch.layer_linears(spec):
                if linear.quantised:
                    self._quantise(linear.in_features * linear.out_features)
        table = spec.vocab_size * spec.hidden_size
        self._parameter("embed", table, matrix=True)
        for _ in range(spec.num_layers):
            for linear in arch.layer_linears(spec):
                if not linear.quantised:
                    self._parameter(linear.name, linear.in_features * linear.out_features, matrix=True)
            for name, elements in arch.layer_vectors(spec):
                self._parameter(name, elements)
        for name, elements in arch.outer_vectors(spec):
            self._parameter(name, elements)
        for elements in arch.buffer_elements(spec):
            self.memory.malloc(4 * elements)
        if not spec.tie_word_embeddings:
            self._parameter("lm_head", table, matrix=True)
        self.memory.empty_cache()

    def _quantise(self, elements: int) -> None:
        """bitsandbytes `quantize_4bit` on the card: scales before the packed weight, then the scales of the scales."""
        malloc, free = self.memory.malloc, self.memory.free
        drawn = malloc(2 * elements)
        weight = malloc(2 * elements)
        free(drawn)
        blocks = -(-elements // 64)
        absmax = malloc(4 * blocks)
        malloc(-(-elements // 2))
        malloc(NF4_CODE_BYTES)
        if self.double_quant:
            malloc(4)  # offset
            shifted = malloc(4 * blocks)
            malloc(NESTED_CODE_BYTES)
            malloc(4 * -(-blocks // 256))
            malloc(blocks)
            free(shifted)
            free(absmax)
        free(weight)

    def _parameter(self, name: str, elements: int, matrix: bool = False) -> None:
        if matrix:  # drawn and scaled
            drawn = self.memory.malloc(2 * elements)
            self.plain.append((name, elements, self.memory.malloc(2 * elements)))
            self.memory.free(drawn)
        else:
            self.plain.append((name, elements, self.memory.malloc(2 * elements)))

    def upcast(self, which: str) -> None:
        """`prepare_model_for_kbit_training` ("all"), or the norms alone: cast one by one, the old tensor dies after."""
        for i, (name, elements, block) in enumerate(self.plain):
            if which == "all" or (which == "norms" and "norm" in name):
                wide = self.memory.malloc(4 * elements)
                self.memory.free(block)
                self.plain[i] = (name, elements, wide)

    def add_lora(self, lora: Lora) -> None:
        """`get_peft_model`: A then B of every adapted Linear."""
        size = 4 if lora.dtype == "float32" else 2
        linears = arch.lora_linears(self.spec, lora)
        for _ in range(self.spec.num_layers):
            for x in linears:
                self.memory.malloc(size * lora.r * x.in_features)
                self.memory.malloc(size * lora.r * x.out_features)
