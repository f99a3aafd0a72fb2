"""`--from FILE`: another trainer's configuration, or a run or plan of ours, as flags in front of those that were given.

What the command line says too counts there. What the file leaves open, and what no estimate counts, is told in notes.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from vramplan.core.dialects import TOOL_NAMES
from vramplan.core.types import ModelSpec, RunSpec, TrainerConfig
from vramplan.errors import InputError

SHOWN_KEYS = 6
RECORDS = ("RunSpec", "Plan")
LEVERS = {"upcast": "upcast", "loss": "loss", "checkpointing": "checkpointing",
          "checkpoint_offload": "checkpoint_offload", "optim": "optimizer", "attn": "attention",
          "allocator": "allocator", "kernels": "kernels"}  # fmt: skip
CHOSEN_BY_FIT = ("checkpointing", "checkpoint_offload")


class Origin(NamedTuple):
    """The file of `--from`, and the run that it holds; `config` where it is another trainer's."""

    path: str
    run: RunSpec
    config: TrainerConfig | None = None

    @property
    def notes(self) -> list[str]:
        """What was taken for granted, what nothing counts, what nobody understood: a line each, if any."""
        return [] if self.config is None else list(_notes(self.path, self.config))

    def words(self, command: str, names: Set[str], given: Set[str]) -> list[str]:
        """The run as flags of `command`, which knows those `names`, without what was `given`."""
        settings = dict(_settings(self.run, fit=command == "fit"))
        if {"checkpointing", "gradient_checkpointing"} & given:
            given = given | {"checkpointing", "gradient_checkpointing"}
        if "recipe" in given:  # a recipe is a set of levers: the file's give way to it
            given = given | set(LEVERS)
        if self.run.gpus > 1 and "gpus" not in names and "gpus" not in given:
            raise InputError(
                f"{self.path} is a run on {self.run.gpus} GPUs, and {command} looks at one card",
                f"vramplan estimate --from {self.path}",
            )
        return [word for name, word in settings.items() if name in names and name not in given]

    def completed(self, run: RunSpec, spec: object) -> RunSpec:
        """With what no flag says: the rest of a record of ours; without targets that the model does not have."""
        if self.config is None:
            levers = replace(run.levers, resident_layers=self.run.levers.resident_layers)
            lora = replace(run.lora, dtype=self.run.lora.dtype)
            return replace(
                run, levers=levers, lora=lora, driver=self.run.driver, data=self.run.data, schedule=self.run.schedule,
                random_weights=self.run.random_weights, model_path=run.model_path or self.run.model_path,
            )  # fmt: skip
        if run.lora.targets != self.run.lora.targets or not isinstance(spec, ModelSpec):
            return run
        kept = self._kept(run, spec)
        return replace(run, lora=replace(run.lora, targets=kept)) if kept else run

    def _kept(self, run: RunSpec, spec: ModelSpec) -> tuple[str, ...]:
        from vramplan.core.audit_rows import unmatched

        lost = unmatched(spec, run.lora)
        return tuple(name for name in run.lora.targets if name not in lost)


def read_origin(path: str) -> Origin:
    """The file of `--from`. InputError for what holds no run, or one that is not described here."""
    file = Path(path)
    if (file / "run.json").is_file():
        file = file / "run.json"
    if file.is_dir():
        raise InputError(f"--from {path}: the folder holds no run.json", "name a file")
    if file.suffix.lower() == ".json":
        found = _record(str(file))
        if found is not None:
            return found
    from vramplan.sources.foreign import read_foreign

    config = read_foreign(file)
    if config.unplanned or config.run is None:
        raise InputError(
            f"--from {path}: {config.unplanned or 'it holds no run'}", f"vramplan audit {path} says what can be said"
        )
    return Origin(path, config.run, config)


def _record(path: str) -> Origin | None:
    """A run or a plan of ours; None for JSON of others."""
    from vramplan.core.types import Plan
    from vramplan.sources.foreign import is_model_config
    from vramplan.sources.records import decode, parse_json, read_text

    data = parse_json(read_text(path), path)
    if is_model_config(data):
        raise InputError(f"--from {path}: it is a model, not a run", f"vramplan estimate {path}")
    if not isinstance(data, dict) or "schema_version" not in data:
        return None
    if data.get("type") not in RECORDS:
        raise InputError(f"--from {path}: it is a {str(data.get('type'))[:40]}", "a run.json or a plan.json has a run")
    if data["type"] == "Plan":
        return Origin(path, decode(data, Plan, where=path).run)
    return Origin(path, decode(data, RunSpec, where=path))


def _settings(run: RunSpec, *, fit: bool) -> Iterator[tuple[str, str]]:
    """(parameter, the flag that sets it), for every flag that a run comes to."""
    yield "batch_size", f"--batch-size={run.micro_batch_size}"
    yield "accumulation", f"--accumulation={run.accumulation}"
    if fit:
        yield "effective_batch_size", f"--effective-batch-size={run.micro_batch_size * run.accumulation}"
    yield "seq_len", f"--seq-len={run.seq_len}"
    yield "recipe", f"--recipe={run.recipe}"
    for name in ("double_quant", "padding", "packing"):
        yield name, _switch(name, getattr(run, name))
    if run.trust_remote_code:
        yield "trust_remote_code", "--trust-remote-code"
    if run.model_path is not None:
        yield "model_path", f"--model-path={run.model_path}"
    if run.gpus > 1:
        yield "gpus", f"--gpus={run.gpus}"
        yield "parallel", f"--parallel={run.parallel}"
    yield "lora_r", f"--lora-r={run.lora.r}"
    yield "lora_alpha", f"--lora-alpha={run.lora.alpha}"
    yield "lora_targets", f"--lora-targets={','.join(run.lora.targets)}"
    yield "lora_dropout", f"--lora-dropout={run.lora.dropout!r}"
    for name, field in LEVERS.items():
        value = getattr(run.levers, field)
        if not (fit and name in CHOSEN_BY_FIT):
            flag = name.replace("_", "-")
            yield name, _switch(name, value) if isinstance(value, bool) else f"--{flag}={value}"


def _switch(name: str, value: bool) -> str:
    flag = name.replace("_", "-")
    return f"--{flag}" if value else f"--no-{flag}"


def _notes(path: str, config: TrainerConfig) -> Iterator[str]:
    of = f"{path} ({TOOL_NAMES[config.tool]})"
    assumed = list(config.assumed)
    if not config.batch_stated and config.run is not None:
        assumed.append(f"no micro-batch is stated: {config.run.micro_batch_size}, the trainer's default")
    if not config.loss_stated:
        assumed.append("whole logits, unless this TRL computes its loss in chunks")
    if assumed:
        yield f"{of}: {'; '.join(assumed)}"
    left = list(_uncounted(config))
    keys = config.not_understood
    if keys:
        more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
        left.append(f"keys that were not understood ({', '.join(keys[:SHOWN_KEYS])}{more})")
    if left:
        yield f"{of}: not counted are {'; '.join(left)}; vramplan audit {path} says what they cost"


def _uncounted(config: TrainerConfig) -> Iterator[str]:
    """What the file asks for and a run does not have."""
    if config.trained_whole:
        yield f"{', '.join(config.trained_whole)} trained whole"
    if config.compute_dtype not in (None, "bfloat16"):
        yield f"4-bit layers that compute in {config.compute_dtype}"
    if config.base_dtype not in (None, "bfloat16"):
        yield f"a base in {config.base_dtype}"
    if config.evaluates:
        yield f"evaluation, {config.eval_batch_size} rows at a time"
