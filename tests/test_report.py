"""The tables: they add up, they fit, they read well without colour; and the JSON keeps its shape.

The files in golden/ are what people see. After a wanted change: VRAMPLAN_UPDATE_GOLDEN=1 pytest tests/test_report.py,
then read the difference.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import (
    LINES,
    OFFERS,
    VERDICTS,
    make_choice,
    make_gpu,
    make_ledger,
    make_line,
    make_measurement,
    make_model,
    make_offer,
    make_plan,
    make_priced,
    make_probe,
    make_run,
    make_verdict,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.core import rows
from vramplan.core.types import Calibration, Levers, SpeedFactors
from vramplan.core.units import GIB, MIB
from vramplan.report import payload, tables
from vramplan.report.audit import show_audit
from vramplan.report.calibrate import LiveBar, PlainBar, make_bar, show_calibration
from vramplan.report.compare import compare
from vramplan.report.estimate import headline, one_card, show_estimate
from vramplan.report.fit import show_fit, shown
from vramplan.report.gpus import show_gpus
from vramplan.report.guide import change_labels, show_choice, show_guide, significant
from vramplan.report.guide import headline as guide_headline
from vramplan.report.live import PlainDisplay, clock, event_text, one_line, step_text
from vramplan.report.models import show_models
from vramplan.report.survival import survived
from vramplan.report.train import show_result, summary

GOLDEN = Path(__file__).parent / "golden"


class Terminal(io.TextIOWrapper):
    """A text stream with an encoding of its own, a terminal or not."""

    def __init__(self, encoding: str = "utf-8", *, tty: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty

    @property
    def text(self) -> str:
        self.flush()
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue().decode(self.encoding)


def draw(show: Callable[..., None], *args: object, encoding: str = "utf-8", **options: object) -> str:
    stream = Terminal(encoding)
    show(stream, *args, **options)
    return stream.text


CARDS = (make_gpu(), make_gpu("t4", 15360 * MIB, 14912 * MIB, bf16_flops_per_s=None, usable_basis="measured"))
NO_FIT = make_plan(verdict="does_not_fit", budget_bytes=3 * GIB, reason="", advice=("--seq-len 512 needs 2.90 GiB",))
FAILED = make_probe(
    make_plan(), micro_batch_size=8, accumulation=2, levers=Levers(checkpointing="none"), ended="oom", fits=False,
    process_bytes=None, allocated_bytes=None, reserved_bytes=None, tokens_per_s=None,
)  # fmt: skip
PROBED = make_plan(verified=True, probes=(FAILED, make_probe(make_plan())))
REFUTED = make_plan(verdict="does_not_fit", reason="predicted to fit, but the probe did not", probes=(FAILED,))
TUNED = Calibration(
    card="NVIDIA H100 80GB HBM3", total_bytes=85520809984, versions=(("driver", "580"), ("torch", "2.11.0")),
    context_bytes=612 * MIB, reserved_factor=1.02, speed=SpeedFactors(matmul_share=0.61), rows=9, made="2026-01-02",
    error=0.071,
)  # fmt: skip
MODELS = (("llama-2-7b", make_model(), 6_738_415_616, "meta-llama/Llama-2-7b-hf"),)

OOM = {
    "event": "oom", "step": 12, "action": "split", "where": "backward", "rows": 4, "tokens": 4096,
    "micro_batch_size": 2, "accumulation": 8, "requested_bytes": 2 * GIB, "message": "CUDA out of memory.",
}  # fmt: skip
REHEARSAL = {
    "event": "rehearsal", "rows": 4, "tokens": 4096, "micro_batch_size": 4, "accumulation": 4, "oom_events": 0,
    "relief": [], "peak_bytes": 10 * GIB, "seconds": 2.5,
}  # fmt: skip
HEALTH = {"event": "health", "kind": "stuck", "step": 100, "message": "the loss does not fall", "reason": "rate 0"}
AUDIT = {
    "event": "audit",
    "rows": [
        {"key": "weights.nf4", "label": "packed 4-bit weights", "dtypes": {"uint8": 3_238_002_688},
         "bytes": 3_238_002_688, "planned_bytes": 3_238_002_688},
        {"key": "weights.constants", "label": "quantisation constants", "dtypes": {"uint8": 90_000_000, "float32": 1},
         "bytes": 102_600_001, "planned_bytes": 102_600_000},
        {"key": "weights.embeddings", "label": "input embedding", "dtypes": {"float32": 524_288_000},
         "bytes": 524_288_000, "planned_bytes": 262_144_000},
        {"key": "weights.lm_head", "label": "output layer", "dtypes": {"float32": 524_288_000},
         "bytes": 524_288_000, "planned_bytes": 262_144_000},
        {"key": "adapter.lora", "label": "LoRA A and B", "dtypes": {"float32": 159_907_840},
         "bytes": 159_907_840, "planned_bytes": 159_907_840},
    ],
    "counted_bytes": 4_549_086_529, "planned_bytes": 3_922_198_528, "allocated_bytes": 4_549_086_529 + 3 * MIB,
    "findings": [
        {"cause": 3, "key": "upcast", "bytes": 524_288_000, "fix": "--upcast none, as the lean recipe has it",
         "message": "embeddings and head were made float32 (prepare_model_for_kbit_training)"},
        {"cause": None, "key": "not_quantised", "bytes": None, "fix": "another model, or room for them",
         "message": "24 Linears are of a class that is not quantised and stay bfloat16"},
    ],
}  # fmt: skip

TOGETHER = make_ledger(
    (*LINES[:1], make_line("weights.gathered", 3 * MIB, label="gathered from the other cards"), *LINES[1:]),
    run=make_run(gpus=2, parallel="fsdp", accumulation=4),
)
MEASURED_TOGETHER = make_measurement(gpus=2, rank_peak_bytes=(5 * GIB, 5 * GIB - MIB))

VIEWS: dict[str, tuple[Callable[..., None], tuple[object, ...]]] = {
    "estimate": (show_estimate, (make_ledger(), VERDICTS)),
    "estimate_gpus": (show_estimate, (TOGETHER, VERDICTS)),
    "guide": (show_guide, (make_ledger(), OFFERS)),
    "guide_priced": (show_guide, (make_ledger(), make_priced())),
    "choice": (show_choice, (make_model(), make_run(), make_choice())),
    "fit": (show_fit, (make_plan(),)),
    "fit_impossible": (show_fit, (NO_FIT,)),
    "fit_probed": (show_fit, (PROBED,)),
    "fit_refuted": (show_fit, (REFUTED,)),
    "calibrate": (lambda stream, found, width: show_calibration(stream, found, "h100.json", width=width), (TUNED,)),
    "audit": (lambda stream, event, width: show_audit(tables.console(stream, width), event), (AUDIT,)),
    "train": (show_result, (make_ledger(), make_measurement(), "runs/first/adapter")),
    "train_gpus": (show_result, (TOGETHER, MEASURED_TOGETHER, "runs/first/adapter")),
    "gpus": (show_gpus, (CARDS, ())),
    "models": (show_models, (MODELS,)),
}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", VIEWS)
def test_golden(name: str, width: int) -> None:
    show, args = VIEWS[name]
    text = draw(show, *args, width=width)
    file = GOLDEN / f"{name}_{width}.txt"
    if os.environ.get("VRAMPLAN_UPDATE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", VIEWS)
def test_no_line_is_wider_than_the_screen_or_ends_in_blanks(name: str) -> None:
    show, args = VIEWS[name]
    for width in (80, 100, 120, 200):
        for line in draw(show, *args, width=width).splitlines():
            assert len(line) <= width
            assert line == line.rstrip()


@pytest.mark.parametrize("name", VIEWS)
def test_ascii_terminals_get_ascii(name: str) -> None:
    show, args = VIEWS[name]
    text = draw(show, *args, width=80, encoding="ascii")  # a strict stream: anything else raises
    assert "---" in text
    assert text.isascii()


# ------------------------------------------------------------------------------------------------------ adding up
def printed_numbers(text: str) -> dict[str, float]:
    """label -> printed GiB or MiB of the ledger table."""
    found = re.findall(r"^(.+?)\s+~?([\d,]+\.\d+)\s+<?\d+%", text, flags=re.MULTILINE)
    return {label: float(number.replace(",", "")) for label, number in found}


SIZES = st.lists(st.integers(0, 40 * GIB), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(SIZES, st.lists(st.integers(0, GIB), max_size=2), st.sampled_from([1, 1000]))
def test_printed_rows_add_up(inside: list[int], overhead: list[int], shrink: int) -> None:
    groups = ("weights", "adapter", "optimizer", "activations", "loss")
    lines = [make_line(f"{groups[i % 5]}.part{i}", size // shrink) for i, size in enumerate(inside)]
    lines += [make_line(f"overhead.part{i}", size // shrink) for i, size in enumerate(overhead)]
    scale, table = rows.ledger_rows(make_ledger(tuple(lines)))
    total = table[-1]
    subtotal = next(row for row in table if row.kind == rows.SUBTOTAL)
    groups_only = [row for row in table if row.kind == rows.GROUP]
    assert total.bytes == sum(line.bytes for line in lines)
    assert sum(row.steps for row in groups_only) == total.steps
    assert subtotal.steps == sum(row.steps for row in groups_only if row.group != "overhead")
    for group in groups_only:
        parts = [row.steps for row in table if row.kind == rows.LINE and row.group == group.group]
        assert not parts or sum(parts) == group.steps
    for row in table:  # and no number is a whole last digit off
        assert abs(row.steps * scale.unit_bytes - row.bytes * 10**scale.digits) < scale.unit_bytes


def test_the_numbers_on_the_screen_add_up() -> None:
    numbers = printed_numbers(draw(show_estimate, make_ledger(), width=80))
    top = {label: number for label, number in numbers.items() if not label.startswith(" ")}
    device, allocated, overhead = top.pop("device"), top.pop("allocated at the peak"), top.pop("overhead")
    assert len(top) == 6
    assert round(sum(top.values()), 2) == allocated
    assert round(allocated + overhead, 2) == device == 5.86


def test_largest_first_and_overhead_after_the_subtotal() -> None:
    _, table = rows.ledger_rows(make_ledger())
    kinds = [row.kind for row in table]
    cut = kinds.index(rows.SUBTOTAL)
    sizes = [row.bytes for row in table[:cut] if row.kind == rows.GROUP]
    assert sizes == sorted(sizes, reverse=True)
    assert {row.group for row in table[cut + 1 : -1]} == {"overhead"}
    assert kinds[-1] == rows.TOTAL


def test_workspace_filed_as_overhead_still_counts_as_allocated() -> None:
    line = make_line("workspace.cublas", MIB, group="overhead")
    _, table = rows.ledger_rows(make_ledger((line, make_line("overhead.context", MIB))))
    assert next(row for row in table if row.kind == rows.SUBTOTAL).bytes == MIB


def test_small_runs_print_mib() -> None:
    text = draw(show_estimate, make_ledger((make_line("weights.nf4", 3 * MIB),)), width=80)
    assert "MiB" in text and "3.0" in text


def test_formulas_need_room() -> None:
    assert "6,476,005,376 parameters / 2" in draw(show_estimate, make_ledger(), width=120)
    assert "6,476,005,376" not in draw(show_estimate, make_ledger(), width=80)


@given(st.floats(0, 1), st.integers(1, 60))
def test_bars_stay_within_their_width_and_show_what_is_there(share: float, width: int) -> None:
    for ascii_only in (True, False):
        drawn = tables.bar(share, width, ascii_only=ascii_only)
        assert len(drawn) <= width
        assert bool(drawn) == (share > 0)


# ------------------------------------------------------------------------------------------------------ sentences
def test_the_verdict_comes_first() -> None:
    need = make_ledger().peak.device_bytes
    assert one_card(need, make_verdict()).startswith("Fits rtx-4090: needs 5.86 GiB, 23.52 GiB usable")
    assert one_card(need, make_verdict(verdict="tight")).startswith("Tight on rtx-4090:")
    small = make_verdict("small", 5 * GIB, "does_not_fit", max_batch_size=0, max_seq_len=512)
    assert one_card(need, small) == "Does not fit small: needs 5.86 GiB, 5.00 GiB usable; 512 tokens fit."
    assert one_card(need, replace(small, max_batch_size=2)).endswith("batch 2 fits.")
    assert one_card(need, replace(small, max_seq_len=0)).endswith("nor does batch 1.")


def test_several_cards_in_one_sentence() -> None:
    text, verdict = headline(make_ledger(), VERDICTS)
    assert text == "Fits 3 of 4 cards: the smallest that does is rtx-4060 (7.62 GiB usable)."
    assert verdict == "fits"
    none = tuple(replace(verdict, verdict="does_not_fit") for verdict in VERDICTS)
    assert headline(make_ledger(), none)[0].startswith("Does not fit: none of the 4 cards")


def test_the_guide_says_how_many_cards_and_what_the_smallest_needs() -> None:
    run = make_run()
    assert guide_headline(OFFERS, run) == (
        "Fits 5 of 6 cards, 3 as asked: the smallest that does is rtx-4060 (7.62 GiB usable, with"
        " --checkpoint-offload)."
    )
    plain = tuple(replace(offer, as_asked=True) for offer in OFFERS[1:])
    assert guide_headline(plain, run).startswith("Fits 5 of 5 cards: the smallest that does is rtx-4060 (7.62 GiB")
    assert guide_headline(OFFERS[:1], run) == (
        "Does not fit: none of the 1 cards. 6 GB is too small: gtx-6gb lacks 300.0 MiB with --checkpoint-offload."
    )


def test_no_card_is_large_enough() -> None:
    choice = make_choice(memory_gb=None, as_asked_gb=None, offers=(), priced=())
    assert draw(show_choice, make_model(), make_run(), choice, width=120).splitlines() == [
        "Does not fit: no stored card is large enough.",
        "llama-2-7b, 1 x 2048 tokens, r=16 on all-linear, recipe lean",
        "6 GB is too small: gtx-6gb lacks 300.0 MiB with --checkpoint-offload.",
    ]
    smallest = draw(show_choice, make_model(), make_run(), make_choice(smaller=None, as_asked_gb=8), width=120)
    assert smallest.startswith("Fits cards of 8 GB as asked.")
    assert "No smaller class of cards is stored." in smallest


def test_several_cards_together_are_said_and_trained() -> None:
    run = make_run(gpus=2, parallel="fsdp")
    for text in (
        draw(show_choice, make_model(), run, make_choice(), width=120),
        draw(show_guide, make_ledger(run=run), OFFERS, width=120),
    ):
        assert "batch and context are per card, speed and cost of all 2 together" in text
        assert text.endswith("  vramplan train llama-2-7b --gpus 2 --parallel fsdp --data FILE\n")


def test_every_change_of_levers_has_a_text_of_its_own() -> None:
    changes: list[dict[str, Any]] = [
        {"checkpoint_offload": True},
        {"checkpointing": "every-2"},
        {"loss": "full", "upcast": "all"},
        {"kernels": "stock", "upcast": "all"},
        {"optimizer": "sgd", "loss": "full", "upcast": "norms"},
    ]
    offers = [make_offer(as_asked=False, levers=replace(Levers(), **change)) for change in changes]
    labels = change_labels([*offers, *offers, OFFERS[0]], make_run())  # OFFERS[0] does not fit
    assert list(labels.values()) == ["offload", "ckpt", "2 levers", "2b levers", "3 levers"]
    text = draw(show_guide, make_ledger(), offers, width=80)
    for label, flags in (("2b levers", "--upcast all --kernels stock"), ("offload", "--checkpoint-offload")):
        assert f"\n{label}: add {flags}\n" in text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (0.000123456, "0.000123"), (0.0315, "0.0315"), (0.6, "0.600"), (1.1151, "1.12"), (12.34, "12.3"),
     (123.4, "123"), (1234.5, "1,234"), (1e-12, "0.000000000")],
)  # fmt: skip
def test_three_digits_that_count(number: float, text: str) -> None:
    assert significant(number) == text


# ------------------------------------------------------------------------------------------------------- terminals
def test_colour_on_a_terminal_and_none_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def on_terminal() -> str:
        stream = Terminal(tty=True)
        show_estimate(stream, make_ledger(), VERDICTS, width=80)
        return stream.text

    colours = r"\x1b\[[0-9;]*38;5;"
    assert re.search(colours, on_terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(colours, on_terminal())


def test_width_when_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert tables.console(Terminal()).width == 80
    monkeypatch.setenv("COLUMNS", "132")
    assert tables.console(Terminal()).width == 132
    assert tables.console(Terminal(), 90).width == 90


def test_commands_are_never_broken() -> None:
    name = "an/" + "extremely-" * 12 + "long-name"
    ledger = make_ledger()
    ledger = replace(ledger, run=replace(ledger.run, model=name))
    assert f"vramplan estimate {name} --gpu all" in draw(show_estimate, ledger, width=80).splitlines()[-1]


# ------------------------------------------------------------------------------------------------------------- fit
def test_fit_says_the_product_and_the_command() -> None:
    text = draw(show_fit, make_plan(), width=80, written="my.json")
    assert "batch 4 x 4 = 16" in text
    assert "vramplan train my.json --data FILE" in text
    assert re.search(r"^> +4 x 4", text, flags=re.MULTILINE)


def test_fit_impossible_gives_the_advice_and_no_command() -> None:
    text = draw(show_fit, NO_FIT, width=80)
    assert text.startswith("Does not fit rtx-4090")
    assert "--seq-len 512 needs 2.90 GiB" in text
    assert "vramplan train" not in text and ">" not in text


@pytest.mark.parametrize(("source", "others", "said"), [("nvml", 0, True), ("nvml", -1, False), ("file", 0, False)])
def test_where_others_on_the_card_are_why_nothing_fits_it_is_said(source: str, others: int, said: bool) -> None:
    missing = NO_FIT.ledger.peak.device_bytes - NO_FIT.budget_bytes
    card = replace(NO_FIT.gpu, source=source, used_by_others_bytes=missing + others)
    text = draw(show_fit, replace(NO_FIT, gpu=card), width=80)
    assert missing > 0 and ("that others hold now" in text) is said
    assert (f"vramplan check {NO_FIT.run.model} --seq-len {NO_FIT.run.seq_len}" in text) is said
    assert "others hold" not in draw(show_fit, replace(REFUTED, gpu=card), width=80)


def test_what_was_compared_at_another_length_is_told_apart() -> None:
    plan = make_plan()
    assert "compared with" not in draw(show_fit, plan, width=80, compared_at=plan.run.seq_len)
    assert "compared with rows of 1,024 tokens" in draw(show_fit, plan, width=80, compared_at=1024)


def test_one_more_is_one() -> None:
    plan = make_plan()
    slower = replace(plan.candidates[0], levers=Levers(checkpointing="every-9"), tokens_per_s=1, device_bytes=9 * GIB)
    assert "; 1 more was priced" in draw(show_fit, replace(plan, candidates=(*plan.candidates, slower)), width=80)


def test_the_chosen_candidate_is_always_shown() -> None:
    plan = make_plan()
    others = tuple(replace(plan.candidates[1], levers=Levers(checkpointing=f"every-{k}")) for k in range(3, 20))
    listed = shown((*others, plan.candidates[0]), plan)
    assert len(listed) == 8
    assert listed[-1] == plan.candidates[0]


# ----------------------------------------------------------------------------------------------------------- train
def test_prediction_and_measurement_are_matched_by_key() -> None:
    moments, lines = compare(make_ledger(), make_measurement())
    by_key = {pair.key: pair for pair in (*moments, *lines)}
    assert by_key["resident.loaded"].difference == 0
    assert by_key["weights.nf4"].measured_bytes == by_key["weights.nf4"].predicted_bytes == 3_238_002_688
    assert by_key["peak.allocated"].difference == pytest.approx(8 * MIB / make_ledger().peak.allocated_bytes)
    adapter = by_key["adapter.lora"]
    assert adapter.measured_bytes is not None and adapter.predicted_bytes is not None
    assert adapter.measured_bytes - adapter.predicted_bytes == 5 * MIB
    assert "activations.block" not in by_key  # not there to be counted after the step


def test_gradients_are_not_compared() -> None:
    _, lines = compare(make_ledger(), make_measurement(lines=(make_line("adapter.gradients", 7),)))
    assert lines == []


def test_a_line_that_was_not_predicted_is_shown() -> None:
    extra = make_line("optimizer.paged", 7 * MIB, label="paged state", basis="measured")
    text = draw(show_result, make_ledger(), make_measurement(lines=(extra,), phases=()), "a", width=80)
    assert re.search(r"paged state +- +7\.0 +-", text)


def test_a_cpu_run_claims_no_gpu_memory() -> None:
    measurement = make_measurement(device="cpu", phases=())
    text = draw(show_result, make_ledger(), measurement, "a", width=80)
    assert "no GPU memory was measured" in text
    assert "allocated at the peak" not in text


def test_a_wrong_parameter_count_is_said() -> None:
    text = draw(show_result, make_ledger(), make_measurement(trainable_parameters=7), "a", width=80)
    assert "39,976,960 predicted, 7 counted" in text


def test_summary() -> None:
    text = summary(make_measurement(eval_loss_before=2.5, eval_loss_after=1.5))
    assert (
        text
        == "Done: 60 steps, 3,202 tokens/s, loss 2.310 -> 1.120, held out 2.500 -> 1.500 (perplexity 12.18 -> 4.482)."
    )


def test_what_was_survived_in_words() -> None:
    assert event_text(OOM) == (
        "out of memory: step 12, backward, 4 x 4,096 tokens (2.00 GiB asked for): redone 2 rows at a time"
    )
    step = {**OOM, "where": "optimizer", "action": "retry", "requested_bytes": None}
    assert event_text(step) == "out of memory: step 12, optimizer: taken again"
    without = {**OOM, "action": "drop_graphs", "micro_batch_size": 4, "requested_bytes": None}
    for where, played in (("forward", ", 4 x 4,096 tokens"), ("evaluation", ", 4 x 4,096 tokens"), ("optimizer", "")):
        text = f"out of memory: step 12, {where}{played}: redone without CUDA graphs"
        assert event_text({**without, "where": where}) == text
    assert str(event_text({**OOM, "where": "evaluation"})).endswith("2 rows at a time from now on")
    assert event_text({**OOM, "action": "shrink"}) == (
        "micro-batch: 2 rows of 4,096 tokens at a time from step 12 on, accumulation 8: the effective batch stays"
    )
    assert "back to 2 rows" in str(event_text({**OOM, "action": "grow"}))
    assert event_text(REHEARSAL) == "rehearsal: the largest batch, 4 x 4,096 tokens, fits, peak 10.00 GiB"
    assert event_text({**REHEARSAL, "micro_batch_size": 2, "accumulation": 8, "relief": ["offload"]}) == (
        "rehearsal: rows of 4,096 tokens do not fit 4 at a time: 2 x 4,096 from the start, with checkpoints in host "
        "memory, accumulation 8; the effective batch stays, peak 10.00 GiB"
    )
    assert event_text(HEALTH) == "health: step 100: the loss does not fall (rate 0)"


def test_the_end_says_what_was_survived() -> None:
    ledger = make_ledger(run=make_run(micro_batch_size=4, accumulation=4))
    assert survived(ledger, make_measurement()) == []
    once = make_measurement(oom_events=1, micro_batch_size=4)
    assert survived(ledger, once) == [
        "Out of memory once and went on: the micro-batch is 4 as planned; the effective batch stayed 16."
    ]
    text = draw(show_result, ledger, make_measurement(oom_events=3, micro_batch_size=1, skipped_steps=2), "a", width=80)
    flat = " ".join(text.split())
    assert "Out of memory 3 times and went on: the longest rows run 1 at a time instead of 4, accumulation 16" in flat
    assert "2 steps were left out: no finite gradient." in flat


STEP = {"event": "step", "t": 100.0, "step": 3, "loss": 2.5, "tokens_per_s": 1234.0, "peak_bytes": GIB, "eta_s": 61.0}


def test_plain_lines_are_throttled_but_the_last_step_is_shown() -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream, 2 * GIB)
    start = {"event": "start", "total_steps": 60, "effective_batch_size": 8, "examples": 100}
    display.on_event({**start, "resumed_from": 0})
    for step in range(1, 61):
        display.on_event({**STEP, "step": step, "t": 100.0 + step})
    display.on_event({"event": "end", "ended": "finished"})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "train: 60 steps, effective batch 8, 100 examples"
    assert lines[1] == "1/60  loss 2.500  1,234 tok/s  peak 1.00 GiB of 2.00 GiB  0:01:01 left"
    assert lines[-1].startswith("60/60")
    assert len(lines) == 8


@pytest.mark.parametrize("value", [None, "x", True, float("nan"), [], {}])
def test_events_with_nonsense_in_them_are_survived(value: object) -> None:
    for key in STEP:
        assert step_text({**STEP, key: value}, None, GIB)
    for kind in ("phase", "start", "eval", "warning", "sample", "end", value):
        event_text({"event": kind, "message": value, "loss": value, "text": value, "resumed_from": value})
    for event in (OOM, REHEARSAL, HEALTH):
        for key in event.keys() - {"event"}:
            assert event_text({**event, key: value})
    display = PlainDisplay(io.StringIO(), GIB)
    for key in AUDIT.keys() - {"event"}:
        display.on_event({**AUDIT, key: value})
        display.on_event({**AUDIT, key: [value, {"bytes": value, "dtypes": value, "label": value, "cause": value}]})


def test_texts_from_the_child_stay_on_one_line_without_control_characters() -> None:
    assert one_line("a\x1b[31m\nb\r\tc") == "a [31m b c"
    assert clock(90_061) == "1 d 1:01:01"


def test_the_live_bar_draws_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from vramplan.report.live import LiveDisplay, make_display

    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal(tty=True)
    with make_display(stream, 2 * GIB, width=80) as display:
        assert isinstance(display, LiveDisplay)
        display.on_event({"event": "start", "total_steps": 60})
        display.on_event({"event": "sample", "text": "[red]not markup"})
        display.on_event(STEP)
    assert "3/60" in stream.text and "[red]not markup" in stream.text
    assert isinstance(make_display(Terminal(), GIB), PlainDisplay)


@pytest.mark.parametrize(("width", "drawn"), [(120, True), (99, False)])
def test_a_wide_bar_shows_the_course_of_the_loss(monkeypatch: pytest.MonkeyPatch, width: int, drawn: bool) -> None:
    from vramplan.report.live import make_display

    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal(tty=True)
    with make_display(stream, 2 * GIB, width=width) as display:
        for step, loss in enumerate((4.0, 3.0, float("nan"), 2.0), 1):
            display.on_event({**STEP, "step": step, "loss": loss})
    assert ("loss █▅▁ 2.000" in stream.text) is drawn and ("loss 2.000" in stream.text) is not drawn


def test_the_bar_of_a_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal, file = Terminal(tty=True), Terminal()
    for stream, kind in ((terminal, LiveBar), (file, PlainBar)):
        with make_bar(stream, 100) as bar:
            assert isinstance(bar, kind)
            bar.step(2, 9, "wide 1 x 2048", 75.0)
            bar.say("left out: [red]")
            bar.step(9, 9, "", 0.0)
        assert "wide 1 x 2048  0:01:15 left" in stream.text and "left out: [red]" in stream.text
    assert file.text.startswith("3/9  ")


# ------------------------------------------------------------------------------------------------------------ JSON
def test_estimate_payload_has_the_shape_of_the_contract() -> None:
    data = json.loads(json.dumps(payload.estimate_payload(make_ledger(), VERDICTS), allow_nan=False))
    assert data["schema_version"] == 1
    assert data["model"]["name"] == "llama-2-7b" and data["run"]["seq_len"] == 2048
    assert set(data["resident"]) == {"loaded_bytes", "prepared_bytes", "with_lora_bytes"}
    assert set(data["peak"]) == {"allocated_bytes", "phase", "reserved_bytes", "minimum_bytes", "device_bytes"}
    assert {"name", "peak_bytes"} <= set(data["phases"][0])
    assert {"key", "bytes", "formula", "basis"} <= set(data["lines"][0])
    assert {"gpu", "usable_bytes", "verdict", "max_batch_size", "max_seq_len", "tokens_per_s"} == set(data["gpus"][0])
    assert data["trainable_parameters"] == 39_976_960
    assert sum(line["bytes"] for line in data["lines"]) == data["peak"]["device_bytes"]


def test_the_guide_adds_to_the_shape_of_the_contract() -> None:
    data = json.loads(json.dumps(payload.guide_payload(make_ledger(), make_priced()), allow_nan=False))
    old = payload.estimate_payload(make_ledger(), VERDICTS)
    assert set(data) == set(old)
    card = data["gpus"][1]
    assert set(old["gpus"][0]) < set(card)
    assert set(card) - set(old["gpus"][0]) == {
        "memory_gb", "compute_capability", "levers", "as_asked", "flags", "device_bytes", "missing_bytes",
        "context_levers", "fastest", "hours_per_million_tokens", "price_per_hour", "cost_per_million_tokens",
        "cheapest",
    }  # fmt: skip
    assert card["flags"] == ["--checkpoint-offload"] and card["as_asked"] is False
    assert card["levers"]["checkpoint_offload"] is True and card["fastest"]["micro_batch_size"] == 16
    assert all(isinstance(size, int) for row in data["gpus"] for key, size in row.items() if key.endswith("_bytes"))
    assert data["gpus"][2]["tokens_per_s"] is None
    assert [row["gpu"] for row in data["gpus"] if row["cheapest"]] == ["rtx-pro-6000-blackwell"]


def test_a_choice_as_json() -> None:
    data = json.loads(json.dumps(payload.choice_payload(make_model(), make_run(), make_choice()), allow_nan=False))
    assert set(data) == {
        "schema_version", "model", "run", "memory_gb", "as_asked_gb", "gpus", "smaller", "priced", "cheapest"
    }  # fmt: skip
    assert (data["memory_gb"], data["as_asked_gb"], data["cheapest"]) == (8, 24, "rtx-pro-6000-blackwell")
    assert data["smaller"]["missing_bytes"] == 300 * MIB and data["smaller"]["flags"] == ["--checkpoint-offload"]
    nothing = payload.choice_payload(
        make_model(), make_run(), make_choice(memory_gb=None, smaller=None, offers=(), priced=())
    )
    assert nothing["smaller"] is None and nothing["cheapest"] is None and nothing["gpus"] == []


def test_the_other_payloads() -> None:
    data = payload.train_payload("runs/x", "finished", 0, make_ledger(), make_measurement())
    assert data["adapter"] == "runs/x/adapter"
    assert {pair["key"] for pair in data["comparison"]["lines"]} >= {"weights.nf4", "adapter.lora"}
    failed = payload.train_payload("runs/x", "oom", 4, make_ledger(), None, "out of memory")
    assert failed["adapter"] is None and failed["measurement"] is None and failed["exit_code"] == 4
    assert payload.gpus_payload(CARDS, ())["gpus"][1]["key"] == "t4"
    assert payload.models_payload(MODELS)["models"][0]["hub_id"] == "meta-llama/Llama-2-7b-hf"
