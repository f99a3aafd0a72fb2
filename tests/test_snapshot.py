"""Memory snapshots: what is read from them, who holds what, and that no file does anything but be read or refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshot_tools import (
    ATTENTION,
    EMBEDDING,
    LAYER,
    LOAD,
    LORA,
    LOSS,
    MLP,
    MODEL,
    NORM,
    OUTER,
    RESIDUAL,
    SITE,
    Recorder,
    Stack,
    forward,
    out_of_memory,
    training,
)

from vramplan.cli import run
from vramplan.core.diagnose import diagnose
from vramplan.core.holders import BACKWARD, BEFORE, UNKNOWN, Holders
from vramplan.core.holdings import Piece, Replay, evidence_of, holdings, largest_free
from vramplan.core.snapshot import Snapshot
from vramplan.core.types import Diagnosis, Holdings
from vramplan.core.units import GIB, MIB
from vramplan.errors import InputError
from vramplan.sources import pickle_guard, records
from vramplan.sources.snapshot import parse, read_snapshot
from vramplan.sources.snapshot_head import is_snapshot

GOLDEN = Path(__file__).parent / "golden"


def read(value: Any, protocol: int = 4) -> Snapshot:
    return parse(pickle.dumps(value, protocol), "x.pickle")


def held(recorder: Recorder, last: int | None = None) -> Holdings:
    return holdings(read(recorder.snapshot(last)))


def by_key(found: Holdings) -> dict[str, int]:
    return {holder.key: holder.bytes for holder in found.holders if holder.bytes}


# -------------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("protocol", [4, 5])
def test_pickle_and_json_say_the_same(protocol: int) -> None:
    value = out_of_memory().snapshot()
    snapshot = read(value, protocol)
    assert parse(json.dumps(value).encode(), "x.json") == snapshot
    block = next(block for block in snapshot.segments[0].blocks if block.frames)
    assert block.frames[0] == "home/me/train.py:5 <module>"  # torch writes the innermost first
    assert block.frames[-1].endswith("modeling_utils.py:4100 from_pretrained")
    assert snapshot.settings["expandable_segments"] is False and "roundup_power2_divisions" not in snapshot.settings
    assert [event.action for event in snapshot.events].count("oom") == 1


def test_of_two_cards_the_one_that_ran_out() -> None:
    value, other = out_of_memory().snapshot(), training(1).snapshot()
    other["segments"][0]["device"] = 1
    both = {"segments": value["segments"] + other["segments"],
            "device_traces": value["device_traces"] + other["device_traces"]}  # fmt: skip
    assert read(both).device == 0
    both["device_traces"][0] = []
    assert read(both).device == 0  # the one that holds more
    value["segments"][0]["allocated_size"] = 0
    assert read(both).device == 1


def test_segments_alone_and_old_blocks() -> None:
    value = training(1).snapshot()
    assert read(value["segments"]).segments == read(value).segments
    for block in value["segments"][0]["blocks"]:
        frames = block.pop("frames")
        block["history"] = [{"addr": block.pop("address"), "real_size": block.pop("requested_size"), "frames": frames}]
    assert read(value).segments == read(training(1).snapshot()).segments


def test_frames_of_cpp_are_left_out_but_for_the_telling_ones() -> None:
    recorder = Recorder()
    recorder.alloc(MIB, (("??", 0, "_start"), ("engine.cpp", 1, "torch::autograd::Engine::evaluate_function"),
                         ("/x/user\x1b[31m.py", 3, "f\n\ud800g")))  # fmt: skip
    (frames,) = [block.frames for block in read(recorder.snapshot(), 5).segments[0].blocks if block.active]
    assert frames == ("c++:0 autograd::Engine", "/x/user?[31m.py:3 f??g")


# ------------------------------------------------------------------------------------------------------ the replay
STEPS = st.lists(st.tuples(st.booleans(), st.integers(1, 3 * MIB), st.sampled_from([NORM, LOSS, MLP])), max_size=40)


@given(STEPS, st.data())
@settings(max_examples=60, deadline=None)
def test_the_past_is_played_back_exactly(steps: list[tuple[bool, int, Stack]], data: st.DataObject) -> None:
    """Whatever was allocated and freed, and wherever the trace begins."""
    recorder = Recorder()
    alive: list[set[int]] = [set()]
    for allocates, size, stack in steps:
        if allocates or not recorder.live:
            recorder.alloc(size, stack)
        else:
            recorder.free(next(iter(recorder.live)))
        alive.append(set(recorder.live))
    last = data.draw(st.integers(0, len(recorder.events)))
    snapshot = read(recorder.snapshot(last))
    replay, count = Replay(snapshot), len(snapshot.events)
    assert replay.before == recorder.totals[len(recorder.totals) - 1 - count :]
    at = data.draw(st.integers(0, count))
    moment = replay.moment(at)
    assert set(moment.live) == alive[len(alive) - 1 - count + at]
    assert moment.allocated_bytes == replay.before[at]
    for address, piece in moment.live.items():
        if address in recorder.live or piece.born >= 0:  # what lives, or was born in the trace, has its stack
            assert piece.frames
        assert piece.born < at


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=12))
def test_the_largest_gap(pieces: list[tuple[int, bool]]) -> None:
    live, at, gap, best = {}, 100, 0, 0
    for size, taken in pieces:
        gap = 0 if taken else gap + size
        best = max(best, gap)
        if taken:
            live[at] = Piece(size, (), -1)
        at += size
    assert largest_free({100: at - 100}, live) == best


def test_two_segments_are_not_one_piece() -> None:
    assert largest_free({0: 10, 10: 15}, {}) == 15
    assert largest_free({0: 10, 20: 15}, {}) == 15
    assert largest_free({0: 10, 5: 10}, {}) == 10  # no allocator writes this


# ----------------------------------------------------------------------------------------------------- the holders
CHECKPOINT = (f"{SITE}/torch/utils/checkpoint.py", 496, "checkpoint")
AGAIN = ((f"{SITE}/torch/utils/checkpoint.py", 1129, "unpack_hook"),)
BNB = f"{SITE}/bitsandbytes"


@pytest.mark.parametrize(
    ("stack", "key"),
    [
        (LOAD, "weights.loaded"),
        (((f"{SITE}/peft/mapping_func.py", 1, "get_peft_model"), (f"{SITE}/torch/nn/init.py", 5, "kaiming_uniform_")),
         "adapter.lora"),
        (((f"{SITE}/peft/utils/other.py", 151, "prepare_model_for_kbit_training"),), "weights.prepared"),
        (((f"{SITE}/torch/optim/adamw.py", 1, "_init_group"),), "optimizer.state"),
        (((f"{BNB}/optim/optimizer.py", 300, "step"), (f"{BNB}/optim/optimizer.py", 492, "init_state")),
         "optimizer.state"),
        (((f"{SITE}/torch/optim/adamw.py", 1, "_multi_tensor_adamw"),), "optimizer.scratch"),
        (EMBEDDING, "activations.inputs"),
        ((*OUTER, (MODEL, 391, "forward"), (f"{SITE}/transformers/masking_utils.py", 750, "find_packed")),
         "activations.inputs"),
        (NORM, "activations.layers"),
        (MLP, "activations.layers"),
        (LORA, "activations.lora"),
        (ATTENTION, "activations.attention"),
        (RESIDUAL, "activations.layers"),
        ((*LAYER, CHECKPOINT, (MODEL, 323, "forward")), "activations.checkpoints"),
        ((*LAYER, CHECKPOINT, (MODEL, 322, "forward"), (MODEL, 175, "forward")), "activations.layers"),
        ((*AGAIN, (MODEL, 323, "forward")), "activations.layers"),
        (((f"{SITE}/torch/utils/checkpoint.py", 300, "backward"), (MODEL, 322, "forward")), "activations.layers"),
        ((*OUTER, (MODEL, 410, "forward"), (MODEL, 67, "forward")), "activations.head"),
        ((*OUTER, (f"{SITE}/torch/nn/modules/linear.py", 134, "forward")), "loss.logits"),
        (LOSS, "loss.log_softmax"),
        ((*OUTER, (f"{SITE}/transformers/loss/loss_utils.py", 50, "ForCausalLMLoss")), "loss.logits"),
        (((f"{SITE}/vramplan/train/fused_loss.py", 99, "forward"),), "loss.fused"),
        ((*MLP, (f"{BNB}/autograd/_functions.py", 300, "forward"), (f"{BNB}/functional.py", 992, "dequantize_4bit")),
         "workspace.dequantised"),
        (((f"{BNB}/autograd/_functions.py", 340, "backward"),), "activations.gradients"),
        (((f"{BNB}/autograd/_functions.py", 340, "backward"), (f"{BNB}/functional.py", 992, "dequantize_4bit")),
         "workspace.dequantised"),
        (((f"{SITE}/vramplan/train/fast/flat.py", 75, "gradients"),), "adapter.gradients"),
        ((("engine.cpp", 1, "at::cuda::getNewWorkspace()"),), "workspace.cublas"),
        ((("/home/me/train.py", 3, "main"),), UNKNOWN),
    ],
)  # fmt: skip
def test_who_asked(stack: Stack, key: str) -> None:
    recorder = Recorder()
    recorder.alloc(MIB, NORM)  # so that layers are known to be called through transformers' own
    recorder.alloc(MIB, stack)
    snapshot = read(recorder.snapshot())
    holders = Holders({event.frames: None for event in snapshot.events})
    assert holders.of(snapshot.events[-1].frames).key == key


def test_bitsandbytes_makes_the_weight_and_then_the_product() -> None:
    def line(number: int) -> Stack:
        return (*MLP, (f"{BNB}/backends/cuda/ops.py", number, "_dequant_linear_fallback"))

    recorder = Recorder()
    recorder.alloc(2 * MIB, line(914))
    recorder.alloc(3 * MIB, line(916))
    assert by_key(held(recorder)) == {"workspace.dequantised": 2 * MIB, "activations.layers": 3 * MIB}


def test_holders_when_memory_ran_out_although_all_was_freed_since() -> None:
    found = held(out_of_memory())
    assert found.moment == "oom"
    assert by_key(found) == {
        BEFORE: 700 * MIB, "weights.loaded": 50 * MIB, "activations.inputs": 32 * MIB, "activations.lora": 288 * MIB,
        "activations.attention": 72 * MIB, "activations.layers": 3 * 208 * MIB,
    }  # fmt: skip
    assert sum(by_key(found).values()) == found.allocated_bytes == 1766 * MIB
    assert found.layer_bytes == (328 * MIB,) * 3
    assert found.reserved_bytes == 2 * GIB and found.peak_bytes == found.allocated_bytes
    # three norms were freed, 64 MiB each; the rest of the segment is the largest piece
    assert found.largest_free_bytes == 2 * GIB - 1766 * MIB - 3 * 64 * MIB


def test_a_birth_without_python_is_the_backward_and_without_an_event_it_was_before() -> None:
    recorder = Recorder()
    recorder.alloc(MIB)
    recorder.alloc(2 * MIB)
    assert by_key(held(recorder)) == {BACKWARD: 3 * MIB}
    assert by_key(held(recorder, last=1)) == {BEFORE: MIB, BACKWARD: 2 * MIB}


def test_the_layers_of_the_last_forward() -> None:
    recorder = training(2)
    forward(recorder, 5)
    assert held(recorder).layer_bytes == (328 * MIB,) * 5
    assert held(training(2)).layer_bytes == ()


def test_the_peak_and_who_held_it() -> None:
    found = held(training(2))
    assert found.moment == "now" and found.allocated_bytes == 500 * MIB
    assert found.peak_bytes == (500 + 32 + 2 * 328 + 256) * MIB and found.peak_where.endswith("cross_entropy")
    assert {holder.key: holder.peak_bytes for holder in found.holders}["loss.log_softmax"] == 256 * MIB
    assert sum(holder.peak_bytes for holder in found.holders) == found.peak_bytes


def test_private_pools() -> None:
    value = training(1).snapshot()
    assert holdings(read(value)).private_pools_bytes == 0
    value["segments"][0]["segment_pool_id"] = (0, 3)
    assert holdings(read(value)).private_pools_bytes == 500 * MIB


# ---------------------------------------------------------------------------------------------------------- growth
def test_a_leak() -> None:
    growth = held(training(8, leak=20 * MIB)).growth
    assert growth is not None and growth.bytes == 20 * MIB and growth.steps == 6  # between seven starts
    assert growth.key == "loss.log_softmax" and growth.where.endswith("cross_entropy")


@pytest.mark.parametrize(("steps", "leak"), [(8, 0), (3, 20 * MIB), (8, 100 * 1024)])
def test_no_leak(steps: int, leak: int) -> None:
    assert held(training(steps, leak)).growth is None


def test_a_trace_that_stops_in_the_layers_shows_no_growth() -> None:
    """The same code runs once in each layer, and each layer saves more."""
    recorder = Recorder()
    forward(recorder, 12)
    assert held(recorder).growth is None


# ---------------------------------------------------------------------------------------------------------- causes
def causes(recorder: Recorder) -> Diagnosis:
    snapshot = read(recorder.snapshot())
    found = holdings(snapshot)
    evidence = evidence_of(snapshot, found)
    assert evidence is not None
    return diagnose(evidence, holdings=found)


def test_layers_that_are_not_checkpointed_are_the_first_cause() -> None:
    diagnosis = causes(out_of_memory())
    assert diagnosis.cause_keys[0] == "checkpointing" and "984.0 MiB of 1.72 GiB" in diagnosis.causes[0]
    assert diagnosis.evidence.requested_bytes == 352 * MIB and diagnosis.evidence.free_bytes == 100 * MIB
    assert diagnosis.evidence.frames[-1] == "bitsandbytes/nn/modules.py:637 forward"


def test_the_loss_and_a_leak_are_causes() -> None:
    recorder = Recorder()
    recorder.alloc(100 * MIB, LOSS)
    recorder.oom(MIB)
    assert causes(recorder).cause_keys[0] == "logits"
    recorder = training(8, leak=20 * MIB)
    recorder.oom(MIB)
    assert causes(recorder).cause_keys[0] == "leak"


def test_a_card_with_room_was_capped_by_pytorch() -> None:
    recorder = Recorder(size=64 * MIB)
    recorder.alloc(MIB)
    recorder.oom(GIB, free=100 * GIB)
    assert {"cap"} == {key for key in causes(recorder).cause_keys if key in ("cap", "refused")}


def test_without_an_event_there_is_no_evidence() -> None:
    snapshot = read(training(1).snapshot())
    assert evidence_of(snapshot, holdings(snapshot)) is None


# --------------------------------------------------------------------------------------------------------- hostile
class Payload:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def refused(data: bytes) -> str:
    with pytest.raises(InputError) as error:
        parse(data, "x.pickle")
    assert error.value.message.startswith("x.pickle is no memory snapshot of PyTorch: ")
    assert error.value.message.isprintable()
    return error.value.message


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("place", ["whole", "inside"])
def test_no_code_is_run(protocol: int, place: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    payload = Payload(f"touch {mark}")
    value = payload if place == "whole" else {**out_of_memory().snapshot(), "more": payload}
    data = pickle.dumps(value, protocol)
    assert "program" in refused(data) or protocol < 4
    with pytest.raises(pickle.UnpicklingError):  # the second lock holds alone
        pickle_guard._Plain(io.BytesIO(data)).load()
    assert not mark.exists()
    pickle.loads(data)
    assert mark.exists()  # the payload does run where nobody looks at it


DEEP = 500_000
BOMBS = {
    "memo of 64 GiB": b"\x80\x04Nr\xff\xff\xff\xff.",
    "memo by text": b"\x80\x04Np99999999999\n.",
    "text beyond the end": b"\x80\x04X\xff\xff\xff\xffabc.",
    "text of 8 EiB": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "bytes of 8 EiB": b"\x80\x05\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "frame beyond the end": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "number of 2 GiB": b"\x80\x04\x8b\xff\xff\xff\x7fabc.",
    "number as text": b"\x80\x04I" + b"9" * 100_000 + b"\n.",
    "tuples in tuples as a key": b"\x80\x04}N" + b"\x85" * DEEP + b"Ns.",
    "pairs in pairs as a key": b"\x80\x04}K\x00" + b"K\x00\x86" * DEEP + b"Ns.",
    "lists in lists": b"\x80\x04]" * 1 + b"]" * DEEP + b"a" * DEEP + b".",
    "doubling lists": b"\x80\x04]\x94" + b"".join(b"]\x94(h%ch%ce" % (i, i) for i in range(100)) + b".",
    "another's extension": b"\x80\x04\x82\x01.",
    "from outside": b"\x80\x04K\x01Q.",
    "duplicates": b"\x80\x04N" + b"2" * 1000 + b".",
    "nothing": b"\x80\x04",
    "an empty stack": b"\x80\x04.",
    "an item for nothing": b"\x80\x04}s.",
    "a number to append to": b"\x80\x04K\x01Na.",
    "a list as a key": b"\x80\x04}]Ns.",
    "a memo that is empty": b"\x80\x04h\x05.",
    "text that is no UTF-8": b"\x80\x04X\x02\x00\x00\x00\xff\xfe.",
    "after the end": b"\x80\x04}.}.",
    "old protocol": pickle.dumps({"segments": []}, 2),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str) -> None:
    assert len(refused(BOMBS[name])) < 250


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"segments":' * 100_000, '{"segments": [], "x": ' + "9" * 10_000 + "}", "", "{", "null", "\xff",
     '{"segments": NaN}', '{"segments": [1e999]}', '{"segments": [{"address": true}]}'],
)  # fmt: skip
def test_json_bombs(text: str) -> None:
    refused(text.encode("latin-1"))


def test_too_many_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps(out_of_memory().snapshot(), 4)
    parse(data, "x")
    monkeypatch.setattr(pickle_guard, "MAX_OPCODES", 100)
    assert "too many instructions" in refused(data)
    monkeypatch.setattr(pickle_guard, "MAX_CONTAINERS", 10)
    assert "too many" in refused(data) and "too many" in refused(b'{"segments": [' + b"[]," * 10 + b"[]]}")


def test_a_list_that_is_named_a_thousand_times_is_read_once() -> None:
    """A thousand lists of one list of blocks would be a million blocks."""
    value = training(1).snapshot()
    value["segments"] = value["segments"] * 2
    assert "the same list twice" in refused(pickle.dumps(value, 4))


def change(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


@pytest.mark.parametrize("new", [None, -1, 2**70, 1.5, "x", True, [], {}, [[]], [1]])
@pytest.mark.parametrize(
    "path",
    [("segments",), ("device_traces",), ("device_traces", 0), ("device_traces", 0, 0), ("segments", 0),
     *(("segments", 0, key) for key in ("address", "total_size", "blocks", "device")),
     *(("segments", 0, "blocks", 0, key) for key in ("address", "size", "state", "frames", "requested_size")),
     *(("device_traces", 0, 0, key) for key in ("action", "addr", "size", "frames")),
     *(("device_traces", 0, 0, "frames", 0, key) for key in ("name", "filename", "line"))],
)  # fmt: skip
def test_wrong_shapes_are_refused_or_read(path: tuple[Any, ...], new: Any) -> None:
    value = json.loads(json.dumps(training(1).snapshot()))
    change(value, path, new)
    try:
        holdings(parse(json.dumps(value).encode(), "x"))
    except InputError as error:
        assert error.message.startswith("x is no memory snapshot of PyTorch: ")


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    for start in (b"", b"\x80\x04", b"\x80\x05}"):
        with pytest.raises(InputError):
            parse(start + data, "x")


SMALL = pickle.dumps(out_of_memory().snapshot(last=20), 4)


@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.binary(min_size=1, max_size=4)), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_mutated_pickles(changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(SMALL)
    for at, new in changes:
        data[at : at + len(new)] = new
    try:
        snapshot = parse(bytes(data), "x")
    except InputError:
        return
    found = holdings(snapshot)
    evidence_of(snapshot, found)


@given(st.integers(0, len(SMALL) - 1))
def test_truncated_pickles(size: int) -> None:
    with pytest.raises(InputError):
        parse(SMALL[:size], "x")


# ---------------------------------------------------------------------------------------------------- command line
LOG = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 352.00 MiB. GPU 0 has a total capacity of 6.00 GiB "
    "of which 100.00 MiB is free. Including non-PyTorch memory, this process has 2.40 GiB memory in use.\n"
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "oom.pickle"
    path.write_bytes(pickle.dumps(out_of_memory().snapshot(), 4))
    return path


def called(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = run(["diagnose", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", ["oom", "leak"])
def test_golden(name: str, width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = out_of_memory() if name == "oom" else training(8, leak=20 * MIB)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(recorder.snapshot()))
    code, out, _ = called(capsys, path, "--width", width)
    out = out.replace(str(path), "a.json")
    golden = GOLDEN / f"snapshot_{name}_{width}.txt"
    if os.environ.get("VRAMPLAN_UPDATE_GOLDEN"):
        golden.write_text(out)
    assert code == 0 and out == golden.read_text()
    assert max(map(len, out.splitlines())) <= width


@pytest.mark.parametrize("width", [80, 99, 100, 110, 140])
def test_holders_are_named_whole_at_any_width(width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a table is too wide for the place of the allocation, that is what is cut."""
    recorder = training(3)
    path = tmp_path / "a.json"
    recorder.alloc(
        300 * MIB, (*LOSS[:-1], ("/x/functional_with_a_long_name.py", 3500, "a_function_with_a_long_name" * 2))
    )
    path.write_text(json.dumps(recorder.snapshot()))
    _, out, _ = called(capsys, path, "--width", width)
    assert "saved by LoRA in the layers" in out or "weights" in out
    table = out.split("held by")[1].split("Reserved, not")[0].splitlines()[2:]
    assert table and not any("\u2026 " in line.rstrip() for line in table)


def test_json_is_the_same_from_both_kinds(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = file.with_name("no-suffix")  # known by what is in it
    other.write_text(json.dumps(out_of_memory().snapshot()))
    answers = [called(capsys, path, "--json")[1] for path in (file, other)]
    assert answers[0] == answers[1]
    diagnosis = records.decode(json.loads(answers[0]), Diagnosis)
    assert diagnosis.holdings is not None and diagnosis.holdings == holdings(read_snapshot(file))
    assert diagnosis.evidence.allocated_bytes == 1766 * MIB and diagnosis.cause_keys[0] == "checkpointing"


def test_a_log_and_a_snapshot_together(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = file.with_name("log.txt")
    log.write_text(LOG)
    for words in ((log, file), (file, log)):
        code, out, _ = called(capsys, *words, "--json")
        evidence = json.loads(out)["evidence"]
        assert code == 0 and evidence["total_bytes"] == 6 * GIB  # of the log
        assert evidence["allocated_bytes"] == 1766 * MIB and evidence["frames"]  # of the snapshot


def test_fixes_come_with_the_run(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called(capsys, file, "--model", "tinyllama-1.1b", "--batch-size", 4, "--checkpointing", "none",
                          "--gpu", "rtx-4090", "--json")  # fmt: skip
    assert code == 0 and json.loads(out)["fixes"]


def test_without_an_oom_the_holders_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.pickle"
    path.write_bytes(pickle.dumps(training(2).snapshot(), 4))
    code, out, err = called(capsys, path, "--json")
    body = json.loads(out)
    assert code == 0 and body["evidence"] is None and body["holdings"]["moment"] == "now" and "No out-of-memory" in err


def test_two_of_a_kind_and_files_that_are_none(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = file.with_name("bad.pickle")
    bad.write_bytes(pickle.dumps(Payload("true"), 4))
    for words, part in ((("a", "b"), "cannot read a"), ((bad,), "no memory snapshot"), (("-", "-"), "twice")):
        code, out, err = called(capsys, *words)
        assert code == 2 and out == "" and part in err and err.count("\n") == 1


def test_a_log_of_json_lines_is_a_log() -> None:
    assert not is_snapshot(b'{"loss": 1.0}\n{"loss": 0.9}\n')
    assert is_snapshot(b' {"device_traces": []}') and is_snapshot(b"\x80\x04}.")
