"""The rules of an audit about batches, rows, and what is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from .architecture import layer_linears
from .audit_subject import AFTERWARDS, Subject
from .resident import moments, state_tensor_bytes
from .types import ConfigFinding, Lora, ModelSpec, RunSpec

VOCABULARY = ("embed_tokens", "lm_head", "embed_in", "embed_out", "word_embeddings", "wte")
LOGIT_BYTES = 2 + 4 + 4


# --------------------------------------------------------------------------------------------- 4, 6: batch and rows
def evaluation(subject: Subject) -> Iterator[ConfigFinding]:
    """A larger batch than training's. Its whole logits live three times at once: bf16, float32, log_softmax."""
    config, run = subject.config, subject.run
    if not config.evaluates or run is None or config.eval_batch_size is None:
        return
    if config.eval_batch_size <= run.micro_batch_size:
        return
    size, when = _evaluation_bytes(subject, run, config.eval_batch_size)
    if size is not None and not subject.matters(size):
        return
    text = f"evaluation takes {config.eval_batch_size} rows at a time, training {run.micro_batch_size}"
    text += "; counted are whole logits alone" + when if size else ""
    key = "eval_batch_size" if config.tool == "axolotl" else "per_device_eval_batch_size"
    yield ConfigFinding(cause=4, key="evaluation", bytes=size, message=text, fix=f"{key}: {run.micro_batch_size}")


def _evaluation_bytes(subject: Subject, run: RunSpec, rows: int) -> tuple[int | None, str]:
    """By how much evaluation is above training; where it is not, above training without any other cause.

    None without a model, and where evaluation makes no whole logits.
    """
    if subject.ledger is None or subject.model is None or run.levers.loss == "fused":
        return None, ""
    resident = subject.ledger.resident.with_lora_bytes
    one_row = LOGIT_BYTES * run.seq_len * subject.model.vocab_size

    def above(training: int) -> int:
        return resident + rows * one_row - max(training, resident + run.micro_batch_size * one_row)

    size = above(subject.ledger.peak.allocated_bytes)
    lean = subject.lean_allocated_bytes()
    if subject.matters(size) or lean is None:
        return size, ""
    return above(lean), AFTERWARDS


def default_batch(subject: Subject) -> Iterator[ConfigFinding]:
    """transformers takes 8 rows where nothing is said."""
    run = subject.run
    if run is None or subject.config.batch_stated:
        return
    rows, steps = run.micro_batch_size, run.micro_batch_size * run.accumulation
    subject.changes["batch"] = lambda run: replace(run, micro_batch_size=1, accumulation=steps)
    saved = subject.difference(subject.changes["batch"])
    yield ConfigFinding(
        cause=None,
        key="batch",
        bytes=saved,
        message=f"the micro-batch is not stated, so it is {rows}",
        fix=f"per_device_train_batch_size: 1, gradient_accumulation_steps: {steps}",
    )


def padding(subject: Subject) -> Iterator[ConfigFinding]:
    """Every batch is as long as the longest could be. The price is that of a batch whose rows are half as long."""
    run = subject.run
    if run is None or not subject.config.pad_to_max:
        return
    half = max(run.seq_len // 2, 1)
    size = subject.difference(lambda run: replace(run, seq_len=half))
    text = f"every row is padded to {run.seq_len} tokens"
    text += f"; the bytes are what rows of {half} would spare" if size is not None else ""
    fix = (
        "pad_to_sequence_len: false, or sample_packing"
        if subject.config.tool == "axolotl"
        else "pad to the longest row"
    )
    yield ConfigFinding(cause=None, key="padding", bytes=size, message=text, fix=fix, certain=False)


# ------------------------------------------------------------------------------------------- 13, 14: the adapter
def unmatched(model: ModelSpec, lora: Lora) -> tuple[str, ...]:
    """Target modules that no Linear of a layer is called by, by PEFT's rule."""
    if lora.targets == ("all-linear",):
        return ()
    names = [x.name for x in layer_linears(model)]
    return tuple(t for t in lora.targets if not any(name == t or name.endswith("." + t) for name in names))


def targets(subject: Subject) -> Iterator[ConfigFinding]:
    run, model = subject.config.run, subject.model
    lost = unmatched(model, run.lora) if run is not None and model is not None else ()
    if lost and model is not None and run is not None:
        known = ", ".join(dict.fromkeys(x.short for x in layer_linears(model)))
        so = "PEFT refuses to start" if len(lost) == len(run.lora.targets) else "PEFT passes over them"
        yield ConfigFinding(cause=None, key="targets", bytes=None, fix=f"of {model.name} there are {known}",
                            message=f"target modules that match nothing: {', '.join(lost)}; {so}")  # fmt: skip


def trained_whole(subject: Subject) -> Iterator[ConfigFinding]:
    """A copy in bf16, its gradient, and the optimizer's state, at least."""
    config, run, model = subject.config, subject.run, subject.model
    named = [name for name in config.trained_whole if name.rsplit(".", 1)[-1] in VOCABULARY]
    if not named:
        return
    size = None
    if model is not None and run is not None:
        elements = model.vocab_size * model.hidden_size
        state = moments(run.levers.optimizer) * state_tensor_bytes(run.levers.optimizer, elements)
        size = len(named) * (4 * elements + state)
    text = f"{', '.join(named)} trained whole: a copy, its gradient and optimizer state for the vocabulary"
    yield ConfigFinding(cause=13, key="trained_embeddings", bytes=size, message=text,
                        fix="train an adapter alone; for new tokens PEFT has trainable_token_indices")  # fmt: skip


def device_map(subject: Subject) -> Iterator[ConfigFinding]:
    if subject.config.device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        yield ConfigFinding(
            cause=14, key="device_map", bytes=None, certain=False,
            message=f"device_map {subject.config.device_map} splits the model where several cards are seen",
            fix="one card per process, or FSDP",
        )  # fmt: skip


ROW_RULES: tuple[Callable[[Subject], Iterator[ConfigFinding]], ...] = (
    evaluation, default_batch, padding, targets, trained_whole, device_map,
)  # fmt: skip
