"""The rules of a diagnosis that hold the report against the run as described: what the script does otherwise.

What gives way in such a run (the logits of one long row, say) would fit as described: it is a symptom. The remedy is
the described run itself, so that it is the first fix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from . import architecture as arch
from .causes import PROVEN, Finding, phase_of, telling
from .loading import warmup_bytes
from .room import Quick
from .run_causes import same_size
from .units import human

if TYPE_CHECKING:
    from .case import Case

TOLD = 0.006  # by how much a size with two digits can be off
LONGER = 1.05  # than described, to be called long
SYMPTOM = 60  # the most that a lever scores which the described run pulls and yet fits

ACTIVE = (
    "It works in training mode alone (model.train()), and has to be switched on by gradient_checkpointing_enable()."
)

# cause -> what makes the script the described run
REMEDIES = {
    "long_sample": "rows cut to {tokens:,} tokens",
    "checkpointing": "checkpointing that is active",
    "trainable_head": "embeddings and head left frozen",
    "unquantised": "the base loaded in 4 bits",
    "float32_base": "the base loaded in bf16",
    "float32_compute": "bnb_4bit_compute_dtype=torch.bfloat16",
    "loading": "nothing else of this process on the card",
    "not_as_described": "as described: rows of at most {tokens:,} tokens, checkpointing that is active",
}


def symptoms(case: Case, findings: list[Finding]) -> list[Finding]:
    """Levers that the described run pulls are no cause where it fits and more was held than it takes."""
    run = case.run
    if run is None or not case.should_fit or not any(f.key == "not_as_described" for f in findings):
        return findings
    levers = run.levers
    pulled = {
        "logits": levers.loss == "full",
        "eager_attention": levers.attention == "eager",
        "upcast": levers.upcast == "all",
        "batch": True,
        "sequence": True,
        "optimizer": True,
    }
    return [f._replace(score=min(f.score, SYMPTOM)) if pulled.get(f.key) else f for f in findings]


def asked_for(case: Case, size: int) -> bool:
    """Whether the request is a tensor of this size, and large enough to say so."""
    asked = case.evidence.requested_bytes
    return asked is not None and telling(asked) and same_size(size, asked)


# ---------------------------------------------------------------------------------------------------------------- rules
def long_sample(case: Case) -> Iterator[Finding]:
    """In the loss, what is asked for is float32 logits: their number tells how many tokens the batch has."""
    asked, model, run = case.evidence.requested_bytes, case.model, case.run
    if not asked or not telling(asked) or model is None or run is None or not case.should_fit:
        return
    if phase_of(case.evidence.frames) != "loss":
        return
    tokens = asked / (4 * model.vocab_size * run.micro_batch_size)
    if tokens < LONGER * run.seq_len:
        return
    yield Finding(
        "long_sample",
        PROVEN,
        f"A row far longer than described: the {human(asked)} asked for in the loss are float32 logits of "
        f"{run.micro_batch_size} x about {round(tokens):,} tokens x {model.vocab_size:,}, and the run is described "
        f"with {run.seq_len:,}. Truncate or split rows, or plan for the longest batch.",
    )


def inactive(case: Case) -> Iterator[Finding]:
    """A decoder layer called without a checkpoint around it, in a run of which every layer is checkpointed."""
    run, frames = case.run, case.evidence.frames
    if run is None or run.levers.checkpointing != "all" or phase_of(frames) == "evaluation":
        return
    called = any("modeling_layers.py" in frame and "__call__" in frame for frame in frames)
    if called and not any("checkpoint" in frame.lower() for frame in frames):  # torch's own, ours, another's
        yield Finding(
            "checkpointing",
            95,
            "Checkpointing is on in the description but inactive in the script: the traceback goes through a decoder "
            f"layer and through no checkpoint. {ACTIVE}",
        )


def inactive_by_size(case: Case) -> Iterator[Finding]:
    """In the loss, float32 logits of just the described batch are asked for, and so much is held as all layers save."""
    asked, model, run, held = case.evidence.requested_bytes, case.model, case.run, case.evidence.allocated_bytes
    if not asked or model is None or run is None or held is None or not case.should_fit:
        return
    tokens = run.micro_batch_size * run.seq_len
    if run.levers.checkpointing != "all" or not asked_for(case, 4 * tokens * model.vocab_size):
        return
    if phase_of(case.evidence.frames) != "loss":
        return
    bare = replace(run, levers=replace(run.levers, checkpointing="none"))
    quick = Quick(model)
    with_all, without = quick.tensor_bytes(run, case.card), quick.tensor_bytes(bare, case.card)
    if held + asked > 1.03 * with_all and held + asked <= without:
        yield Finding(
            "checkpointing",
            95,
            f"Checkpointing is on in the description but inactive in the script: what is asked for are logits of the "
            f"{tokens:,} tokens described, and {human(held + asked)} are held with them; {human(with_all)} are the "
            f"most with every layer checkpointed, {human(without)} with none. {ACTIVE}",
        )


def float32_head(case: Case) -> Iterator[Finding]:
    """The head copied to 16 bits by autocast, in a run in which it has 16 bits already."""
    model, run, frames = case.model, case.run, case.evidence.frames
    if model is None or run is None or run.levers.upcast == "all" or not frames or "linear.py" not in frames[-1]:
        return
    rows = run.micro_batch_size * run.seq_len
    if rows != model.hidden_size and asked_for(case, 2 * model.vocab_size * model.hidden_size):
        yield Finding(
            "float32_base",
            93,
            f"The head is float32: the {human(case.evidence.requested_bytes or 0)} asked for are its copy in 16 bits, "
            f"[{model.vocab_size:,} x {model.hidden_size:,}], which autocast makes of nothing else. Load the base with "
            "dtype=torch.bfloat16.",
        )


def loaded_otherwise(case: Case) -> Iterator[Finding]:
    """While loading: sizes that only weights without quantisation, or in float32, have; or a card that was in use."""
    model, run, asked = case.model, case.run, case.evidence.requested_bytes
    if model is None or run is None or asked is None or phase_of(case.evidence.frames) != "load":
        return
    whole = arch.total_parameters(model)
    for width, dtype in ((2, "16 bits"), (4, "float32")):
        if abs(asked - width * whole) <= TOLD * asked:
            yield Finding(
                "unquantised",
                98,
                f"The weights are loaded without quantisation: the {human(asked)} asked for are all {whole:,} "
                f"parameters in {dtype}. Pass quantization_config=BitsAndBytesConfig(load_in_4bit=True, ...).",
            )
            return
    linears = arch.layer_linears(model)
    plain = [model.vocab_size * model.hidden_size, *(x.in_features * x.out_features for x in linears)]
    narrow = {2 * elements for elements in plain}
    warmup = warmup_bytes(model)
    if abs(asked - warmup_bytes(model, 4)) <= TOLD * asked or any(
        asked_for(case, 4 * n) and 4 * n not in narrow for n in plain
    ):
        yield Finding(
            "float32_base",
            96,
            f"The base is loaded in float32: the {human(asked)} asked for have that size in 4 bytes an element. "
            "Pass dtype=torch.bfloat16.",
        )
        return
    before = case.evidence.allocated_bytes
    if before is not None and asked_for(case, warmup) and before > warmup // 4:
        yield Finding(
            "loading",
            96,
            f"Loading had not begun, and this process held {human(before)} already: an earlier copy of the model, or "
            "another one. Delete what still refers to it, or start a fresh process.",
        )


def trainable_head(case: Case) -> Iterator[Finding]:
    """A gradient, an optimizer's state or PEFT's copy with the shape of embeddings or head."""
    model, frames = case.model, case.evidence.frames
    if model is None or case.run is None:
        return
    size, rows = model.vocab_size * model.hidden_size, case.run.micro_batch_size * case.run.seq_len
    text = "\n".join(frames)
    copied = "deepcopy" in text and "other.py" in text and any(asked_for(case, width * size) for width in (2, 4))
    widths = {"optimizer": (4,), "backward": (2, 4)}.get(phase_of(frames) or "", ())  # a frozen matrix has neither
    born = rows != model.hidden_size and any(asked_for(case, width * size) for width in widths)
    if not (copied or born):
        return
    yield Finding(
        "trainable_head",
        97,
        f"Embeddings or head are trained: the {human(case.evidence.requested_bytes or 0)} asked for have the shape of "
        f"{model.vocab_size:,} x {model.hidden_size:,}. A whole matrix takes 16 bytes an element with AdamW; leave it "
        "out of modules_to_save, or train single rows (trainable_token_indices).",
    )


def float32_compute(case: Case) -> Iterator[Finding]:
    """A 4-bit weight dequantised to four bytes an element, within bitsandbytes."""
    model, frames = case.model, case.evidence.frames
    if model is None or not any("bitsandbytes" in f or "autograd/_functions.py" in f for f in frames[-6:]):
        return
    for x in arch.layer_linears(model):
        if x.quantised and asked_for(case, 4 * x.in_features * x.out_features):
            yield Finding(
                "float32_compute",
                94,
                f"bitsandbytes computes in float32: the {human(case.evidence.requested_bytes or 0)} asked for are "
                f"{x.short} [{x.out_features:,} x {x.in_features:,}] dequantised to 4 bytes an element. "
                "Set bnb_4bit_compute_dtype=torch.bfloat16.",
            )
            return


def remedied(case: Case, key: str) -> str | None:
    """What to do to the script so that it is the run described; None: that run does not fit, or it is another cause."""
    if case.run is None or key not in REMEDIES or not case.should_fit:
        return None
    if key == "checkpointing" and case.run.levers.checkpointing != "all":
        return None
    return REMEDIES[key].format(tokens=case.run.seq_len)


SCRIPT_RULES: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    long_sample, inactive, inactive_by_size, float32_head, loaded_otherwise, trainable_head, float32_compute,
)  # fmt: skip
