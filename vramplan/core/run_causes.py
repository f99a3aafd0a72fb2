"""The rules of a diagnosis that need the run: the requested size as a tensor of the step, and what levers cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from .allocator import GRANULE, SMALL_REQUEST, SMALL_SEGMENT, segment_bytes
from .case import NOT_THE_CARD
from .causes import PROVEN, Finding, phase_of, telling
from .fixes import LEAST_SEQ_LEN
from .room import Quick, largest
from .timeline import play
from .units import GIB, MIB, human, round_up

if TYPE_CHECKING:
    from .case import Case


class Match(NamedTuple):
    """A tensor of the played step that has the requested size."""

    key: str
    name: str
    rows: int
    columns: int
    dtype: str


def same_size(size: int, asked: int) -> bool:
    """Whether a request that the report rounds to two digits can be a tensor of this size, or its new segment."""
    unit = GIB if asked >= GIB else MIB if asked >= MIB else 1024
    rounded = round_up(size, GRANULE)
    segment = SMALL_SEGMENT if rounded <= SMALL_REQUEST else segment_bytes(rounded)
    return min(abs(size - asked), abs(segment - asked)) <= 0.0051 * unit


def matches(case: Case) -> list[Match]:
    """Tensors of the step, and the copies that kbit preparation makes, of exactly the requested size."""
    asked = case.evidence.requested_bytes
    if asked is None or case.model is None or case.run is None or not telling(asked):
        return []
    model, run = case.model, case.run
    vocab, hidden = model.vocab_size, model.hidden_size
    info = play(model, run, case.card).info
    found = dict.fromkeys(Match(*row[:5]) for row in info if row[5] and same_size(row[5], asked))
    if run.levers.upcast == "all" and same_size(4 * vocab * hidden, asked):
        found[Match("weights.embeddings", "float32 copy of embeddings or head", vocab, hidden, "float32")] = None
    return list(found)


def cause_of(match: Match, case: Case) -> str:
    model, run = case.model, case.run
    assert model is not None and run is not None
    if match.key.startswith("loss.") or (match.columns == model.vocab_size and match.rows > 1):
        return "logits" if run.levers.loss == "full" else "full"  # a chunk of them says nothing
    if match.key.startswith("weights."):
        return "upcast"
    if match.rows == run.micro_batch_size * model.num_heads * run.seq_len and match.columns == run.seq_len:
        return "eager_attention"
    if match.key.startswith("activations."):
        if run.levers.checkpointing != "all":
            return "checkpointing"
        return "batch" if run.micro_batch_size > 1 else "sequence"
    return "full"


def requested(case: Case) -> Iterator[Finding]:
    """The tensor that was asked for."""
    phase = phase_of(case.evidence.frames)
    order = ("logits", "eager_attention", "upcast", "checkpointing", "batch", "sequence", "full")
    wanted = {"loss": "logits", "eager": "eager_attention", "prepare": "upcast"}.get(phase or "")
    by_cause: dict[str, list[Match]] = {}
    for match in matches(case):
        by_cause.setdefault(cause_of(match, case), []).append(match)
    if not by_cause:
        return
    cause = wanted if wanted in by_cause else min(by_cause, key=order.index)
    found = by_cause[cause]
    one = found[0]
    asked = case.evidence.requested_bytes or 0
    text = f"The {human(asked)} asked for is a tensor [{one.rows} x {one.columns}] of {one.dtype}: {one.name}"
    names = list(dict.fromkeys(match.name for match in found))
    text += f" or {names[1]}" if len(names) > 1 else ""
    yield Finding(cause, {"batch": 40, "sequence": 40, "full": 12, "checkpointing": 50}.get(cause, 60), text + ".")


# cause -> what it costs, where the run and the ledger are known
COSTS = {
    "logits": "Whole logits of {tokens} x {vocab} in float32 cost {saved}.",
    "upcast": "Embeddings, head and norms in float32 (prepare_model_for_kbit_training), and the float32 stream between "
    "the layers that follows, cost {saved}.",
    "eager_attention": "Eager attention's scores ({scores}) cost {saved}.",
    "optimizer": "The optimizer's state ({optimizer}) costs {saved} more than paged and in 8 bits.",
    "checkpointing": "Activations of layers that are not checkpointed cost {saved}.",
    "batch": "The micro-batch of {batch} costs {saved} more than a smaller one with more accumulation.",
    "fragmentation": "The native allocator is predicted to leave {saved} in pieces that this run cannot use.",
}


def consumers(case: Case) -> Iterator[Finding]:
    """What each lever would save, told as the cause it removes; the larger its share, the likelier."""
    if case.ledger is None or case.run is None or case.model is None:
        return
    run, need = case.run, case.ledger.peak.device_bytes
    tokens = f"{run.micro_batch_size} x {run.seq_len}"
    batch, heads = run.micro_batch_size, case.model.num_heads
    values = {"tokens": tokens, "vocab": case.model.vocab_size, "optimizer": run.levers.optimizer, "batch": batch,
              "scores": f"{batch} x {heads} x {run.seq_len} x {run.seq_len}"}  # fmt: skip
    for key, saved in case.saved.items():
        if key in COSTS and saved > max(0.01 * need, 16 * MIB):
            weight = {"batch": 30, "fragmentation": 30}.get(key, 60)
            yield Finding(key, 15 + int(weight * min(saved / need, 1)), COSTS[key].format(saved=human(saved), **values))


def one_sequence(case: Case) -> Iterator[Finding]:
    """With one row a micro-batch, its length is what is left."""
    if case.ledger is None or case.run is None or case.model is None or case.run.micro_batch_size > 1:
        return
    run, need = case.run, case.ledger.peak.device_bytes
    if case.budget_bytes is None or need <= case.budget_bytes or run.seq_len < 2 * LEAST_SEQ_LEN:
        return
    saved = need - Quick(case.model).bytes(replace(run, seq_len=run.seq_len // 2), case.card)
    if saved > 0.1 * need:
        text = f"The sequence is long: {run.seq_len:,} tokens in one row cost {human(saved)} more than half as many."
        yield Finding("sequence", 15 + int(30 * saved / need), text)


def against_prediction(case: Case) -> Iterator[Finding]:
    """Where the run should have fitted: something is not as described."""
    ledger, budget = case.ledger, case.budget_bytes
    if not case.should_fit or ledger is None or budget is None or case.run is None or case.model is None:
        return
    peak = ledger.peak
    used = (case.evidence.allocated_bytes or 0) + (case.evidence.requested_bytes or 0)
    fits = f"As described, the run needs {human(peak.device_bytes)} and fits {human(budget)}"
    if used <= 1.03 * peak.allocated_bytes:
        yield Finding("prediction", 25, f"{fits}: if nothing else was on the card, the prediction is wrong; please "
                      "report it with this log and the run.")  # fmt: skip
        return
    text = f"{fits}, but {human(used)} were held or asked for, {human(peak.allocated_bytes)} predicted at the peak"
    score, most = 72, largest_tensor(case)
    if most is not None and most < 0.98 * (case.evidence.requested_bytes or 0):
        score, text = 90, f"{text}; no tensor of its step is larger than {human(most)}"  # one piece or not
    yield Finding("not_as_described", score, f"{text}. What would explain it: {', '.join(explanations(case, used))}.")


def largest_tensor(case: Case) -> int | None:
    """Bytes of the largest segment that the step of the run as described asks for; None outside a training step, and
    in eager attention, which tells enough where the description has none."""
    if case.model is None or case.run is None:
        return None
    eager = ("eager",) if case.run.levers.attention == "eager" else ()
    if phase_of(case.evidence.frames) not in ("forward", "loss", "backward", *eager):
        return None
    return segment_bytes(max(row[5] for row in play(case.model, case.run, case.card).info))


def explanations(case: Case, used: int) -> list[str]:
    """Other runs that take this much: without checkpointing, or with a longer sample."""
    model, run = case.model, case.run
    assert model is not None and run is not None
    quick, could = Quick(model), []
    bare = replace(run, levers=replace(run.levers, checkpointing="none"))
    if run.levers.checkpointing != "none" and quick.bytes(bare, case.card) >= used:
        could.append("checkpointing that is on but inactive")
    longest = model.max_position_embeddings
    if run.seq_len < longest and quick.bytes(replace(run, seq_len=longest), case.card) >= used:
        step = max(128, run.seq_len // 8)
        lengths = range(run.seq_len + step, longest + step, step)
        short = largest(lambda n: quick.bytes(replace(run, seq_len=min(lengths[n - 1], longest)), case.card) < used,
                        len(lengths))  # fmt: skip
        could.append(f"a sample of about {min(lengths[min(short, len(lengths) - 1)], longest):,} tokens")
    return [*could, "an evaluation step", "something else in the same process"]


def too_large(case: Case) -> Iterator[Finding]:
    """Nothing fits, or nothing that leaves training as it is."""
    if case.ledger is None or case.budget_bytes is None or case.evidence.kind in NOT_THE_CARD:
        return
    need = case.ledger.peak.device_bytes
    fitting = [fix for fix in case.fixes if fix.fits]
    if need <= case.budget_bytes or any(not fix.changes_training for fix in fitting):
        return
    there = human(case.budget_bytes)
    if fitting:
        yield Finding("too_large", 50, f"Too large to train unchanged: the run needs {human(need)}, {there} are there, "
                      "and only a change of what is trained fits.")  # fmt: skip
    elif case.floor_bytes is not None:
        yield Finding(
            "too_large",
            PROVEN,
            f"Simply too large: with every saving and short sequences it still needs {human(case.floor_bytes)}, "
            f"{there} are there. A larger card, or a smaller model.",
        )


RUN_RULES: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    requested, consumers, one_sequence, against_prediction, too_large,
)  # fmt: skip
