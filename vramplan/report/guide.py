"""The buying guide: cards from small to large, with which levers a run fits each, how fast, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import ascii_lowercase
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vramplan.core.guide import fits
from vramplan.core.recipes import lever_flags
from vramplan.core.types import Candidate, Choice, Ledger, Levers, ModelSpec, Offer, RunSpec
from vramplan.core.units import human
from vramplan.report import tables
from vramplan.report.estimate import asked, fit_command, next_step, put_ledger

WORDS = {  # a changed lever in a cell
    "checkpointing": "ckpt",
    "checkpoint_offload": "offload",
    "optimizer": "optim",
    "loss": "loss",
    "upcast": "upcast",
    "allocator": "allocator",
    "kernels": "kernels",
    "attention": "attn",
}
LABEL_WIDTH = 9
BF16 = (8, 0)  # compute capability from which on tensor cores know bf16
COLUMNS = ("card", "GiB", "fits", "batch", "context", "tokens/s", "with", "hours/M", "cost/M")


def show_guide(stream: TextIO, ledger: Ledger, offers: Sequence[Offer], *, width: int | None = None) -> None:
    """Which cards hold the run, then the ledger of the run as it was asked for, then every card."""
    screen = tables.console(stream, width)
    verdict = "fits" if any(fits(offer) for offer in offers) else "does_not_fit"
    text = f"{headline(offers, ledger.run)} {cheapest(offers)}".rstrip()
    put_ledger(screen, ledger, text, verdict, speeds=False)
    screen.print()
    put_offers(screen, offers, ledger.model, ledger.run)
    tables.command(screen, *next_step(ledger, offers))


def show_choice(stream: TextIO, model: ModelSpec, run: RunSpec, choice: Choice, *, width: int | None = None) -> None:
    """The smallest class of cards that holds the run; what the next one down lacks; the cheapest with a price."""
    screen = tables.console(stream, width)
    tables.sentence(screen, choice_headline(choice, run), "does_not_fit" if choice.memory_gb is None else "fits")
    screen.print(Text(asked(model, run), style="dim"))
    for text in (smaller(choice, run), cheapest(choice.priced)):
        if text:
            tables.sentence(screen, text)
    shown = {offer.gpu: offer for offer in (*choice.offers, *choice.priced)}  # marked ones last
    if shown:
        screen.print()
        put_offers(screen, list(shown.values()), model, run)
        tables.command(screen, *fit_command(run, list(shown.values())))


# ------------------------------------------------------------------------------------------------------ sentences
def headline(offers: Sequence[Offer], run: RunSpec) -> str:
    """How many cards hold the run, and the smallest of them."""
    fitting = [offer for offer in offers if fits(offer)]
    if not fitting:
        nearest = min(offers, key=lambda offer: offer.missing_bytes)
        return f"Does not fit: none of the {len(offers)} cards. {too_small(nearest, run)}"
    smallest = min(fitting, key=lambda offer: (offer.usable_bytes, offer.gpu))
    plain = sum(offer.as_asked for offer in fitting)
    some = "" if plain == len(fitting) else f", {plain} as asked" if plain else ", none as asked"
    return f"Fits {len(fitting)} of {len(offers)} cards{some}: the smallest that does is {_card(smallest, run)}."


def choice_headline(choice: Choice, run: RunSpec) -> str:
    """The class of card to look for."""
    if choice.memory_gb is None:
        return "Does not fit: no stored card is large enough."
    if choice.as_asked_gb == choice.memory_gb:
        return f"Fits cards of {choice.memory_gb} GB as asked."
    flags = next(offer for offer in choice.offers if fits(offer)).levers
    later = f"; as asked, {choice.as_asked_gb} GB" if choice.as_asked_gb else "; as asked, no stored card"
    return f"Fits cards of {choice.memory_gb} GB with {_flags(flags, run)}{later}."


def smaller(choice: Choice, run: RunSpec) -> str:
    """Why no smaller class will do."""
    if choice.smaller is not None:
        return too_small(choice.smaller, run)
    return "" if choice.memory_gb is None else "No smaller class of cards is stored."


def too_small(offer: Offer, run: RunSpec) -> str:
    """By how much a card is too small."""
    flags = _flags(offer.levers, run)
    most = f" with {flags}" if flags else ""
    return f"{offer.memory_gb} GB is too small: {offer.gpu} lacks {human(offer.missing_bytes)}{most}."


def cheapest(offers: Sequence[Offer]) -> str:
    """The card that trains for least, "" where none has a price."""
    best = next((offer for offer in offers if offer.cheapest), None)
    if best is None or best.cost_per_million_tokens is None:
        return ""
    return f"Cheapest: {best.gpu}, {significant(best.cost_per_million_tokens)} per million tokens."


def _card(offer: Offer, run: RunSpec) -> str:
    extra = "" if offer.as_asked else f", with {_flags(offer.levers, run)}"
    return f"{offer.gpu} ({human(offer.usable_bytes)} usable{extra})"


def _flags(levers: Levers, run: RunSpec) -> str:
    return " ".join(lever_flags(levers, run.levers))


# ---------------------------------------------------------------------------------------------------------- table
def put_offers(screen: Console, offers: Sequence[Offer], model: ModelSpec, run: RunSpec) -> None:
    """The cards, and below them what their columns mean."""
    labels = change_labels(offers, run)
    tables.put(screen, *offer_table(screen, offers, labels))
    for text in notes(offers, labels, model, run):
        screen.print(Text(text, style="dim"))


def offer_table(screen: Console, offers: Sequence[Offer], labels: dict[Levers, str]) -> tuple[Table, int]:
    """One row a card, smallest first; and the column that may be cut. Where there is little room, hours give way to
    costs, and with which levers a card is fastest is left out."""
    wide, priced = screen.width >= tables.WIDE, any(offer.price_per_hour is not None for offer in offers)
    left_out = {"with"} if not wide else set()
    left_out |= {"hours/M"} if priced and not wide else set()
    left_out |= set() if priced else {"cost/M"}
    shown = [title for title in COLUMNS if title not in left_out]
    table = tables.plain_table(screen)
    for title in shown:
        if title in ("card", "fits", "with"):
            tables.add_text(table, title, screen)
        else:
            tables.add_number(table, "tok/s" if title == "tokens/s" and not wide else title)
    for offer in sorted(offers, key=lambda offer: (offer.usable_bytes, offer.gpu)):
        cells = _cells(offer, labels, digits=2 if wide else 1)
        table.add_row(*(cells[title] for title in shown), style="bold" if offer.cheapest else "")
    return table, shown.index("with" if wide else "fits")


def _cells(offer: Offer, labels: dict[Levers, str], digits: int) -> dict[str, str | Text]:
    holds = Text("no" if not fits(offer) else "as asked" if offer.as_asked else labels[offer.levers])
    if offer.verdict == "tight":
        holds.append("!")
    holds.style = tables.VERDICT_STYLES[offer.verdict]
    speed, hours, cost = offer.tokens_per_s, offer.hours_per_million_tokens, offer.cost_per_million_tokens
    return {
        "card": offer.gpu,
        "GiB": f"{offer.usable_bytes / 2**30:.{digits}f}",
        "fits": holds,
        "batch": tables.count(offer.max_batch_size),
        "context": tables.count(offer.max_seq_len),
        "tokens/s": "-" if speed is None else f"~{speed:,}",
        "with": "-" if offer.fastest is None else fastest_text(offer.fastest),
        "hours/M": "-" if hours is None else significant(hours),
        "cost/M": "-" if cost is None else ("*" if offer.cheapest else "") + significant(cost),
    }


def fastest_text(fastest: Candidate) -> str:
    """Micro-batch and checkpointing of the fastest run."""
    levers = fastest.levers
    checkpoints = "offload" if levers.checkpoint_offload else f"ckpt {levers.checkpointing}"
    return f"batch {fastest.micro_batch_size}, {checkpoints}"


def change_labels(offers: Sequence[Offer], run: RunSpec) -> dict[Levers, str]:
    """Changed levers -> what stands for them in a cell, each text once: their names, or how many there are."""
    labels: dict[Levers, str] = {}
    for offer in offers:
        if not fits(offer) or offer.as_asked or offer.levers in labels:
            continue
        words = [word for name, word in WORDS.items() if getattr(offer.levers, name) != getattr(run.levers, name)]
        text = "+".join(words)
        if len(text) > LABEL_WIDTH:
            alike = sum(label.startswith(str(len(words))) for label in labels.values())
            text = f"{len(words)}{ascii_lowercase[alike] if alike else ''} levers"
        labels[offer.levers] = text
    return labels


def notes(offers: Sequence[Offer], labels: dict[Levers, str], model: ModelSpec, run: RunSpec) -> list[str]:
    """What has to be said below the table."""
    out = [f"{text}: add {_flags(levers, run)}" for levers, text in labels.items()]
    if any(offer.verdict == "tight" for offer in offers):
        out.append("!: tight, the allocator must return memory that it has cached")
    out.append(f"batch: the largest micro-batch of {run.seq_len:,} tokens that fits so")
    flags = _flags(offers[0].context_levers, run)
    context = f"context: the longest sequence, one at a time{', with ' + flags if flags else ''}"
    if any(offer.max_seq_len == model.max_position_embeddings for offer in offers):
        context += f"; {model.max_position_embeddings:,} is the limit of {model.name}"
    out.append(context)
    if any(offer.tokens_per_s is not None for offer in offers):
        out.append("~ modelled, not measured: the fastest levers and micro-batch; M: a million tokens")
    if run.gpus > 1:
        out.append(f"batch and context are per card, speed and cost of all {run.gpus} together")
    if any(offer.cheapest for offer in offers):
        out.append("* the cheapest of the cards with a price")
    old = [offer.gpu for offer in offers if offer.compute_capability < BF16]
    if old:
        out.append(f"no bf16 tensor cores, which the plan assumes: {', '.join(old)}")
    return out


def significant(number: float) -> str:
    """Three digits that count: "12.3", "0.0315", "1,235"."""
    if number <= 0:
        return "0"
    digits = max(2 - math.floor(math.log10(number)), 0)
    return f"{number:,.{min(digits, 9)}f}"
