"""The tiny model made on the spot: whole, usable, the same for the same seed."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from vramplan.errors import InputError

pytest.importorskip("transformers")
pytest.importorskip("torch")

import torch

from vramplan.train import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny") / "new" / "model"
    tiny.make(made, warm_up_steps=2, report=lambda text: None)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_the_text_is_the_novels_and_nothing_else() -> None:
    paragraphs = tiny.paragraphs()
    text = "\n".join(paragraphs)
    assert 60_000 < len(text) < 200_000 and text.isascii()
    assert paragraphs[0] == "Chapter 1" and paragraphs[1].startswith("Sir Walter Elliot, of Kellynch Hall")
    assert all(paragraphs)
    assert not re.search("gutenberg|licen[sc]e|copyright|ebook|http", text, re.IGNORECASE)


def test_model_and_config_agree(folder: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["vocab_size"] == tiny.VOCAB_SIZE
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 3_000_000
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 4 * 7
    assert all(size % 64 == 0 for linear in linears for size in linear.weight.shape)  # whole blocks of NF4
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118


def test_our_own_reader_knows_the_model(folder: Path) -> None:
    from vramplan.sources.hf_config import load_model

    spec = load_model(str(folder))
    assert (spec.hidden_size, spec.num_layers, spec.vocab_size, spec.tie_word_embeddings) == (128, 4, 2048, False)


def test_the_tokenizer_is_lossless_and_has_its_special_tokens(tokenizer: Any) -> None:
    text = 'Anne -- "the élan", 三\n\tand 42.'
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == tiny.VOCAB_SIZE and max(ids) < tiny.VOCAB_SIZE
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(tiny.SPECIAL_TOKENS)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert ids[0] == tokenizer.bos_token_id
    words = tiny.paragraphs()[1].split()
    assert len(tokenizer(" ".join(words))["input_ids"]) < 2 * len(words)  # it has learned from the text


def test_the_chat_template_is_chatml_and_marks_the_assistant(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert (
        tokenizer.apply_chat_template(chat, tokenize=False)
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    )
    made = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, one in zip(made["input_ids"], made["assistant_masks"], strict=True) if one]
    assert tokenizer.decode(marked) == "Ho<|im_end|>"


def test_the_data_is_the_half_that_the_model_has_not_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    seen: list[str] = []
    monkeypatch.setattr(tiny, "_warm_up", lambda model, tokenizer, texts, steps, report: seen.extend(texts))
    tiny.make(folder.parent / "again", report=lambda text: None)
    everything = tiny.paragraphs()
    assert len(rows) + len(seen) == len(everything) and abs(len(rows) - len(seen)) <= 1
    assert sorted([*map(tiny._bare, rows), *seen]) == sorted(map(tiny._bare, everything))
    assert set(rows) <= set(everything)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_seed_decides_everything(folder: Path) -> None:
    state = torch.get_rng_state()
    for name, seed in (("same", 0), ("other", 1)):
        tiny.make(folder.parent / name, seed=seed, warm_up_steps=2, report=lambda text: None)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone
    first, same, other = (digests(folder.parent / name) for name in ("model", "same", "other"))
    assert first == same
    assert {name for name in first if first[name] != other[name]} >= {"model.safetensors", "train.jsonl"}


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        tiny.make(tmp_path)
    assert tiny.main([str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert tiny.main([str(tmp_path / "note")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_nothing_is_left_of_a_failed_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "_warm_up", fail)
    with pytest.raises(KeyboardInterrupt):
        tiny.make(tmp_path / "model", report=lambda text: None)
    assert list(tmp_path.iterdir()) == []


def test_warming_up_teaches(tokenizer: Any) -> None:
    lines: list[str] = []
    torch.manual_seed(0)
    tiny._warm_up(tiny._model(tokenizer), tokenizer, tiny.paragraphs()[:40], 25, lines.append)
    first, last = (float(line.rpartition(" ")[2]) for line in (lines[0], lines[-1]))
    assert first > 7.5 and last < 6.9  # log(2048) is 7.62
