"""What ranks say to each other: two processes over gloo in one test; the rest needs none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from vramplan.core.parallel import BUCKET_BYTES, largest_bucket  # noqa: E402
from vramplan.core.types import RunSpec  # noqa: E402
from vramplan.errors import InputError  # noqa: E402
from vramplan.train import parallel  # noqa: E402
from vramplan.train.meter import over_ranks  # noqa: E402
from vramplan.train.outcome import Interrupted, Outcome, PeerFailed, outcome_of  # noqa: E402
from vramplan.train.parallel import World, buckets, join, sum_gradients  # noqa: E402
from vramplan.train.place import Place, check_size, place_in  # noqa: E402
from vramplan.train.progress import Lock  # noqa: E402
from vramplan.train.ranks import Share  # noqa: E402

TWO = RunSpec(model="m", gpus=2, parallel="ddp")


# ------------------------------------------------------------------------------------------------------ two ranks
def in_two_processes(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=folder.rpartition("-")[2], RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    stop = SimpleNamespace(asked=False)
    world = join(TWO, Place(rank, 2, rank), stop)
    parameters = [torch.nn.Parameter(torch.zeros(n, 3)) for n in (1, 5, 4000, 2)]
    for number, parameter in enumerate(parameters[:3]):
        parameter.grad = torch.full((parameter.shape[0], 3), float(10 * rank + number))
    if world.main:  # the other has no gradient here
        parameters[3].grad = torch.ones(3, 2).t()  # and this one lies column by column
    parallel.BUCKET_BYTES = 40_000  # the third is sent alone
    sum_gradients(parameters)
    sums = [float(p.grad[0, 0]) for p in parameters if p.grad is not None]
    assert sums == [10.0, 12.0, 14.0, 1.0]
    assert all(bool((p.grad == p.grad[0, 0]).all()) for p in parameters)

    assert world.sum(rank + 1.0, 0.5) == (3.0, 1.0)
    assert int(world.sum_items(torch.tensor(rank + 5))) == 11
    assert world.sum_items(None) is None
    assert world.gather("ab"[rank]) == ["a", "b"]
    assert world.from_main(lambda: f"of {rank}") == "of 0"

    stop.asked = rank == 1
    assert not world.agreed.asked
    world.meet()
    assert world.agreed.asked
    stop.asked = False

    outcomes = {failing: failure_of(world, rank, failing) for failing in (0, 1)}
    assert outcomes[1] == (Outcome("oom", 4, ("" if rank else "rank 1: ") + "CUDA out of memory.", HINT))
    assert outcomes[0] == (Outcome("oom", 4, ("rank 0: " if rank else "") + "CUDA out of memory.", HINT))

    def refuse() -> str:
        raise InputError("no", "do")

    with pytest.raises(PeerFailed if rank else InputError) as caught:
        world.from_main(refuse)
    assert outcome_of(caught.value) == Outcome("error", 2, "rank 0: no" if rank else "no", "do")

    (weight,) = [torch.nn.Parameter(torch.full((3,), float(rank)))]
    world.same([weight])
    assert weight.tolist() == [0.0, 0.0, 0.0]
    world.leave()
    (Path(folder) / f"done-{rank}").touch()


HINT = "ask `vramplan diagnose RUN_DIR` what would fit"


def failure_of(world: World, rank: int, failing: int) -> Outcome:
    """How a step ends on this rank in which rank `failing` runs out of memory, whoever comes first to the meeting."""

    def work() -> int:
        if rank == failing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 7

    with pytest.raises((torch.OutOfMemoryError, PeerFailed)) as caught:
        assert world.together(work) == 7
        world.sync([])
    return outcome_of(caught.value)


def test_two_ranks(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / f"at-{port}"
    folder.mkdir()
    torch.multiprocessing.spawn(in_two_processes, (str(folder),), nprocs=2)
    assert sorted(path.name for path in folder.iterdir()) == ["done-0", "done-1"]


# ------------------------------------------------------------------------------------------------------- one rank
def test_a_world_of_one_sends_nothing() -> None:
    stop = SimpleNamespace(asked=False)
    world = World(stop=stop)
    parameter = torch.nn.Parameter(torch.ones(2))
    world.sync([parameter])
    assert parameter.grad is None
    assert world.together(lambda: 3) == 3
    assert world.sum(1.0, 2.0) == (1.0, 2.0)
    assert world.sum_items(5) == 5
    assert world.from_main(lambda: 4) == 4
    assert world.gather(1) == [1]
    assert world.agreed is stop
    world.same([parameter])
    world.leave()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12 * 2**20), st.booleans()), max_size=30))
def test_buckets_are_neighbours_of_one_dtype_and_no_larger_than_planned(shapes: list[tuple[int, bool]]) -> None:
    dtypes = [torch.bfloat16 if half else torch.float32 for _, half in shapes]
    gradients = [torch.empty(n, dtype=dtype, device="meta") for (n, _), dtype in zip(shapes, dtypes, strict=True)]
    found = list(buckets(gradients))
    sizes = [sum(g.numel() * g.element_size() for g in bucket) for bucket in found]
    assert sorted(id(g) for bucket in found for g in bucket) == sorted(id(g) for g in gradients)
    assert all(len({g.dtype for g in bucket}) == 1 for bucket in found)
    assert all(size <= BUCKET_BYTES or len(bucket) == 1 for size, bucket in zip(sizes, found, strict=True))
    if len(set(dtypes)) == 1:
        planned = largest_bucket([g.numel() * g.element_size() for g in gradients])
        assert planned == max((size for size in sizes if size < BUCKET_BYTES), default=0)


@given(st.integers(1, 40), st.integers(1, 5))
def test_shares_of_a_data_set(rows: int, size: int) -> None:
    """Each row counts once, on one rank; all ranks have as many rows."""
    dataset = [{"input_ids": [1] * (n % 4 + 1), "labels": [-100] * (n % 2) + [n] * (n % 4 + 1)} for n in range(rows)]
    shares = [Share(dataset, World(Place(rank, size, rank))) for rank in range(size)]
    assert {len(share) for share in shares} == {-(-rows // size)}
    alone = Share(dataset, World())
    assert [alone[index] for index in range(rows)] == dataset
    assert sum(share.labelled() for share in shares) == alone.labelled()
    assert sum(label != -100 for share in shares for row in share for label in row["labels"]) == sum(
        label != -100 for row in dataset for label in row["labels"]
    )


# ------------------------------------------------------------------------------------------------------- the place
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Place()),
        ({"RANK": "3", "WORLD_SIZE": "8"}, Place()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(3, 8, 1)),
    ],
)
def test_where_a_process_is(environment: dict[str, str], expected: Place) -> None:
    assert place_in(environment) == expected


@pytest.mark.parametrize(
    ("rank", "size", "local"), [("8", "8", "0"), ("-1", "8", "0"), ("a", "2", "0"), ("0", "2", "2")]
)
def test_an_environment_that_cannot_be(rank: str, size: str, local: str) -> None:
    with pytest.raises(InputError, match="not that of a process of several: RANK="):
        place_in({"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local})


def test_each_rank_has_files_of_its_own(tmp_path: Path) -> None:
    assert Place().file(tmp_path, "log.txt") == tmp_path / "log.txt"
    assert Place(2, 4, 0).file(tmp_path, "progress.jsonl") == tmp_path / "progress.rank2.jsonl"


def test_as_many_processes_as_the_run_is_for() -> None:
    check_size(TWO, Place(1, 2, 1))
    with pytest.raises(InputError, match="for 2 GPUs, but 1 process was started") as caught:
        check_size(TWO, Place())
    assert "--nproc-per-node 2" in caught.value.hint
    with pytest.raises(InputError, match="for 1 GPU, but 4 processes were started"):
        check_size(RunSpec(model="m"), Place(0, 4, 0))


def test_a_rank_beyond_the_cards_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="no GPU for process 1 of this machine: torch sees 1"):
        join(TWO, Place(1, 2, 1))


def test_the_lock_of_the_launcher_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:  # neither us nor a parent
        (tmp_path / "lock").write_text(f"{other.pid}\n")
        with pytest.raises(InputError, match=f"in use by process {other.pid}"), Lock(tmp_path):
            pass
        monkeypatch.setenv("VRAMPLAN_LAUNCHER", str(other.pid))
        with Lock(tmp_path):
            assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
        other.communicate(b"\n")


# ----------------------------------------------------------------------------------------------------- the endings
@pytest.mark.parametrize(
    ("error", "ended", "code"),
    [
        (torch.OutOfMemoryError("x"), "oom", 4),
        (InputError("x"), "error", 2),
        (Interrupted("x"), "interrupted", 130),
    ],
)
def test_a_peer_ends_as_the_first_one_did(error: Any, ended: str, code: int) -> None:
    outcome = outcome_of(PeerFailed(3, outcome_of(error)))
    assert (outcome.ended, outcome.exit_code, outcome.message) == (ended, code, "rank 3: x")


def test_a_measurement_over_ranks_is_the_most_of_any() -> None:
    from dataclasses import replace

    from factories import make_measurement

    from vramplan.core.types import MeasuredPhase

    one = make_measurement(
        phases=(MeasuredPhase(name="loaded", allocated_bytes=5), MeasuredPhase(name="step", peak_bytes=7))
    )
    one = replace(one, oom_events=1)
    phases = (
        MeasuredPhase(name="loaded", allocated_bytes=4, peak_bytes=9),
        MeasuredPhase(name="step", peak_bytes=8),
    )
    two = replace(one, tokens=1, oom_events=2, micro_batch_size=3, phases=phases)
    found = over_ranks(one, [one, two])
    assert found.phases == (
        MeasuredPhase(name="loaded", allocated_bytes=5, peak_bytes=9),
        MeasuredPhase(name="step", peak_bytes=8),
    )
    assert (found.gpus, found.rank_peak_bytes, found.tokens) == (2, (7, 8), one.tokens)
    assert (found.oom_events, found.micro_batch_size) == (3, 3)
