"""What lies beside the weights of a merged model: config, generation config, tokenizer, card."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vramplan.core.types import MergeSpec
from vramplan.errors import InputError
from vramplan.sources import records

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
)
# Code of the model's own is copied, never run; the licence travels with the weights.
BASE_PATTERNS = (*TOKENIZER_FILES, "generation_config.json", "*.py", "LICENSE*", "NOTICE*")
DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True, slots=True)
class Config:
    """The base's config.json. `tied`: whether embedding and output layer are one; None where it does not say."""

    values: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Config:
        """InputError for a base whose weights are no plain numbers."""
        path = folder / "config.json"
        values = records.parse_json(records.read_text(path), str(path))
        if not isinstance(values, dict):
            raise InputError(f"{path} is no config of a model")
        quantised = values.get("quantization_config")
        if quantised:
            method = quantised.get("quant_method", "") if isinstance(quantised, dict) else ""
            raise InputError(
                f"the weights of {folder} are quantised ({method or 'see its config'})",
                "name the unquantised model with --base",
            )
        return cls(values)

    @property
    def tied(self) -> bool | None:
        for part in self._parts(self.values):
            if isinstance(part.get("tie_word_embeddings"), bool):
                return bool(part["tie_word_embeddings"])
        return None

    @staticmethod
    def _parts(values: dict[str, Any]) -> list[dict[str, Any]]:
        """The config, and that of its language model where it has more than one part."""
        text = values.get("text_config")
        return [values, text] if isinstance(text, dict) else [values]

    def write(self, folder: Path, dtype: str, *, untied: bool) -> None:
        values = json.loads(json.dumps(self.values))
        values.pop("_name_or_path", None)  # a path of somebody's machine
        for part in self._parts(values):
            for key in [key for key in DTYPE_KEYS if key in part]:
                part[key] = dtype
            if untied:
                part["tie_word_embeddings"] = False
        if not any(key in values for key in DTYPE_KEYS):
            values["torch_dtype"] = dtype
        records.write_text(folder / "config.json", json.dumps(values, indent=2) + "\n")


def files_to_copy(base: Path, adapter: Path) -> dict[str, Path]:
    """Name in the result -> file: the base's, with the tokenizer of the adapter (and its chat template) over it."""
    files = {file.name: file for pattern in BASE_PATTERNS for file in sorted(base.glob(pattern)) if file.is_file()}
    if (adapter / "tokenizer_config.json").is_file():
        for name in ("chat_template.jinja", "chat_template.json"):  # an older file would win over the adapter's own
            files.pop(name, None)
        files |= {name: adapter / name for name in TOKENIZER_FILES if (adapter / name).is_file()}
    return files


def copy_files(files: dict[str, Path], folder: Path) -> None:
    for name, file in files.items():
        shutil.copyfile(file, folder / name)  # the Hub's cache holds links: their targets are copied


def result_card(spec: MergeSpec, adapter_config: dict[str, Any]) -> str:
    """README.md of the merged model."""
    from huggingface_hub import ModelCardData

    base = spec.base_name
    head = ModelCardData(base_model=base, library_name="transformers", tags=["qlora", "vramplan"]).to_yaml()
    onto = {
        "original": "the original weights of the base",
        "nf4": "the base's weights as 4 bits (NF4) had rounded them, which is what the adapter was trained on",
    }
    return (
        f"---\n{head}\n---\n\n# {base} with a merged adapter\n\nA LoRA adapter of rank {adapter_config.get('r', '?')}, "
        f"merged by `vramplan merge` into {onto[spec.onto]}, in {spec.dtype}. The licence of the base applies.\n"
    )
