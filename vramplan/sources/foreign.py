"""Configuration files of other trainers, told apart by their keys, in our words.

Only what the file states, and the trainer's own defaults; each reader's docstring says where those are from. What is
not known stays unknown, and keys that nobody reads are kept by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vramplan.errors import InputError
from vramplan.sources import foreign_axolotl, foreign_hf, foreign_llama_factory
from vramplan.sources.foreign_fields import Fields
from vramplan.sources.yaml_file import read_mapping

if TYPE_CHECKING:
    from pathlib import Path

    from vramplan.core.types import TrainerConfig

# A file is that of the first tool with one of these keys: those further up share keys with those below.
TOOLS: tuple[tuple[tuple[str, ...], Callable[[Fields], TrainerConfig]], ...] = (
    (foreign_axolotl.KEYS, foreign_axolotl.read_axolotl),
    (foreign_llama_factory.KEYS, foreign_llama_factory.read_llama_factory),
    (foreign_hf.TRL_KEYS, foreign_hf.read_trl),
    (foreign_hf.KEYS, foreign_hf.read_transformers),
)


def read_foreign(path: Path | str) -> TrainerConfig:
    """The file at `path`. InputError, with the line where that is known, for what cannot be one of these."""
    file = read_mapping(path)
    for keys, read in TOOLS:
        if any(key in file.values for key in keys):
            return read(Fields(file))
    raise InputError(
        f"{path} is no configuration that is known here",
        "known are TrainingArguments and SFTConfig (JSON, YAML), axolotl, LLaMA-Factory, and run files (TOML)",
    )


def is_model_config(values: Any) -> bool:
    """Whether a JSON file is a model's config.json rather than a trainer's configuration."""
    return isinstance(values, dict) and ("architectures" in values or "hidden_size" in values)
