"""What `diagnose` is given: packed files, stdin, several logs, encodings, and files made to do harm."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from snapshot_tools import out_of_memory, training

from vramplan.cli import run
from vramplan.core.units import GIB, MIB
from vramplan.errors import InputError
from vramplan.sources import pickle_guard, unpacked
from vramplan.sources.log_files import logs_in, rank_of, reports
from vramplan.sources.oom_text import parse, read_evidence, read_report
from vramplan.sources.snapshot import parse as parse_snapshot

REPORT = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {} MiB. GPU 0 has a total capacity of 6.00 GiB "
    "of which 100.00 MiB is free. Including non-PyTorch memory, this process has 2.40 GiB memory in use.\n"
)
SMALL = REPORT.format("352.00")


def called(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = run(["diagnose", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))


def requested(out: str) -> int:
    found = json.loads(out)["evidence"]["requested_bytes"]
    assert isinstance(found, int)
    return found


# --------------------------------------------------------------------------------------------------------- packed
SNAPSHOTS = [pickle.dumps(out_of_memory().snapshot(), 4), json.dumps(out_of_memory().snapshot()).encode()]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("stdin", [False, True])
@pytest.mark.parametrize("data", [SMALL.encode(), *SNAPSHOTS], ids=["log", "pickle", "json"])
def test_packed_or_not_from_a_file_or_stdin(
    data: bytes, stdin: bool, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "no-suffix"
    path.write_bytes(gzip.compress(data) if packed else data)
    if stdin:
        piped(monkeypatch, path.read_bytes())
    code, out, _ = called(capsys, "-" if stdin else path, "--json")
    assert code == 0 and requested(out) == 352 * MIB


def test_a_snapshot_on_stdin_beside_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    log = tmp_path / "log.txt"
    log.write_text(SMALL)
    piped(monkeypatch, SNAPSHOTS[0])
    code, out, _ = called(capsys, "-", log, "--json")
    evidence = json.loads(out)["evidence"]
    assert code == 0 and evidence["total_bytes"] == 6 * GIB and evidence["allocated_bytes"] == 1766 * MIB


@given(st.lists(st.binary(max_size=300), max_size=4), st.integers(1, 50))
def test_members_put_together_and_read_in_any_pieces(parts: list[bytes], size: int) -> None:
    data = b"".join(map(gzip.compress, parts))
    pieces = (data[at : at + size] for at in range(0, len(data), size))
    assert b"".join(unpacked.gunzipped(pieces)) == b"".join(parts)


def test_a_packed_log_that_is_cut_gives_what_is_there() -> None:
    data = gzip.compress(SMALL.encode() + os.urandom(2000))
    assert read_evidence(io.BytesIO(data[:-500])) == parse(SMALL)
    data = gzip.compress(SMALL.encode() + b"x\n" * 10**6)
    assert read_evidence(io.BytesIO(data[:-8])) == parse(SMALL)


def test_bombs_end_early_and_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = gzip.compress(b"\x80\x04" + b"N" * 40 * MIB)
    monkeypatch.setattr(unpacked, "FREE_BYTES", MIB)
    with pytest.raises(InputError, match="x is no memory snapshot of PyTorch: it unpacks to more than"):
        parse_snapshot(bomb, "x")
    monkeypatch.setattr(unpacked.gunzipped, "__defaults__", (8 * MIB,))
    bomb = gzip.compress(b"x\n" * 8 * MIB)
    tracemalloc.start()
    with pytest.raises(InputError, match="unpacks to more than 8 MiB"):
        read_evidence(io.BytesIO(bomb))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * MIB


@given(st.binary(max_size=400))
def test_any_bytes_that_begin_as_gzip(data: bytes) -> None:
    for head in (b"\x1f\x8b", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"):
        try:
            read_evidence(io.BytesIO(head + data))
        except InputError as error:
            assert "unpacked" in error.message or "snapshot" in error.message or "gzip" in error.message
        with pytest.raises(InputError):
            parse_snapshot(head + data, "x")


# ---------------------------------------------------------------------------------------------------- several logs
def torchrun(folder: Path, texts: dict[int, str]) -> Path:
    for rank, text in texts.items():
        place = folder / "none_x1" / "attempt_0" / str(rank)
        place.mkdir(parents=True)
        (place / "stderr.log").write_text(text)
        (place / "stdout.log").write_text("loss 1.0\n")
    return folder


@pytest.mark.parametrize(
    "stamp", ["2026-11-30 12:00:{:02},123 ", "[rank0]:E1130 12:00:{:02}.000123 17 x.py:3] ", "#{0} "]
)
def test_the_first_rank_to_fail_is_the_cause(stamp: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its time; without one by its number."""
    texts = {
        0: "starting\n",
        2: stamp.format(7) + "x\n" + REPORT.format("20.00"),
        10: stamp.format(5) + REPORT.format("64.00"),
    }
    code, out, err = called(capsys, torchrun(tmp_path, texts), "--json")
    evidence = json.loads(out)["evidence"]
    first = 10 if "12:00" in stamp else 2
    assert code == 0 and evidence["requested_bytes"] == {2: 20 * MIB, 10: 64 * MIB}[first]
    assert evidence["rank"] == (0 if "rank0" in stamp and first == 10 else first)
    assert err.count("\n") == 1 and f"rank {12 - first} " in err
    assert ("failed first" if first == 10 else "is taken for the first to fail") in err


def test_logs_in_the_order_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "rank1.log", tmp_path / "rank0.log"
    first.write_text(REPORT.format("64.00"))
    second.write_text("[rank0]: " + REPORT.format("20.00"))
    code, out, err = called(capsys, first, second, "--json")
    assert code == 0 and requested(out) == 64 * MIB and json.loads(out)["evidence"]["rank"] == 1
    assert (
        "rank 1 (rank1.log) is taken for the first to fail; out of memory too: rank 0 (rank0.log, 20.0 MiB asked for)"
        in err
    )


def test_an_exit_code_is_never_the_first_to_fail(tmp_path: Path) -> None:
    first, second = tmp_path / "a.log", tmp_path / "b.log"
    first.write_text("2026-11-30 12:00:00 failed (exitcode: -9) local_rank: 1\n")
    second.write_text("2026-11-30 12:00:09 " + SMALL)
    assert [report.path.name for report in reports([first, second])] == ["b.log", "a.log"]


def test_times_that_cannot_be_compared_do_not_count(tmp_path: Path) -> None:
    first, second = tmp_path / "a.log", tmp_path / "b.log"
    first.write_text("2026-11-30 12:00:09 " + SMALL)
    second.write_text("E1130 12:00:00.1 " + SMALL)
    assert [report.path.name for report in reports([first, second])] == ["a.log", "b.log"]


@pytest.mark.parametrize(
    ("name", "rank"),
    [("x/attempt_0/3/stderr.log", 3), ("train.rank12.log", 12), ("local_rank_2.txt", 2), ("out-7.txt.gz", 7),
     ("slurm-123456.out", None), ("train.log", None), ("rank3x7.log", 3)],
)  # fmt: skip
def test_ranks_of_names(name: str, rank: int | None) -> None:
    assert rank_of(Path(name)) == rank


def test_a_run_folder_with_its_snapshot_and_other_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.txt").write_text(SMALL)
    (tmp_path / "oom-17.pickle").write_bytes(SNAPSHOTS[0])
    (tmp_path / "oom-18.pickle").write_bytes(b"no snapshot")
    code, out, _ = called(capsys, tmp_path, "--json")
    evidence = json.loads(out)["evidence"]
    assert code == 0 and evidence["total_bytes"] == 6 * GIB and evidence["allocated_bytes"] == 1766 * MIB
    other = tmp_path / "other.log"
    other.write_text("2026-11-30 12:00:09 " + REPORT.format("64.00"))
    code, out, err = called(capsys, other, tmp_path, "--json")
    assert code == 0 and requested(out) == 64 * MIB and "other.log is taken for the first" in err


def test_of_two_snapshots_the_one_that_was_written_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "b.pickle", tmp_path / "a.pickle"]
    for at, (path, recorder) in enumerate(zip(paths, (out_of_memory(), training(1)), strict=True)):
        path.write_bytes(pickle.dumps(recorder.snapshot(), 4))
        os.utime(path, (1000 + at, 1000 + at))
    code, out, err = called(capsys, *reversed(paths), "--json")
    assert code == 0 and requested(out) == 352 * MIB and "b.pickle was written first" in err


def test_folders_without_logs_and_two_run_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, empty = tmp_path / "one", tmp_path / "two", tmp_path / "empty"
    for folder in (one, two, empty):
        folder.mkdir()
        if folder is not empty:
            (folder / "log.txt").write_text(SMALL)
    for words, part in (((empty,), "no log.txt, and no other logs"), ((one, two), "two run folders")):
        code, _, err = called(capsys, *words)
        assert code == 2 and part in err
    with pytest.raises(InputError):
        logs_in(tmp_path / "missing")


# ------------------------------------------------------------------------------------------------------- encodings
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1", "cp1252"])
@pytest.mark.parametrize("lines", [0, 20_000])
def test_encodings(encoding: str, lines: int) -> None:
    text = "Epoche beendet: 12 % übrig\r\n" * lines + SMALL.replace("\n", "\r\n")
    assert read_evidence(io.BytesIO(text.encode(encoding))) == parse(SMALL)


@given(st.binary(max_size=300), st.binary(max_size=300), st.booleans())
@example(b"\x00" * 100, b"\x00", False)
@example(b"\xff\xfe\x00", b"\xd8", False)
def test_a_report_between_any_bytes_is_found_or_not_but_nothing_fails(before: bytes, after: bytes, wide: bool) -> None:
    data = before + b"\n" + SMALL.encode("utf-16" if wide else "utf-8") + after
    try:
        read_report(io.BytesIO(data))
    except InputError:
        return


@given(st.integers(1, 40), st.sampled_from(["\x00", "\x00\x00\n", "\x1b[2K", "\ufffd"]))
def test_nul_bytes_between_lines_hide_nothing(count: int, what: str) -> None:
    found = read_evidence(io.BytesIO((what * count + "\n" + SMALL).encode()))
    assert found is not None and found.requested_bytes == 352 * MIB


class Endless:
    """A stream that is made while it is read."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.blocks = blocks

    def read(self, size: int = -1) -> bytes:
        return next(self.blocks, b"")


@pytest.mark.parametrize("block", [b"x" * MIB, b"loss 1.0 memory 137\n" * (MIB // 20), b"Killed" * (MIB // 6)])
def test_long_logs_and_long_lines_take_little_memory(block: bytes) -> None:
    blocks = iter([block] * 24 + [b"\n" + SMALL.encode()])
    tracemalloc.start()
    found = read_evidence(Endless(blocks))  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None and found.requested_bytes == 352 * MIB and peak < 16 * MIB


# --------------------------------------------------------------------------------------------------------- pickles
def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


CALLS = {
    "GLOBAL": b"cos\nsystem\n",
    "STACK_GLOBAL": short("os") + short("system") + b"\x93",
    "INST": b"(" + short("touch x") + b"ios\nsystem\n",
    "OBJ": b"(cos\nsystem\n" + short("touch x") + b"o",
    "REDUCE": b"cos\nsystem\n" + short("touch x") + b"\x85R",
    "BUILD": b"}}b",
    "NEWOBJ": b"cos\nsystem\n)\x81",
    "NEWOBJ_EX": b"cos\nsystem\n)}\x92",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "PERSID": b"Pwhere\n",
    "BINPERSID": b"K\x01Q",
    "LONG_BINPUT": b"Nr\xff\xff\xff\xff",
    "BYTEARRAY8": b"\x96" + struct.pack("<Q", 2**40),
    "NEXT_BUFFER": b"\x97",
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("where", [b"", b"}\x94", b"]\x94(K\x01K\x02"])
@pytest.mark.parametrize("protocol", [4, 5])
def test_no_instruction_that_calls_is_run(name: str, where: bytes, protocol: int) -> None:
    data = bytes([0x80, protocol]) + where + CALLS[name] + b"."
    with pytest.raises(InputError) as error:
        parse_snapshot(data, "x")
    assert "no memory snapshot" in error.value.message
    with pytest.raises(InputError):
        pickle_guard.check(data, "x")  # before anything is run


OPCODES = st.sampled_from([bytes([code]) for code in range(256)])


@given(
    st.lists(st.one_of(OPCODES, st.sampled_from([*CALLS.values(), short("segments"), b"h\x00", b"\x94"])), max_size=60)
)
@settings(max_examples=300)
def test_any_program_of_opcodes_is_refused_or_read(parts: list[bytes]) -> None:
    try:
        found = parse_snapshot(b"\x80\x04" + b"".join(parts) + b".", "x")
    except InputError:
        return
    assert found.segments == () and found.events == ()  # an empty list is one of no segments


@given(st.integers(1, 2000), st.sampled_from(["[", '{"segments":', '{"segments":[', '[{"blocks":', '"\\ud800']))
@example(100_000, "[")
def test_deep_json_is_refused(depth: int, opening: str) -> None:
    with pytest.raises(InputError):
        parse_snapshot((opening * depth).encode("utf-8", "surrogatepass"), "x")


@given(st.integers(1, 3000), st.sampled_from([b"]", b"}K\x01", b"]\x94"]))
def test_deep_pickles_are_refused_or_read(depth: int, opening: bytes) -> None:
    closing = b"s" if opening.startswith(b"}") else b"a"
    data = b"\x80\x04" + opening * depth + b"N" + closing * depth + b"."
    with pytest.raises(InputError):
        parse_snapshot(data, "x")
