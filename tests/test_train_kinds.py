"""Every kind of row: which one it is, and that all that mean the same are learned the same."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("torch")

from test_train_data import CHAT, PLAIN_TEMPLATE, learned_text, read, refusal, write_jsonl

from vramplan.core.types import DATA_KINDS, DataSpec
from vramplan.errors import InputError
from vramplan.train import tiny
from vramplan.train.encode import encoder, inside
from vramplan.train.kinds import conversation, detect_kind

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [SYSTEM, *CHAT]
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": NAMES[m["role"]], "value": m["content"]} for m in TALK]
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]

# Rows that say the same as TALK, by the kind that is found in them.
SAME: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": TALK}),
    ("messages", {"messages": SHAREGPT}),
    ("messages", {"system": "Be brief.", "messages": CHAT}),
    ("messages", {"messages": [{**m, "name": None} for m in TALK]}),
    ("messages", {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TALK]}),
    ("messages", {"messages": json.dumps(TALK)}),
    ("sharegpt", {"conversations": SHAREGPT}),
    ("sharegpt", {"conversations": TALK}),
    ("sharegpt", {"system": "Be brief.", "conversations": SHAREGPT[1:]}),
    ("sharegpt", {"conversations": json.dumps(SHAREGPT), "tools": "[]"}),
    (
        "alpaca",
        {
            "system": "Be brief.",
            "history": [[CHAT[0]["content"], CHAT[1]["content"]]],
            "instruction": CHAT[2]["content"],
            "input": "",
            "output": CHAT[3]["content"],
        },
    ),
]


@pytest.mark.parametrize(("kind", "row"), SAME)
def test_rows_that_say_the_same_are_the_same_messages(kind: str, row: dict[str, Any]) -> None:
    assert detect_kind(row, DataSpec(path="x"), "x") == kind
    assert detect_kind(row, DataSpec(path="x", kind=kind), "x") == kind
    assert conversation(kind, row).messages == TALK


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, PLAIN_TEMPLATE], ids=["generation", "prefixes"])
def test_every_kind_of_conversation_is_learned_the_same(tmp_path: Path, tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    examples = [read(write_jsonl(tmp_path / "a.jsonl", [row]), tokenizer, seq_len=128).train[0] for _, row in SAME]
    assert all(example == examples[0] for example in examples)
    assert learned_text(examples[0], tokenizer).count("<|im_end|>") == 2


def test_an_input_follows_its_instruction() -> None:
    row = {"instruction": "Translate.", "input": "Guten Tag", "response": "Good day"}
    assert detect_kind(row, DataSpec(path="x"), "x") == "alpaca"
    assert conversation("alpaca", row).messages == [
        {"role": "user", "content": "Translate.\n\nGuten Tag"},
        {"role": "assistant", "content": "Good day"},
    ]


def test_other_names_for_who_speaks_and_tools() -> None:
    said = [("human", "q"), ("function_call", "{}"), ("observation", "42"), ("model", "a")]
    row = {"conversations": [{"from": who, "value": text} for who, text in said], "tools": json.dumps(TOOLS)}
    talk = conversation("sharegpt", row)
    assert [message["role"] for message in talk.messages] == ["user", "assistant", "tool", "assistant"]
    assert talk.tools == TOOLS


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, PLAIN_TEMPLATE], ids=["generation", "prefixes"])
def test_of_prompt_and_completion_as_messages_the_completion_is_learned(
    tmp_path: Path, tokenizer: Any, template: str
) -> None:
    tokenizer.chat_template = template
    rows = [{"prompt": TALK[:4], "completion": TALK[4:]}, {"prompt": TALK[:2], "completion": TALK[2:]}]
    splits = read(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, seq_len=128)
    one, both = (learned_text(splits.train[index], tokenizer).split("<|im_end|>") for index in (0, 1))
    assert splits.train[0]["input_ids"] == splits.train[1]["input_ids"]
    assert one[0] == "His wife." and [text.strip() for text in both[:2]] == ["A sailor.", "His wife."]


def test_what_is_learned_can_be_all(tmp_path: Path, tokenizer: Any) -> None:
    rows = write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK}])
    example = read(rows, tokenizer, seq_len=128, assistant_only_loss=False).train[0]
    assert example["labels"] == example["input_ids"]
    rows = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "Who was he?", "completion": " A sailor."}])
    example = read(rows, tokenizer, completion_only_loss=False).train[0]
    assert learned_text(example, tokenizer) == "<bos>Who was he? A sailor.<eos>"


def test_tokens_that_come_as_they_are(tmp_path: Path, tokenizer: Any) -> None:
    ids = tokenizer("Anne was there.")["input_ids"]
    rows = [
        {"input_ids": ids},
        {"input_ids": ids, "labels": [-100, *ids[1:]], "attention_mask": [1] * len(ids)},
        {"input_ids": [*ids, 0], "labels": [-100, -100, *ids[2:], -100], "attention_mask": [1] * len(ids) + [0]},
    ]
    splits = read(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer)
    assert splits.kind == "tokens"
    assert [splits.train[i]["input_ids"] for i in range(3)] == [ids] * 3
    assert [splits.train[i]["labels"] for i in range(3)] == [ids, [-100, *ids[1:]], [-100, -100, *ids[2:]]]


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("tokens", {"input_ids": "x"}, 'no "input_ids" that is a list of whole numbers'),
        ("tokens", {"input_ids": [1, True]}, "whole numbers"),
        ("tokens", {"input_ids": [1, 10**6]}, "an id outside the tokenizer's 2,048 tokens"),
        ("tokens", {"input_ids": [1, -1]}, "an id outside"),
        ("tokens", {"input_ids": [1, 2], "labels": [1]}, "different lengths"),
        ("tokens", {"input_ids": [1, 2], "labels": [1, 3]}, "neither its token nor -100"),
        ("sharegpt", {"conversations": []}, 'no "conversations"'),
        ("sharegpt", {"conversations": "[1, "}, 'no "conversations"'),
        ("sharegpt", {"conversations": SHAREGPT[:2]}, "no message of the role assistant, only of system, user"),
        ("sharegpt", {"conversations": [{"value": "x"}]}, "message 1 without a role"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content is not text"),
        ("messages", {"messages": [{"role": "assistant", "content": "\ud83d"}]}, "half a character"),
        ("alpaca", {"instruction": "\udc00", "output": "x"}, "half a character"),
        ("alpaca", {"instruction": "x", "output": 3}, "an answer that is no text but int"),
        ("alpaca", {"instruction": None, "output": "x"}, "an instruction that is no text but NoneType"),
        ("alpaca", {"instruction": "x", "output": "y", "history": ["a"]}, "no list of pairs"),
        ("prompt_completion", {"prompt": CHAT[:1], "completion": "x"}, 'no "completion": expected a list'),
        ("prompt_completion", {"prompt": CHAT[:2], "completion": CHAT[2:3]}, "no message of the role assistant"),
    ],
)
def test_rows_of_a_kind_that_cannot_be_used(tokenizer: Any, kind: str, row: dict[str, Any], words: str) -> None:
    assert words in refusal(kind, row, tokenizer)


def test_one_bad_row_in_a_block_spoils_no_other(tmp_path: Path, tokenizer: Any) -> None:
    """Rows are encoded together; for each kind the bad one is named and the others stay as they are."""
    good: dict[str, dict[str, Any]] = {
        "text": {"text": "Anne was there."},
        "prompt_completion": {"prompt": "Who?", "completion": " Anne."},
        "messages": {"messages": CHAT},
        "alpaca": {"instruction": "Who?", "output": "Anne."},
        "tokens": {"input_ids": [1, 9, 2]},
    }
    for kind, row in good.items():
        bad = {name: 5 for name in row}
        path = write_jsonl(tmp_path / f"{kind}.jsonl", [row, row, bad, row])
        with pytest.raises(InputError, match=r"jsonl, line 3, has"):
            read(path, tokenizer, kind=kind)
        splits = read(path, tokenizer, kind=kind, on_bad_row="skip")
        assert (splits.examples, splits.skipped) == (3, 1)
        assert [splits.train[index] for index in range(3)] == [splits.train[0]] * 3


def test_conversations_in_a_csv_file_are_json(tmp_path: Path, tokenizer: Any) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["conversations", "id"], [json.dumps(SHAREGPT), "1"]])
    assert "His wife." in learned_text(read(tmp_path / "a.csv", tokenizer, seq_len=128).train[0], tokenizer)


def test_messages_with_tools_go_through_the_template_one_by_one(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if tools %}[{{ tools[0]['function']['name'] }}]{% endif %}" + tiny.CHAT_TEMPLATE
    rows = [{"messages": CHAT}, {"messages": CHAT, "tools": TOOLS}]
    without, with_tools = encoder("messages", tokenizer, DataSpec(path="x"), print)(rows)
    texts = [tokenizer.decode(each.input_ids) for each in (without, with_tools)]
    assert "[look_up]" not in texts[0] and texts[1] == "[look_up]" + texts[0]
    assert sum(without.learned) == sum(with_tools.learned) > 0


def test_the_kinds_of_the_command_line_are_those_there_are() -> None:
    from vramplan.train.kinds import _EXPECTED

    assert set(DATA_KINDS) == {"auto", *_EXPECTED}


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=30),
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 20)), max_size=4),
)
def test_a_token_is_learned_if_one_of_its_characters_is(sizes: list[int], cuts: list[tuple[int, int]]) -> None:
    offsets, at = [], 0
    for size in sizes:
        offsets.append((at, at + size))
        at += size
    spans = [(start, start + size) for start, size in cuts]
    wanted = [any(set(range(*token)) & set(range(*span)) for span in spans) for token in offsets]
    assert [bool(flag) for flag in inside(offsets, spans)] == wanted
