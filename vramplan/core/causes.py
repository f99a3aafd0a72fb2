"""The rules of a diagnosis that need the report alone: each says what it sees, with the numbers that show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from .inverse import said, shapes
from .units import GIB, MIB, human

if TYPE_CHECKING:
    from .case import Case


DISPLAY_BYTES = 256 * MIB  # less than this in other hands is a display server


PROVEN = 200  # above all that is only likely


class Finding(NamedTuple):
    """A cause that a rule sees. `score` ranks it, up to about 100; `text` is one or more sentences."""

    key: str
    score: int
    text: str


# function or file in a traceback -> what the process was doing; the innermost frame that says something decides
PHASES = (
    ("loss", ("loss_utils.py", "cross_entropy", "log_softmax", "nll_loss")),
    ("eager", ("eager_attention_forward",)),
    ("prepare", ("prepare_model_for_kbit_training",)),
    (
        "load",
        (
            "from_pretrained",
            "_load_pretrained_model",
            "caching_allocator_warmup",
            "load_state_dict_into",
            "core_model_loading.py",
        ),
    ),
    ("save", ("save_pretrained", "save_model", "_save_checkpoint", "merge_and_unload", "state_dict")),
    ("evaluation", ("evaluation_loop", "prediction_step", "evaluate")),
    ("backward", ("_engine_run_backward", "run_backward", "backward")),
    ("optimizer", ("optim/", "optimizer.py", "adamw", "init_state", "update_step")),
    ("forward", ("compute_loss", "forward")),
)


def phase_of(frames: tuple[str, ...]) -> str | None:
    """What a traceback's frames were doing, or None. A backward that plays a layer again is a backward."""
    text = "\n".join(frames)
    if "evaluation_loop" in text or "prediction_step" in text:
        return "evaluation"
    for frame in reversed(frames):
        for phase, words in PHASES:
            if any(word in frame for word in words):
                if phase == "forward" and "run_backward" in text:
                    return "backward"
                return phase
    return None


# --------------------------------------------------------------------------------------------- the text by itself
# kind of the report -> (cause, score, text); PyTorch's own reports carry numbers and are left to the other rules
TELLERS = {
    "host": (
        "host_memory", 100,
        "The computer's memory ran out, not the card's{asked}: fewer data workers, no pinned memory, more swap or a "
        "higher container limit.",
    ),
    "bitsandbytes": (
        "outside_pytorch", 90,
        "bitsandbytes allocates outside PyTorch and gave up: the card is full, or, for a paged optimizer (most of all "
        "under WSL), pinned host memory is.",
    ),
    "nccl": (
        "outside_pytorch", 80,
        "NCCL could not allocate its buffers{asked} beside PyTorch's memory: the card was already full, so each rank "
        "must use less.",
    ),
    "cublas": ("outside_pytorch", 60, "cuBLAS could not get its workspace or handle: the card was already full."),
    "triton": ("outside_pytorch", 50, "Triton could not load or run a kernel: the card was already full."),
    "cuda": ("outside_pytorch", 50, "The CUDA driver had no memory left for an allocation outside PyTorch's cache."),
    "cudnn": ("outside_pytorch", 45, "cuDNN failed; after memory pressure this is how a full card looks to it."),
}  # fmt: skip


def teller(case: Case) -> Iterator[Finding]:
    """Reports that are not PyTorch's own carry few numbers: what their kind tells."""
    if case.evidence.kind in TELLERS:
        key, score, text = TELLERS[case.evidence.kind]
        asked = case.evidence.requested_bytes
        yield Finding(key, score, text.format(asked=f" ({human(asked)} asked for)" if asked else ""))


def larger_than_card(case: Case) -> Iterator[Finding]:
    asked, total = case.evidence.requested_bytes, case.evidence.total_bytes
    if asked and total and asked > total:
        yield Finding(
            "larger_than_card",
            PROVEN,
            f"One tensor of {human(asked)} is larger than the whole card ({human(total)}): nothing that could be freed "
            "would help; a shape is wrong, or batch and sequence are far too large.",
        )


def fragmentation(case: Case) -> Iterator[Finding]:
    """Reserved but unallocated memory that would have been enough, had it been in one piece."""
    asked, idle = case.evidence.requested_bytes, case.evidence.reserved_unallocated_bytes
    if not asked or idle is None or idle < asked:
        return
    held = idle + (case.evidence.allocated_bytes or 0)
    much = idle >= 0.08 * held
    text = (
        f"Fragmentation: PyTorch held {human(idle)} that it could not hand out in one piece, "
        f"{human(asked)} {'was' if asked < GIB else 'were'} asked for"
    )
    if not much:
        text += f"; that is only {idle / held:.1%} of what it held, so the card was all but full anyway"
    remedy = "" if case.run and case.run.levers.allocator == "expandable" else (
        " PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True removes most of it.")  # fmt: skip
    yield Finding("fragmentation", 86 if much else 20, text + "." + remedy)


def other_process(case: Case) -> Iterator[Finding]:
    """Memory that somebody else holds, named or hidden."""
    evidence, held = case.evidence, case.others_bytes
    if held < DISPLAY_BYTES:
        return
    named = [p for p in case.others if p.used_bytes]
    who = ", ".join(f"process {p.pid} ({human(p.used_bytes or 0)})" for p in named[:3])
    who = who if who else "something else that the report does not list (a process outside this container, a display)"
    text = f"Another user of the card holds {human(held)}: {who}."
    asked, free = evidence.requested_bytes or 0, evidence.free_bytes or 0
    score = 70 if free + held >= asked else 30
    need = case.ledger.peak.device_bytes if case.ledger else None
    if need is not None and case.budget_bytes is not None and case.budget_bytes < need <= case.budget_bytes + held:
        text += f" The plan was right, the card was not free: the run needs {human(need)}, which fits without it."
        score = PROVEN
    yield Finding("other_process", score, text + " Free it, take another card, or plan with a lower budget.")


def capped(case: Case) -> Iterator[Finding]:
    allowed, free, asked = case.evidence.allowed_bytes, case.evidence.free_bytes, case.evidence.requested_bytes
    preempted = "per_process_memory_fraction" in case.evidence.message
    if allowed is None and not preempted:
        return
    if allowed is not None and case.evidence.total_bytes is not None and allowed >= case.evidence.total_bytes:
        return
    text = "PyTorch was told to stop" + (f" at {human(allowed)}" if allowed else "")
    text += " (set_per_process_memory_fraction)"
    if free is not None and asked is not None and free >= asked:
        text += f" while {human(free)} of the card was free"
    # A run that is known, and needs more, has its own causes: the cap is its card then.
    explained = case.ledger is not None and case.ledger.peak.device_bytes > (case.budget_bytes or 0)
    yield Finding("cap", 18 if explained else 45, text + ".")


def spilled(case: Case) -> Iterator[Finding]:
    used, total = case.evidence.allocated_bytes, case.evidence.total_bytes
    if used and total and used > 1.02 * total:
        yield Finding(
            "spill",
            60,
            f"{human(used)} are allocated on a card of {human(total)}: the Windows driver had been moving the rest to "
            "system memory, which is slow.",
        )


def free_but_refused(case: Case) -> Iterator[Finding]:
    evidence = case.evidence
    asked, free = evidence.requested_bytes, evidence.free_bytes
    if not asked or free is None or evidence.allowed_bytes is not None or free < asked + 64 * MIB:
        return
    if evidence.total_bytes is not None and asked > evidence.total_bytes:
        return
    if "per_process_memory_fraction" in evidence.message:  # PyTorch refused, not the driver
        return
    yield Finding(
        "refused",
        55,
        f"The driver refused {human(asked)} although {human(free)} was free: host memory, pinned memory or a WSL limit "
        "may be exhausted, or another process took memory and gave it back.",
    )


def log_signs(case: Case) -> Iterator[Finding]:
    if "checkpointing_inactive" in case.evidence.signs:
        yield Finding(
            "checkpointing",
            90,
            'Checkpointing is on but inactive: the log warns "None of the inputs have requires_grad=True"; call '
            "model.enable_input_require_grads() (prepare_model_for_kbit_training does) or use_reentrant=False.",
        )
    if "float32_compute" in case.evidence.signs:
        yield Finding(
            "float32_compute",
            70,
            "bitsandbytes computes in float32, its default: dequantised weights and their products take twice the "
            "memory; set bnb_4bit_compute_dtype=torch.bfloat16.",
        )


# what the traceback was doing -> (cause, score, text)
DOING = {
    "loss": (
        "logits", 84,
        "It failed in the loss, where whole logits are made in float32: with log_softmax and gradients 12 bytes per "
        "token and vocabulary entry. A fused loss never makes them.",
    ),
    "eager": (
        "eager_attention", 84,
        "It failed in eager attention, which keeps scores of batch x heads x sequence x sequence several times; sdpa "
        "and flash attention never make them.",
    ),
    "prepare": (
        "upcast", 88,
        "It failed in prepare_model_for_kbit_training, which turns embeddings, head and norms to float32; the lean "
        "recipe leaves them in bf16.",
    ),
    "load": (
        "loading", 86,
        "It failed while loading: weights arrive in bf16 and are quantised on the card. A checkpoint that is already "
        "quantised, or smaller shards, need less.",
    ),
    "save": (
        "saving", 86,
        "It failed while saving, resuming or merging: save the adapter only, and load or merge on the CPU.",
    ),
    "evaluation": (
        "evaluation", 86,
        "It failed in evaluation, not in training: per_device_eval_batch_size defaults to 8, and logits are kept "
        "unless prediction_loss_only is set.",
    ),
    "optimizer": (
        "optimizer", 62,
        "It failed in the optimizer, whose state appears at the first step: an 8-bit or paged optimizer needs less.",
    ),
}  # fmt: skip


def doing(case: Case) -> Iterator[Finding]:
    """What the traceback says the process was doing."""
    phase = phase_of(case.evidence.frames)
    if phase in DOING:
        yield Finding(*DOING[phase])


def shape_of_size(case: Case) -> Iterator[Finding]:
    """Without a run: what shape the size that was asked for would be."""
    asked = case.evidence.requested_bytes
    if case.run is None and asked and telling(asked):
        found = shapes(asked, case.known, phase_of(case.evidence.frames))
        if found:
            yield Finding(found[0].cause, 20, said(asked, found))


def telling(asked: int) -> bool:
    """Small requests are served from segments of 2 and 20 MiB, which say nothing about a tensor."""
    return asked > 20 * MIB


def full(case: Case) -> Iterator[Finding]:
    """What is left to say when no other rule sees anything."""
    evidence = case.evidence
    if evidence.allocated_bytes is None or evidence.total_bytes is None:
        yield Finding("full", 1, "The card was full; the report does not say with what.")
        return
    share = evidence.allocated_bytes / evidence.total_bytes
    text = f"The card was full: tensors of this process held {share:.0%} of it."
    if evidence.requested_bytes and not telling(evidence.requested_bytes):
        text += (
            f" {human(evidence.requested_bytes)} is a step of the allocator: it does not say which tensor came last."
        )
    yield Finding("full", 40, text)


TEXT_RULES: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    teller, larger_than_card, fragmentation, other_process, capped, spilled, free_but_refused, log_signs, doing,
    shape_of_size,
)  # fmt: skip
