"""The settings of a foreign file, typed; what was asked for is remembered, so that the rest can be named."""

from __future__ import annotations

from math import isfinite
from typing import Any, NoReturn

from vramplan.core.types import OPTIMIZERS, Levers, Lora, RunSpec
from vramplan.errors import InputError
from vramplan.sources.yaml_file import Mapping

MANY = 1_000_000  # as on the command line
OPTIMIZER_ALIASES = {
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_lion": "paged_lion_32bit",
    "lion_bnb_8bit": "lion_8bit",
}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32", "fp32": "float32"}
VOCABULARY = ("embed_tokens", "lm_head", "embed_in", "embed_out", "word_embeddings", "wte", "output")


class Fields:
    """Absent and null are the same: the default. A value of another kind is refused with its line."""

    def __init__(self, file: Mapping) -> None:
        self.file = file
        self.seen: set[str] = set()

    def __contains__(self, key: str) -> bool:
        """Whether the file states it."""
        return self._get(key) is not None

    def refuse(self, key: str, wanted: str, value: Any) -> NoReturn:
        line = f", line {self.file.lines[key]}" if key in self.file.lines else ""
        shown = "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)[:40]
        raise InputError(f"{self.file.where}{line}: {key} must be {wanted}, not {shown}")

    def _get(self, key: str) -> Any:
        self.seen.add(key)
        value = self.file.values.get(key)
        return None if isinstance(value, str) and not value.strip() else value

    def any(self, key: str) -> Any:
        """As it is, of whatever kind."""
        return self._get(key)

    def whole(self, key: str, default: int) -> int:
        value = self._get(key)
        if value is None:
            return default
        if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not 1 <= value <= MANY:
            self.refuse(key, f"a whole number from 1 to {MANY}", value)
        return value

    def number(self, key: str, default: float, high: float) -> float:
        """From 0 to `high`. YAML reads 1e-4 as a text."""
        value = self._get(key)
        if value is None:
            return default
        try:
            found = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else -1.0
        except (ValueError, OverflowError):
            found = -1.0
        if not (isfinite(found) and 0 <= found <= high):
            self.refuse(key, f"a number from 0 to {high:g}", value)
        return found

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key)
        if value is None:
            return default
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if type(value) is not bool:
            self.refuse(key, "true or false", value)
        return value

    def text(self, key: str) -> str | None:
        value = self._get(key)
        if value is not None and not isinstance(value, str):
            self.refuse(key, "a text", value)
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names, or one text with commas."""
        value = self._get(key)
        if value is None:
            return ()
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            self.refuse(key, "names", value)
        return tuple(dict.fromkeys(item.strip() for item in items if item.strip()))

    def inner(self, key: str) -> Fields:
        """A mapping inside the file; an empty one where there is none."""
        value = self._get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            self.refuse(key, "a mapping", value)
        return Fields(Mapping({str(k): v for k, v in value.items()}, {}, f"{self.file.where}: {key}"))

    def dtype(self, *keys: str) -> str | None:
        """ "torch.bfloat16", "bf16" -> "bfloat16"; of the first key that is stated."""
        for key in keys:
            text = self.text(key)
            if text is not None:
                plain = text.lower().removeprefix("torch.")
                return DTYPES.get(plain, plain)
        return None

    def rest(self, ignored: tuple[str, ...]) -> tuple[str, ...]:
        """The keys that nobody asked for; those that start with one of `ignored` cost no memory."""
        return tuple(k for k in self.file.values if k not in self.seen and not k.startswith(ignored))


class Draft:
    """A run in the making: what it takes for granted, and why there may be none."""

    def __init__(self, model: str | None) -> None:
        self.model = model or ""
        self.assumed: list[str] = []
        self.unplanned = ""

    def refuse(self, why: str) -> None:
        self.unplanned = self.unplanned or why

    def optimizer(self, name: str) -> str:
        plain = name.lower().removeprefix("optimizernames.")
        plain = OPTIMIZER_ALIASES.get(plain, plain)
        if plain not in OPTIMIZERS:
            self.refuse(f"the optimizer {name[:40]} is not described here")
            return "adamw_torch_fused"
        return plain

    def attention(self, name: str | None) -> str:
        """transformers takes sdpa where nothing is said."""
        plain = (name or "sdpa").lower()
        if plain in ("sdpa", "eager"):
            return plain
        if "flash" not in plain:
            self.refuse(f"attention by {plain[:40]} is not described here")
        return "flash_attention_2"

    def targets(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Module names as they are; a pattern, and adapters on the vocabulary, are not described."""
        if any(not name.replace("_", "").replace(".", "").replace("-", "").isalnum() for name in names):
            self.refuse("target modules given as a pattern are not described here")
            return ("all-linear",)
        outer = [name for name in names if name in VOCABULARY]
        if outer:
            self.assumed.append(f"the adapter of {', '.join(outer)} is not counted")
        return tuple(name for name in names if name not in VOCABULARY) or ("all-linear",)

    def whole_base(self, quantised: bool | None) -> None:
        if quantised is False:
            self.refuse("a base that is not quantised is not described here")

    def several(self, sharded: bool) -> None:
        if sharded:
            self.assumed.append("how many cards share the run is not in the file: one is assumed")

    def run(self, *, levers: Levers, lora: Lora, batch: int, seq_len: int | None, accumulation: int,
            double_quant: bool, padding: bool = False) -> RunSpec:  # fmt: skip
        if seq_len is None:
            self.assumed.append("rows of 2,048 tokens: the file sets no length")
        return RunSpec(
            model=self.model, recipe="peft", levers=levers, lora=lora, micro_batch_size=batch,
            seq_len=seq_len or 2048, accumulation=accumulation, double_quant=double_quant, padding=padding,
        )  # fmt: skip
