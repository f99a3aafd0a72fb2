"""Replays loading, preparing and wrapping through the allocator, tensor by tensor.

The order matters: a block whose rest is too small to split keeps it, so the same tensors can count a few MiB more or
less. A weight comes to the card in bf16, is quantised there and dropped; with random weights it is drawn and scaled
first, which takes it twice.
"""

from __future__ import annotations

from . import architecture as arch
from .allocator import Handle, Native
from .types import Lora, ModelSpec

NF4_CODE_BYTES, NESTED_CODE_BYTES = 64, 1024


class Loader:
    """Holds the resident blocks of one model in `memory`."""

    def __init__(self, memory: Native, spec: ModelSpec, double_quant: bool, drawn: bool = False) -> None:
        self.memory = memory
        self.drawn = drawn  # random weights
        self.spec = spec
        self.double_quant = double_quant
        self.plain: list[tuple[str, int, Handle]] = []  # unquantised parameters: name, elements, block

    def load(self) -> None:
        """Everything that `memory_allocated()` shows after the 4-bit load."""
        if self.drawn:
            self._linears()
            self._rest(embedding_first=True)
        else:  # from_pretrained takes the tensors of a checkpoint in the order of their names
            self._head()
            self._parameter("embed", self.spec.vocab_size * self.spec.hidden_size, matrix=True)
            self._linears()
            self._rest(embedding_first=False)
        self.memory.empty_cache()

    def _linears(self) -> None:
        """Every 4-bit Linear, layer by layer."""
        linears = [x for x in arch.layer_linears(self.spec) if x.quantised]
        if not self.drawn:
            linears.sort(key=lambda x: x.name)
        for _ in range(self.spec.num_layers):
            for x in linears:
                self._quantise(x.in_features * x.out_features)

    def _rest(self, embedding_first: bool) -> None:
        """Everything that stays bf16, and the buffers."""
        spec = self.spec
        if embedding_first:
            self._parameter("embed", spec.vocab_size * spec.hidden_size, matrix=True)
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
        if embedding_first:
            self._head()

    def _head(self) -> None:
        if not self.spec.tie_word_embeddings:
            self._parameter("lm_head", self.spec.vocab_size * self.spec.hidden_size, matrix=True)

    def _quantise(self, elements: int) -> None:
        """bitsandbytes `quantize_4bit` on the card: scales before the packed weight, then the scales of the scales."""
        malloc, free = self.memory.malloc, self.memory.free
        weight = self._arrive(elements)
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
        block = self._arrive(elements) if matrix else self.memory.malloc(2 * elements)
        self.plain.append((name, elements, block))

    def _arrive(self, elements: int) -> Handle:
        """A bf16 matrix on the card."""
        if not self.drawn:
            return self.memory.malloc(2 * elements)
        first = self.memory.malloc(2 * elements)
        scaled = self.memory.malloc(2 * elements)
        self.memory.free(first)
        return scaled

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
