"""One training child from start to end: its environment, its events, its signals, its memory on the card."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.core.types import Measurement, RunSpec
from vramplan.errors import MissingExtra, VramplanError
from vramplan.launch.ending import Outcome, died, died_silently, log_tail, said
from vramplan.launch.folder import LAUNCHER, Lock
from vramplan.launch.ranks import Ranks, smaller_micro_batch
from vramplan.launch.torchrun import torchrun_words
from vramplan.launch.watching import Card, Tail, size_of
from vramplan.sources import records

if TYPE_CHECKING:
    import subprocess

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
_POLL_S, _SAMPLE_S, _LAST_WORDS_S = 0.1, 1.0, 30.0

OnEvent = Callable[[dict[str, Any]], None]
OnSample = Callable[[int], None]


def launch(
    run_dir: Path,
    *,
    resume: bool = False,
    measure: bool = False,
    probe: bool = False,
    data_only: bool = False,
    environment: Mapping[str, str] | None = None,
    on_event: OnEvent = lambda event: None,
    on_sample: OnSample = lambda pid: None,
) -> Outcome:
    """Run the child in a folder that `prepare_run_dir` made; returns when it has ended, however it did.

    With `measure` it plays a few steps on random tokens and saves nothing (`train/measure.py`), with `probe` it plays
    the worst batch and an evaluation (`train/probe.py`), with `data_only` it reads the data and loads no model.
    `environment` is added to the child's. `on_event` gets each event of `progress.jsonl` as it appears, `on_sample` the
    child's pid, about once a second. The first Ctrl-C (or SIGTERM) lets the child save its
    state, the second ends it. MissingExtra if the training libraries are not installed, InputError if the folder is
    in use or holds no run.
    """
    _require_libraries()
    run_dir = run_dir.absolute()
    run = records.read_json(run_dir / "run.json", RunSpec)
    if run.gpus > 1 and not data_only:
        return _launch_several(run, run_dir, resume, on_event)
    modes = {"--measure": measure, "--probe": probe, "--data-only": data_only}
    command = [*_command(run_dir, resume), *(flag for flag, wanted in modes.items() if wanted)]
    outer = {**os.environ, **(environment or {})}
    with Lock(run_dir) as lock:
        return _Watch(run_dir, on_event, lock, on_sample=on_sample).run(command, _environment(run, outer), resume)


def _launch_several(run: RunSpec, run_dir: Path, resume: bool, on_event: OnEvent) -> Outcome:
    """One process per GPU, under torchrun.

    A rank that runs out of memory in a step while weights are sharded ends them all: then once more from the last
    checkpoint, with smaller micro-batches and the same effective batch.
    """
    with Lock(run_dir) as lock:
        watch = _Watch(run_dir, on_event, lock, run.gpus)
        outcome = watch.run(_several_command(run, run_dir, resume), _environment(run, os.environ), resume)
        in_a_step = run.parallel == "fsdp" and outcome.ended == "oom" and watch.training
        smaller = smaller_micro_batch(run) if in_a_step and not watch.stops else None
        if smaller is None:
            return outcome
        records.write_json(run_dir / "run.json", smaller)
        on_event(_restart(run_dir, smaller, outcome))
        watch = _Watch(run_dir, on_event, lock, run.gpus)
        return watch.run(_several_command(smaller, run_dir, True), _environment(run, os.environ), True)


def _several_command(run: RunSpec, run_dir: Path, resume: bool) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *torchrun_words(run, run_dir, resume=resume)]


def _restart(run_dir: Path, run: RunSpec, outcome: Outcome) -> dict[str, Any]:
    """The event that says so, also written down with the others."""
    message = (
        f"out of memory ({outcome.message}): once more from the last checkpoint, micro-batch {run.micro_batch_size} x "
        f"accumulation {run.accumulation}, the same effective batch"
    )
    batch = {"micro_batch_size": run.micro_batch_size, "accumulation": run.accumulation}
    event = {"t": round(time.time(), 3), "event": "restart", "message": message, **batch}
    with (run_dir / "progress.jsonl").open("ab") as file:
        file.write((json.dumps(event) + "\n").encode())
    return event


def _require_libraries() -> None:
    from importlib.util import find_spec

    if any(find_spec(name) is None for name in _LIBRARIES):
        raise MissingExtra("vramplan train")


def _command(run_dir: Path, resume: bool) -> list[str]:
    return [sys.executable, "-m", "vramplan.train", str(run_dir), *(["--resume"] if resume else [])]


def _environment(run: RunSpec, outer: Mapping[str, str]) -> dict[str, str]:
    """The child's environment. What the user has set stays."""
    env = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", **outer, LAUNCHER: str(os.getpid())}
    if run.gpus == 1:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # of a torchrun that we were started by
            env.pop(name, None)
    else:  # from Ctrl-C until torchrun kills: a step must end and be saved. The default is half a minute
        env.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")
    asked = "PYTORCH_CUDA_ALLOC_CONF" in outer or "PYTORCH_ALLOC_CONF" in outer
    if run.levers.allocator == "expandable" and not asked:
        env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # the name that every version of torch obeys
    return env


class _Watch:
    """What the launcher knows of its child."""

    def __init__(
        self, run_dir: Path, on_event: OnEvent, lock: Lock, gpus: int = 1, on_sample: OnSample = lambda pid: None
    ) -> None:
        self.run_dir, self.on_event, self.lock, self.gpus = run_dir, on_event, lock, gpus
        self.on_sample = on_sample
        self.child: subprocess.Popen[bytes] | None = None
        self.ranks: Ranks | None = None
        self.training = False  # the model is loaded and the first step has begun
        self.stops = 0  # signals that asked us to stop
        self.peak_bytes: int | None = None

    def run(self, command: list[str], env: dict[str, str], resume: bool) -> Outcome:
        """Start it, follow it to its end."""
        tail = Tail(self.run_dir / "progress.jsonl", from_end=resume)
        self.ranks = Ranks(self.run_dir, self.gpus, from_end=resume)
        measured = size_of(self.run_dir / "measurement.jsonl")
        with _Signals(self):
            child = self.child = _start(command, env, self.run_dir / "log.txt", resume)
            try:
                self.lock.pids.add(child.pid)
                if self.stops:  # asked while it was starting
                    _interrupt(child)
                self._follow(child, tail, self.ranks)
            except BaseException:  # the display failed: do not leave a training run behind that nobody watches
                _end(child)
                raise
        self.lock.pids.update(self.ranks.pids.values())  # rank 0 may have been killed with the lock in its name
        return self._outcome(child.returncode, self.ranks, _last_measurement(self.run_dir, measured))

    def stop(self) -> None:
        """One request to stop: the first is passed on, the next ends the child."""
        self.stops += 1
        if self.child is not None and self.child.poll() is None:
            if self.stops == 1:
                _interrupt(self.child)
            else:
                if self.ranks is not None:
                    self.ranks.kill()  # torchrun's children are in sessions of their own
                self.child.kill()

    def _follow(self, child: subprocess.Popen[bytes], tail: Tail, ranks: Ranks) -> None:
        told, next_sample = 0, 0.0
        with ExitStack() as stack:
            cards = [stack.enter_context(Card(child.pid, index)) for index in range(self.gpus)]
            while True:
                ended = child.poll() is not None  # looked at before reading, so that the last words are read
                for event in tail.read():
                    ranks.note(0, event)
                    self.training = self.training or event["event"] == "start"
                    self.on_event(event)
                for event in ranks.read():
                    self.on_event(event)
                if ended:
                    return
                if self.stops > told:
                    told = self.stops
                    text = "saving, then stopping; once more to stop at once" if told == 1 else "stopping at once"
                    self.on_event({"t": time.time(), "event": "warning", "message": text})
                if time.monotonic() >= next_sample:
                    next_sample = time.monotonic() + _SAMPLE_S
                    for card in cards:
                        card.pid = ranks.pids.get(card.index, child.pid)
                    samples = [size for card in cards if (size := card.sample()) is not None]
                    self.peak_bytes = max(samples, default=None)
                    self.on_sample(child.pid)
                time.sleep(_POLL_S)

    def _outcome(self, returncode: int, ranks: Ranks, measurement: Measurement | None) -> Outcome:
        death = ranks.silent_death() if self.gpus > 1 and not self.stops else None
        end = ranks.end()
        if death is not None and (end is None or end.get("ended") in ("error", "interrupted")):
            ended, message, hint, code = died_silently(*death)
        elif end is not None:
            ended, message, hint, code = said(end)
        else:
            ended, message, hint, code = died(returncode, self.stops, log_tail(self.run_dir / "log.txt"))
        return Outcome(
            exit_code=code,
            ended=ended,
            message=message,
            hint=hint,
            measurement=measurement,
            peak_process_bytes=self.peak_bytes,
        )


def _start(command: list[str], env: dict[str, str], log: Path, resume: bool) -> subprocess.Popen[bytes]:
    import subprocess

    # A terminal sends Ctrl-C to a whole process group; in a group of its own the child hears only what we pass on.
    group: dict[str, Any] = {"start_new_session": True}
    if os.name == "nt":
        group = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    with log.open("ab" if resume else "wb") as output:
        return subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, **group
        )


def _interrupt(child: subprocess.Popen[bytes]) -> None:
    import signal

    child.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT) if os.name == "nt" else signal.SIGINT)


def _end(child: subprocess.Popen[bytes]) -> None:
    import subprocess

    if child.poll() is not None:
        return
    _interrupt(child)
    try:
        child.wait(_LAST_WORDS_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


class _Signals:
    """SIGINT and SIGTERM become requests to stop. Only a main thread can do that; elsewhere nothing changes."""

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch
        self.old: dict[int, Any] = {}

    def __enter__(self) -> None:
        import signal
        import threading

        if threading.current_thread() is threading.main_thread():
            self.old = {number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *error: object) -> None:
        import signal

        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: object) -> None:
        self.watch.stop()


def _last_measurement(run_dir: Path, size_before: int) -> Measurement | None:
    """What this run measured; None if it did not come to that, or if what it wrote cannot be read."""
    path = run_dir / "measurement.jsonl"
    if size_of(path) <= size_before:
        return None
    try:
        measurements = records.read_jsonl(path, Measurement)
    except VramplanError:
        return None
    return measurements[-1] if measurements else None
