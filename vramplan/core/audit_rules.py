"""The rules of an audit: what in the file costs memory. Those about batches and the adapter are in
`audit_rows.py`, those about the model alone in `audit_model.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .architecture import layer_linears
from .audit_model import MODEL_RULES
from .audit_rows import ROW_RULES
from .audit_subject import Price, Subject, lever
from .fixes import LEANER_OPTIMIZER
from .resident import weights
from .types import ConfigFinding, ModelSpec

# tool -> how its files turn a thing on
CHECKPOINTING = {"llama-factory": "disable_gradient_checkpointing: false", "vramplan": 'checkpointing = "all"'}
FUSED = {
    "transformers": "use_liger_kernel: true",
    "trl": "loss_type: chunked_nll, or use_liger_kernel: true",
    "axolotl": "the plugin of cut_cross_entropy, with cut_cross_entropy: true",
    "llama-factory": "enable_liger_kernel: true",
    "vramplan": 'loss = "fused"',
    "model": "a fused loss",
}
SDPA = {"axolotl": "sdp_attention: true, or flash_attention", "llama-factory": "flash_attn: auto",
        "vramplan": "attn = \"sdpa\""}  # fmt: skip


# -------------------------------------------------------------------------------------------------- 1: whole logits
def logits(subject: Subject) -> Iterator[ConfigFinding]:
    run, config = subject.run, subject.config
    if run is None or run.levers.loss == "fused":
        return
    saved = subject.saved("logits", loss="fused")
    if not subject.matters(saved.bytes):
        return
    shape = f"{run.micro_batch_size} x {run.seq_len}"
    shape += f" x {subject.model.vocab_size}" if subject.model else " tokens x vocabulary"
    text = f"whole logits of {shape} are made in float32"
    if not config.loss_stated:
        text += ", unless this TRL already computes the loss in chunks"
    text += saved.when
    yield ConfigFinding(cause=1, key="logits", bytes=saved.bytes, message=text, fix=FUSED[config.tool],
                        certain=config.loss_stated)  # fmt: skip


# ----------------------------------------------------------------------------------------------- 2: checkpointing
def checkpointing(subject: Subject) -> Iterator[ConfigFinding]:
    run, config = subject.run, subject.config
    if run is None:
        return
    if run.levers.checkpointing == "none":
        saved = subject.saved("checkpointing", checkpointing="all")
        fix = CHECKPOINTING.get(config.tool, "gradient_checkpointing: true")
        if subject.matters(saved.bytes):
            yield ConfigFinding(
                cause=2,
                key="checkpointing",
                bytes=saved.bytes,
                message="no layer is checkpointed" + saved.when,
                fix=fix,
            )
    elif config.reentrant and config.input_grads is None:
        more = subject.difference(lever(checkpointing="none", checkpoint_offload=False))
        text = "checkpoints are reentrant: without a gradient into the first layer they do nothing"
        fix = "use_reentrant: false, or model.enable_input_require_grads()"
        yield ConfigFinding(cause=2, key="checkpointing", bytes=None if more is None else -more, message=text, fix=fix,
                            certain=False)  # fmt: skip


# ---------------------------------------------------------------------------- 3, 10, 11, 15: quantisation and dtypes
def upcast(subject: Subject) -> Iterator[ConfigFinding]:
    """prepare_model_for_kbit_training, where it is called, or a script may call it."""
    run, config = subject.run, subject.config
    if run is None or subject.model is None or config.prepared is False:
        return
    if run.levers.upcast == "all":
        saved = subject.saved("upcast", upcast="none")
        certain, text = True, "prepare_model_for_kbit_training makes embeddings, head and norms float32"
    else:
        more = subject.difference(lever(upcast="all"))
        saved, certain = Price(None if more is None else -more, ""), False
        text = "prepare_model_for_kbit_training, if it is called, makes embeddings, head and norms float32"
    if subject.matters(saved.bytes):
        fix = 'upcast = "none"' if config.tool == "vramplan" else "leave it out, or cast them back to bf16 after it"
        yield ConfigFinding(
            cause=3, key="upcast", bytes=saved.bytes, message=text + saved.when, fix=fix, certain=certain
        )


def compute_dtype(subject: Subject) -> Iterator[ConfigFinding]:
    """The weight of one Linear at a time, dequantised: in float32 twice what it is in bf16."""
    config = subject.config
    if not config.quantised or config.compute_dtype != "float32":
        return
    size = None
    if subject.model is not None:
        size = 2 * max((x.in_features * x.out_features for x in layer_linears(subject.model) if x.quantised), default=0)
    fixes = {"axolotl": "bf16: auto", "trl": "dtype: bfloat16", "llama-factory": "bf16: true"}
    yield ConfigFinding(
        cause=10, key="float32_compute", bytes=size or None, message="4-bit layers compute in float32, the default of "
        "bitsandbytes: a dequantised weight takes twice the memory",
        fix=fixes.get(config.tool, "bnb_4bit_compute_dtype: bfloat16"),
    )  # fmt: skip


def base_dtype(subject: Subject) -> Iterator[ConfigFinding]:
    """What is not quantised is loaded as the file says."""
    config, run = subject.config, subject.run
    if config.base_dtype != "float32":
        return
    size = None
    if subject.model is not None and run is not None and run.levers.upcast != "all":
        wide = weights(subject.model, run.double_quant, "all").total_bytes
        size = wide - weights(subject.model, run.double_quant).total_bytes
        if config.quantised is False:
            size += 2 * _quantisable(subject.model)
    fix = {"axolotl": "bf16: auto"}.get(config.tool, "dtype: bfloat16")
    yield ConfigFinding(cause=11, key="base_float32", bytes=size, message="what is not quantised is loaded in float32",
                        fix=fix)  # fmt: skip


def not_4bit(subject: Subject) -> Iterator[ConfigFinding]:
    """A file that says of quantisation that there is none."""
    if subject.config.quantised is not False:
        return
    size = None
    if subject.model is not None:
        packed = weights(subject.model, double_quant=True)
        size = 2 * _quantisable(subject.model) - packed.nf4_bytes - packed.constants_bytes
    fixes = {"axolotl": "adapter: qlora, load_in_4bit: true", "llama-factory": "quantization_bit: 4"}
    yield ConfigFinding(
        cause=None,
        key="not_4bit",
        bytes=size,
        message="the base is not quantised: its Linears stay bf16",
        fix=fixes.get(subject.config.tool, "load_in_4bit: true"),
    )


def quant_storage(subject: Subject) -> Iterator[ConfigFinding]:
    """FSDP shards what is a floating-point tensor, so 4-bit weights must be stored as one. Of two cards, one's half."""
    config = subject.config
    if not config.sharded or config.quantised is False or config.quant_storage not in (None, "uint8"):
        return
    size = weights(subject.model, double_quant=True).nf4_bytes // 2 if subject.model else None
    yield ConfigFinding(
        cause=15,
        key="quant_storage",
        bytes=size,
        message="4-bit weights stored as uint8 are not shared out: each card holds all of them",
        fix="bnb_4bit_quant_storage: bfloat16",
        certain=config.quant_storage is not None,
    )


def _quantisable(model: ModelSpec) -> int:
    return model.num_layers * sum(x.in_features * x.out_features for x in layer_linears(model) if x.quantised)


# ------------------------------------------------------------------------------------ 7, 12, 16: the other levers
def eager(subject: Subject) -> Iterator[ConfigFinding]:
    """Only eager attention does soft-capping: there it is no choice."""
    run, model = subject.run, subject.model
    if run is None or run.levers.attention != "eager" or (model and model.attn_logit_softcapping is not None):
        return
    saved = subject.saved("eager_attention", attention="sdpa")
    if subject.matters(saved.bytes):
        heads = model.num_heads if model else "heads"
        text = (
            f"eager attention keeps scores of {run.micro_batch_size} x {heads} x {run.seq_len} x {run.seq_len}"
            + saved.when
        )
        yield ConfigFinding(cause=12, key="eager_attention", bytes=saved.bytes, message=text,
                            fix=SDPA.get(subject.config.tool, "attn_implementation: sdpa"))  # fmt: skip


def optimizer(subject: Subject) -> Iterator[ConfigFinding]:
    run = subject.run
    leaner = LEANER_OPTIMIZER.get(run.levers.optimizer) if run else None
    if run is None or leaner is None or subject.ledger is None:
        return
    saved = subject.saved("optimizer", optimizer=leaner)
    if subject.matters(saved.bytes):
        name = "optimizer" if subject.config.tool == "axolotl" else "optim"
        yield ConfigFinding(cause=16, key="optimizer", bytes=saved.bytes, fix=f"{name}: {leaner}",
                            message=f"the state of {run.levers.optimizer} stays on the card{saved.when}")  # fmt: skip


def allocator(subject: Subject) -> Iterator[ConfigFinding]:
    """An environment variable, which no file but ours sets."""
    run, config = subject.run, subject.config
    if run is None or run.levers.allocator == "expandable" or subject.ledger is None:
        return
    saved = subject.saved("fragmentation", allocator="expandable")
    if subject.matters(saved.bytes):
        yield ConfigFinding(
            cause=7, key="fragmentation", bytes=saved.bytes, certain=config.tool == "vramplan",
            message="PyTorch's allocator without expandable segments leaves pieces that nothing fits into" + saved.when,
            fix="PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        )  # fmt: skip


RULES: tuple[Callable[[Subject], Iterator[ConfigFinding]], ...] = (
    logits, checkpointing, upcast, compute_dtype, base_dtype, not_4bit, quant_storage, eager, optimizer, allocator,
    *ROW_RULES, *MODEL_RULES,
)  # fmt: skip
