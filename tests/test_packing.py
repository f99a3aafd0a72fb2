"""Packed rows, rows of like length, what padding costs, and the tokens that a resumed run finds again."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("torch")

from test_train_data import CHAT, learned_text, read, run_spec, write_jsonl

from vramplan.core.types import RunSpec
from vramplan.core.varlen import documents, documents_per_row
from vramplan.errors import InputError
from vramplan.train import cache
from vramplan.train.collate import of_one_shape
from vramplan.train.data import CACHE, SKIPPED, Collator, Splits, build
from vramplan.train.lengths import LengthGrouped, padding_share, percentile
from vramplan.train.packing import Packing, pack
from vramplan.train.samples import sample_rows


def built(path: Path, tokenizer: Any, told: list[Any] | None = None, **changes: Any) -> Splits:
    """With changes of the run: packing, micro_batch_size, ..."""
    run = replace(run_spec(path, seq_len=changes.pop("seq_len", 64)), **changes)
    return build(run, tokenizer, report=(told if told is not None else []).append)


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": " ".join(["Anne was there"] * (1 + (i * 7) % 12)) + f" {i}."} for i in range(count)]


# ------------------------------------------------------------------------------------------------------- packing
@given(
    st.integers(2, 400).flatmap(
        lambda seq: st.tuples(st.just(seq), st.lists(st.integers(2, seq), max_size=80), st.integers(0, 3))
    )
)
def test_every_document_is_in_one_row_that_takes_it(case: tuple[int, list[int], int]) -> None:
    seq_len, lengths, seed = case
    rows = pack(lengths, seq_len, seed)
    assert Counter(index for row in rows for index in row) == Counter(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= seq_len for row in rows)
    assert all(len(row) + 1 <= documents_per_row(seq_len) for row in rows)
    assert rows == pack(lengths, seq_len, seed)
    stored = Packing(rows)
    assert [list(stored.row(index)) for index in range(len(stored))] == rows
    # At most one row is half empty, rows of as many documents as there may be apart.
    open_rows = [row for row in rows if len(row) + 1 < documents_per_row(seq_len)]
    assert sum(sum(lengths[index] for index in row) * 2 <= seq_len for row in open_rows) <= 1


def test_the_seed_decides_which_equals_meet() -> None:
    assert pack([32] * 20, 64, 1) != pack([32] * 20, 64, 2)
    assert pack([], 64, 1) == []
    with pytest.raises(ValueError, match="65 tokens does not fit a row of 64"):
        pack([65], 64, 1)


def test_many_rows_are_packed_at_once() -> None:
    """Best fit by looking through all rows would take minutes."""
    lengths = [2 + (i * 7919) % 1500 for i in range(50_000)]
    rows = pack(lengths, 2048, 0)
    assert sum(lengths) / (len(rows) * 2048) > 0.97


def test_packed_rows_are_the_documents_end_to_end(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts(40))
    told: list[dict[str, Any]] = []
    alone, packed = built(path, tokenizer, seq_len=128), built(path, tokenizer, told, seq_len=128, packing=True)
    assert packed.examples == len(alone.train) == 40 > len(packed.train)
    wanted = Counter(tuple(alone.train[i]["input_ids"]) for i in range(40))
    found: Counter[tuple[int, ...]] = Counter()
    for index in range(len(packed.train)):
        example = packed.train[index]
        at = 0
        for length in example["lengths"]:
            found[tuple(example["input_ids"][at : at + length])] += 1
            assert example["labels"][at] == -100
            assert example["labels"][at + 1 : at + length] == example["input_ids"][at + 1 : at + length]
            at += length
        assert at == len(example["input_ids"]) <= packed.train.length(index) == 128
    assert found == wanted
    event = told[-1]
    assert event["packed_rows"] == len(packed.train) and event["examples"] == 40
    slots = 128 * len(packed.train)
    assert event["padding"] == pytest.approx(1 - event["tokens"] / slots, abs=1e-4)
    assert event["padding"] < 0.3
    part = packed.train[2:4]
    assert len(part) == 2 and part[0] == packed.train[2]


def test_a_packed_batch_says_where_its_documents_are() -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "lengths": [3, 2]},
        {"input_ids": [1, 2, 3, 4, 5, 6, 7, 8], "labels": [1] * 8, "lengths": [8]},
    ]
    batch = Collator(0, 8, packed=True)(rows)
    assert list(batch) == [
        *("input_ids", "labels", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    ]
    assert batch["input_ids"].tolist()[0] == [5, 6, 7, 8, 9, 0, 0, 0]
    assert batch["labels"].tolist()[0] == [-100, 6, 7, -100, 9, -100, -100, -100]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], list(range(8))]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 8, 16]
    assert str(batch["cu_seq_lens_q"].dtype) == "torch.int32"
    assert (batch["max_length_q"], batch["max_length_k"]) == (8, 8)


@settings(deadline=None)
@given(st.lists(st.integers(2, 64), min_size=1, max_size=60), st.integers(1, 4))
def test_a_batch_holds_no_more_documents_than_the_plan_has_room_for(lengths: list[int], batch: int) -> None:
    rows = [
        {"input_ids": [1] * sum(row), "labels": [1] * sum(row), "lengths": row}
        for row in ([lengths[index] for index in row] for row in pack(lengths, 64, 0))
    ]
    for start in range(0, len(rows), batch):
        made = Collator(0, 64, packed=True)(rows[start : start + batch])
        assert made["input_ids"].shape[1] == 64
        most = documents(made["input_ids"].shape[0], 64)
        assert made["cu_seq_lens_q"].numel() - 1 <= most
        static = of_one_shape(made)
        assert static["cu_seq_lens_q"].numel() - 1 == most and static["max_length_q"] == 64
        assert static["cu_seq_lens_q"].unique().tolist() == made["cu_seq_lens_q"].tolist()


# -------------------------------------------------------------------------------------------------------- lengths
@given(st.lists(st.integers(1, 500), min_size=1, max_size=120), st.integers(1, 8), st.integers(0, 9))
def test_rows_of_like_length_come_together(lengths: list[int], batch: int, seed: int) -> None:
    sampler = LengthGrouped(lengths, batch, seed)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))) and len(sampler) == len(lengths)
    assert lengths[order[0]] == max(lengths)
    again = LengthGrouped(lengths, batch, seed)
    assert list(again) == order
    again.set_epoch(1)
    later = list(again)
    assert sorted(later) == sorted(order)
    again.set_epoch(0)
    assert list(again) == order


def test_what_padding_costs() -> None:
    assert padding_share([10, 20, 30, 40], [0, 1, 2, 3], 2) == pytest.approx(1 - 100 / 120)
    assert padding_share([10, 20], [0, 1], 1) == 0
    assert padding_share([], [], 4) == 0
    assert [percentile([1, 2, 3, 4], p) for p in (25, 50, 51, 95, 100)] == [1, 2, 3, 4, 4]
    assert percentile([7], 50) == 7


def test_the_summary_counts(tmp_path: Path, tokenizer: Any) -> None:
    told: list[dict[str, Any]] = []
    path = write_jsonl(tmp_path / "a.jsonl", texts(480))
    splits = built(path, tokenizer, told, micro_batch_size=4, accumulation=2)
    event = told[-1]
    lengths = sorted(splits.train.lengths())
    assert list(splits.train.lengths()) == [len(splits.train[i]["input_ids"]) for i in range(480)]
    assert (event["p50"], event["longest"]) == (lengths[239], lengths[-1])
    assert splits.train.length(splits.longest_index) == lengths[-1]
    assert event["tokens"] == sum(lengths) and event["learned_tokens"] == sum(lengths) - 480
    assert 0.2 < event["padding_random"] < 0.7 and event["padding_grouped"] < event["padding_random"] / 2


# ---------------------------------------------------------------------------------------------------- truncation
def test_long_rows_are_cut_left_out_or_refused(tmp_path: Path, tokenizer: Any) -> None:
    values = [{"text": "Short."}, {"text": "and so on " * 40}]
    path = write_jsonl(tmp_path / "a.jsonl", values)
    size = len(tokenizer(values[1]["text"])["input_ids"]) + 1
    cut = read(path, tokenizer, seq_len=16)
    assert (cut.examples, cut.truncated, cut.train.store.cut[1]) == (2, 1, size - 16)
    dropped = read(path, tokenizer, seq_len=16, truncation="drop")
    assert (dropped.examples, dropped.truncated, dropped.skipped) == (1, 0, 1)
    with pytest.raises(InputError, match=rf"a\.jsonl, line 2, has {size} tokens, over the sequence length of 16"):
        read(path, tokenizer, seq_len=16, truncation="error")
    with pytest.raises(InputError, match=r"none of the 1 rows .* 1 too long"):
        read(write_jsonl(path, values[1:]), tokenizer, seq_len=16, truncation="drop")


def test_long_text_can_be_split(tmp_path: Path, tokenizer: Any) -> None:
    text = "and so on " * 40
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    told: list[dict[str, Any]] = []
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "Short."}, {"text": text}])
    splits = read(path, tokenizer, told, seq_len=len(ids) // 3, truncation="split")
    parts = [splits.train[index]["input_ids"] for index in range(1, len(splits.train))]
    assert [token for part in parts for token in part] == ids[: sum(map(len, parts))]
    assert len(ids) - sum(map(len, parts)) <= 1  # a last token alone has nothing to learn
    assert (told[-1]["split"], told[-1]["truncated"], told[-1]["tokens_lost"]) == (1, 0, 0)
    assert list(splits.train.store.sources) == [1] + [2] * len(parts)
    assert splits.skipped == 0 and not any(event["event"] == "warning" for event in told)


def test_held_out_rows_of_their_own(tmp_path: Path, tokenizer: Any) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", texts(5))
    held_out = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "Who?", "completion": " Anne."}])
    splits = read(train, tokenizer, eval_path=str(held_out))
    assert splits.eval is not None and (splits.examples, len(splits.eval)) == (5, 1)
    assert learned_text(splits.eval[0], tokenizer) == " Anne.<eos>"
    with pytest.raises(InputError, match="not from both"):
        read(train, tokenizer, eval_path=str(held_out), eval_fraction=0.1)


# -------------------------------------------------------------------------------------------------- the run folder
def test_rows_left_out_are_written_down(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*texts(2), {"text": 5}, {"text": " "}, {"text": None}, *texts(1)])
    run = run_spec(path, on_bad_row="skip")
    build(run, tokenizer, report=lambda _: None, run_dir=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / SKIPPED).read_text().splitlines()]
    assert [line["where"] for line in lines] == ["line 3", "line 4", "line 5"]
    assert [line["why"] for line in lines] == ["bad", "empty", "bad"]
    reason = 'has a int as "text", expected text'
    assert lines[0] == {"file": str(path), "where": "line 3", "why": "bad", "reason": reason}
    monkeypatch.setattr("vramplan.train.ingest.MAX_SKIPPED", 2)
    build(run, tokenizer, report=lambda _: None, run_dir=tmp_path)
    assert json.loads((tmp_path / SKIPPED).read_text().splitlines()[-1]) == {"more": 1}
    build(run_spec(write_jsonl(path, texts(2))), tokenizer, report=lambda _: None, run_dir=tmp_path)
    assert not (tmp_path / SKIPPED).exists()


def resumed(run: RunSpec, tokenizer: Any, folder: Path, resume: bool = True) -> tuple[Splits, dict[str, Any], str]:
    told: list[dict[str, Any]] = []
    splits = build(run, tokenizer, report=told.append, run_dir=folder, resume=resume)
    return splits, told[-1], " ".join(event["message"] for event in told if event["event"] == "warning")


def test_a_resumed_run_finds_its_tokens(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = None
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT[:2]}] * 4)
    run = run_spec(path, eval_fraction=0.3)
    first, event, _ = resumed(run, tokenizer, tmp_path, resume=False)
    assert event["cached"] is False and (tmp_path / CACHE).is_file()
    template, tokenizer.chat_template = tokenizer.chat_template, None
    second, kept, warnings = resumed(run, tokenizer, tmp_path)
    assert warnings == "" and kept == {**event, "cached": True}
    assert tokenizer.chat_template == template  # the adapter must carry it
    for a, b in ((first.train, second.train), (first.eval, second.eval)):
        assert a is not None and b is not None and list(a) == list(b)
    assert (second.kind, second.unit, second.longest) == ("messages", "line", first.longest)
    assert list(second.train.store.sources) == list(range(1, 9))
    packed, _, _ = resumed(replace(run, packing=True), tokenizer, tmp_path)  # the same tokens, in other rows
    assert packed.examples == first.examples


def test_tokens_of_another_run_are_not_taken(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts(6))
    run = run_spec(path)
    resumed(run, tokenizer, tmp_path, resume=False)
    assert resumed(run, tokenizer, tmp_path)[1]["cached"] is True
    for other in (replace(run, seq_len=32), run_spec(path, text_column="body", kind="auto")):
        assert cache.fingerprint(other, tokenizer) != cache.fingerprint(run, tokenizer)
    write_jsonl(path, texts(7))
    splits, event, warnings = resumed(run, tokenizer, tmp_path)
    assert splits.examples == 7 and event["cached"] is False
    assert "has changed since this run began" in warnings


@pytest.mark.parametrize("damage", ["", "cut", "header", "lengths"])
def test_a_broken_file_of_tokens_is_read_anew(tmp_path: Path, tokenizer: Any, damage: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts(6))
    run = run_spec(path)
    resumed(run, tokenizer, tmp_path, resume=False)
    file = tmp_path / CACHE
    whole = file.read_bytes()
    broken = {
        "": b"",
        "cut": whole[:-3],
        "header": whole.replace(b'"sources"', b'"saucers"', 1),
        "lengths": whole[: -6 * 12] + b"\xff" * 72,
    }[damage]
    file.write_bytes(broken)
    splits, event, warnings = resumed(run, tokenizer, tmp_path)
    if damage != "lengths":  # numbers of lines and cut tokens: nothing to check them against
        assert event["cached"] is False and f"{CACHE} cannot be read" in warnings
    assert splits.examples == 6
    assert list(splits.train) == list(read(path, tokenizer).train)


def test_a_full_disk_costs_only_the_kept_tokens(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    path = write_jsonl(tmp_path / "a.jsonl", texts(6))
    splits, _, warnings = resumed(run_spec(path), tokenizer, tmp_path, resume=False)
    assert splits.examples == 6 and "not kept for --resume: No space left" in warnings
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


# --------------------------------------------------------------------------------------------------------- samples
def test_samples_are_what_the_model_sees(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT[:2]}, {"messages": CHAT}])
    splits = read(path, tokenizer, seq_len=30)
    events = list(sample_rows(splits, tokenizer, 2))
    assert [(e["number"], e["of"], e["unit"], e["padding"]) for e in events] == [(1, 3, "line", 0), (2, 3, "line", 0)]
    for index, event in enumerate(events):
        (document,) = event["documents"]
        example = splits.train[index]
        segments = document["segments"]
        assert "".join(text for text, _, _ in segments) == tokenizer.decode(example["input_ids"])
        assert "".join(text for text, learned, _ in segments if learned) == learned_text(example, tokenizer)
        assert {text for text, _, special in segments if special} == {"<|im_start|>", "<|im_end|>"}
        assert (document["source"], document["tokens"]) == (index + 1, len(example["input_ids"]))
        assert event["learned_tokens"] == sum(label >= 0 for label in example["labels"])
    assert events[0]["documents"][0]["cut"] > 0 == events[1]["documents"][0]["cut"]


def test_samples_of_packed_rows_are_several_documents(tmp_path: Path, tokenizer: Any) -> None:
    splits = built(write_jsonl(tmp_path / "a.jsonl", texts(30)), tokenizer, seq_len=256, packing=True)
    (event,) = sample_rows(splits, tokenizer, 1)
    assert len(event["documents"]) == len(splits.train[0]["lengths"]) > 1
    assert event["tokens"] + event["padding"] == 256
    assert [d["tokens"] for d in event["documents"]] == splits.train[0]["lengths"]
    assert len(list(sample_rows(splits, tokenizer, 10**6))) == len(splits.train)


def test_of_a_very_long_row_the_middle_is_left_out(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vramplan.train.samples.MAX_TOKENS", 10)
    splits = read(write_jsonl(tmp_path / "a.jsonl", [{"text": "and so on " * 40}]), tokenizer, seq_len=100)
    (event,) = sample_rows(splits, tokenizer, 1)
    segments = event["documents"][0]["segments"]
    assert [90] in segments and segments[0][0] == "<bos>"
