"""`python -m vramplan.train.merge`: an adapter merged into its base, tensor by tensor, on the CPU.

Reads a `MergeSpec` from stdin, writes events to stdout, one JSON object a line; the last is "end", with how it ended.
The base is read from its safetensors files and the result written as it is made, so memory holds about one tensor:
no model is ever built, on a card or off it. The exit code is the one of the contract.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vramplan.core.types import MERGE_DTYPES, MergeSpec
from vramplan.core.units import human
from vramplan.errors import OK, InputError, VramplanError
from vramplan.sources import records
from vramplan.train.adapter import WEIGHTS, Change, Locator, changes, read_config
from vramplan.train.merged_folder import Config, copy_files, files_to_copy, result_card
from vramplan.train.outcome import Outcome, StopSignal, outcome_of
from vramplan.train.saving import whole_folder
from vramplan.train.shards import Checkpoint, Entry, checkpoint_files, write_checkpoint

HEAD = "lm_head.weight"
CONV1D = ("gpt2", "openai-gpt")  # weights lie [in, out], whatever fan_in_fan_out says of the layer trained in 4 bits
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
NEWS_S = 0.2  # between two events of progress
SPARE_BYTES = 64 * 2**20  # kept free beside the result

Say = Callable[..., None]


def merge(spec: MergeSpec, say: Say) -> str:
    """Do it; the last line for the user. The output folder appears whole or not at all."""
    if spec.dtype not in MERGE_DTYPES:
        raise InputError(f"{spec.dtype} is not a dtype to merge in", f"one of {', '.join(MERGE_DTYPES)}")
    adapter_folder, output = Path(spec.adapter), Path(spec.output)
    adapter_config = read_config(adapter_folder)
    base = base_folder(spec.base, say)
    config = Config.read(base)
    with Checkpoint(checkpoint_files(base)) as weights, Checkpoint([_adapter_file(adapter_folder)]) as adapter:
        plan = Plan(weights, adapter, adapter_config, config, getattr(torch, spec.dtype))
        if spec.onto == "nf4":
            from vramplan.train.nf4 import nf4_rounding

            say("phase", message="finding what was quantised")
            plan.rounding = nf4_rounding(base, plan.locate, spec.double_quant)
        files = files_to_copy(base, adapter_folder)
        _check_room(output.parent, plan.total_bytes + sum(file.stat().st_size for file in files.values()))
        merged, total = len(plan.changes), len(plan.entries)
        say("start", total_bytes=plan.total_bytes, tensors=total, merged=merged)
        with whole_folder(output, "free some space, then merge again") as folder:
            progress = Progress(plan.total_bytes, say)
            make = _watched(plan.make, progress)
            count = write_checkpoint(folder, plan.entries, spec.max_shard_bytes, make)
            plan.check_use()
            copy_files(files, folder)
            config.write(folder, spec.dtype, untied=plan.untied)
            records.write_text(folder / "README.md", result_card(spec, adapter_config))
    where = "one file" if count == 1 else f"{count} files"
    return f"{merged} of {total} tensors merged, {human(plan.total_bytes)} in {where} of {output}"


def base_folder(base: str, say: Say) -> Path:
    """The base's folder: as named, or fetched from the Hub into its cache (weights, config and tokenizer alone)."""
    path = Path(base).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or base.startswith((".", "~")) or base.count("/") > 1:
        raise InputError(f"there is no folder {base} with the base model", "name the base with --base")
    from huggingface_hub import snapshot_download

    from vramplan.train.load import clear_errors

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*"]
    say("phase", message=f"fetching {base} from the Hub, unless it is in the cache")
    with clear_errors(base):
        return Path(snapshot_download(base, allow_patterns=wanted, ignore_patterns=["original/*", "consolidated*"]))


def _adapter_file(folder: Path) -> Path:
    file = folder / WEIGHTS
    if not file.is_file():
        raise InputError(f"{folder} holds no {WEIGHTS}", "load and save the adapter with PEFT once: it writes one")
    return file


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + SPARE_BYTES > free:
        raise VramplanError(
            f"the result needs {human(needed + SPARE_BYTES)}, {folder} has {human(free)} free",
            "choose another disk: -o",
        )


class Plan:
    """What every tensor of the result is made of."""

    def __init__(
        self,
        weights: Checkpoint,
        adapter: Checkpoint,
        adapter_config: dict[str, Any],
        config: Config,
        dtype: torch.dtype,
    ) -> None:
        self.weights, self.adapter = weights, adapter
        self.rounding: dict[str, Callable[[Tensor], Tensor]] = {}  # onto nf4: what 4 bits did to a weight
        self._embedding = self._tied_embedding(config)
        self.locate = Locator([*weights.entries, *([HEAD] if self._embedding else [])])
        transposed = bool(adapter_config.get("fan_in_fan_out")) or config.values.get("model_type") in CONV1D
        self.changes: dict[str, Change] = changes(adapter, adapter_config, self.locate, transposed)
        self.untied = self._is_untied(config)
        self.entries = [self._entry(name, dtype) for name in self._names()]
        self.total_bytes = sum(entry.bytes for entry in self.entries)
        self._used: list[str] = []

    def _tied_embedding(self, config: Config) -> str | None:
        """The embedding that is the output layer too, where that has no tensor of its own."""
        if HEAD in self.weights.entries or config.tied is False:
            return None
        found = [name for name in self.weights.entries if name.endswith(EMBEDDINGS)]
        return found[0] if len(found) == 1 else None

    def _is_untied(self, config: Config) -> bool:
        """Embedding and output layer are one tensor and the adapter changes one of them, or both: they part."""
        both = {HEAD, *(name for name in self.weights.entries if name.endswith(EMBEDDINGS))}
        tied = self._embedding is not None or config.tied is True
        return tied and bool(both & self.changes.keys())

    def _names(self) -> list[str]:
        return [*self.weights.entries, *([HEAD] if self.untied and self._embedding else [])]

    def _source(self, name: str) -> str:
        return self._embedding if name == HEAD and self._embedding is not None else name

    def _entry(self, name: str, dtype: torch.dtype) -> Entry:
        stored = self.weights.entries[self._source(name)]
        return replace(stored, name=name, dtype=dtype if stored.dtype.is_floating_point else stored.dtype)

    def make(self, entry: Entry) -> Tensor:
        """One tensor of the result. VramplanError if it has a number that is none, and the base's had not."""
        stored = self.weights.read(self._source(entry.name))
        base = self.rounding[entry.name](stored) if entry.name in self.rounding else stored
        change = self.changes.get(entry.name)
        if change is not None:
            base = change.apply(base, self.adapter)
            self._used += change.keys
        result = base.to(entry.dtype)
        if entry.dtype.is_floating_point and not _finite(result) and _finite(stored):
            why = f"{entry.name} would hold numbers that are none"
            if _finite(base):
                raise VramplanError(f"{why}: it is too large for {entry.dtype}", "merge with --dtype bfloat16")
            raise VramplanError(why, "the adapter is broken: did its training diverge?")
        return result

    def check_use(self) -> None:
        """Every tensor of the adapter was used, and once."""
        if sorted(self._used) != sorted(self.adapter.entries):
            raise VramplanError("not every tensor of the adapter was used exactly once, please report")


def _finite(tensor: Tensor) -> bool:
    """By the smallest and the largest, which NaN takes the place of: that needs no memory."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def _watched(make: Callable[[Entry], Tensor], progress: Progress) -> Callable[[Entry], Tensor]:
    def watched(entry: Entry) -> Tensor:
        progress.before(entry)
        return make(entry)

    return watched


class Progress:
    """Events while tensors are written."""

    def __init__(self, total_bytes: int, say: Say) -> None:
        self.total, self.say = total_bytes, say
        self.done, self.begun, self.told = 0, time.monotonic(), float("-inf")

    def before(self, entry: Entry) -> None:
        now = time.monotonic()
        if now - self.told >= NEWS_S:
            self.told = now
            left = (now - self.begun) / self.done * (self.total - self.done) if self.done else None
            eta = None if left is None else round(left, 1)
            self.say("tensor", name=entry.name, done_bytes=self.done, total_bytes=self.total, eta_s=eta)
        self.done += entry.bytes


# ------------------------------------------------------------------------------------------------------- the process
def main() -> int:
    def say(event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), flush=True)

    try:
        StopSignal()  # a signal raises where the program stands: nothing of the output is left
        spec = records.decode(records.parse_json(sys.stdin.read(), "stdin"), MergeSpec)
        outcome = Outcome("finished", OK, merge(spec, say))
    except BaseException as error:
        outcome = outcome_of(error)
        if outcome.ended == "interrupted":
            outcome = replace(outcome, message="interrupted: nothing was written", hint="")
        elif not isinstance(error, VramplanError):
            traceback.print_exc()
    say("end", ended=outcome.ended, exit_code=outcome.exit_code, message=outcome.message, hint=outcome.hint)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
