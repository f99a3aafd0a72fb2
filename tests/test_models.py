"""The built-in models: every file is whole, and their sizes add up to the published parameter counts."""

from __future__ import annotations

import pytest

from vramplan.core.architecture import total_parameters
from vramplan.sources import profiles
from vramplan.sources.hf_config import load_model, raw_config

NAMES = profiles.model_names()

# Parameters as the Hub shows them for the repository's safetensors, or as the reference says.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b-v0.1": 7_241_732_096,
    "phi-3-mini-4k": 3_821_079_552,  # keras-hub, phi3_presets.py
}
# What the name says, in billions, where the last number before its "b" does not say it closely enough.
SAID = {
    "smollm2-135m": 0.1345,
    "smollm2-360m": 0.362,
    "llama-3.2-1b": 1.24,
    "mistral-7b-v0.1": 7.24,
    "mistral-7b-v0.3": 7.25,
    "gemma-2-2b": 2.6,
    "granite-3.1-2b": 2.5,
    "phi-3-mini-4k": 3.8,
    "phi-2": 2.78,
    "phi-4": 14.7,
    "mixtral-8x7b": 46.7,
    "qwen3-30b-a3b": 30.5,
}


def test_there_are_enough_models_and_all_families_of_the_list() -> None:
    assert len(NAMES) >= 30
    families = {load_model(name).model_type for name in NAMES}
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3", "granite",
            "starcoder2", "falcon", "gpt_neox", "phi", "stablelm", "cohere", "olmo", "glm"} <= families  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_whole(name: str) -> None:
    profile = profiles.model_profile(name)
    assert profile["name"] == name == name.lower()
    assert profile["hub_id"].count("/") == 1
    assert len(profile["source"]) > 20
    assert profile["config"]["architectures"] == [load_model(name).architecture]
    assert set(profile) == {"name", "hub_id", "source", "config"}


def test_hub_ids_lead_to_one_model_each() -> None:
    ids = [profiles.model_profile(name)["hub_id"].lower() for name in NAMES]
    assert len(set(ids)) == len(ids)
    assert [load_model(hub_id).name for hub_id in ids] == list(NAMES)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_are_the_published_ones(name: str) -> None:
    assert total_parameters(load_model(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_about_what_the_name_says(name: str) -> None:
    said = SAID.get(name) or float(name.rsplit("-", 1)[1].removesuffix("b"))
    assert total_parameters(load_model(name)) / 1e9 == pytest.approx(said, rel=0.15)


BUILT = "llama-2-7b qwen2.5-7b gemma-2-9b gemma-3-1b phi-3-mini-4k starcoder2-3b falcon-7b pythia-1.4b olmo-2-7b phi-2"


MORE = ["granite-3.1-2b", "smollm3-3b", "qwen3-0.6b", "mistral-nemo-12b", "stablelm-3b", "olmo-7b", "command-r-35b"]


@pytest.mark.parametrize("name", [*BUILT.split(), *MORE, "glm-4-9b"])
def test_transformers_builds_the_same_number_of_parameters(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw_config(name)))
    assert sum(p.numel() for p in model.parameters()) == total_parameters(load_model(name))
