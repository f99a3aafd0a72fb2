"""A LoRA adapter on disk, as PEFT writes it: which tensor of the base each of its tensors changes, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from vramplan.errors import InputError
from vramplan.sources import records
from vramplan.train.shards import Checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# Fields that decide the merge, and those that decide nothing. Any other one that is set means a variant of LoRA.
_USED = {"r", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "lora_bias"}
_HARMLESS = {
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("auto_mapping", "lora_dropout", "target_modules", "exclude_modules", "bias", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"),
}
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "default")  # the others change the base's weights


@dataclass(frozen=True, slots=True)
class LowRank:
    """base + scale * B @ A, transposed where the base layer keeps [in, out].

    `keys` are A [r, in], B [out, r], and the base's own weight where PEFT saved that too (embeddings, lm_head).
    """

    keys: tuple[str, ...]
    scale: float
    transposed: bool

    def apply(self, base: Tensor, adapter: Checkpoint) -> Tensor:
        a, b = (adapter.read(key).float() for key in self.keys[:2])
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise InputError(f"{self.keys[0]} and {self.keys[1]} are no two low-rank matrices of one layer")
        delta = (b @ a).mul_(self.scale)
        delta = delta.T if self.transposed else delta
        if delta.shape != base.shape:
            raise InputError(
                f"{self.keys[0]} is for a weight of {_shape(delta)}, the base has {_shape(base)}",
                "name the base that the adapter was trained on with --base",
            )
        for key in self.keys[2:]:
            base = Replacement((key,)).apply(base, adapter)
        return delta.add_(base)  # in float32, without a float32 copy of the base


@dataclass(frozen=True, slots=True)
class Shift:
    """base + scale * bias, of an adapter with lora_bias."""

    keys: tuple[str, ...]
    scale: float

    def apply(self, base: Tensor, adapter: Checkpoint) -> Tensor:
        return base.float() + self.scale * adapter.read(self.keys[0]).float()


@dataclass(frozen=True, slots=True)
class Replacement:
    """A tensor that was trained whole: a bias, or a module of modules_to_save."""

    keys: tuple[str, ...]

    def apply(self, base: Tensor, adapter: Checkpoint) -> Tensor:
        whole = adapter.read(self.keys[0])
        if whole.shape != base.shape:
            raise InputError(
                f"the adapter's {self.keys[0]} is {_shape(whole)}, the base has {_shape(base)}",
                "an adapter that resizes the vocabulary is merged by PEFT's merge_and_unload",
            )
        return whole


Change: TypeAlias = LowRank | Shift | Replacement  # `apply` gives the merged tensor, float32 where it was computed


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


# ---------------------------------------------------------------------------------------------------- the config
def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of plain LoRA. InputError for anything else, naming it."""
    config = records.parse_json(records.read_text(folder / CONFIG), str(folder / CONFIG))
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise InputError(f"{folder / CONFIG} is of a {kind or 'nameless'} adapter; only LoRA can be merged here")
    numbers = [config.get("lora_alpha", 8), *dict(config.get("alpha_pattern") or {}).values()]
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise InputError(f"{folder / CONFIG} has a lora_alpha that is no number")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise InputError(
            f"the adapter was started with init_lora_weights={start!r}, which changed the base's weights",
            "merge it with PEFT's merge_and_unload",
        )
    variants = [key for key, value in config.items() if value and key not in _USED | _HARMLESS]
    if variants:
        raise InputError(
            f"the adapter uses {', '.join(sorted(variants))}: it is no plain LoRA", "merge it with merge_and_unload"
        )
    return config


def scale_of(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r), by the patterns for this module where there are any, as PEFT looks them up."""
    patterns = config.get("alpha_pattern") or {}
    alpha = config.get("lora_alpha", 8)
    if patterns:
        from peft.utils.other import get_pattern_key

        alpha = patterns.get(get_pattern_key(patterns.keys(), module), alpha)
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


# -------------------------------------------------------------------------------------------------- what changes
def changes(adapter: Checkpoint, config: dict[str, Any], locate: Locator, transposed: bool) -> dict[str, Change]:
    """Base tensor -> what is done to it. InputError for a tensor of the adapter that changes none, or an odd one.

    `transposed`: the base keeps the weights of its linear layers as [in, out].
    """
    found: dict[str, Change] = {}
    for change, target in _all_changes(adapter, config, transposed):
        name = locate(target)
        if name in found:
            raise InputError(f"two parts of the adapter change {name}: {found[name].keys[0]} and {change.keys[0]}")
        found[name] = change
    uses = Counter(key for change in found.values() for key in change.keys)
    unused = [key for key in adapter.entries if uses[key] != 1]
    if unused:
        raise InputError(f"the adapter's {unused[0]} is of no kind that can be merged", "PEFT's merge_and_unload may")
    return found


def _all_changes(adapter: Checkpoint, config: dict[str, Any], in_out: bool) -> Iterable[tuple[Change, str]]:
    """Every change and the dotted name of the parameter it is for."""
    keys = adapter.entries
    for key, entry in keys.items():
        path, _, last = key.removeprefix(PREFIX).rpartition(".")
        for a, b, transposed in (
            (".lora_A.weight", ".lora_B.weight", in_out),
            (".lora_embedding_A", ".lora_embedding_B", True),
        ):
            layer = key.removesuffix(a)
            if layer != key and layer + b in keys:
                module = layer.removeprefix(PREFIX)
                scale = scale_of(config, module, entry.shape[0])
                whole = tuple(name for name in (layer + ".base_layer.weight",) if name in keys)
                yield LowRank((key, layer + b, *whole), scale, transposed), f"{module}.weight"
                if layer + ".lora_B.bias" in keys:
                    yield Shift((layer + ".lora_B.bias",), scale), f"{module}.bias"
        if "lora_" not in key and not key.endswith(".base_layer.weight"):
            yield Replacement((key,)), f"{path.removesuffix('.base_layer')}.{last}"


class Locator:
    """Finds a parameter of the model among the names of its checkpoint, which may lack or add a prefix."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = dict.fromkeys(names)

    def find(self, parameter: str) -> str | None:
        """The name, or None. InputError if several would do. The number of a layer always has to be right."""
        if parameter in self.names:
            return parameter
        tail = parameter
        while "." in tail:
            fits = [name for name in self.names if name == tail or name.endswith("." + tail)]
            if len(fits) > 1:
                raise InputError(
                    f"{parameter} could be {fits[0]} or {fits[1]} of the base", "merge_and_unload may do it"
                )
            if fits:
                return fits[0]
            dropped, _, tail = tail.partition(".")
            if dropped.isdecimal():
                return None
        return None

    def __call__(self, parameter: str) -> str:
        name = self.find(parameter)
        if name is None:
            raise InputError(
                f"the adapter changes {parameter}, which the base does not hold",
                "name the base that the adapter was trained on with --base",
            )
        return name
