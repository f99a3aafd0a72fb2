"""`vramplan lock`: what is written down, and when it is too much later."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import make_ledger, make_run
from golden_tools import check_golden
from hypothesis import given
from hypothesis import strategies as st

from vramplan.cli import run
from vramplan.core.lock import Drift, lock_of
from vramplan.core.rows import scale_for
from vramplan.core.types import Levers, Lock
from vramplan.core.units import GIB, MIB
from vramplan.report.lock import columns, show_drift, show_lock
from vramplan.sources.records import read_json

VERSIONS = (("vramplan", "0.1.0"), ("torch", "2.11.0"))
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


def make_lock(groups: dict[str, int], **changes: Any) -> Lock:
    ledger = make_ledger()
    size = sum(groups.values())
    peak = replace(ledger.peak, device_bytes=size)
    made = lock_of(ledger, ("llama-2-7b",), VERSIONS)
    return replace(made, peak=peak, groups=tuple(groups.items()), **changes)


THEN = make_lock({"weights": 4 * GIB, "optimizer": GIB // 2, "loss": GIB})
NOW = make_lock(
    {"weights": 4 * GIB, "activations": 300 * MIB, "loss": 3 * GIB // 2},
    run=make_run(seq_len=4096, levers=Levers(loss="full", optimizer="sgd")),
    versions=(("vramplan", "0.2.0"), ("torch", "2.11.0"), ("peft", "0.21.0")), gpu="rtx-4090",
)  # fmt: skip


def test_golden() -> None:
    check_golden("lock", lambda stream, width: show_lock(stream, THEN, "vramplan.lock", width=width))
    check_golden("lock_rose", lambda stream, width: show_drift(stream, Drift(THEN, NOW, 0.02), "a.lock", width=width))
    check_golden("lock_same", lambda stream, width: show_drift(stream, Drift(THEN, THEN, 0.02), "a.lock", width=width))


sizes = st.integers(0, 90 * GIB)


@given(st.lists(st.tuples(sizes, sizes) | sizes.map(lambda n: (n, n)), min_size=1, max_size=8))
def test_printed_columns_add_up_and_what_stays_reads_the_same(pairs: list[tuple[int, int]]) -> None:
    scale = scale_for(sum(then for then, _ in pairs))
    then, now = columns(pairs, scale)
    assert sum(then) == scale.steps(sum(pair[0] for pair in pairs))
    assert sum(now) == scale.steps(sum(pair[1] for pair in pairs))
    assert all(before == after for before, after, pair in zip(then, now, pairs, strict=True) if pair[0] == pair[1])


@pytest.mark.parametrize(("more", "tolerance", "too_much"), [(20, 0.02, False), (21, 0.02, True), (1, 0.0, True),
                                                              (0, 0.0, False), (-500, 0.0, False)])  # fmt: skip
def test_the_tolerance_is_a_share_of_the_lock(more: int, tolerance: float, too_much: bool) -> None:
    then = make_lock({"weights": 1000})
    assert Drift(then, make_lock({"weights": 1000 + more}), tolerance).is_too_much is too_much


def test_the_groups_are_the_whole_ledger() -> None:
    ledger = make_ledger()
    made = lock_of(ledger, (), VERSIONS)
    assert sum(size for _, size in made.groups) == sum(line.bytes for line in ledger.lines)


def test_a_run_is_held_against_its_lock(cli: Call, tmp_path: Path) -> None:
    code, out, _ = cli("lock", "llama-2-7b", "--batch-size", 2, "--seq_len=1024", "--no-double-quant", "-o", "a.lock")
    assert code == 0 and "vramplan lock --check a.lock" in out
    made = read_json(tmp_path / "a.lock", Lock)
    assert made.words == ("llama-2-7b", "--batch-size=2", "--seq-len=1024", "--no-double-quant")
    assert dict(made.versions)["vramplan"] and made.run.micro_batch_size == 2
    estimate = json.loads(cli("estimate", "llama-2-7b", "--batch-size", 2, "--seq-len", 1024, "--no-double-quant",
                              "--json")[1])  # fmt: skip
    assert made.peak.device_bytes == estimate["peak"]["device_bytes"]
    code, out, _ = cli("lock", "--check", "a.lock")
    assert (code, out[:5]) == (0, "Same:") and "what changed" not in out
    code, out, _ = cli("lock", "--check", "a.lock", "--batch-size", 4)
    assert (code, out[:5]) == (5, "Rose:") and re.search(r"micro_batch_size +2 +4", out)
    assert cli("lock", "--check", "a.lock", "--batch-size", 4, "--tolerance", "90%")[0] == 0
    assert cli("lock", "--check", "a.lock", "qwen2.5-0.5b")[0] == 0  # another, smaller model
    found = json.loads(cli("lock", "--check", "a.lock", "--batch-size", 4, "--json")[1])
    assert found["rose"] and sum(row["bytes"] for row in found["groups"]) == found["now"]["peak"]["device_bytes"]


def test_files_are_read_anew(cli: Call, tmp_path: Path) -> None:
    text = (Path(__file__).parent / "configs" / "axolotl.yml").read_text()
    (tmp_path / "q.yml").write_text(text)
    (tmp_path / "run.toml").write_text("lora_r = 8\n")
    assert cli("lock", "--from", "q.yml", "--config", "run.toml", "--attn", "sdpa")[0] == 0
    assert cli("lock", "--check", "vramplan.lock")[0] == 0
    (tmp_path / "q.yml").write_text(text.replace("sequence_len: 8192", "sequence_len: 9216"))
    assert cli("lock", "--check", "vramplan.lock")[0] == 5
    (tmp_path / "q.yml").write_text(text)
    (tmp_path / "run.toml").write_text("lora_r = 512\n")
    assert cli("lock", "--check", "vramplan.lock")[0] == 5
    assert cli("lock", "--check", "vramplan.lock", "--lora-r", 8)[0] == 0


def test_the_chip_is_kept(cli: Call, tmp_path: Path) -> None:
    assert cli("lock", "llama-2-7b", "--gpu", "h100-80gb")[0] == 0
    assert read_json(tmp_path / "vramplan.lock", Lock).gpu == "h100-80gb"
    assert cli("lock", "--check", "vramplan.lock")[1].startswith("Same:")
    assert "gpu" in cli("lock", "--check", "vramplan.lock", "--gpu", "rtx-3060-12gb", "--tolerance", "50%")[1]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("lock",), "MODEL is missing"),
        (("lock", "llama-2-7b", "--gpu", "live"), "another card on another machine"),
        (("lock", "llama-2-7b", "--tolerance", "2%"), "add --check"),
        (("lock", "--check", "good.lock", "-o", "x"), "exclude each other"),
        (("lock", "--check", "good.lock", "--tolerance", "2"), "must be a share below 1"),
        (("lock", "--check", "missing.lock"), "cannot read missing.lock"),
        (("lock", "--check", "bad.lock"), "is not valid JSON"),
        (("lock", "--check", "flag.lock"), "holds a flag that is not one"),
        (("lock", "--check", "trust.lock"), "asks for --trust-remote-code"),
    ],
)
def test_what_is_wrong_is_one_sentence(words: tuple[str, ...], wanted: str, cli: Call, tmp_path: Path) -> None:
    from vramplan.sources.records import write_json

    write_json(tmp_path / "good.lock", THEN)
    write_json(tmp_path / "flag.lock", replace(THEN, words=("llama-2-7b", "--nonsense=3")))
    write_json(tmp_path / "trust.lock", replace(THEN, words=("llama-2-7b", "--trust-remote-code")))
    (tmp_path / "bad.lock").write_text("{")
    code, out, err = cli(*words)
    assert (code, out) == (2, "") and wanted in err and err.count("\n") == 1
