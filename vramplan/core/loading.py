"""Replays loading, preparing and wrapping through the allocator, tensor by tensor.

The order matters: a block whose rest is too small to split keeps it, so the same tensors can count a few MiB more or
less. A weight comes to the card in bf16, is quantised there and dropped, before the next one comes: transformers 5.17
loads without threads when it quantises on the way (core_model_loading.py), in the order of the checkpoint's names.
Before that, `caching_allocator_warmup` (modeling_utils.py) takes one block of about the model's size and gives it back
to the cache. Random weights have no checkpoint: they come module by module, drawn and scaled, which takes them twice.
Where several cards share the weights out, each keeps its part of one as soon as it is there (`vramplan.train.fsdp`),
and there is no warm-up.
"""

from __future__ import annotations

from typing import NamedTuple

from . import architecture as arch
from .allocator import BITS, Native, Op, by_pool, units
from .fused import lora_shapes
from .parallel import packed_rows, shard_rows, vocabulary_shards
from .types import Lora, ModelSpec, Resident

NF4_CODE_BYTES, NESTED_CODE_BYTES = 64, 1024


class Held(NamedTuple):
    """What is on the card before the first step, and how high it was on the way."""

    resident: Resident
    load_peak_bytes: int  # while loading
    loaded_reserved_bytes: int  # after it
    peak_bytes: int  # while loading, preparing and wrapping
    reserved_bytes: int


def warmup_bytes(spec: ModelSpec, width: int = 2) -> int:
    """`get_total_byte_count`: half a byte for each weight to be quantised, `width` bytes for everything else."""
    linears = arch.layer_linears(spec)
    halves = sum(x.in_features * x.out_features * (1 if x.quantised else 2 * width) for x in linears)
    halves += 2 * width * sum(elements for _, elements in arch.layer_vectors(spec))
    halves *= spec.num_layers
    halves += 2 * width * sum(elements for _, elements in arch.outer_vectors(spec))
    halves += 2 * width * spec.vocab_size * spec.hidden_size * (1 if spec.tie_word_embeddings else 2)
    return halves // 2


class Loader:
    """Puts one model on the card and into `memory`.

    The operations of a layer are written down once, by `_tensor` and `_dies`, and run for every layer.
    """

    def __init__(
        self, memory: Native, spec: ModelSpec, double_quant: bool, drawn: bool = False, parts: int = 1
    ) -> None:
        self.memory = memory
        self.drawn = drawn  # random weights
        self.parts = parts  # cards among which the matrices are shared out
        self.spec = spec
        self.double_quant = double_quant
        self.live: dict[int, int] = {}  # the blocks of what is resident
        self.plain: list[tuple[str, int, int]] = []  # unquantised parameters: name, elements, key in `live`
        self._ops: list[Op] = []
        self._units: dict[int, int] = {}  # of their tensors, by key
        self._named: list[tuple[str, int, int]] = []  # what `_ops` adds to `plain`
        self._keys = 0

    def prepare(self, upcast: str, lora: Lora, flat: bool = False) -> Held:
        """Load, prepare, wrap, empty the cache: the state in which the first step finds the card."""
        memory = self.memory
        memory.reset_peaks()
        self.load()
        loaded, load_peak, cached = memory.allocated, memory.peak_allocated, memory.reserved
        self.upcast(upcast)
        prepared = memory.allocated
        self.add_lora(lora, flat)
        peak, reserved = memory.peak_allocated, memory.peak_reserved
        memory.empty_cache()  # Trainer, through accelerate's `free_memory`
        found = Resident(loaded_bytes=loaded, prepared_bytes=prepared, with_lora_bytes=memory.allocated)
        return Held(found, load_peak, cached, peak, reserved)

    def load(self) -> None:
        """Everything that `memory_allocated()` shows after the 4-bit load."""
        if self.drawn:
            self._embedding()
            self._layers(arch.layer_linears(self.spec), arch.layer_vectors(self.spec))
            self._outer()
            self._head()
            self.memory.empty_cache()
        else:
            if self.parts == 1:
                self.memory.free(self.memory.malloc(warmup_bytes(self.spec)))
            self._head()
            self._embedding()
            self._layers_by_name()
            self._outer()

    def unload(self) -> None:
        """The model and its adapter are gone; what they lay in stays cached."""
        ops = [(key, -(block >> BITS), False) for key, block in self.live.items()]
        self.memory.run(by_pool(ops), 0, self.live)
        self.plain = []

    # -------------------------------------------------------------------------------------- writing and running
    def _tensor(self, size: int) -> int:
        self._keys += 1
        self._units[self._keys] = units(size)
        self._ops.append((self._keys, units(size), True))
        return self._keys

    def _dies(self, key: int) -> None:
        self._ops.append((key, -self._units[key], True))

    def _run(self, times: int = 1) -> None:
        """Carry out what was written down, once for every layer."""
        stride, todo = self._keys, by_pool(self._ops)
        for layer in range(times):
            shift = layer * stride
            self.memory.run(todo, shift, self.live)
            self.plain += [(name, elements, key + shift) for name, elements, key in self._named]
        self._keys *= times + 1  # above every key in use
        self._ops, self._named, self._units = [], [], {}

    # ------------------------------------------------------------------------------------------------ loading
    def _layers(self, linears: tuple[arch.Linear, ...], vectors: tuple[tuple[str, int], ...]) -> None:
        for x in linears:
            self._linear(x)
        for name, elements in vectors:
            self._vector(name, elements)
        self._run(self.spec.num_layers)

    def _layers_by_name(self) -> None:
        """As a checkpoint's sorted names have them (`dot_natural_key`)."""
        linears = {x.name: x for x in arch.layer_linears(self.spec)}
        vectors = dict(arch.layer_vectors(self.spec))
        for name in sorted([*linears, *vectors], key=lambda name: name.split(".")):
            if name in linears:
                self._linear(linears[name])
            else:
                self._vector(name, vectors[name])
        self._run(self.spec.num_layers)

    def _linear(self, linear: arch.Linear) -> None:
        elements = linear.in_features * linear.out_features
        if linear.quantised:
            self._quantise(elements)
        else:
            self._matrix(linear.name, linear.out_features, linear.in_features, self.parts)

    def _vector(self, name: str, elements: int) -> None:
        if arch.is_expert(name):
            rows = self.spec.num_experts
            self._matrix(name, rows, elements // rows, self.parts, merged=True)
        else:
            self._parameter(name, elements)

    def _outer(self) -> None:
        """Final norm and buffers."""
        for name, elements in arch.outer_vectors(self.spec):
            self._parameter(name, elements)
        for elements in arch.buffer_elements(self.spec):
            self._tensor(4 * elements)
        self._run()

    def _embedding(self) -> None:
        self._vocabulary("embed")

    def _head(self) -> None:
        if not self.spec.tie_word_embeddings:
            self._vocabulary("lm_head")

    def _vocabulary(self, name: str) -> None:
        spec = self.spec
        self._matrix(name, spec.vocab_size, spec.hidden_size, vocabulary_shards(spec, self.parts))
        self._run()

    def _quantise(self, elements: int) -> None:
        """bitsandbytes `quantize_4bit` on the card: scales before the packed weight, then the scales of the scales."""
        weight = self._arrive(elements)
        blocks = -(-elements // 64)
        absmax = self._tensor(4 * blocks)
        packed = self._tensor(-(-elements // 2))
        self._tensor(NF4_CODE_BYTES)
        if self.double_quant:
            self._tensor(4)  # offset
            shifted = self._tensor(4 * blocks)
            for size in (NESTED_CODE_BYTES, 4 * -(-blocks // 256), blocks):
                self._tensor(size)
            self._dies(shifted)
            self._dies(absmax)
        self._dies(weight)
        if self.parts > 1:
            self._kept(packed, 2 * shard_rows(packed_rows(elements), self.parts))

    def _parameter(self, name: str, elements: int) -> None:
        self._named.append((name, elements, self._tensor(2 * elements)))

    def _matrix(self, name: str, rows: int, columns: int, parts: int, merged: bool = False) -> None:
        """One that is not quantised, of which this card keeps one of `parts`."""
        key, kept = self._arrive(rows * columns, merged), shard_rows(rows, parts) * columns
        if parts > 1:
            key = self._kept(key, 2 * kept)
        self._named.append((name, kept, key))

    def _kept(self, whole: int, size: int) -> int:
        part = self._tensor(size)
        self._dies(whole)
        return part

    def _arrive(self, elements: int, merged: bool = False) -> int:
        """A bf16 matrix on the card. `merged`: a checkpoint's experts come one by one and are stacked
        (`MergeModulelist`): twice the bytes."""
        if not self.drawn and not merged:
            return self._tensor(2 * elements)
        first = self._tensor(2 * elements)
        scaled = self._tensor(2 * elements)
        self._dies(first)
        return scaled

    # ---------------------------------------------------------------------------------- preparing and wrapping
    def upcast(self, which: str) -> None:
        """`prepare_model_for_kbit_training` ("all"), or the norms alone: cast one by one, the old tensor dies after.

        peft 0.21 empties the cache after its casts.
        """
        live = self.live
        for name, elements, key in self.plain:
            if which == "all" or (which == "norms" and "norm" in name):
                narrow = live.pop(key)
                self.memory.run(by_pool([(key, units(4 * elements), False)]), 0, live)
                self.memory.free(narrow)
        if which == "all":
            self.memory.empty_cache()

    def add_lora(self, lora: Lora, flat: bool = False) -> None:
        """`get_peft_model`: A then B of every adapted Linear; `flat`: moved into one tensor a layer after that."""
        size = 4 if lora.dtype == "float32" else 2
        sizes = [size * rows * columns for rows, columns in lora_shapes(self.spec, lora)]
        if not flat:
            for n in sizes:
                self._tensor(n)
            self._run(self.spec.num_layers)
            return
        memory, live = self.memory, self.live
        parts = [[memory.malloc(n) for n in sizes] for _ in range(self.spec.num_layers)]
        for layer in parts:
            self._keys += 1
            live[self._keys] = memory.malloc(sum(sizes))
            for part in layer:
                memory.free(part)
