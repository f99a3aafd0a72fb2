"""What the blocks refuse, and kernels that only some of them take. Their steps: test_trace_agrees.py."""

from __future__ import annotations

import pytest
from traced import CONFIGS, lean, spec_of

from vramplan.core.blocks import PLAYED
from vramplan.core.timeline import play
from vramplan.core.types import RunSpec, Unplannable
from vramplan.sources.hf_config import parse_config
from vramplan.sources.profiles import load_gpu


def test_every_family_that_is_played_is_compared_with_the_libraries() -> None:
    compared = {config["model_type"] for config in CONFIGS.values()}
    assert compared | {"gemma3_text"} == set(PLAYED)  # Gemma 3 is Gemma 2's block with a period of six layers


def test_an_activation_that_is_not_described_is_refused() -> None:
    config = {**CONFIGS["phi"], "hidden_act": "relu2", "architectures": ["x"]}
    spec = parse_config(config, name="x", source="x")
    with pytest.raises(Unplannable, match="activation 'relu2'"):
        play(spec, lean("phi"), load_gpu("h200"))


def test_one_key_head_without_grouped_attention_is_played_in_float32() -> None:
    """Falcon-7B: no fused kernel takes 71 heads on one, so the scores are whole tensors, 71 x S x S in float32."""
    step = play(spec_of("falcon-7b"), RunSpec(model="x", seq_len=128), load_gpu("h200"))
    assert any(row[1:] == ("attention softmax", 16 * 128, 128, "float32", 16 * 128 * 128 * 4) for row in step.info)
