"""A card that is not there, and children that are played: for the tests of `fit --probe` and `calibrate`.

The state of the card is a JSON file, so that a child can change it while it runs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import make_gpu

from vramplan.core.types import GpuProfile, MeasuredPhase, Measurement
from vramplan.core.units import GIB, MIB
from vramplan.launch import child, tenants
from vramplan.sources import gpu, records

CARD = make_gpu("rtx-3060-12gb", 12288 * MIB, 11910 * MIB, compute_capability=(8, 6), driver="580.95.05")
QUIET: dict[str, Any] = {"used": 200 * MIB, "sizes": {"77": 150 * MIB}, "busy": 0}


class FakeNvml:
    """`sources.gpu.Nvml` on one card, whose state is in a file."""

    def __init__(self, state: Path, card: GpuProfile) -> None:
        self.state, self.card = state, card

    def __enter__(self) -> FakeNvml:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def _now(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.state.read_text())
        return found

    def count(self) -> int:
        return 1

    def gpu(self, index: int) -> GpuProfile:
        assert index == 0
        return self.card

    def used_bytes(self, index: int) -> int | None:
        used: int | None = self._now()["used"]
        return used

    def sizes(self, index: int) -> dict[int, int | None]:
        return {int(pid): size for pid, size in self._now()["sizes"].items()}

    def busy_percent(self, index: int) -> int | None:
        busy: int | None = self._now()["busy"]
        return busy

    def process_bytes(self, index: int, pid: int) -> int | None:
        return self.sizes(index).get(pid)

    def process_name(self, pid: int) -> str | None:
        return f"program-{pid}" if pid < 1000 else None


# What every played child starts with. `say` appends an event, `card` changes the state of the card, `finish` writes
# what a child does that has measured something: sizes in MiB. `turn` counts the children from 0.
HEAD = """
import json, os, sys, time
from pathlib import Path
folder, place = sys.argv[1], Path({place!r})
assert sys.argv[2:] == ["--probe"], sys.argv
turn = len(list(place.glob("run*.json")))
run = json.loads(Path(folder, "run.json").read_text())
Path(place, f"run{{turn}}.json").write_text(json.dumps(run))
Path(place, f"config{{turn}}.json").write_text(Path(folder, "model", "config.json").read_text())
Path(place, f"env{{turn}}.json").write_text(json.dumps(dict(os.environ)))
Path(place, f"folder{{turn}}").write_text(folder)
state = Path({state!r})
MIB = 2**20
def card(**changes):
    new = {{**json.loads(state.read_text()), **changes}}
    state.with_suffix(".new").write_text(json.dumps(new))
    state.with_suffix(".new").replace(state)
def say(event, **fields):
    with open(folder + "/progress.jsonl", "a") as file:
        file.write(json.dumps({{"t": time.time(), "event": event, **fields}}) + "\\n")
def end(ended, code, message):
    say("end", ended=ended, exit_code=code, message=message, hint="")
    sys.exit(code)
def write(ended, allocated, reserved, process, tokens_per_s):
    record = json.loads({line!r})
    sizes = {{"allocated_bytes": allocated * MIB, "peak_bytes": allocated * MIB, "reserved_bytes": reserved * MIB,
             "process_bytes": process if process is None else process * MIB}}
    record["phases"] = [{{"name": name, **sizes}} for name in ("evaluation", "step")] if ended == "finished" else []
    record.update(ended=ended, tokens_per_s=tokens_per_s)
    with open(folder + "/measurement.jsonl", "a") as file:
        file.write(json.dumps(record) + "\\n")
def finish(allocated=7000, reserved=7200, process=7600, tokens_per_s=1000.0):
    say("start", total_steps=10, effective_batch_size=1, examples=1)
    say("held", reserved_bytes=reserved * MIB)
    time.sleep(0.4)
    write("finished", allocated, reserved, process, tokens_per_s)
    end("finished", 0, "10 steps measured")
def oom():
    write("oom", 0, 0, None, 0.0)
    end("oom", 4, "CUDA out of memory. Tried to allocate 2.00 GiB")
"""
VERSIONS = {"torch": "2.11.0", "transformers": "5.17.0", "peft": "0.21.0", "bitsandbytes": "0.50.2"}
MEASURED = Measurement(
    device="cuda",
    device_name=CARD.name,
    versions=tuple(VERSIONS.items()),
    phases=(MeasuredPhase(name="step", peak_bytes=GIB),),
    trainable_parameters=1,
    steps=10,
    tokens=1000,
    tokens_per_s=1000.0,
    ended="finished",
)


class Bench:
    """A card and the children that run on it."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.patch, self.card = tmp_path, monkeypatch, CARD
        self.state = tmp_path / "card.json"
        self.set(**QUIET)
        monkeypatch.setattr(gpu, "Nvml", lambda: FakeNvml(self.state, self.card))
        monkeypatch.setattr(gpu, "live_gpu", lambda index: self.card)
        monkeypatch.setattr(child, "_LIBRARIES", ("json",))
        monkeypatch.setattr("vramplan.cli.runner.EXTRA_MODULES", ("json",))
        monkeypatch.setattr(child, "_SAMPLE_S", 0.05)
        monkeypatch.setattr(tenants, "PAUSE_S", 0.01)
        monkeypatch.setattr(tenants, "LIMIT_S", 0.3)
        monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path / "cache"))

    def set(self, **state: Any) -> None:
        self.state.write_text(json.dumps({**QUIET, **state}))

    def children(self, script: str) -> None:
        """Every child from now on plays this."""
        line = json.dumps(records.encode(MEASURED))
        head = HEAD.format(place=str(self.place), state=str(self.state), line=line)
        command = [sys.executable, "-c", head + script]
        self.patch.setattr(child, "_command", lambda folder, resume: [*command, str(folder)])

    def played(self, turn: int, what: str = "run") -> Any:
        """run.json, config.json or the environment of a child."""
        return json.loads((self.place / f"{what}{turn}.json").read_text())

    def count(self) -> int:
        return len(list(self.place.glob("run*.json")))

    def usable(self, usable_bytes: int) -> None:
        self.card = replace(self.card, usable_bytes=usable_bytes)
