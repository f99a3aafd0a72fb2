"""The difference of two runs in the keys of another trainer's configuration file.

The inverse of the readers (`sources/foreign_*.py`): what is set here they read as it was meant. What a trainer has no
key for is said in a sentence and never silently dropped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .types import RunSpec

Values = dict[str, Any]

# The names of a run's numbers, by trainer.
NUMBERS: dict[str, dict[str, str]] = {
    "axolotl": {"micro_batch_size": "micro_batch_size", "accumulation": "gradient_accumulation_steps",
                "seq_len": "sequence_len", "r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout",
                "optimizer": "optimizer"},
    "llama-factory": {"micro_batch_size": "per_device_train_batch_size", "accumulation": "gradient_accumulation_steps",
                      "seq_len": "cutoff_len", "r": "lora_rank", "alpha": "lora_alpha", "dropout": "lora_dropout",
                      "optimizer": "optim"},
    "trl": {"micro_batch_size": "per_device_train_batch_size", "accumulation": "gradient_accumulation_steps",
            "seq_len": "max_length", "r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout",
            "optimizer": "optim"},
    "transformers": {"micro_batch_size": "per_device_train_batch_size",
                     "accumulation": "gradient_accumulation_steps", "optimizer": "optim"},
}  # fmt: skip
TOOL_NAMES = {"transformers": "TrainingArguments", "trl": "TRL", "axolotl": "axolotl", "llama-factory": "LLaMA-Factory"}
OFFLOADS = ("axolotl", "llama-factory")  # have checkpoints in host memory, as ours
STYLES = ("none", "all")  # of checkpointing: that every K-th layer is checkpointed none of them can say
AXOLOTL_ATTENTIONS = {"flash_attention_2": "flash_attention", "sdpa": "sdp_attention", "eager": "eager_attention"}
AXOLOTL_OTHERS = ("flex_attention", "xformers_attention")
AXOLOTL_LOSSES = ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "chunked_cross_entropy",
                  "unsloth_cross_entropy")  # fmt: skip
AXOLOTL_PLUGIN = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
FACTORY_ATTENTIONS = {"sdpa": "sdpa", "eager": "disabled", "flash_attention_2": "fa2"}
ELSEWHERE = {  # what no file of theirs says
    "kernels": "--kernels {0}: the layers are the trainer's own",
    "allocator": "--allocator {0}: an environment variable, PYTORCH_CUDA_ALLOC_CONF=expandable_segments:{1}",
    "packing": "--packing: documents that do not see each other are not said in its words",
    "padding": "--padding: whether batches hold padding is up to the data",
    "upcast": "--upcast {0}: whether prepare_model_for_kbit_training is called is up to the trainer",
}


class Rewrite(NamedTuple):
    """`keys` are to be set at the top level of the file, `unsaid` what it has no words for."""

    keys: Values
    unsaid: tuple[str, ...]


START = {"axolotl": "axolotl train {0}", "llama-factory": "llamafactory-cli train {0}", "trl": "trl sft --config {0}",
         "transformers": "your script with {0}"}  # fmt: skip


class Rewritten(NamedTuple):
    """A plan as a change of another trainer's file.

    `was` is what the file holds of the keys; `written` is the file with them set, None where none was asked for.
    """

    tool: str
    source: str
    change: Rewrite
    was: Values
    written: str | None = None
    comments_lost: bool = False

    @property
    def start(self) -> str:
        """How the trainer is started with the file."""
        return START[self.tool].format(self.written or self.source)

    def rows(self) -> list[tuple[str, str, str]]:
        """(key, what the file says, what the plan says)."""
        return [(key, shown(self.was.get(key)), shown(value)) for key, value in self.change.keys.items()]


def shown(value: Any) -> str:
    """A value of a file, on one line; "-" for none."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {shown(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(item) for item in value)
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def rewrite(tool: str, values: Values, before: RunSpec, after: RunSpec) -> Rewrite:
    """What to set in a file of `tool` that holds `values` and means `before`, so that it means `after`."""
    keys: Values = {}
    unsaid: list[str] = []
    _numbers(tool, values, before, after, keys, unsaid)
    if _levers(before, after, "checkpointing", "checkpoint_offload"):
        _checkpointing(tool, values, after, keys, unsaid)
    if _levers(before, after, "loss"):
        keys |= _loss(tool, values, after.levers.loss == "fused")
    if _levers(before, after, "attention"):
        _attention(tool, values, after.levers.attention, keys, unsaid)
    if before.lora.targets != after.lora.targets:
        _targets(tool, values, after.lora.targets, keys, unsaid)
    if before.double_quant != after.double_quant:
        _double_quant(tool, values, after.double_quant, keys, unsaid)
    _elsewhere(tool, before, after, keys, unsaid)
    return Rewrite(keys, tuple(unsaid))


def _levers(before: RunSpec, after: RunSpec, *names: str) -> bool:
    return any(getattr(before.levers, name) != getattr(after.levers, name) for name in names)


def _numbers(tool: str, values: Values, before: RunSpec, after: RunSpec, keys: Values, unsaid: list[str]) -> None:
    flags = {"micro_batch_size": "--batch-size", "accumulation": "--accumulation", "seq_len": "--seq-len",
             "r": "--lora-r", "alpha": "--lora-alpha", "dropout": "--lora-dropout", "optimizer": "--optim"}  # fmt: skip
    for name, flag in flags.items():
        was, now = (_number(run, name) for run in (before, after))
        if was == now:
            continue
        key = NUMBERS[tool].get(name)
        if name == "seq_len" and tool == "trl" and "max_length" not in values and "max_seq_length" in values:
            key = "max_seq_length"
        if key is None:
            unsaid.append(f"{flag} {now}: it is in the script, not in this file")
        else:
            keys[key] = now
    if tool == "llama-factory" and "lora_rank" in keys:
        keys["lora_alpha"] = after.lora.alpha  # which is twice the rank where nothing is said


def _number(run: RunSpec, name: str) -> Any:
    holder = run.lora if name in ("r", "alpha", "dropout") else run.levers if name == "optimizer" else run
    return getattr(holder, name)


def _checkpointing(tool: str, values: Values, after: RunSpec, keys: Values, unsaid: list[str]) -> None:
    style, offload = after.levers.checkpointing, after.levers.checkpoint_offload
    if style not in STYLES:
        unsaid.append(f"--checkpointing {style}: it checkpoints all layers or none")
        return
    if offload and tool not in OFFLOADS:
        unsaid.append("--checkpoint-offload: its own way to offload is another")
    if tool == "axolotl":
        keys["gradient_checkpointing"] = "offload" if offload else style == "all"
    elif tool == "llama-factory":
        keys["disable_gradient_checkpointing"] = style == "none"
        if offload or values.get("use_unsloth_gc"):
            keys["use_unsloth_gc"] = offload
    else:
        keys["gradient_checkpointing"] = style == "all"


def _loss(tool: str, values: Values, fused: bool) -> Values:
    if tool == "llama-factory":
        return {"enable_liger_kernel": fused}
    if tool == "axolotl":
        if not fused:
            return {key: False for key in AXOLOTL_LOSSES if values.get(key)}
        plugins = values.get("plugins") or []
        missing = [] if AXOLOTL_PLUGIN in plugins else [AXOLOTL_PLUGIN]
        return {"cut_cross_entropy": True, **({"plugins": [*plugins, *missing]} if missing else {})}
    if fused:
        return {"use_liger_kernel": True}
    chunked = {"loss_type": "nll"} if values.get("loss_type") == "chunked_nll" else {}
    return {**{key: False for key in ("use_liger_kernel", "use_liger") if values.get(key)}, **chunked}


def _attention(tool: str, values: Values, wanted: str, keys: Values, unsaid: list[str]) -> None:
    if tool == "llama-factory":
        keys["flash_attn"] = FACTORY_ATTENTIONS[wanted]
    elif tool == "axolotl" and not values.get("attn_implementation"):
        switches = (*AXOLOTL_ATTENTIONS.values(), *AXOLOTL_OTHERS)
        keys |= {switch: False for switch in switches if values.get(switch)}
        keys[AXOLOTL_ATTENTIONS[wanted]] = True
    else:
        inner = values.get("model_init_kwargs")
        if isinstance(inner, dict) and inner.get("attn_implementation") and not values.get("attn_implementation"):
            keys["model_init_kwargs"] = {**inner, "attn_implementation": wanted}
        elif tool == "transformers" and not values.get("attn_implementation"):
            unsaid.append(f"--attn {wanted}: from_pretrained takes it as attn_implementation, in the script")
            return
        else:
            keys["attn_implementation"] = wanted
        if values.get("use_flash_attention_2"):
            keys["use_flash_attention_2"] = False


def _targets(tool: str, values: Values, names: tuple[str, ...], keys: Values, unsaid: list[str]) -> None:
    whole = names == ("all-linear",)
    if tool == "axolotl":
        if whole or values.get("lora_target_linear"):
            keys["lora_target_linear"] = whole
        if not whole:
            keys["lora_target_modules"] = list(names)
    elif tool == "llama-factory":
        keys["lora_target"] = "all" if whole else ",".join(names)
    elif tool == "trl":
        own = "target_modules" if values.get("target_modules") and not values.get("lora_target_modules") else ""
        keys[own or "lora_target_modules"] = list(names)
    else:
        unsaid.append(f"--lora-targets {','.join(names)}: the adapter is in the script, not in this file")


def _double_quant(tool: str, values: Values, wanted: bool, keys: Values, unsaid: list[str]) -> None:
    if tool == "axolotl":
        inner = values.get("bnb_config_kwargs")
        keys["bnb_config_kwargs"] = {**(inner if isinstance(inner, dict) else {}), "bnb_4bit_use_double_quant": wanted}
    elif tool == "llama-factory":
        keys["double_quantization"] = wanted
    elif tool == "trl":
        keys["use_bnb_nested_quant"] = wanted
    else:
        unsaid.append(f"--{'' if wanted else 'no-'}double-quant: quantisation is in the script, not in this file")


def _elsewhere(tool: str, before: RunSpec, after: RunSpec, keys: Values, unsaid: list[str]) -> None:
    levers = after.levers
    if _levers(before, after, "upcast"):
        if tool == "llama-factory" and levers.upcast != "all":
            keys["upcast_layernorm"] = levers.upcast == "norms"
        else:
            unsaid.append(ELSEWHERE["upcast"].format(levers.upcast))
    if _levers(before, after, "allocator"):
        unsaid.append(ELSEWHERE["allocator"].format(levers.allocator, levers.allocator == "expandable"))
    if _levers(before, after, "kernels"):
        unsaid.append(ELSEWHERE["kernels"].format(levers.kernels))
    if after.packing != before.packing:
        unsaid.append(ELSEWHERE["packing"])
    if after.padding != before.padding:
        if tool == "axolotl":
            keys["pad_to_sequence_len"] = after.padding
        else:
            unsaid.append(ELSEWHERE["padding"])
