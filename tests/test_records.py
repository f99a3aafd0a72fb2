"""The JSON codec: a round trip for every dataclass, and a clear refusal for everything else."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import types as python_types
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.core import types
from vramplan.core.types import DataSpec, GpuProfile, Levers, Line, Lora, ModelSpec, RunSpec, Schedule
from vramplan.errors import InputError, VramplanError
from vramplan.sources import records

CLASSES = [item for item in vars(types).values() if isinstance(item, type) and dataclasses.is_dataclass(item)]
MODEL = ModelSpec(
    name="tiny",
    architecture="LlamaForCausalLM",
    model_type="llama",
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_size=320,
    max_position_embeddings=256,
)


def of_hint(hint: Any, name: str) -> st.SearchStrategy[Any]:
    if dataclasses.is_dataclass(hint):
        return instances(typing.cast(type, hint))
    args = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, python_types.UnionType):
        return st.none() | st.one_of([of_hint(arg, name) for arg in args if arg is not type(None)])
    if typing.get_origin(hint) is tuple:
        if args[-1] is Ellipsis:
            return st.lists(of_hint(args[0], name), max_size=3).map(tuple)
        return st.tuples(*(of_hint(arg, name) for arg in args))
    if name in records.CHOICES:
        return st.sampled_from(records.CHOICES[name])
    return {
        int: st.integers(-(2**63) + 1, 2**63 - 1),
        float: st.floats(-1e300, 1e300),
        str: st.text(st.characters(), max_size=20),  # lone surrogates too: names of files may hold them
        bool: st.booleans(),
    }[hint]


def instances(cls: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{f.name: of_hint(hints[f.name], f.name) for f in dataclasses.fields(cls)})


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_record_survives_the_round_trip_through_text(cls: type) -> None:
    @settings(max_examples=15, deadline=None, database=None)
    @given(instances(cls))
    def law(value: Any) -> None:
        text = json.dumps(records.encode(value), allow_nan=False)
        again = records.decode(json.loads(text), cls)
        assert again == value
        assert json.dumps(records.encode(again)) == text

    law()


def test_the_envelope_names_version_and_type() -> None:
    assert records.encode(Lora(r=8)) == {
        "schema_version": 1,
        "type": "Lora",
        "r": 8,
        "alpha": 32,
        "targets": ["all-linear"],
        "dropout": 0.0,
        "dtype": "float32",
    }


def test_missing_keys_take_their_defaults_and_int_serves_as_float() -> None:
    lora = records.decode({"schema_version": 1, "type": "Lora", "dropout": 0}, Lora)
    assert lora == Lora() and type(lora.dropout) is float


def run_with(**changes: Any) -> dict[str, Any]:
    return {**records.encode(RunSpec(model="m", data=DataSpec(path="d"))), **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"micro_batch_size": True}, "micro_batch_size must be a whole number, not true"),
        ({"micro_batch_size": 1.0}, "micro_batch_size must be a whole number, not 1.0"),
        ({"micro_batch_size": "1"}, 'micro_batch_size must be a whole number, not "1"'),
        ({"micro_batch_size": None}, "micro_batch_size must be a whole number, not null"),
        ({"micro_batch_size": 2**63}, "micro_batch_size is too large"),
        ({"double_quant": 1}, "double_quant must be true or false, not 1"),
        ({"model": 3}, "model must be text, not 3"),
        ({"lora": []}, "lora must be an object, not a list"),
        ({"lora": {"targets": "q_proj"}}, 'lora.targets must be a list, not "q_proj"'),
        ({"lora": {"targets": ["q_proj", 3]}}, "lora.targets[1] must be text, not 3"),
        ({"lora": {"dropout": float("nan")}}, "lora.dropout is NaN"),
        ({"lora": {"dropout": float("inf")}}, "lora.dropout is too large"),
        ({"lora": {"dropout": 10**400}}, "lora.dropout is too large"),
        ({"lora": {"dropout": False}}, "lora.dropout must be a number, not false"),
        ({"lora": {"rank": 8}}, '"lora.rank" is not a field of Lora'),
        ({"levers": {"upcast": "some"}}, 'levers.upcast must be one of all, norms, none, not "some"'),
        ({"data": {"kind": "text"}}, "data.path is missing"),
        ({"extra": 1}, '"extra" is not a field of RunSpec'),
        ({"model": {"deep": 1}}, "model must be text, not an object"),
        ({"schema_version": 2}, "has schema_version 2, this vramplan reads up to 1"),
        ({"schema_version": None}, "schema_version is null"),
        ({"schema_version": True}, "schema_version is true"),
        ({"schema_version": "1"}, 'schema_version is "1"'),
        ({"type": "Plan"}, "holds a record of type \"Plan\", not 'RunSpec'"),
    ],
)
def test_bad_fields_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        records.decode(run_with(**changes), RunSpec, where="run.json")
    assert caught.value.message.startswith("run.json") and said in caught.value.message
    assert "\n" not in caught.value.message and len(caught.value.message) < 200


def test_a_fixed_tuple_must_have_its_length() -> None:
    data = records.encode(GpuProfile(key="k", name="n", total_bytes=2, usable_bytes=1))
    with pytest.raises(InputError, match="compute_capability must have 2 entries, not 3"):
        records.decode({**data, "compute_capability": [8, 9, 0]}, GpuProfile)


@pytest.mark.parametrize("data", [[], None, 3, "text", True])
def test_only_an_object_is_a_record(data: Any) -> None:
    with pytest.raises(InputError, match="not a Lora record"):
        records.decode(data, Lora)


def test_nan_is_not_written() -> None:
    with pytest.raises(InputError, match=r"Schedule.learning_rate is nan"):
        records.encode(Schedule(learning_rate=float("nan")))
    with pytest.raises(TypeError):
        records.encode({"a": 1})
    with pytest.raises(TypeError):
        records.encode(Lora(targets=typing.cast("tuple[str, ...]", {"q_proj"})))


# --------------------------------------------------------------------------------------------------------- files
def test_files_round_trip_and_leave_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    records.write_json(path, MODEL)
    records.write_json(path, dataclasses.replace(MODEL, name="zwölf"))
    assert records.read_json(path, ModelSpec).name == "zwölf"
    assert [p.name for p in tmp_path.iterdir()] == ["model.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a":' * 200_000, "nested too deep"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b'{"r": ' + b"9" * 5000 + b"}", "a number is too long"),
        (b"[]", "not a Lora record"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        records.read_json(path, Lora)
    assert str(path) in caught.value.message


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(records.encode(Lora(r=4))).encode())
    assert records.read_json(path, Lora).r == 4


def test_missing_folder_and_oversized_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path, Path("nul\0byte")):
        with pytest.raises(InputError, match="cannot read"):
            records.read_json(path, Lora)
    big = tmp_path / "big.json"
    big.write_bytes(b" " * 2**20 + b"x")
    with pytest.raises(InputError, match="larger than 1 MiB"):
        records.read_text(big, 2**20)
    assert len(records.read_text(big, 2**20 + 1)) == 2**20 + 1


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.json"
    records.write_json(path, MODEL)

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VramplanError, match="No space left on device") as caught:
        records.write_json(path, dataclasses.replace(MODEL, name="other"))
    assert caught.value.exit_code == 1
    assert records.read_json(path, ModelSpec) == MODEL
    assert [p.name for p in tmp_path.iterdir()] == ["model.json"]


def test_only_regular_files_are_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent" / "x.json", Path(os.devnull)):
        with pytest.raises(InputError, match="cannot write"):
            records.write_json(path, Lora())
    assert not Path(os.devnull).is_file()


def test_lines_are_appended_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = [Line(key=f"k.{i}", label="x\ny", bytes=i, formula="") for i in range(3)]
    for line in lines:
        records.append_jsonl(path, line)
    assert path.read_bytes().count(b"\n") == 3
    assert records.read_jsonl(path, Line) == lines


def test_a_torn_last_line_is_left_out_but_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    records.append_jsonl(path, Levers())
    with path.open("ab") as file:
        file.write(b'{"schema_version": 1, "ty')
    assert records.read_jsonl(path, Levers) == [Levers()]
    with path.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(InputError, match="line 2 is not valid JSON"):
        records.read_jsonl(path, Levers)


def test_a_line_that_does_not_fit_on_the_disk_is_taken_back() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(VramplanError, match="cannot write /dev/full"):
        records.append_jsonl(full, Lora())
