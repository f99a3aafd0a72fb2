"""The one lookup of stored profiles: `gpus/*.toml` (cards) and `models/*.json` (raw Hugging Face configs).

Listing is a directory listing and loading one card parses one file. Names are forgiving in case, spaces, dashes and
vendor words ("RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090"), but a match is exact after that and unique: "A100"
names two cards, so it is refused with both. A profile's numbers are checked like any other input from outside.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vramplan.core.types import GpuProfile
from vramplan.errors import InputError
from vramplan.sources.records import parse_json, read_text

if TYPE_CHECKING:  # importing pathlib takes a tenth of the time of a whole `vramplan estimate`
    from pathlib import Path

PROFILES_VARIABLE = "VRAMPLAN_PROFILES"
MAX_PROFILE_BYTES = 2**20

# What a number may be, so that a typing error or a hostile file cannot steer a plan: (lowest, highest).
_LIMITS = {
    "total_bytes": (2**26, 2**44),
    "usable_bytes": (2**26, 2**44),
    "context_bytes": (0, 2**34),
    "sm_count": (1, 4096),
    "bandwidth_bytes_per_s": (10**9, 10**15),
    "bf16_flops_per_s": (10**9, 10**18),
    "fp16_flops_per_s": (10**9, 10**18),
    "pcie_bytes_per_s": (10**8, 10**13),
}
_REQUIRED = ("total_bytes", "usable_bytes", "context_bytes")
_WITH_BASIS = {"usable_bytes", "context_bytes"}
_PLAIN = {"name", "nvml_names"}
_VENDOR_WORDS = re.compile(r"\b(nvidia|geforce|tesla)\b")
_NOT_ALPHANUMERIC = re.compile(r"[^a-z0-9]+")
_CAPABILITY = re.compile(r"(\d{1,2})\.(\d)\Z")


# ------------------------------------------------------------------------------------------------------- where
def profiles_dir() -> Path:
    """`$VRAMPLAN_PROFILES`, else `profiles` inside the installed package, else the one beside it in a checkout."""
    from pathlib import Path

    return Path(_folder())


def _folder(*parts: str) -> str:
    """`profiles_dir()` and what lies in it, as text."""
    chosen = os.environ.get(PROFILES_VARIABLE)
    if chosen:
        if not os.path.isdir(chosen):  # noqa: PTH112
            raise InputError(f"{PROFILES_VARIABLE}: {chosen} is not a folder", "it should hold gpus/ and models/")
        return os.path.join(chosen, *parts)  # noqa: PTH118
    package = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # noqa: PTH120
    inside = os.path.join(package, "profiles")  # noqa: PTH118
    if not os.path.isdir(inside):  # noqa: PTH112
        inside = os.path.join(os.path.dirname(package), "profiles")  # noqa: PTH118, PTH120
    return os.path.join(inside, *parts)  # noqa: PTH118


def _stems(folder: str, suffix: str) -> tuple[str, ...]:
    try:
        names = os.listdir(_folder(folder))  # noqa: PTH208
    except OSError:
        return ()
    return tuple(sorted(name[: -len(suffix)] for name in names if name.endswith(suffix) and name[0] != "."))


def suggest(name: str, names: Iterable[str]) -> str:
    """ "did you mean rtx-4080 or rtx-4090?" for the nearest of `names`, "" when none is near."""
    by_plain = {normalise(candidate): candidate for candidate in names}
    plain = normalise(name[:100])
    near = [known for known in by_plain if plain and known.startswith(plain)]
    if not near:
        import difflib

        near = difflib.get_close_matches(plain, by_plain, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(by_plain[known] for known in near[:3])}?" if near else ""


def normalise(name: str) -> str:
    """A card's or model's name without case, vendor words and separators: "NVIDIA GeForce RTX 4090" -> "rtx4090"."""
    return _NOT_ALPHANUMERIC.sub("", _VENDOR_WORDS.sub(" ", name.lower().replace("_", " ")))


# ------------------------------------------------------------------------------------------------------- cards
def gpu_names() -> tuple[str, ...]:
    """The short names of the stored cards, sorted."""
    return _stems("gpus", ".toml")


def load_gpu(name: str) -> GpuProfile:
    """The card called `name`: a short name, the driver's name for it, or the path of a `.toml` file.

    InputError if there is none, if several match, or if the file does not hold a card.
    """
    if name.endswith(".toml"):
        from pathlib import Path

        return _read_gpu(Path(name))
    plain = normalise(name)
    matches = [stem for stem in gpu_names() if normalise(stem) == plain]
    if not matches:
        matches = [stem for stem in gpu_names() if plain in {normalise(other) for other in _nvml_names(stem)}]
    if len(matches) != 1:
        raise _no_such_gpu(name, matches)
    return _read_gpu(_gpu_path(matches[0]))


def find_gpu(nvml_name: str, total_bytes: int) -> GpuProfile | None:
    """The stored card that NVML calls `nvml_name` with about this total, or None. Variants differ only in size."""
    for stem in gpu_names():
        if nvml_name in _nvml_names(stem):
            profile = _read_gpu(_gpu_path(stem))
            if abs(profile.total_bytes - total_bytes) <= profile.total_bytes // 12:  # ECC takes a sixteenth
                return profile
    return None


def _gpu_path(stem: str) -> Path:
    return profiles_dir() / "gpus" / f"{stem}.toml"


def _no_such_gpu(name: str, matches: list[str]) -> InputError:
    if matches:
        return InputError(f"--gpu {_show(name)} could be {' or '.join(matches)}", "give one of these names")
    near = suggest(name, gpu_names())
    return InputError(f"--gpu {_show(name)} is not a known card", f"{near} `vramplan gpus` lists them".strip())


def _nvml_names(stem: str) -> tuple[str, ...]:
    names = parse_toml(_gpu_path(stem)).get("nvml_names", ())
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def parse_toml(path: Path | str) -> dict[str, Any]:
    """The tables of a TOML file of at most `MAX_PROFILE_BYTES`. InputError if it is none."""
    from importlib import import_module  # tomllib, or tomli under Python 3.10: mypy knows only one of them

    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    text = read_text(path, MAX_PROFILE_BYTES)
    try:
        data: dict[str, Any] = toml.loads(text)
    except RecursionError:
        raise InputError(f"{path} is nested too deep") from None
    except ValueError as error:  # TOMLDecodeError is one; so is an integer of thousands of digits
        raise InputError(f"{path} is not valid TOML: {error}") from None
    return data


def _read_gpu(path: Path) -> GpuProfile:
    data = parse_toml(path)
    unknown = sorted(data.keys() - _LIMITS.keys() - _PLAIN - {"compute_capability"})
    if unknown:
        raise InputError(f"{path}: unknown field {unknown[0]!r}", suggest(unknown[0], [*_LIMITS, *_PLAIN]))
    for field in ("name", "compute_capability", *_REQUIRED):
        if field not in data:
            raise InputError(f"{path}: {field} is missing")
    entries = {field: _entry(path, field, data[field]) for field in data if field not in _PLAIN}
    numbers = {field: _number(path, field, entries[field]["value"]) for field in entries if field in _LIMITS}
    if numbers["usable_bytes"] > numbers["total_bytes"]:
        raise InputError(f"{path}: usable_bytes is more than total_bytes")
    if numbers["context_bytes"] >= numbers["usable_bytes"]:
        raise InputError(f"{path}: context_bytes leaves nothing of usable_bytes")
    return GpuProfile(
        key=path.stem,
        name=_text(path, "name", data["name"]),
        total_bytes=numbers["total_bytes"],
        usable_bytes=numbers["usable_bytes"],
        usable_basis=_basis(path, "usable_bytes", entries),
        reserved_bytes=numbers["total_bytes"] - numbers["usable_bytes"],
        compute_capability=_capability(path, entries["compute_capability"]["value"]),
        sm_count=numbers.get("sm_count"),
        context_bytes=numbers["context_bytes"],
        context_basis=_basis(path, "context_bytes", entries),
        bandwidth_bytes_per_s=numbers.get("bandwidth_bytes_per_s"),
        bf16_flops_per_s=numbers.get("bf16_flops_per_s"),
        fp16_flops_per_s=numbers.get("fp16_flops_per_s"),
        pcie_bytes_per_s=numbers.get("pcie_bytes_per_s"),
        sources=tuple((field, entry["source"]) for field, entry in entries.items() if entry["source"]),
    )


def _entry(path: Path, field: str, data: Any) -> dict[str, Any]:
    """`field = 1` or a table of value, source and (where it means something) basis -> that table, complete."""
    entry = data if isinstance(data, dict) else {"value": data}
    allowed = {"value", "source", *(("basis",) if field in _WITH_BASIS else ())}
    wrong = sorted(entry.keys() - allowed)
    if wrong:
        raise InputError(f"{path}: unknown field {field}.{wrong[0]}")
    if "value" not in entry:
        raise InputError(f"{path}: {field}.value is missing")
    source = _text(path, f"{field}.source", entry["source"]) if "source" in entry else ""
    return {**entry, "source": source}


def _number(path: Path, field: str, value: Any) -> int:
    low, high = _LIMITS[field]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{path}: {field} must be a whole number from {low} to {high}, not {_show(value)}")
    return value


def _text(path: Path | str, field: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > 2000:
        raise InputError(f"{path}: {field} must be a short text, not {_show(value)}")
    return value


def _basis(path: Path, field: str, entries: dict[str, dict[str, Any]]) -> str:
    basis = entries[field].get("basis", "modelled")
    if basis not in ("measured", "modelled"):
        raise InputError(f"{path}: {field}.basis must be 'measured' or 'modelled', not {_show(basis)}")
    return str(basis)


def _capability(path: Path, value: Any) -> tuple[int, int]:
    match = _CAPABILITY.match(value) if isinstance(value, str) else None
    if match is None:
        raise InputError(f'{path}: compute_capability must be a text such as "8.9", not {_show(value)}')
    return int(match[1]), int(match[2])


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, (bool, int, float, str)) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------------------------------------------- models
def model_names() -> tuple[str, ...]:
    """The short names of the built-in models, sorted."""
    return _stems("models", ".json")


def model_profile(name: str) -> dict[str, Any]:
    """The stored JSON of the built-in model `name` (exact): name, hub_id, source and config, its raw `config.json`.

    InputError if there is no such model or its file is not one.
    """
    if name not in model_names():  # also keeps "../x" from leaving the folder
        raise InputError(f"{_show(name)} is not a built-in model", suggest(name, model_names()))
    path = _folder("models", f"{name}.json")
    data = parse_json(read_text(path, MAX_PROFILE_BYTES), str(path))
    if not isinstance(data, dict) or not isinstance(data.get("config"), dict):
        raise InputError(f"{path} has no object 'config'")
    for field in ("name", "hub_id", "source"):
        _text(path, field, data.get(field))
    return data


def model_shapes() -> tuple[tuple[tuple[int, tuple[str, ...]], ...], tuple[int, ...]]:
    """(each vocabulary of the built-in models with who has it, their numbers of attention heads). Falcon calls them
    otherwise in its older configs: what a config does not say is left out."""
    owners: dict[int, list[str]] = {}
    heads: set[int] = set()
    for name in model_names():
        config = model_profile(name)["config"]
        if isinstance(config.get("vocab_size"), int):
            owners.setdefault(config["vocab_size"], []).append(name)
        if isinstance(config.get("num_attention_heads"), int):
            heads.add(config["num_attention_heads"])
    return tuple((vocab, tuple(names)) for vocab, names in sorted(owners.items())), tuple(sorted(heads))
