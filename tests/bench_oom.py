"""Runs that go out of memory on a CUDA card, diagnosed, and played again with the first fix:
python tests/bench_oom.py --write FILE [--only NAME...] [--until SECONDS]

Each case of `oom_cases.py` is provoked in a process of its own, with random weights, under a cap of
`set_per_process_memory_fraction` that lies between what the run needs without its cause and what it takes with it. Its
log is read as `vramplan diagnose LOG --model ... --gpu live` reads it. Then the first fix is played under the same cap:
`Fix.run` as `vramplan train` builds it, or, where the cause lies outside the run, the script changed as the cause says.
Rows go to FILE as JSON lines; cases that are there already are not played again, but for errors. Ends with a table.

The parent imports all libraries and forks: it must never touch the card itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from oom_cases import Case, Job, Sides, cases, sides
from oom_processes import Row, fork, held, import_all, played, wait

from vramplan.cli.diagnose import diagnosed
from vramplan.core.fixes import command
from vramplan.core.types import Diagnosis, GpuProfile, RunSpec
from vramplan.core.units import MIB
from vramplan.sources.gpu import live_gpu
from vramplan.sources.oom_text import read_evidence
from vramplan.sources.profiles import load_gpu

TAIL_BYTES = 6000
FRAGMENTED = (0.15, 0.06, 0.02)  # caps to try, from what lives at once to what was reserved
SCRIPT_CHANGES = {  # cause -> what it says in words, and the twist that is left of the script
    "evaluation": ("evaluated in batches as large as those of the training, for the loss alone",
                   lambda case: {"eval_batch": case.run.micro_batch_size}),
    "saving": ("the adapter saved, nothing merged on the card", lambda case: {}),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ one case
@dataclass
class Provoked:
    """A case that was played with its cause."""

    case: Case
    row: Row
    cap_bytes: int | None
    log: Path


def provoke(case: Case, between: Sides, gpu: GpuProfile, root: Path) -> Provoked:
    """Play the case under its cap; without one first, where only that tells what it takes."""
    job = Job(case.run, case.script, root / "provoked", None, case.twist)
    if case.twist.get("twice") or "dtype" in case.twist:
        wait(fork(lambda: _zeros(Path(case.run.model))))
    row: Row = {"low_bytes": between.low_bytes, "high_bytes": between.high_bytes}
    if case.measured:
        free = played(job)
        row["uncapped"] = {
            name: free.get(name) for name in ("ended", "peak_bytes", "reserved_bytes", "seconds", "tail")
        }
        if free["ended"] != "ok":
            return Provoked(case, row | {"ended": "error", "tail": free.get("tail")}, None, job.folder / "log.txt")
        if case.rule == "fragmented":
            return fragment(case, row, free, job)
        between = Sides(between.low_bytes, free["peak_bytes"])
    if case.rule == "no_cap":
        return Provoked(case, row | played(job), None, job.folder / "log.txt")
    if not between.apart:
        return Provoked(case, row | {"ended": "no case"}, None, job.folder / "log.txt")
    cap = between.cap(case.share)
    if case.rule == "holder":
        with held(cap, gpu):
            return Provoked(case, row | played(job) | {"left_bytes": cap}, None, job.folder / "log.txt")
    return Provoked(case, row | played(replace(job, cap_bytes=cap)), cap, job.folder / "log.txt")


def fragment(case: Case, row: Row, free: Row, job: Job) -> Provoked:
    """The highest cap of a few under which the allocator's pieces are too small."""
    lives, reserved = free["peak_bytes"], free["reserved_bytes"]
    for part in FRAGMENTED:
        cap = int(max(lives * 1.01, lives + part * (reserved - lives))) // MIB * MIB
        tried = played(replace(job, cap_bytes=cap))
        if tried["ended"] != "ok":
            break
    return Provoked(case, row | tried, cap, job.folder / "log.txt")


def _zeros(folder: Path) -> int:
    import oom_child

    oom_child.checkpoint_of_zeros(folder)
    return 0


def diagnosis_of(log: Path, run: RunSpec, gpu: GpuProfile) -> Diagnosis | None:
    """As `vramplan diagnose LOG --gpu live` with the run's flags."""
    evidence = read_evidence(log)
    return None if evidence is None else diagnosed(evidence, run, gpu)


def remedy(case: Case, found: Diagnosis, cap: int | None, gpu: GpuProfile, folder: Path) -> tuple[str, Job | None]:
    """What the diagnosis says to do, and the process that does it; None: nothing that could be done."""
    first = found.cause_keys[0]
    fix = found.fixes[0] if found.fixes else None
    if first not in case.expected and case.twist:
        return "nothing: what the script does beside the run was not found", None
    if first in SCRIPT_CHANGES and case.twist:
        words, left = SCRIPT_CHANGES[first]
        return words, Job(case.run, case.script, folder, cap, left(case))
    if first == "too_large" and (fix is None or not fix.fits):
        need = (found.predicted_bytes or 0) - gpu.context_bytes
        return f"a card on which PyTorch may have {need} bytes", Job(case.run, case.script, folder, need)
    if fix is None:
        return "nothing: no fix is offered", None
    scripted = "lengths" in case.twist and fix.run.levers.loss == "full" and fix.run.levers.kernels == "stock"
    if scripted:
        return fix.title, Job(fix.run, case.script, folder, cap, case.twist)
    return fix.title, Job(steps_for(fix.run), "vramplan", folder, cap)


def steps_for(run: RunSpec) -> RunSpec:
    """Three steps; two where one is many micro-steps."""
    return replace(run, schedule=replace(run.schedule, max_steps=2 if run.accumulation > 4 else 3))


def placeless(text: str, root: Path) -> str:
    """Without the folders of this machine: rows are kept where others read them."""
    for folder in sorted({str(root), *sys.path, str(Path.cwd())} - {""}, key=len, reverse=True):
        text = text.replace(f"{folder.rstrip('/')}/", "")
    return text


def told(found: Diagnosis | None) -> Row | None:
    if found is None:
        return None
    fixes = [{"title": f.title, "command": f.command, "fits": f.fits, "device_bytes": f.device_bytes,
              "changes_training": f.changes_training} for f in found.fixes[:4]]  # fmt: skip
    return {"cause_keys": found.cause_keys, "causes": found.causes, "fixes": fixes, "budget_bytes": found.budget_bytes,
            "predicted_bytes": found.predicted_bytes}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the summary
def counted(row: Row) -> bool:
    return bool(row["ended"] == "oom" and row["diagnosis"])


def summary(rows: list[Row]) -> str:
    """Per cause: cases, cause right, fix passes; what is wrong, by name."""
    lines = [f"{'cause':20} {'n':>3} {'cause right':>12} {'fix passes':>11}"]
    rows = list({row["name"]: row for row in rows}.values())  # the last of each
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["cause"], []).append(row)
    for cause, group in [*groups.items(), ("all", rows)]:
        played_rows = [row for row in group if counted(row)]
        n = len(played_rows)
        share = [sum(bool(row[key]) for row in played_rows) for key in ("right", "passes")]
        text = [f"{number} ({number / n:.0%})" if n else "-" for number in share]
        lines.append(f"{cause:20} {n:3} {text[0]:>12} {text[1]:>11}")
    for row in rows:
        if not counted(row):
            lines.append(f"not counted: {row['name']}: {row['ended']} {(row.get('tail') or '').strip()[-120:]!r}")
        elif not row["right"]:
            lines.append(f"wrong cause: {row['name']}: {row['diagnosis']['cause_keys'][0]}, not {row['expected']}")
        if counted(row) and not row["passes"]:
            lines.append(f"no pass: {row['name']}: {row['applied']}: {(row['rerun'] or {}).get('ended')}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- main
class Bench:
    def __init__(self, options: argparse.Namespace, gpu: GpuProfile, pool: ProcessPoolExecutor, root: Path) -> None:
        self.options, self.gpu, self.pool, self.root = options, gpu, pool, root
        self.waiting: list[tuple[Provoked, Future[Diagnosis | None] | None, float]] = []
        names = ("torch", "transformers", "bitsandbytes", "peft", "accelerate")
        self.about = {"gpu": gpu.name, "driver": gpu.driver, "versions": {name: version(name) for name in names}}

    def run(self, wanted: list[Case]) -> None:
        begun = time.monotonic()
        placed = [case.placed(self.root) for case in wanted]
        caps = {case.name: self.pool.submit(sides, case, self.gpu) for case in placed}
        for number, case in enumerate(placed):
            if time.monotonic() - begun > self.options.until:
                print(f"{len(placed) - number} cases are left for another time", flush=True)
                break
            self.begin(case, caps[case.name].result(), self.root / "logs" / str(number))
            while len(self.waiting) > 2 or (self.waiting and self.ready()):
                self.finish()
        while self.waiting:
            self.finish()

    def ready(self) -> bool:
        future = self.waiting[0][1]
        return future is None or future.done()

    def begin(self, case: Case, between: Sides, kept: Path) -> None:
        start = time.monotonic()
        try:
            one = provoke(case, between, self.gpu, self.root)
        except (OSError, RuntimeError) as error:  # the other process could not fill the card
            one = Provoked(case, {"ended": "error", "tail": str(error)}, None, kept)
        kept.parent.mkdir(exist_ok=True)
        if one.log.is_file():
            one.log = Path(shutil.copy(one.log, kept))
        went = one.row["ended"] == "oom"
        future = self.pool.submit(diagnosis_of, one.log, case.run, self.gpu) if went else None
        self.waiting.append((one, future, time.monotonic() - start))

    def finish(self) -> None:
        one, future, seconds = self.waiting.pop(0)
        case, start = one.case, time.monotonic()
        found = future.result() if future else None
        row: Row = {"name": case.name, "cause": case.cause, "expected": case.expected, "script": case.script,
                    "twist": case.twist, "run": command(case.run), **one.row, "diagnosis": told(found), "right": False,
                    "passes": False, "applied": None, "rerun": None}  # fmt: skip
        if one.row["ended"] == "oom":
            row["evidence"] = one.log.read_bytes()[-TAIL_BYTES:].decode(errors="replace")
        if found is not None:
            row["right"] = found.cause_keys[0] in case.expected
            row["applied"], job = remedy(case, found, one.cap_bytes, self.gpu, self.root / "again")
            if job is not None:
                left = one.row.get("left_bytes")
                freed = left is None or (found.cause_keys[0] == "other_process" and "freed" in row["applied"])
                if freed:
                    row["rerun"] = played(job)
                else:
                    with held(left, self.gpu):
                        row["rerun"] = played(job)
                row["passes"] = row["rerun"]["ended"] == "ok"
        row["wall_s"] = round(seconds + time.monotonic() - start, 2)
        with self.options.write.open("a") as file:
            file.write(placeless(json.dumps(row | self.about), self.root) + "\n")
        key = row["diagnosis"]["cause_keys"][0] if row["diagnosis"] else "-"
        words = (f"{row['wall_s']:5.1f} s", f"{case.name:34}", row["ended"], key, "right" if row["right"] else "WRONG")
        print(*words, "|", row["applied"], "->", (row["rerun"] or {}).get("ended"), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases whose name begins like this")
    parser.add_argument("--until", type=float, default=1e9, help="no case is begun after so many seconds")
    parser.add_argument("--gpu", help="a stored card instead of the live one, for --list")
    parser.add_argument("--list", action="store_true", help="cases and caps; plays nothing")
    options = parser.parse_args()
    if options.write is None and not options.list:
        parser.error("--write FILE says where the rows go")
    return options


def rows_in(path: Path | None) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def finished(rows: list[Row]) -> set[str]:
    """What is not played again: an error is."""
    return {row["name"] for row in rows if row["ended"] != "error"}


def chosen(only: list[str], done: set[str]) -> list[Case]:
    return [case for case in cases() if case.name not in done and (not only or case.name.startswith(tuple(only)))]


def main() -> None:
    options = arguments()
    warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)  # the pool's threads hold nothing of ours
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several cards Trainer would use all
    wanted = chosen(options.only, finished(rows_in(options.write)))
    pool = ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork"))
    gpu = load_gpu(options.gpu) if options.gpu else pool.submit(live_gpu, 0).result()
    if options.list:
        for case, found in zip(wanted, pool.map(sides, wanted, [gpu] * len(wanted)), strict=True):
            high = f"{found.high_bytes / 2**30:6.2f}" if found.high_bytes else "     -"
            print(f"{case.name:34} {found.low_bytes / 2**30:6.2f} {high} GiB {case.expected}")
        return
    import_all(gpu)
    gc.collect()
    gc.freeze()  # a child's collector shall not touch, and so copy, what the parent has
    with tempfile.TemporaryDirectory(prefix="bench-oom-") as root:
        Bench(options, gpu, pool, Path(root)).run(wanted)
    print(summary(rows_in(options.write)))


if __name__ == "__main__":
    main()
