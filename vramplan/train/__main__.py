"""`python -m vramplan.train RUN_DIR [--resume | --measure | --probe | --data-only]`: the training child.

Reads RUN_DIR/run.json and writes progress.jsonl, measurement.jsonl, log.txt, checkpoints/ and adapter/. Exit codes:
0 finished, 1 our error, 2 bad input, 4 out of memory, 130 interrupted (state saved). torch is imported only after
run.json is read and the process environment is set: the CUDA allocator reads its settings once.

Under torchrun or `accelerate launch` each process is one rank of the run. Rank 0 writes those files; rank N writes
progress.rankN.jsonl, measurement.rankN.jsonl and log.rankN.txt. Such a launcher itself ends with 1 if any rank failed.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TextIO

from vramplan.core.types import RunSpec
from vramplan.errors import BAD_INPUT, OK, VramplanError
from vramplan.sources import records
from vramplan.train.outcome import Outcome, StopSignal, outcome_of
from vramplan.train.place import Place, check_size, place_in
from vramplan.train.progress import Lock, Progress

FLAGS = ("--resume", "--measure", "--probe", "--data-only")
USAGE = "usage: python -m vramplan.train RUN_DIR [--resume | --measure | --probe | --data-only]"


def main(arguments: list[str]) -> int:
    flags = [a for a in arguments if a in FLAGS]
    folders = [a for a in arguments if a not in FLAGS]
    if len(folders) != 1 or folders[0].startswith("-") or len(flags) > 1:
        print(USAGE, file=sys.stderr)
        return BAD_INPUT
    run_dir = Path(folders[0]).absolute()
    if not run_dir.is_dir():
        print(f"error: {run_dir} is not a folder ({USAGE})", file=sys.stderr)
        return BAD_INPUT
    try:
        place = place_in(os.environ)
        lock = Lock(run_dir) if place.main else nullcontext()
        with lock, _output_in(place.file(run_dir, "log.txt")) as console:
            code = _run(run_dir, flags, place, console)
    except (VramplanError, OSError) as error:  # the folder is in use or cannot be written: leave it alone
        return _say(outcome_of(error), sys.stderr)
    if code and place.size > 1:  # Python would wait for ranks that may never answer as it takes the group apart
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(run_dir: Path, flags: list[str], place: Place, console: TextIO) -> int:
    progress = Progress(place.file(run_dir, "progress.jsonl"))
    try:
        stop = StopSignal()
        run = records.read_json(run_dir / "run.json", RunSpec)
        if "--data-only" not in flags:
            check_size(run, place)
        if place.size > 1:
            progress("process", rank=place.rank, local_rank=place.local_rank, pid=os.getpid())
        set_environment(run)
        if "--measure" in flags:
            from vramplan.train.measure import cuda_device, measure  # imports torch, as finetune does

            message = measure(run, run_dir, cuda_device(), progress=progress, stop=stop)
        elif "--probe" in flags:
            from vramplan.train.measure import cuda_device
            from vramplan.train.probe import probe

            message = probe(run, run_dir, cuda_device(), progress=progress, stop=stop)
        elif "--data-only" in flags:
            from vramplan.train.reading import look_at_data

            message = look_at_data(run, run_dir, progress)
        else:
            from vramplan.train.finetune import finetune

            resume = "--resume" in flags
            message = finetune(run, run_dir, resume=resume, progress=progress, stop=stop, place=place)
        outcome = Outcome("finished", OK, message)
    except BaseException as error:
        outcome = outcome_of(error)
        traceback.print_exc()  # goes to log.txt
    fields = {"ended": outcome.ended, "exit_code": outcome.exit_code}
    try:
        progress("end", **fields, message=outcome.message, hint=outcome.hint)
    except OSError:  # the disk is full: the exit code and the line below still say how it ended
        traceback.print_exc()
    return _say(outcome, console, place)


def set_environment(run: RunSpec) -> None:
    """Settings that must stand before torch is imported. What the user has set himself stays."""
    if run.levers.allocator == "expandable":
        # The older name is the one that every version of torch obeys.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if run.schedule.full_determinism:  # cuBLAS reads it as it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    if run.gpus == 1:
        # One card: transformers' Trainer would otherwise multiply the batch by the number of visible ones.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    else:
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # from an accelerate config: sharding is done here (`fsdp.py`)
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # its multicast buffers cost memory, and some hosts refuse them
    # Threads that spin while they wait make a step on a CPU ten times slower as soon as anything else wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@contextmanager
def _output_in(log: Path) -> Iterator[TextIO]:
    """Sends everything that this process prints, C libraries included, to `log`; yields the console of before.

    When the launcher has already connected stdout and stderr to the log, nothing changes.
    """
    descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    if os.path.sameopenfile(descriptor, 2):
        os.close(descriptor)
        yield sys.stderr
        return
    saved = os.dup(1), os.dup(2)
    try:
        _connect(descriptor, descriptor)
        with os.fdopen(os.dup(saved[1]), "w", buffering=1) as console:
            yield console
    finally:
        _connect(*saved)
        for each in (descriptor, *saved):
            os.close(each)


def _connect(stdout: int, stderr: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)


def _say(outcome: Outcome, console: TextIO, place: Place | None = None) -> int:
    """The one line on the console. Of several ranks the main one says how it went, and any other why it did not."""
    rank = "" if place is None or place.main else f"rank {place.rank}: "
    if rank and not outcome.exit_code:
        return outcome.exit_code
    word = {"finished": "done", "interrupted": "interrupted", "oom": "out of memory"}.get(outcome.ended, "error")
    hint = f" ({outcome.hint})" if outcome.hint else ""
    print(f"{rank}{word}: {outcome.message}{hint}", file=console)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
