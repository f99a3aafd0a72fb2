"""Typed, bounded access to an untrusted `config.json`: every refusal names the file and the field."""

from __future__ import annotations

from math import isfinite
from typing import Any, NoReturn

from vramplan.errors import InputError

# Largest believable values: far above every published model, far below what would make the arithmetic absurd.
LIMITS = {
    "hidden_size": 2**17,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "num_kv_heads": 2**12,
    "head_dim": 2**14,
    "intermediate_size": 2**20,
    "ffn_hidden_size": 2**20,
    "moe_intermediate_size": 2**20,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**31,
    "sliding_window": 2**31,
    "num_experts": 2**12,
    "num_local_experts": 2**12,
    "num_experts_per_tok": 2**12,
}

# transformers' names of activations -> ours (`ModelSpec.activation`).
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_fast",
    "relu": "relu",
    "relu2": "relu2",
}


class Reader:
    """The fields of one config. An absent or null field takes the family's default, as in transformers."""

    def __init__(self, config: dict[str, Any], where: str, defaults: dict[str, Any]) -> None:
        self.config = config
        self.where = where
        self.defaults = defaults

    def refuse(self, problem: str, hint: str = "") -> NoReturn:
        raise InputError(f"{self.where}: {problem}", hint)

    def _get(self, key: str) -> Any:
        value = self.config.get(key)
        return self.defaults.get(key) if value is None else value

    def _wrong(self, key: str, wanted: str, value: Any) -> NoReturn:
        text = {dict: "an object", list: "a list", bool: str(value).lower()}.get(type(value)) or repr(value)
        self.refuse(f"{key} must be {wanted}, not {text if len(text) <= 40 else text[:37] + '...'}")

    def optional_size(self, key: str, minimum: int = 1) -> int | None:
        """A whole number from `minimum` to the field's limit, or None where neither config nor family has one."""
        value = self._get(key)
        if value is None:
            return None
        if type(value) is not int:  # a bool is no number here, nor is "4096" or 4096.0
            self._wrong(key, "a whole number", value)
        limit = LIMITS.get(key, 2**31)
        if not minimum <= value <= limit:
            shown = value if abs(value) < 10**15 else "a huge number"
            self.refuse(f"{key} must be from {minimum} to {limit}, not {shown}")
        return value

    def size(self, key: str) -> int:
        """The same, required."""
        value = self.optional_size(key)
        if value is None:
            self.refuse(f"{key} is missing")
        return value

    def nullable_size(self, key: str) -> int | None:
        """The same for a field whose null is not "absent" but "none", as `sliding_window`."""
        return None if key in self.config and self.config[key] is None else self.optional_size(key)

    def flag(self, key: str) -> bool:
        value = self._get(key)
        if value is None:
            return False
        if type(value) is not bool:
            self._wrong(key, "true or false", value)
        return value

    def number(self, key: str, low: float, high: float) -> float:
        """A finite number in [low, high]; 0.0 without a default."""
        value = self._get(key)
        if value is None:
            return 0.0
        if type(value) not in (int, float):
            self._wrong(key, "a number", value)
        if not (low <= value <= high and isfinite(value)):
            shown = value if abs(value) < 1e15 or value != value else "a huge number"
            self.refuse(f"{key} must be from {low:g} to {high:g}, not {shown}")
        return float(value)

    def nullable_number(self, key: str, low: float, high: float) -> float | None:
        """The same for a field that is switched off by null, as `attn_logit_softcapping`."""
        off = self.config[key] is None if key in self.config else self.defaults.get(key) is None
        return None if off else self.number(key, low, high)

    def dropout(self, key: str) -> float:
        return self.number(key, 0.0, 0.99)

    def activation(self, key: str) -> str:
        value = self._get(key) or "silu"
        if not isinstance(value, str) or value not in ACTIVATIONS:
            self._wrong(key, "one of " + ", ".join(ACTIVATIONS), value)
        return ACTIVATIONS[value]

    def rotary_factor(self, key: str) -> float:
        """The part of a head that is rotated; newer files keep it in `rope_parameters` or `rope_scaling`."""
        for name in ("rope_scaling", "rope_parameters"):
            inner = self.config.get(name)
            if isinstance(inner, dict) and inner.get("partial_rotary_factor") is not None:
                return Reader(inner, f"{self.where}: {name}", {}).number("partial_rotary_factor", 0.001, 1.0)
        return self.number(key, 0.001, 1.0)

    def per_layer(self, key: str, layers: int, allowed: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A list with one of the `allowed` values for each layer, or None where the config has none."""
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            self._wrong(key, "a list", value)
        if len(value) != layers:
            self.refuse(f"{key} has {len(value)} entries for {layers} layers")
        for item in value:
            if type(item) is not type(allowed[0]) or item not in allowed:
                self._wrong(f"each entry of {key}", "one of " + ", ".join(map(str, allowed)), item)
        return tuple(value)
