"""One line of a ledger taken apart: its formula, the numbers that were put in, the tensors behind it, and the source.

The tensors are those of the same play that the ledger is of, so that they add up to the line. Letters are those of
docs/memory-model.md.
"""

from __future__ import annotations

from typing import NamedTuple

from . import architecture as arch
from . import resident
from .caps import MARGIN
from .fused import adapter_shapes, is_fused
from .ledger import NO_CARD
from .parallel import shard_rows, shards
from .replay import live_at_peak, workspaces
from .timeline import play
from .types import GpuProfile, Ledger, Line, ModelSpec, RunSpec
from .unroll import Unrolled

# line -> (its formula, who makes it so)
RULES: dict[str, tuple[str, str]] = {
    "weights.nf4": (
        "n / 2 for each quantised Linear",
        "bitsandbytes 0.50.2, quantize_4bit: two values in a byte",
    ),
    "weights.constants": (
        "of each quantised Linear n/64 + 4 ceil(n/64/256) + 1024 (code) + 4 (offset) + 64 (NF4 code); without double "
        "quantisation 4 n/64 + 64",
        "bitsandbytes 0.50.2, quantize_4bit; QLoRA, arXiv:2305.14314, section 3",
    ),
    "weights.embeddings": (
        "V H x 2 (bf16), or 4 with --upcast all",
        "embeddings are not quantised; peft 0.21, prepare_model_for_kbit_training",
    ),
    "weights.lm_head": (
        "V H x 2 (bf16), or 4 with --upcast all; nothing where it is the embedding",
        "transformers leaves the head out of quantisation; peft 0.21, prepare_model_for_kbit_training",
    ),
    "weights.plain": (
        "n x 2 (bf16), or 4 with --upcast all",
        "Linears that transformers does not hand to bitsandbytes for this architecture",
    ),
    "weights.experts": (
        "n x 2 (bf16), or 4 with --upcast all",
        "experts are 3-D parameters, which bitsandbytes does not quantise",
    ),
    "weights.other": (
        "2 bytes an element (bf16), 4 of what is upcast and of buffers; every tensor apart",
        "peft 0.21, prepare_model_for_kbit_training: --upcast all turns all of them, norms the norms",
    ),
    "weights.gathered": ("what one layer's other parts take", "train/fsdp.py gathers layer by layer"),
    "adapter.lora": (
        "(i + o) r x 4 (float32) for each adapted Linear; with fused layers one flat tensor a layer",
        "peft 0.21, autocast_adapter_dtype; train/fast/flat.py",
    ),
    "adapter.gradients": ("as large as A and B", "autograd; train/fast/flat.py with fused layers"),
    "adapter.casts": ("2 bytes an element of A and B of one layer", "autocast; train/fast with fused layers"),
    "optimizer.state": (
        "what stays on the card: per element 4 or 1 (8 bit) for each moment that is not paged, and for 8 bit one "
        "float32 per 256 elements and two code tables",
        "bitsandbytes 0.50.2 (8 bit from 4,096 elements on, paged from 100,000); torch.optim",
    ),
    "optimizer.scratch": ("what a step of the optimizer takes and gives back", "torch.optim, foreach or fused"),
    "workspace.cublas": ("by compute capability, one for each thread that multiplies", "torch, CUDABlas.cpp"),
    "workspace.dequantised": (
        "2 i o of the Linear that is being multiplied",
        "bitsandbytes 0.50.2, dequantize_4bit; train/fast/linear.py",
    ),
    "activations.inputs": ("tensors of the batch, and what all layers share", "the caller's batch; transformers"),
    "activations.checkpoints": (
        "w T H for each checkpointed layer",
        "torch.utils.checkpoint; train/fast/checkpoint.py with fused layers",
    ),
    "activations.layers": (
        "what autograd saves of the layers that are not checkpointed, or of the one that is being recomputed",
        "transformers, peft 0.21; train/fast with fused layers",
    ),
    "activations.attention": ("what the attention kernel saves", "torch, scaled_dot_product_attention"),
    "activations.lora": ("what the adapters save", "peft 0.21"),
    "activations.head": ("what the last norm saves", "transformers"),
    "activations.gradients": ("gradients on their way back through a layer", "torch.autograd"),
    "loss.logits": ("P V x 2 (bf16) and x 4 (float32); in chunks of c tokens with a fused loss",
                    "transformers, ForCausalLMLoss; train/fused_loss.py"),
    "loss.log_softmax": ("4 P V", "torch, cross_entropy"),
    "loss.gradients": ("as the logits", "torch.autograd"),
    "loss.fused": ("what the loss in chunks keeps for the backward", "train/fused_loss.py"),
    "overhead.rounding": ("allocated in the replay, less the tensors", "c10/cuda/CUDACachingAllocator.cpp"),
    "overhead.allocator": (
        "the smallest cap under which the replay survives, with a margin, less what is allocated at the peak",
        "c10/cuda/CUDACachingAllocator.cpp, replayed",
    ),
    "overhead.checkpoint_tails": (
        "what from_pretrained leaves more allocated than a model built layer by layer",
        "c10/cuda/CUDACachingAllocator.cpp, replayed",
    ),
    "overhead.loading": (
        "the peak of loading and preparing, with a margin, less what training needs",
        "transformers, caching_allocator_warmup; replayed",
    ),
    "overhead.context": ("a constant of the card", "the driver; vramplan calibrate measures it on this machine's card"),
    "overhead.nccl": ("three buffers a channel, and 633 MiB", "nccl src/include/device.h; two measured H100"),
}  # fmt: skip


class Part(NamedTuple):
    """Tensors of one name and shape; `bytes` are those of all of them, as the allocator counts them."""

    name: str
    tensors: int
    shape: str
    dtype: str
    bytes: int


class Explanation(NamedTuple):
    """`numbers` are (letter or name, value) pairs; `parts` add up to the line, or are empty where it is no tensors."""

    line: Line
    formula: str
    source: str
    numbers: tuple[tuple[str, int | float], ...]
    parts: tuple[Part, ...] = ()


def find(ledger: Ledger, wanted: str) -> Line | None:
    """The line by its key, by the part of it behind the dot where only one has that, or by its label."""
    plain = wanted.strip().lower()
    for names in (
        [line.key for line in ledger.lines],
        [line.key.partition(".")[2] for line in ledger.lines],
        [line.label.lower() for line in ledger.lines],
    ):
        if names.count(plain) == 1:
            return ledger.lines[names.index(plain)]
    return None


def explain(ledger: Ledger, line: Line, gpu: GpuProfile | None = None) -> Explanation:
    """This line of an estimate on `gpu`."""
    formula, source = RULES.get(line.key, ("", ""))
    model, run, card = ledger.model, ledger.run, gpu or NO_CARD
    if line.key.startswith("overhead."):
        return Explanation(line, formula, source, _overhead(ledger, line, card))
    parts = _resident(model, run, line.key)
    if parts is None:
        unrolled = play(model, run, card)
        parts = _workspaces(unrolled) if line.key == "workspace.cublas" else _played(unrolled, line.key)
    return Explanation(line, formula, source, _letters(model, run), tuple(sorted(parts, key=_size, reverse=True)))


def _size(part: Part) -> int:
    return part.bytes


def _letters(model: ModelSpec, run: RunSpec) -> tuple[tuple[str, int], ...]:
    batch, length = run.micro_batch_size, run.seq_len
    return (
        ("layers", model.num_layers), ("B", batch), ("S", length), ("T", batch * length), ("H", model.hidden_size),
        ("I", model.intermediate_size), ("V", model.vocab_size), ("h", model.num_heads), ("g", model.num_kv_heads),
        ("D", model.head_dim), ("r", run.lora.r),
    )  # fmt: skip


def _overhead(ledger: Ledger, line: Line, card: GpuProfile) -> tuple[tuple[str, int | float], ...]:
    peak = ledger.peak
    known: dict[str, tuple[tuple[str, int | float], ...]] = {
        "overhead.allocator": (
            ("smallest cap", peak.allocated_bytes + line.bytes), ("allocated at the peak", peak.allocated_bytes),
            ("margin", MARGIN[ledger.run.levers.allocator]),
        ),
        "overhead.loading": (("minimum", peak.minimum_bytes), ("margin", MARGIN[ledger.run.levers.allocator])),
        "overhead.rounding": (("allocated at the peak", peak.allocated_bytes),),
        "overhead.context": (("context", card.context_bytes),),
        "overhead.nccl": (("cards", ledger.run.gpus),),
    }  # fmt: skip
    return known.get(line.key, ())


# ------------------------------------------------------------------------------------------------- the tensors
def _played(unrolled: Unrolled, key: str) -> list[Part]:
    """The tensors of the step that are alive at its highest point, under this key."""
    found: dict[tuple[str, str, str], tuple[int, int]] = {}
    for ident, count in live_at_peak(unrolled)[1]:
        of, name, rows, columns, dtype, size = unrolled.info[ident]
        if of == key:
            before, total = found.get((name, f"{rows} x {columns}", dtype), (0, 0))
            found[name, f"{rows} x {columns}", dtype] = (before + count, total + size * count)
    return [Part(name, count, shape, dtype, size) for (name, shape, dtype), (count, size) in found.items()]


def _workspaces(unrolled: Unrolled) -> list[Part]:
    return [Part("workspace", 1, str(size), "uint8", size) for size in workspaces(unrolled)]


def _resident(model: ModelSpec, run: RunSpec, key: str) -> list[Part] | None:
    """The tensors that are always there; None for those of the step."""
    cards, layers = shards(run), model.num_layers
    upcast = run.levers.upcast
    wide, dtype = (4, "float32") if upcast == "all" else (2, "bfloat16")
    linears = [x for x in arch.layer_linears(model) if x.quantised]
    if key == "weights.nf4":
        return [Part(x.short, layers, f"{x.out_features} x {x.in_features}", "4-bit",
                     layers * resident.packed_bytes(x.in_features * x.out_features, cards))
                for x in linears]  # fmt: skip
    if key == "weights.constants":
        return [Part(x.short, layers, f"{x.out_features} x {x.in_features}", "absmax, codes",
                     layers * resident.constants_bytes(x.in_features * x.out_features, run.double_quant))
                for x in linears]  # fmt: skip
    weights = resident.weights(model, run.double_quant, upcast, cards)
    table = f"{model.vocab_size} x {model.hidden_size}"
    if key == "weights.embeddings":
        return [Part("embedding", 1, table, dtype, weights.embeddings_bytes)]
    if key == "weights.lm_head":
        return [Part("head", 1, table, dtype, weights.lm_head_bytes)]
    if key == "weights.plain":
        return [Part(x.short, layers, f"{x.out_features} x {x.in_features}", dtype, layers * resident.rounded(
                     wide * shard_rows(x.out_features, cards) * x.in_features))
                for x in arch.layer_linears(model) if not x.quantised]  # fmt: skip
    if key == "weights.experts":
        return [Part(name, layers, str(n), dtype,
                     layers * resident.rounded(wide * resident.expert_elements(model, n, cards)))
                for name, n in arch.layer_vectors(model) if arch.is_expert(name)]  # fmt: skip
    if key == "weights.other":
        return _others(model, upcast)
    if key == "adapter.lora":
        return _adapter(model, run)
    if key == "optimizer.state":
        births = resident.state_births(model, run)
        return [Part("state", births.count(size), str(size), "bytes", births.count(size) * size)
                for size in dict.fromkeys(births)]  # fmt: skip
    return None


def _others(model: ModelSpec, upcast: str) -> list[Part]:
    """Norms, biases, buffers."""

    def size(name: str) -> int:
        return 4 if upcast == "all" or (upcast == "norms" and "norm" in name) else 2

    def part(name: str, n: int, count: int, width: int) -> Part:
        kind = "float32" if width == 4 else "bfloat16"
        return Part(name, count, str(n), kind, count * resident.rounded(width * n))

    inner = [part(name, n, model.num_layers, size(name)) for name, n in arch.layer_vectors(model)
             if not arch.is_expert(name)]  # fmt: skip
    outer = [part(name, n, 1, size(name) if upcast != "all" else 4) for name, n in arch.outer_vectors(model)]
    return [*inner, *outer, *(part("buffer", n, 1, 4) for n in arch.buffer_elements(model))]


def _adapter(model: ModelSpec, run: RunSpec) -> list[Part]:
    size, layers = (4 if run.lora.dtype == "float32" else 2), model.num_layers
    shapes = adapter_shapes(model, run)
    if is_fused(model, run):
        names = ["A and B of a layer"] * len(shapes)
    else:
        linears = arch.lora_linears(model, run.lora)
        names = [f"{x.short} {matrix}" for x in linears for matrix in ("A", "B")]
    return [Part(name, layers, f"{rows} x {columns}", run.lora.dtype, layers * resident.rounded(size * rows * columns))
            for name, (rows, columns) in zip(names, shapes, strict=True)]  # fmt: skip
