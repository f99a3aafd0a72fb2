"""A model's `config.json`, from wherever it is, as a `ModelSpec`.

A name is, in this order: the path of a file or of a folder that holds a `config.json`; a built-in model's short name
or Hub id; a Hub id ("org/name"), fetched through `huggingface_hub`. Nothing is guessed: an unknown architecture, a
field of the wrong type or an impossible size is refused in one sentence.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from vramplan.core.types import ModelSpec
from vramplan.errors import InputError, UnknownArchitecture
from vramplan.sources import profiles, records
from vramplan.sources.config_reader import Reader
from vramplan.sources.families import FAMILIES, shared

if TYPE_CHECKING:
    from pathlib import Path

MAX_CONFIG_BYTES = 16 * 2**20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z", re.ASCII)
_QUANTISABLE = (None, "bitsandbytes")  # QLoRA quantises plain weights itself; a 4-bit bitsandbytes file is its result


# -------------------------------------------------------------------------------------------------------- reading
def load_model(name_or_path: str, *, trust_remote_code: bool = False) -> ModelSpec:
    """The model behind a path, a built-in name or a Hub id. Raises InputError, or VramplanError without a network."""
    config, name, source = _find(name_or_path)
    auto_map = config.get("auto_map")
    if trust_remote_code and isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map:
        raise UnknownArchitecture(
            f"{name} brings its own modelling code, whose memory is not described here",
            "leave out --trust-remote-code to plan for the implementation in transformers",
        )
    return parse_config(config, name=name, source=source)


def raw_config(name_or_path: str) -> dict[str, Any]:
    """The `config.json` itself, as a dict, found in the same way."""
    return _find(name_or_path)[0]


def _find(name_or_path: str) -> tuple[dict[str, Any], str, str]:
    """(config, short name, source)."""
    if not name_or_path.strip() or "\0" in name_or_path:
        raise InputError("the model's name is empty" if not name_or_path.strip() else "the model's name is not text")
    built_in = _built_in(name_or_path)
    if built_in and not os.path.exists(name_or_path):  # noqa: PTH110 -- spares the import of pathlib
        return profiles.model_profile(built_in)["config"], built_in, "built-in"
    from pathlib import Path

    path = Path(name_or_path)
    # A folder without a config.json (a run folder, say) does not hide the built-in model of the same name.
    if _exists(path) and not (built_in and path.is_dir() and not (path / "config.json").is_file()):
        return _local(path)
    if built_in:
        return profiles.model_profile(built_in)["config"], built_in, "built-in"
    if path.suffix.lower() == ".gguf":
        raise InputError(f"no such file: {name_or_path}")
    if path.suffix.lower() == ".json" or not _HUB_ID.match(name_or_path):
        raise _unknown_name(name_or_path)
    from vramplan.sources.hub import fetch_config

    return _read(fetch_config(name_or_path), f"config.json of {name_or_path}"), name_or_path, name_or_path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than the file system allows
        return False


def _built_in(name: str) -> str | None:
    """The built-in model with this short name or Hub id, upper and lower case being the same."""
    wanted, names = name.lower(), profiles.model_names()
    if wanted in names:
        return wanted
    if "/" in wanted:
        for candidate in names:
            if str(profiles.model_profile(candidate).get("hub_id", "")).lower() == wanted:
                return candidate
    return None


def _local(path: Path) -> tuple[dict[str, Any], str, str]:
    if path.suffix.lower() == ".gguf" and path.is_file():
        raise InputError(
            f"{path} is a GGUF file, which is not read here",
            "give the config.json or the name of the model that it was made from",
        )
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise InputError(f"{path} holds no config.json", "give a folder with the model's config.json, or a model name")
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return _read(file, str(file)), name or "model", str(path)


def _read(file: Path, where: str) -> dict[str, Any]:
    config = records.parse_json(records.read_text(file, MAX_CONFIG_BYTES), where)
    if not isinstance(config, dict):
        raise InputError(f"{where} is not a model's config: it must be a JSON object")
    return config


def _unknown_name(name: str) -> InputError:
    if "/" in name or "\\" in name or name.endswith(".json"):
        return InputError(f"no such file or folder: {name}", "give a config.json, its folder, or a model name")
    hint = profiles.suggest(name.lower(), profiles.model_names())
    return InputError(f"unknown model {name!r}", f"{hint} vramplan models lists the built-in names".strip())


# -------------------------------------------------------------------------------------------------------- parsing
def parse_config(config: dict[str, Any], *, name: str, source: str) -> ModelSpec:
    """A `config.json` as a ModelSpec. Raises UnknownArchitecture or InputError naming the field.

    `dtype` is not read: QLoRA loads what it does not quantise in the compute dtype, bfloat16, whatever the file says.
    """
    where = source if source.endswith(".json") else f"config.json of {name}"
    if not isinstance(config, dict):
        raise InputError(f"{where} is not a model's config: it must be a JSON object")
    config = _text_part(config, where)
    model_type = config.get("model_type")
    if model_type is None:
        raise InputError(f"{where}: model_type is missing")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise _unknown_architecture(config, where)
    _refuse_quantised(config, where)
    family = FAMILIES[model_type]
    reader = Reader(config, where, family.defaults)
    fields = shared(reader, family)
    fields.update(family.extra(reader, fields))
    return ModelSpec(name=name, architecture=family.architecture, model_type=model_type, source=source, **fields)


def _text_part(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Gemma 3 files from 4B up describe a vision tower beside the language model: the latter alone is planned."""
    text = config.get("text_config")
    if config.get("model_type") != "gemma3" or text is None:
        return config
    if not isinstance(text, dict):
        raise InputError(f"{where}: text_config must be an object")
    tied = config.get("tie_word_embeddings")
    outer = {} if tied is None else {"tie_word_embeddings": tied}
    return {**outer, **text, "model_type": "gemma3_text"}


def _unknown_architecture(config: dict[str, Any], where: str) -> UnknownArchitecture:
    shown = repr(config.get("model_type"))[:60]
    more = any(key in config for key in ("text_config", "vision_config", "audio_config"))
    problem = "has a vision or audio part, which is" if more else "is an architecture that is"
    return UnknownArchitecture(
        f"{where}: model_type {shown} {problem} not described here",
        f"vramplan estimate --trace takes any architecture of transformers; described are {', '.join(FAMILIES)}",
    )


def _refuse_quantised(config: dict[str, Any], where: str) -> None:
    quantised = config.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if isinstance(quantised, dict) and method is None:  # files of early bitsandbytes name no method
        method = "bitsandbytes" if "load_in_4bit" in quantised else "unknown"
    if method not in _QUANTISABLE:
        raise InputError(
            f"{where}: the weights are quantised already ({str(method)[:30]}), QLoRA starts from plain ones",
            "give the model that it was made from",
        )
