"""From a size back to a shape."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.core.diagnose import diagnose
from vramplan.core.inverse import CLEAR, Known, shapes, sizes
from vramplan.core.types import OomEvidence, RunSpec
from vramplan.core.units import GIB, MIB
from vramplan.sources.hf_config import load_model
from vramplan.sources.profiles import model_shapes

KNOWN = Known(*model_shapes())
VOCABULARIES = [vocab for vocab, _ in KNOWN.vocabularies]


def reported(size: int) -> int:
    """As PyTorch prints it: two digits, after it was rounded up to 2 MiB."""
    size = -(-size // (2 * MIB)) * 2 * MIB
    unit = GIB if size > GIB else MIB
    return round(round(size / unit, 2) * unit)


@given(st.sampled_from(VOCABULARIES), st.sampled_from([1024, 2048, 4096, 8192, 16384]))
def test_logits_of_usual_shapes_are_found(vocab: int, tokens: int) -> None:
    """What was meant is said where only one vocabulary can be; else something that fits as well."""
    asked = reported(tokens * vocab * 4)
    found = shapes(asked, KNOWN, "loss")
    assert found and all(shape.cause == "logits" and shape.clear >= CLEAR for shape in found)
    alone = shapes(asked, Known(((vocab, ("it",)),)), "loss")
    assert any(f"{tokens:,} tokens with a vocabulary of {vocab:,}" in shape.text for shape in alone)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_token_may_be_missing_from_every_sequence(batch: int) -> None:
    """The labels are shifted: older versions of transformers copy the logits of all tokens but the last."""
    found = shapes(reported(batch * (2048 - 1) * 151936 * 4), Known(((151936, ("qwen",)),)), "loss")
    assert f"{batch * 2048:,} tokens" in found[0].text


@given(st.sampled_from([8, 16, 32, 40, 64]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1024, 2048, 4096]))
def test_scores_of_eager_attention_are_found(heads: int, batch: int, tokens: int) -> None:
    found = shapes(reported(batch * heads * tokens**2 * 4), Known((), (heads,)), "eager")
    assert found and all(shape.cause == "eager_attention" for shape in found)
    squares = {batch * heads * tokens**2 * 4, batch * heads * tokens**2 * 2}
    numbers = [int(word.replace(",", "")) for word in found[0].text.split() if word.replace(",", "").isdigit()]
    assert math.prod(numbers) * (4 if "float32" in found[0].text else 2) in squares


@given(st.integers(1, 200 * GIB), st.sampled_from(["loss", "eager", "load", "optimizer", "forward", None]))
def test_what_is_said_has_the_size(asked: int, phase: str | None) -> None:
    found = shapes(asked, KNOWN, phase)
    assert phase in ("loss", "eager") or not found
    for shape in found:
        if shape.cause == "logits":
            tokens, vocab = (int(w.replace(",", "")) for w in shape.text.partition("(")[0].split() if w[0].isdigit())
            width = 4 if shape.text.startswith("float32") else 2
            least, most = sizes(asked)
            assert least <= tokens * vocab * width <= most + 8 * vocab * width  # a few tokens may be missing


LOSS = ("trainer.py:1 compute_loss", "loss_utils.py:36 fixed_cross_entropy")


def test_a_report_without_a_run_names_the_shape() -> None:
    evidence = OomEvidence(message="CUDA out of memory", requested_bytes=reported(4096 * 128256 * 4), frames=LOSS)
    found = diagnose(evidence, known=KNOWN)
    assert found.cause_keys[0] == "logits"
    assert "1.96 GiB would be" in found.causes[0] and "4,096 tokens with a vocabulary of 128,256" in found.causes[0]
    assert "would be" not in " ".join(diagnose(evidence).causes)


def test_with_a_run_its_own_tensors_count() -> None:
    evidence = OomEvidence(message="CUDA out of memory", requested_bytes=reported(4096 * 128256 * 4), frames=LOSS)
    found = diagnose(evidence, load_model("llama-3.1-8b"), RunSpec(model="llama-3.1-8b"), known=KNOWN)
    assert "would be" not in " ".join(found.causes)
