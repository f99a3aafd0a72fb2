"""The computer's memory, and what `fit` does with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from measured import model

from vramplan.core.plan import TIE, plan
from vramplan.core.speed import host_bytes
from vramplan.core.types import RunSpec
from vramplan.core.units import GIB
from vramplan.sources import host
from vramplan.sources.profiles import load_gpu


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max\n", 16 * GIB), (f"{4 * GIB}\n", 4 * GIB), (f"{2**63 - 4096}\n", 16 * GIB), ("", 16 * GIB), ("-1", 16 * GIB)],
)
def test_a_containers_limit_counts_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: int
) -> None:
    sizes = {"SC_PHYS_PAGES": 4 * 2**20, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(host.os, "sysconf", sizes.__getitem__)
    (tmp_path / "limit").write_text(text)
    monkeypatch.setattr(host, "LIMIT_FILES", (str(tmp_path / "none"), str(tmp_path / "limit")))
    assert host.memory_bytes() == expected
    assert host.checkpoint_limit_bytes() == int(0.7 * expected)


def test_a_system_that_does_not_say_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(host.os, "sysconf", refuse)
    assert host.memory_bytes() is None and host.checkpoint_limit_bytes() is None


# Without checkpoints nothing fits there, and the fastest by a hair waits in host memory.
SPEC, RUN = model("qwen2.5-3b"), RunSpec(model="x", seq_len=8192)
CARD = replace(load_gpu("h200"), usable_bytes=8 * GIB, total_bytes=8 * GIB)


def test_no_plan_takes_more_of_the_computers_memory_than_there_is() -> None:
    free = plan(SPEC, RUN, CARD, 8)
    assert any(c.levers.checkpoint_offload for c in free.candidates)
    for limit in (0, GIB, 2 * GIB):
        found = plan(SPEC, RUN, CARD, 8, host_limit_bytes=limit)
        assert found.verdict != "does_not_fit"
        for candidate in found.candidates:
            if candidate.levers.checkpoint_offload:
                run = replace(RUN, levers=candidate.levers, micro_batch_size=candidate.micro_batch_size)
                assert host_bytes(SPEC, run) <= limit


def test_an_offload_that_was_asked_for_stays() -> None:
    run = replace(RUN, levers=replace(RUN.levers, checkpoint_offload=True, checkpointing="all"))
    found = plan(SPEC, run, CARD, 8, free=(), host_limit_bytes=0)
    assert found.run.levers.checkpoint_offload
    assert "of the computer's memory" in found.reason


def test_host_memory_is_not_spent_on_a_difference_that_nobody_can_tell() -> None:
    found = plan(SPEC, RUN, CARD, 8)
    best = max(c.tokens_per_s or 0 for c in found.candidates if c.verdict != "does_not_fit")
    chosen = found.run.levers, found.run.micro_batch_size
    ((speed, offloaded),) = [
        (c.tokens_per_s or 0, c.levers.checkpoint_offload)
        for c in found.candidates
        if (c.levers, c.micro_batch_size) == chosen
    ]
    assert speed >= (1 - TIE) * best
    assert not offloaded
    assert any(c.levers.checkpoint_offload and (c.tokens_per_s or 0) > speed for c in found.candidates)


def test_the_longest_context_too_stays_within_the_computers_memory() -> None:
    free, bound = plan(SPEC, RUN, CARD, 1, "context"), plan(SPEC, RUN, CARD, 1, "context", host_limit_bytes=GIB)
    assert free.run.levers.checkpoint_offload and host_bytes(SPEC, free.run) > GIB
    assert not bound.run.levers.checkpoint_offload and bound.run.seq_len >= RUN.seq_len
