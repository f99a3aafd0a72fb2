"""What others know a model by."""

from __future__ import annotations

import pytest

from vramplan.core.names import public_name


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("gpt2", "gpt2"),
        ("/home/me/.cache/huggingface/hub/models--org--Some-7B/snapshots/0123abcd", "org/Some-7B"),
        ("/home/me/models/Some 7B/", "Some-7B"),
        ("~/models", "models"),
        ("./some", "some"),
        ("../a/b", "b"),
        ("a/b/c", "c"),
        ("weights/some.Q8_0.gguf", "some.Q8_0.gguf"),
        (r"C:\\Users\\me\\models\\some", "some"),
        ("/", "model"),
        ("", "model"),
    ],
)
def test_a_name_and_no_path(place: str, expected: str) -> None:
    assert public_name(place) == expected
