"""`vramplan watch`: a run as its records have it, while somebody else writes them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import make_ledger, make_plan
from golden_tools import check_golden
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vramplan.core.types import Ledger
from vramplan.core.units import GIB, MIB
from vramplan.launch import attaching
from vramplan.report.sparkline import SPARKS, sparkline
from vramplan.report.tables import console
from vramplan.report.watch import Watched, view
from vramplan.report.watching import LiveScreen
from vramplan.sources.records import write_json

Call = Callable[..., tuple[int, str, str]]
START = {"event": "start", "total_steps": 60, "effective_batch_size": 16, "examples": 400, "resumed_from": 0}
END = {"event": "end", "ended": "finished", "exit_code": 0, "message": "60 steps, adapter in x", "hint": ""}


def step(number: int, **changes: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": 3.0 / number, "tokens_per_s": 3201.4, "peak_bytes": 5 * GIB,
            "reserved_bytes": 6 * GIB, "eta_s": 80.0, **changes}  # fmt: skip


def put(folder: Path, *events: dict[str, Any]) -> None:
    with (folder / "progress.jsonl").open("a") as file:
        for event in events:
            file.write(json.dumps({"t": time.time(), **event}) + "\n")


def watched(*events: dict[str, Any], ledger: Ledger | None = None) -> Watched:
    found = Watched("runs/first", ledger or make_ledger(), 3400)
    found.add(events)
    return found


def draw(found: Watched) -> Callable[..., None]:
    def show(stream: Any, width: int) -> None:
        screen = console(stream, width)
        screen.print(view(screen, found))

    return show


def test_golden() -> None:
    oom = {"event": "oom", "step": 12, "action": "split", "where": "backward", "rows": 4, "tokens": 4096,
           "micro_batch_size": 2, "requested_bytes": 2 * GIB}  # fmt: skip
    evaluated = {"event": "eval", "step": 10, "loss": 2.5}
    check_golden("watch", draw(watched(START, *(step(n) for n in range(1, 13)), evaluated, oom)))
    check_golden("watch_done", draw(watched(START, step(1), step(60), END)))
    check_golden("watch_start", draw(watched({"event": "phase", "name": "load", "message": "4-bit weights"})))


def test_the_highest_peak_and_the_newest_speed_count() -> None:
    found = watched(START, step(1, peak_bytes=7 * GIB), step(2, tokens_per_s=10.0))
    assert (found.peak, found.speed, found.step, found.losses) == (7 * GIB, 10.0, 2, [3.0, 1.5])
    assert found.state()["running"] and found.state()["predicted_peak_bytes"] == make_ledger().peak.allocated_bytes


def test_a_run_that_was_resumed_goes_on() -> None:
    found = watched(START, step(3), {**END, "ended": "interrupted"}, {"event": "phase", "name": "load"},
                    {**START, "resumed_from": 3})  # fmt: skip
    assert not found.is_over and found.step == 3
    assert found.headline().startswith("Running: step 3 of 60")


FIELDS = ("event", "step", "loss", "total_steps", "peak_bytes", "eta_s", "message", "ended", "resumed_from")
KINDS = st.sampled_from(["step", "start", "eval", "end", "phase", "oom", "warning", "health", "restart"])
ANYTHING = KINDS | st.none() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.integers(), max_size=1)


@given(st.lists(st.dictionaries(st.sampled_from(FIELDS), ANYTHING), max_size=9))
def test_whatever_the_other_process_writes_it_is_drawn(events: list[dict[str, Any]]) -> None:
    found = Watched("r", None)
    found.add(events)
    draw(found)(io.StringIO(), 80)
    json.dumps(found.state(), allow_nan=False)


@given(st.lists(st.floats(0, 20), min_size=1, max_size=300), st.integers(1, 40))
def test_a_sparkline_is_no_wider_and_has_its_ends(values: list[float], cells: int) -> None:
    line = sparkline(values, cells)
    assert len(line) == min(cells, len(values)) and set(line) <= set(SPARKS)


def test_a_sparkline_goes_as_the_values_do() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == SPARKS[::-1]
    assert sparkline([1, 1, 3, 3], 2) == "▁█"
    assert sparkline([2, 2], 9) == "▁▁"


# --------------------------------------------------------------------------------------------------- the command
def test_an_ended_run_is_shown_and_its_exit_code_is_that_of_the_run(cli: Call, tmp_path: Path) -> None:
    plan = make_plan()
    write_json(tmp_path / "prediction.json", plan.ledger)
    write_json(tmp_path / "plan.json", plan)
    put(tmp_path, START, step(60), END)
    code, out, err = cli("watch", tmp_path)
    assert (code, err) == (0, "") and out.startswith("Done: 60 steps") and out.count("Done:") == 1
    assert "~3,400" in out
    put(tmp_path, {**END, "ended": "oom", "exit_code": 4, "message": "CUDA out of memory."})
    assert cli("watch", tmp_path)[0] == 4


def test_it_follows_to_the_end(cli: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attaching, "LOOK_S", 0.01)
    (tmp_path / "lock").write_text(f"{os.getpid()}\n")
    put(tmp_path, START, step(1))

    def work() -> None:
        for event in (step(2, loss=9.5), {"event": "warning", "message": "something"}, step(60), END):
            time.sleep(0.05)
            put(tmp_path, event)

    thread = threading.Thread(target=work)
    thread.start()
    code, out, _ = cli("watch", tmp_path)
    thread.join()
    assert code == 0
    order = ["Running: step 1 of 60", "2/60  loss 9.500", "warning: something", "60/60", "Done: 60 steps"]
    places = [out.index(text) for text in order]
    assert places == sorted(places)


def test_a_run_that_is_gone_without_a_word_ends_the_watch(cli: Call, tmp_path: Path) -> None:
    put(tmp_path, START, step(5))
    code, out, _ = cli("watch", tmp_path)
    assert code == 1 and "Ended without a word: step 5 of 60" in out


def test_a_process_on_another_machine_counts_while_it_writes(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (tmp_path / "lock").write_text(f"{child.pid}\n")
    put(tmp_path, START)
    assert attaching.is_running(tmp_path)
    os.utime(tmp_path / "progress.jsonl", (1, 1))
    assert not attaching.is_running(tmp_path)
    (tmp_path / "lock").unlink()
    assert attaching.is_running(tmp_path, os.getpid()) and not attaching.is_running(tmp_path)


def test_once_and_json_do_not_wait(cli: Call, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(f"{os.getpid()}\n")
    write_json(tmp_path / "prediction.json", replace(make_ledger()))
    put(tmp_path, START, step(6))
    code, out, _ = cli("watch", tmp_path, "--once")
    assert code == 0 and out.startswith("Running: step 6 of 60, 0:01:20 left.")
    state = json.loads(cli("watch", tmp_path, "--json")[1])
    assert (state["running"], state["step"], state["loss"], state["peak_bytes"]) == (True, 6, 0.5, 5 * GIB)


def default_sigint() -> None:
    """Who starts the tests in the background may have had it ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_leaves_the_run_alone(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / "lock").write_text(f"{other.pid}\n")
        put(tmp_path, START, step(1))
        before = sorted(path.name for path in tmp_path.iterdir())
        watch = subprocess.Popen([sys.executable, "-m", "vramplan", "watch", str(tmp_path)], stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True, preexec_fn=default_sigint)  # fmt: skip
        assert watch.stdout is not None
        watch.stdout.readline()
        watch.send_signal(signal.SIGINT)
        _, err = watch.communicate(timeout=20)
        assert watch.returncode == 130 and "the run goes on" in err and "Traceback" not in err
        assert other.poll() is None
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    finally:
        other.kill()
        other.wait()


def test_a_terminal_gets_one_table_that_is_drawn_again() -> None:
    stream = io.StringIO()
    screen = Console(file=stream, force_terminal=True, width=80, color_system=None, markup=False)
    found = watched(START, step(1))
    with LiveScreen(screen, found) as live:
        found.add([step(2)])
        live.show([])
        found.add([END])
    text = stream.getvalue()
    assert "step 2 of 60" in text and "\x1b[1A" in text
    assert "Running" not in text[text.index("Done:") :]  # what stays is the end


@pytest.mark.parametrize(("name", "wanted"), [("runs/frist", "did you mean first?"), ("runs", "holds no run")])
def test_what_is_no_run_folder(name: str, wanted: str, cli: Call, tmp_path: Path) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    code, out, err = cli("watch", tmp_path / name)
    assert (code, out) == (2, "") and wanted in err


def test_a_prediction_that_cannot_be_read_is_left_aside(cli: Call, tmp_path: Path) -> None:
    (tmp_path / "prediction.json").write_text("{")
    put(tmp_path, START, step(60, peak_bytes=3 * MIB), END)
    code, out, err = cli("watch", tmp_path)
    assert code == 0 and "watched without a prediction" in err and "3.0 MiB" in out
