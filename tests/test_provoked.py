"""Runs that went out of memory on a card, provoked for one cause by `bench_oom.py`: diagnosed again from their logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from oom_cases import Case, cases

from vramplan.cli.diagnose import diagnosed
from vramplan.sources.oom_text import read_evidence
from vramplan.sources.profiles import load_gpu

PROVOKED = Path(__file__).parents[1] / "docs" / "measurements" / "h200-oom-causes.jsonl"
KNOWN = {case.name: case for case in cases()}
# The place of the fault was the bench: random embeddings were made twice. And 96 GiB are not more than the card.
SPOILT = ("upcast/1-qwen2.5-7b", "larger_than_card/2-qwen2.5-1.5b")


def provoked() -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in PROVOKED.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["ended"] == "oom" and row["name"] not in SPOILT]


ROWS = {row["cause"]: row for row in provoked()}  # the last of each: all of them takes a minute


@pytest.mark.parametrize("cause", ROWS)
def test_the_cause_is_named_first(cause: str, tmp_path: Path) -> None:
    case: Case = KNOWN[ROWS[cause]["name"]].placed(tmp_path)
    log = tmp_path / "log.txt"
    log.write_text(ROWS[cause]["evidence"], encoding="utf-8")
    evidence = read_evidence(log)
    assert evidence is not None
    found = diagnosed(evidence, case.run, load_gpu("h200"))
    assert found.cause_keys[0] in case.expected
    assert found.cause_keys[0] == "too_large" or found.fixes


def test_many_causes_were_provoked() -> None:
    assert len(provoked()) >= 39 and len(ROWS) >= 16
