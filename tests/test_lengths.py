"""Plans for rows of different lengths: the longest batch decides the memory, the usual one the speed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import model

from vramplan.core.lengths import longest_run, mean, real_share, usual_width
from vramplan.core.plan import plan
from vramplan.core.types import DataSpec, Lengths, Plan, RunSpec
from vramplan.core.units import round_up
from vramplan.sources.profiles import load_gpu
from vramplan.sources.records import decode, encode

pytest.importorskip("torch")
from vramplan.train.lengths import histogram

SPEC, CARD = model("qwen2.5-0.5b"), load_gpu("rtx-4090")
GROUPED = DataSpec(path="x", train_sampling_strategy="group_by_length")
sizes = st.lists(st.integers(1, 3000), min_size=1, max_size=400)


def of(lengths: list[int]) -> Lengths:
    return Lengths(bars=tuple((t, n) for t, n in histogram(sorted(lengths))), tokens=sum(lengths))


@given(sizes)
def test_a_histogram_holds_every_row_under_its_bar(lengths: list[int]) -> None:
    ascending, bars = sorted(lengths), histogram(sorted(lengths))
    assert len(bars) <= 64 and [t for t, _ in bars] == sorted({t for t, _ in bars})
    assert sum(rows for _, rows in bars) == len(lengths) and bars[-1][0] == max(lengths)
    at = 0
    for tokens, rows in bars:
        at += rows
        assert ascending[at - 1] == tokens
    assert of(lengths).rows == len(lengths) and of(lengths).longest == max(lengths)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(8, 2000), min_size=40, max_size=60), st.sampled_from([1, 2, 4, 8]))
def test_the_usual_width_is_that_of_drawn_batches(lengths: list[int], micro: int) -> None:
    draw = random.Random(1)
    drawn = [round_up(max(draw.choices(lengths, k=micro)), 8) for _ in range(4000)]
    found = usual_width(RunSpec(model="x", micro_batch_size=micro, seq_len=2048), of(lengths))
    assert found == pytest.approx(sum(drawn) / len(drawn), rel=0.06, abs=16)


@given(sizes, st.integers(1, 16), st.integers(8, 2048))
def test_padding_grows_with_the_micro_batch_and_grouping_saves_it(lengths: list[int], micro: int, seq: int) -> None:
    run, rows = RunSpec(model="x", micro_batch_size=micro, seq_len=round_up(seq, 8)), of(lengths)
    more, grouped = replace(run, micro_batch_size=micro + 1), replace(run, data=GROUPED)
    assert usual_width(more, rows) >= usual_width(run, rows) >= usual_width(grouped, rows)
    assert 0 < real_share(run, rows) <= 1 and real_share(replace(run, packing=True), rows) == 1
    assert usual_width(run, rows) <= round_up(run.seq_len, 8)
    assert mean(rows, run.seq_len) <= min(rows.longest, run.seq_len)
    assert longest_run(run, rows).seq_len == min(run.seq_len, round_up(rows.longest, 8))


def test_short_rows_make_a_smaller_plan_and_padding_a_slower_one() -> None:
    run = RunSpec(model="x", seq_len=2048)
    alike, mixed = of([512] * 100), of([64] * 90 + [2048] * 10)
    whole, short, ragged = (plan(SPEC, run, CARD, 16, lengths=rows) for rows in (None, alike, mixed))
    assert short.run.seq_len == 512 and ragged.run.seq_len == 2048 and short.lengths == alike
    assert short.candidates[0].tokens_per_s == pytest.approx(plan(SPEC, replace(run, seq_len=512), CARD, 16)
                                                             .candidates[0].tokens_per_s)  # fmt: skip
    assert ragged.candidates[0].tokens_per_s < 0.8 * whole.candidates[0].tokens_per_s
    grouped = plan(SPEC, replace(run, data=GROUPED), CARD, 16, lengths=mixed)
    assert grouped.candidates[0].tokens_per_s > ragged.candidates[0].tokens_per_s
    assert decode(encode(ragged), Plan) == ragged


def test_where_rows_differ_small_micro_batches_are_looked_at() -> None:
    run, rows = RunSpec(model="llama-3.1-8b", seq_len=4096), of([700] * 95 + [4096] * 5)
    found = plan(model("llama-3.1-8b"), run, load_gpu("h100-80gb"), 16, lengths=rows)
    priced = {c.micro_batch_size for c in found.candidates if c.levers == found.run.levers}
    assert 1 in priced and len(priced) > 2
    best = max(found.candidates, key=lambda c: (c.verdict != "does_not_fit", c.tokens_per_s or 0))
    assert (best.micro_batch_size, best.levers) == (found.run.micro_batch_size, found.run.levers)
