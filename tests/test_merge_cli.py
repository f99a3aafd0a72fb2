"""`vramplan merge` without torch: what it asks the merge for, what it refuses, how it shows what happens."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_cli
from rich.console import Console
from test_cli import Cli

from vramplan.core.types import MergeSpec, RunSpec
from vramplan.launch import Outcome, merging
from vramplan.report.merge import LiveDisplay, PlainDisplay
from vramplan.sources import records

cli = test_cli.cli  # fixture


class Merger:
    """Stands in for the process."""

    spec: MergeSpec | None = None
    outcome = Outcome(exit_code=0, ended="finished", message="1 of 2 tensors merged")

    def __call__(self, spec: MergeSpec, on_event: Callable[[dict[str, Any]], None]) -> Outcome:
        self.spec = spec
        on_event({"event": "start", "tensors": 2, "merged": 1, "total_bytes": 2**30})
        return self.outcome


@pytest.fixture
def merger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Merger:
    stand_in = Merger()
    monkeypatch.setattr(merging, "merge", stand_in)
    monkeypatch.setattr("vramplan.cli.runner.EXTRA_MODULES", ("json",))
    monkeypatch.chdir(tmp_path)
    return stand_in


def make_run(folder: Path, base: str | None = "org/base", **run: Any) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    if run:
        records.write_json(folder / "run.json", RunSpec(**{"model": "org/base", **run}))
    return folder


def test_a_run_folder_says_everything(cli: Cli, merger: Merger, tmp_path: Path) -> None:
    make_run(tmp_path / "run", model="llama-2-7b", model_path="meta-llama/Llama-2-7b-hf", double_quant=False)
    result = cli("merge", "run", "-o", "out")
    assert result.code == 0 and result.out == "Done: 1 of 2 tensors merged\n"
    assert "merge: 1 of 2 tensors change, 1.00 GiB to write" in result.err
    assert merger.spec == MergeSpec(
        adapter="run/adapter",
        base="org/base",
        base_name="meta-llama/Llama-2-7b-hf",
        output=str(tmp_path / "out"),
        double_quant=False,
    )
    assert cli("merge", "run/adapter", "-o", "out").code == 0  # the adapter alone finds its run
    assert merger.spec.double_quant is False


def test_every_flag(cli: Cli, merger: Merger, tmp_path: Path) -> None:
    make_run(tmp_path / "plain")
    (tmp_path / "my base").mkdir()
    flags = ["--onto", "nf4", "--no-double-quant", "--dtype", "float16", "--max-shard-size", "500MiB", "--json"]
    result = cli("merge", "plain/adapter", "-o", "out", "--base", "my base", *flags)
    assert json.loads(result.out) == {
        "schema_version": 1,
        "output": str(tmp_path / "out"),
        "ended": "finished",
        "exit_code": 0,
        "message": "1 of 2 tensors merged",
    }
    assert merger.spec == MergeSpec(
        adapter="plain/adapter",
        base=str(tmp_path / "my base"),
        base_name="my-base",
        output=str(tmp_path / "out"),
        dtype="float16",
        max_shard_bytes=500 * 2**20,
        onto="nf4",
        double_quant=False,
    )


@pytest.mark.parametrize(
    ("named", "base", "name"),
    [
        ("llama-2-7b", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("org/other", "org/other", "org/other"),
        (None, "org/base", "org/base"),
    ],
)
def test_the_base(cli: Cli, merger: Merger, tmp_path: Path, named: str | None, base: str, name: str) -> None:
    make_run(tmp_path / "plain")
    words = [] if named is None else ["--model_name_or_path", named]
    assert cli("merge", "plain", "-o", "out", *words).code == 0
    assert merger.spec is not None and (merger.spec.base, merger.spec.base_name) == (base, name)


def test_a_gguf_run_merges_into_what_it_unpacked(cli: Cli, merger: Merger, tmp_path: Path) -> None:
    make_run(tmp_path / "run", "/moved/run/model", model_path="/home/me/some.Q8_0.gguf")
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    assert cli("merge", "run", "-o", "out").code == 0
    assert merger.spec is not None
    assert (merger.spec.base, merger.spec.base_name) == ("run/model", "some.Q8_0.gguf")


def test_what_is_refused(cli: Cli, merger: Merger, tmp_path: Path) -> None:
    make_run(tmp_path / "run", model="tiny", random_weights=True)
    make_run(tmp_path / "nameless", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for words, sentence in {
        ("nowhere", "-o", "out"): "nowhere is neither a run folder with an adapter nor an adapter",
        ("run", "-o", "out"): "was trained on random weights",
        ("nameless", "-o", "out"): "names no base model (name it with --base)",
        ("nameless", "-o", "full", "--base", "a/b"): "-o full exists already",
        ("nameless", "-o", "no/where", "--base", "a/b"): "-o no/where: there is no folder",
        ("nameless",): "Missing option '-o'",
        ("nameless", "-o", "out", "--max-shard-size", "much"): "--max-shard-size must be a size such as 5GB",
        ("nameless", "-o", "out", "--max-shard-size", "0"): "--max-shard-size must be a size such as 5GB",
        ("nameless", "-o", "out", "--dtype", "int8"): "--dtype",
    }.items():
        result = cli("merge", *words)
        assert result.code == 2 and sentence in result.error, result
    assert merger.spec is None


@pytest.mark.parametrize(("code", "ended"), [(1, "error"), (2, "error"), (130, "interrupted")])
def test_how_it_ends_is_passed_on(cli: Cli, merger: Merger, tmp_path: Path, code: int, ended: str) -> None:
    make_run(tmp_path / "plain")
    merger.outcome = Outcome(exit_code=code, ended=ended, message="what happened", hint="what to do")
    result = cli("merge", "plain", "-o", "out", "--json")
    assert result.code == code and result.error == "error: what happened (what to do)"
    assert json.loads(result.out)["output"] is None


EVENTS: list[dict[str, Any]] = [
    {"event": "phase", "message": "fetching org/base from the Hub, unless it is in the cache"},
    {"event": "start", "tensors": 291, "merged": 224, "total_bytes": 13_476_839_424},
    {"event": "tensor", "name": "a", "done_bytes": 0, "total_bytes": 13_476_839_424, "eta_s": None},
    {"event": "tensor", "name": "b", "done_bytes": 6 * 2**30, "total_bytes": 13_476_839_424, "eta_s": 83.2},
    {"event": "unknown"},
]


def test_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    now = iter((0.0, 1.0, 30.0, 31.0))
    monkeypatch.setattr("vramplan.report.merge.time.monotonic", lambda: next(now))
    with PlainDisplay(stream) as display:
        for event in EVENTS:
            display.on_event(event)
    assert stream.getvalue() == (
        "merge: fetching org/base from the Hub, unless it is in the cache\n"
        "merge: 224 of 291 tensors change, 12.55 GiB to write\n"
        "6.00 GiB of 12.55 GiB, 0:01:23 left\n"
    )


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_fits_the_screen(width: int) -> None:
    stream = io.StringIO()
    screen = Console(file=stream, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    with LiveDisplay(screen) as display:
        for event in EVENTS:
            display.on_event(event)
        display.progress.refresh()
    text = stream.getvalue()
    assert "6.00 GiB of 12.55 GiB, 0:01:23 left" in text
    assert "━" in text
    assert max(len(line) for line in text.replace("\r", "\n").splitlines() if "\x1b" not in line) <= width
