"""Training data: every format and kind, every way a file can be wrong, and the laws of labels and padding."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vramplan.core.types import DataSpec, RunSpec, Schedule
from vramplan.errors import InputError

pytest.importorskip("transformers")
pytest.importorskip("torch")

from vramplan.train import data, rows, tiny
from vramplan.train.data import Collator, Splits, TokenStore, build
from vramplan.train.encode import encoder
from vramplan.train.kinds import BadRow

CHAT = [
    {"role": "user", "content": "Who was he?"},
    {"role": "assistant", "content": "A sailor."},
    {"role": "user", "content": "And she?"},
    {"role": "assistant", "content": "His wife."},
]
PLAIN_TEMPLATE = tiny.CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# As Qwen3's: a turn is written otherwise once a later one follows.
REWRITING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last and m['role'] == 'assistant' %}[thought]"
    "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def told() -> list[dict[str, Any]]:
    return []


def run_spec(path: Path | str, seq_len: int = 64, seed: int = 42, **changes: Any) -> RunSpec:
    return RunSpec(
        model="tiny", seq_len=seq_len, data=DataSpec(path=str(path), **changes), schedule=Schedule(seed=seed)
    )


def read(path: Path | str, tokenizer: Any, told: list[dict[str, Any]] | None = None, **changes: Any) -> Splits:
    return build(run_spec(path, **changes), tokenizer, report=(told if told is not None else []).append)


def write_jsonl(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def refusal(kind: str, row: dict[str, Any], tokenizer: Any) -> str:
    """Why this one row cannot be used."""
    (result,) = encoder(kind, tokenizer, DataSpec(path="x"), print)([row])
    assert isinstance(result, BadRow)
    return str(result)


def learned_text(example: dict[str, list[int]], tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in example["labels"] if label != -100]))


# ----------------------------------------------------------------------------------------------------- kinds
def test_text_rows_are_learned_whole_and_end(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "Anne was there."}])
    example = read(path, tokenizer).train[0]
    assert example["labels"] == example["input_ids"]
    assert tokenizer.decode(example["input_ids"]) == "<bos>Anne was there.<eos>"
    assert example["attention_mask"] == [1] * len(example["input_ids"])


def test_only_the_completion_and_the_end_are_learned(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Who was he?", "completion": " A sailor."}])
    example = read(path, tokenizer).train[0]
    assert learned_text(example, tokenizer) == " A sailor.<eos>"
    assert tokenizer.decode(example["input_ids"]) == "<bos>Who was he? A sailor.<eos>"


def test_the_prompt_keeps_its_own_tokens_where_the_two_would_merge(tmp_path: Path, tokenizer: Any) -> None:
    start = tokenizer("the wo")["input_ids"]
    assert tokenizer("the world")["input_ids"][: len(start)] != start  # else this tests nothing
    example = read(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "the wo", "completion": "rld"}]), tokenizer).train[0]
    assert example["input_ids"][: len(start)] == start
    assert learned_text(example, tokenizer) == "rld<eos>"


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, PLAIN_TEMPLATE], ids=["generation", "prefixes"])
def test_only_the_assistants_words_are_learned(tmp_path: Path, tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    example = read(write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]), tokenizer).train[0]
    assert example["input_ids"] == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert learned_text(example, tokenizer).split("<|im_end|>")[:2] in (
        ["A sailor.", "His wife."],
        ["A sailor.", "\nHis wife."],  # by prefixes, the line's end belongs to the turn
    )


def test_a_first_message_by_the_assistant_does_not_teach_its_heading(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN_TEMPLATE
    example = read(write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT[1:3]}]), tokenizer).train[0]
    assert learned_text(example, tokenizer) == "A sailor.<|im_end|>\n"


def test_a_slow_tokenizer_gives_the_same_labels(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN_TEMPLATE

    class Slow:
        is_fast = False
        chat_template = PLAIN_TEMPLATE
        get_chat_template = tokenizer.get_chat_template
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text: str, **options: Any) -> Any:
            return {"input_ids": tokenizer(text, **options)["input_ids"]}

    rows, spec = [{"messages": CHAT}], DataSpec(path="x")
    (slow,), (fast,) = (encoder("messages", each, spec, print)(rows) for each in (Slow(), tokenizer))
    assert list(slow.input_ids) == list(fast.input_ids)
    assert bytes(slow.learned) == bytes(fast.learned)


def test_turns_that_are_written_otherwise_once_others_follow_are_found_by_their_words(
    tmp_path: Path, tokenizer: Any
) -> None:
    tokenizer.chat_template = REWRITING_TEMPLATE
    example = read(write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]), tokenizer).train[0]
    assert learned_text(example, tokenizer) == "A sailor.<|im_end|>\n[thought]His wife.<|im_end|>\n"


def test_a_template_that_rewrites_what_was_said_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = REWRITING_TEMPLATE.replace(
        "{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'] | upper }}"
    )
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: the chat template rewrites earlier turns"):
        read(path, tokenizer, on_bad_row="skip")


def test_without_a_template_a_plain_one_is_used_and_said(
    tmp_path: Path, tokenizer: Any, told: list[dict[str, Any]]
) -> None:
    tokenizer.chat_template = None
    example = read(write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT[:2]}]), tokenizer, told).train[0]
    assert learned_text(example, tokenizer) == "A sailor.<eos>"
    assert "### Assistant:\nA sailor.<eos>" in tokenizer.decode(example["input_ids"])
    assert [event["event"] for event in told] == ["warning", "data"]
    assert "no chat template" in told[0]["message"]


def test_a_text_column_the_user_named_wins(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT, "body": "Only this."}])
    example = read(path, tokenizer, text_column="body").train[0]
    assert learned_text(example, tokenizer) == "<bos>Only this.<eos>"


# --------------------------------------------------------------------------------------------------- formats
TEXTS = ["First one, with a comma.", 'Second\nhas "two" lines.', "Third: ümlaut, 三."]


def write_as(kind: str, folder: Path) -> Path:
    values, path = [{"text": text, "n": 1} for text in TEXTS], folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("\ufeff" + "\r\n".join(map(json.dumps, values)) + "\n\n", encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(values, indent=2), encoding="utf-8")
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(values), path)
    elif kind == "txt":
        path.write_text("\n\n \n".join(TEXTS) + "\n", encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "n"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(values)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "tsv", "txt"])
def test_every_format_gives_the_same_rows(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    splits = read(write_as(kind, tmp_path), tokenizer)
    texts = [tokenizer.decode(splits.train[i]["input_ids"], skip_special_tokens=True) for i in range(len(splits.train))]
    assert texts == TEXTS
    assert (splits.examples, splits.truncated, splits.skipped, splits.eval) == (3, 0, 0, None)
    assert splits.longest == max(len(splits.train[i]["input_ids"]) for i in range(3))


def test_parquet_messages_with_null_columns(tmp_path: Path, tokenizer: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    messages = [{**message, "name": None} for message in CHAT]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "a.parquet")
    assert "His wife." in learned_text(read(tmp_path / "a.parquet", tokenizer).train[0], tokenizer)


def test_a_data_set_by_name(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(name: str, config: str | None, split: str, revision: str | None) -> Any:
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_list([{"text": text} for text in TEXTS])

    asked: list[tuple[str | None, ...]] = []
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("someone/something", tokenizer, split="test[:10%]").examples == 3
    whole = rows.Rows(DataSpec(path="x/y"))
    assert [(whole.share(), row.where) for row in whole] == [(1 / 3, "row 1"), (2 / 3, "row 2"), (1.0, "row 3")]
    asked.pop()
    splits = read("a/b", tokenizer, config="en", revision="v2", eval_split="validation")
    assert splits.eval is not None and (splits.examples, len(splits.eval)) == (3, 3)
    assert asked == [
        ("someone/something", None, "test[:10%]", None),
        ("a/b", "en", "train", "v2"),
        ("a/b", "en", "validation", "v2"),
    ]


@pytest.mark.parametrize(
    ("asked", "flag"),
    [({"split": "test"}, "--split"), ({"config": "en"}, "--data-config"), ({"eval_split": "test"}, "--eval-split")],
)
def test_a_file_has_no_splits(tmp_path: Path, tokenizer: Any, asked: dict[str, Any], flag: str) -> None:
    with pytest.raises(InputError, match=rf"^{flag} is for data sets by name, and .*a\.jsonl is a file"):
        read(write_jsonl(tmp_path / "a.jsonl", [{"text": "x y z"}]), tokenizer, **asked)


def test_an_unknown_data_set_is_one_sentence(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach it\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match=r"^'nobody/nothing' is neither a file .*: Couldn't reach it$"):
        read("nobody/nothing", tokenizer)


# ------------------------------------------------------------------------------------------------ wrong files
def test_wrong_paths(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "x.docx").write_text("x")
    for path, words in {
        tmp_path: "is a folder",
        tmp_path / "none.jsonl": "no data file",
        tmp_path / "empty.jsonl": "is empty",
        tmp_path / "blank.jsonl": "holds no rows",
        tmp_path / "x.docx": r"data files end in one of .*\.jsonl",
    }.items():
        with pytest.raises(InputError, match=words):
            read(path, tokenizer)


GOOD = b'{"text": "A good row."}\n'


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"text": "cut off\n', "is not JSON"),
        (b"[1, 2]\n", "is a JSON array, not an object"),
        (b"null\n", "is a JSON null, not an object"),
        (b'{"text": "caf\xe9"}\n', "is not UTF-8"),
        (b"\xff\xfe{\x00}\x00\n", "is UTF-16"),
        (b'{"text": 5}\n', 'has a int as "text"'),
        (b'{"text": null}\n', 'has a NoneType as "text"'),
        (b'{"words": "x"}\n', 'has no "text"'),
        (b'{"text": "cut \\ud83d in two"}\n', "has half a character .* at position 4"),
        (b"[" * 100_000 + b"\n", "is not JSON that can be read"),
        (b'{"n": ' + b"1" * 10_000 + b"}\n", "is not JSON that can be read|has no"),
    ],
)
def test_one_bad_line_is_named_or_skipped(
    tmp_path: Path, tokenizer: Any, told: list[dict[str, Any]], bad: bytes, words: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 3 + bad + GOOD * 2)
    with pytest.raises(InputError, match=rf"a\.jsonl, line 4, ({words})"):
        read(path, tokenizer)
    splits = read(path, tokenizer, told, on_bad_row="skip")
    assert (splits.examples, splits.skipped) == (5, 1)
    assert "1 bad row left out" in told[0]["message"] and "line 4" in told[0]["message"]


def test_a_huge_line_is_not_held(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + json.dumps({"text": "x" * 5000}).encode() + b"\n" + GOOD)
    with pytest.raises(InputError, match="line 2, is longer than"):
        read(path, tokenizer)
    assert read(path, tokenizer, on_bad_row="skip").examples == 2


@pytest.mark.parametrize("line", [b"one,two,three\n", b"caf\xe9,two\n", b"only one\n"])
def test_a_bad_csv_row_does_not_spoil_its_neighbours(tmp_path: Path, tokenizer: Any, line: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,n\nfirst,1\n" + line + b"last,2\n")
    with pytest.raises(InputError, match=r"a\.csv, line 3, (has \d values|is not UTF-8)"):
        read(path, tokenizer)
    splits = read(path, tokenizer, on_bad_row="skip")
    assert [learned_text(splits.train[i], tokenizer) for i in range(2)] == ["<bos>first<eos>", "<bos>last<eos>"]


def test_files_that_are_not_what_they_say(tmp_path: Path, tokenizer: Any) -> None:
    pytest.importorskip("pyarrow")
    for name, content, words in (
        ("a.parquet", b"PAR1 or not", "cannot be read as Parquet"),
        ("a.json", b'[{"text": "x"}, ', "line 1, is not JSON"),
        ("b.json", b'[{"text": "\xff"}]', "is not UTF-8"),
        ("a.csv", b"text,text\na,b\n", "must name the columns, each once"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            read(tmp_path / name, tokenizer)


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({"foo": "x", "bar": 1}, "auto", r"line 1, has the columns bar, foo; expected \{\"messages\""),
        ({"question": "x", "answer": "y"}, "auto", "columns answer, question"),
        ({"chosen": "x", "rejected": "y"}, "auto", "columns chosen, rejected"),
        ({"text": "x"}, "messages", "columns text; expected"),
        ({"prompt": "x"}, "prompt_completion", "columns prompt; expected"),
        ({"instruction": "x"}, "alpaca", "columns instruction; expected"),
        ({"text": "x"}, "poems", "'poems' is not a kind of data"),
    ],
)
def test_wrong_columns(tmp_path: Path, tokenizer: Any, row: dict[str, Any], kind: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        read(write_jsonl(tmp_path / "a.jsonl", [row]), tokenizer, kind=kind, on_bad_row="skip")
    assert error.value.hint


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], 'has no "messages"'),
        ("hello", 'has no "messages"'),
        ([{"content": "x"}], "message 1 without a role"),
        ([{"role": "assistant", "content": 3}], r"message 1 \(assistant\) whose content is not text"),
        (CHAT[:1], "no message of the role assistant, only of user"),
    ],
)
def test_wrong_messages(tokenizer: Any, messages: Any, words: str) -> None:
    assert re.search(words, refusal("messages", {"messages": messages}, tokenizer))


def test_what_the_template_refuses_is_a_bad_row(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "refused by the chat template: roles must alternate" in refusal("messages", {"messages": CHAT}, tokenizer)


@pytest.mark.parametrize("bad", [{"eval_fraction": 1.0}, {"eval_fraction": float("nan")}, {"on_bad_row": "maybe"}])
def test_wrong_settings(tmp_path: Path, tokenizer: Any, bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        read(write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}]), tokenizer, **bad)


# ----------------------------------------------------------------------------------------------- cutting and splitting
def test_cut_and_left_out_rows_are_counted_and_said(tmp_path: Path, tokenizer: Any, told: list[dict[str, Any]]) -> None:
    long = "and so on " * 40
    values = [
        {"prompt": "Short?", "completion": " Yes."},
        {"prompt": "Short?", "completion": long},  # cut
        {"prompt": long, "completion": " Yes."},  # nothing to learn within 16 tokens
        {"prompt": "Nothing?", "completion": " "},  # nothing to learn at all
    ]
    splits = read(write_jsonl(tmp_path / "a.jsonl", values), tokenizer, told, seq_len=16)
    assert (splits.examples, splits.truncated, splits.skipped, splits.longest) == (2, 1, 2, 16)
    messages = " ".join(event["message"] for event in told if event["event"] == "warning")
    assert "1 row (50.0 %) cut" in messages and "2 rows left out" in messages
    found = told[-1]
    lost = len(tokenizer(long)["input_ids"]) + len(tokenizer("Short?")["input_ids"]) - 16
    assert (found["event"], found["rows"], found["empty"], found["truncated"]) == ("data", 4, 2, 1)
    assert found["tokens_lost"] == pytest.approx(lost, abs=2)  # a start token less, an end token more


def test_no_usable_row_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": " \n"}])
    with pytest.raises(InputError, match="none of the 2 rows"):
        read(path, tokenizer)
    path.write_text("{\n{\n")
    with pytest.raises(InputError, match=r"the first bad one: .*line 1"):
        read(path, tokenizer, on_bad_row="skip")


@given(count=st.integers(2, 60), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 5))
def test_the_split_is_a_partition_by_the_seed(count: int, fraction: float, seed: int) -> None:
    train, held_out = data._split(count, fraction, seed)
    assert len(train) >= 1 and len(held_out) >= 1
    assert sorted([*train, *held_out]) == list(range(count))
    assert (train, held_out) == data._split(count, fraction, seed)
    assert abs(len(held_out) - count * fraction) <= 1


def test_the_split_of_a_file(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"row {i}"} for i in range(40)])
    one, same, other = (read(path, tokenizer, eval_fraction=0.25, seed=seed) for seed in (1, 1, 2))
    assert one.eval is not None and same.eval is not None and other.eval is not None
    assert (len(one.train), len(one.eval), one.examples) == (30, 10, 30)
    assert list(one.eval) == list(same.eval) != list(other.eval)
    with pytest.raises(InputError, match="one row cannot be split"):
        read(write_jsonl(path, [{"text": "x"}]), tokenizer, eval_fraction=0.5)


def test_a_run_without_data(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="names no data"):
        build(replace(run_spec("x"), data=None), tokenizer, report=print)


# ------------------------------------------------------------------------------------------------------ laws
token_rows = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=40), min_size=1, max_size=8
)


@given(token_rows)
def test_the_store_gives_back_what_it_was_given(given_rows: list[list[tuple[int, bool]]]) -> None:
    store = TokenStore()
    for row in given_rows:
        store.append([token for token, _ in row], [learned for _, learned in row])
    assert len(store) == len(given_rows)
    for index, row in enumerate(given_rows):
        example = store.example(index)
        assert example["input_ids"] == [token for token, _ in row]
        assert example["labels"] == [token if learned else -100 for token, learned in row]
        assert store.length(index) == len(example["attention_mask"]) == len(row)


@given(token_rows, st.integers(0, 9), st.sampled_from([None, 40, 64]))
def test_padding_is_the_only_thing_the_collator_adds(
    given_rows: list[list[tuple[int, bool]]], pad: int, limit: int | None
) -> None:
    store = TokenStore()
    for row in given_rows:
        store.append([token for token, _ in row], [learned for _, learned in row])
    examples = [store.example(index) for index in range(len(store))]
    batch = Collator(pad, limit)(examples)
    longest = max(len(row) for row in given_rows)
    width = batch["input_ids"].shape[1]
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(len(examples), width)}
    assert width == longest if longest <= 8 else longest <= width < longest + 8 and (width % 8 == 0 or width == limit)
    for index, example in enumerate(examples):
        size = len(example["input_ids"])
        assert {name: tensor[index, :size].tolist() for name, tensor in batch.items()} == example
        assert set(batch["input_ids"][index, size:].tolist()) <= {pad}
        assert set(batch["labels"][index, size:].tolist()) <= {-100}
        assert set(batch["attention_mask"][index, size:].tolist()) <= {0}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(prompt=st.text(max_size=60), completion=st.text(max_size=60), seq_len=st.integers(2, 40))
def test_labels_are_the_tokens_or_nothing_and_never_too_many(
    tmp_path: Path, tokenizer: Any, prompt: str, completion: str, seq_len: int
) -> None:
    path = tmp_path / "law.jsonl"
    filler = {"prompt": "", "completion": "a row that is always learned"}
    write_jsonl(path, [{"prompt": prompt, "completion": completion}, filler])
    train = read(path, tokenizer, seq_len=seq_len).train
    for example in train:
        assert 0 < len(example["input_ids"]) <= seq_len
        flags = [label != -100 for label in example["labels"]]
        assert flags == sorted(flags)  # the prompt first, then what is learned
        assert [label for label in example["labels"] if label != -100] == example["input_ids"][flags.index(True) :]
    if len(train) == 2:
        start = tokenizer(prompt)["input_ids"]
        assert [label != -100 for label in train[0]["labels"]].index(True) == len(start)
