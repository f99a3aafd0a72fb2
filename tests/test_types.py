"""The values that cross doors: frozen, compared and hashed by their fields, whatever way that is made."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.core import types
from vramplan.core.types import Levers, Lora, RunSpec
from vramplan.core.units import GIB, human, parse_size, round_up

CLASSES = [c for c in vars(types).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]


def test_every_class_is_slotted_keyword_only_and_a_value():
    assert len(CLASSES) > 20
    for cls in CLASSES:
        assert "__dict__" not in dir(cls), cls
        assert issubclass(cls, types.Value)
        assert all(field.kw_only for field in dataclasses.fields(cls))


def test_a_value_cannot_be_changed():
    run = RunSpec(model="m")
    for change in (lambda: setattr(run, "seq_len", 1), lambda: delattr(run, "seq_len")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            change()
    with pytest.raises(AttributeError):
        run.nonsense = 1  # type: ignore[attr-defined]
    assert run.seq_len == 2048


def test_values_are_equal_by_their_fields():
    one, two = RunSpec(model="m", lora=Lora(r=8)), RunSpec(model="m", lora=Lora(r=8))
    assert one == two
    assert hash(one) == hash(two)
    assert one != dataclasses.replace(one, lora=Lora(r=9))
    assert Levers() != Lora()
    assert len({one, two}) == 1
    assert eval(repr(one), vars(types)) == one
    assert copy.copy(one) == one
    assert pickle.loads(pickle.dumps(one)) == one


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * GIB), ("24 GB", 24 * 10**9), ("512M", 512 * 2**20), ("8589934592", 2**33), ("1.5 TiB", 3 * 2**39)],
)
def test_sizes_mean_what_they_say(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1 GB", "1e9", "12 parsecs", "nan", "1 GiB x"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@given(st.integers(0, 2**50), st.integers(1, 2**30))
def test_rounding_up(size, step):
    up = round_up(size, step)
    assert up % step == 0
    assert size <= up < size + step


def test_sizes_are_printed_in_binary_units():
    assert [human(n) for n in (0, 512, 2048, 8.1 * 2**20, 6845104128)] == [
        "0 B",
        "512 B",
        "2.0 KiB",
        "8.1 MiB",
        "6.38 GiB",
    ]
