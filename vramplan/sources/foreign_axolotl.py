"""axolotl's YAML.

Defaults are those of its schemas (`utils/schemas/`: micro-batch 1, evaluation as training, sequence_len 512,
adamw_torch_fused, no checkpointing, no dropout) and of what it does with them (`loaders/model.py`): NF4 with double
quantisation and bf16 storage, the compute dtype from `bf16`, `fp16` or float32 where both are off;
prepare_model_for_kbit_training, then norms and vocabulary back to that dtype, so that nothing stays float32; rows are
padded to the full length with sample packing. It sets expandable segments itself (`utils/__init__.py`).
"""

from __future__ import annotations

from vramplan.core.types import Levers, Lora, TrainerConfig
from vramplan.sources.foreign_fields import Draft, Fields

KEYS = ("base_model", "micro_batch_size", "sequence_len", "sample_packing", "lora_target_linear")
COSTS_NOTHING = (
    "model_type", "tokenizer", "datasets", "test_datasets", "dataset", "output_dir", "lr_", "learning_rate",
    "num_epochs", "max_steps", "wandb", "warmup", "eval_", "evals_", "save", "logging", "log", "hub_", "special_tokens",
    "weight_decay", "debug", "early_stopping", "resume", "auto_resume", "local_rank", "strict", "trust_remote_code",
    "seed", "train_on_inputs", "group_by_length", "chat_template", "adam_", "max_grad_norm", "tf32", "loss_watchdog",
    "val_set",
    "mlflow", "comet", "use_tensorboard", "tokens", "base_model_config", "revision_of_model", "is_", "shuffle",
    "peft_use_rslora", "lora_fan_in", "lora_model_dir", "merge_lora", "plugins", "dataloader_", "ddp", "fsdp_config",
    "rope", "remove_unused", "skip_prepare", "shuffle_merged", "hf_use_auth", "push_", "neftune",
)  # fmt: skip
FUSED_LOSSES = (
    "cut_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "chunked_cross_entropy",
    "unsloth_cross_entropy",
)


def read_axolotl(fields: Fields) -> TrainerConfig:
    """The file as a run and the facts that are audited."""
    model = fields.text("base_model")
    draft = Draft(model)
    four = _four_bits(fields, draft)
    batch = fields.whole("micro_batch_size", 1)
    checkpointing = fields.any("gradient_checkpointing")
    if isinstance(checkpointing, str) and checkpointing.lower() not in ("true", "false", "unsloth", "offload"):
        draft.refuse(f"gradient_checkpointing {checkpointing[:20]} is not described here")
    packed = fields.flag("sample_packing")
    if packed:
        draft.assumed.append("packed rows are counted as rows without padding")
    fused = [key for key in FUSED_LOSSES if fields.flag(key)]
    if fused:
        draft.assumed.append(f"{fused[0]} is counted as our loss in chunks")
    sharded = bool(fields.any("fsdp")) or fields.any("deepspeed") is not None
    draft.several(sharded)
    dtype = _dtype(fields)
    on = checkpointing is not None and checkpointing is not False and str(checkpointing).lower() != "false"
    bnb = fields.inner("bnb_config_kwargs")
    levers = Levers(
        upcast="none", loss="fused" if fused else "full", checkpointing="all" if on else "none",
        checkpoint_offload=str(checkpointing).lower() in ("unsloth", "offload"),
        optimizer=draft.optimizer(fields.text("optimizer") or "adamw_torch_fused"), kernels="stock",
        attention=draft.attention(_attention(fields)), allocator="expandable",
    )  # fmt: skip
    pad = fields.flag("pad_to_sequence_len", packed)
    run = draft.run(
        levers=levers, lora=_lora(fields, draft), batch=batch, seq_len=fields.whole("sequence_len", 512),
        accumulation=fields.whole("gradient_accumulation_steps", 1), padding=pad and not packed,
        double_quant=bnb.flag("bnb_4bit_use_double_quant", True),
    )  # fmt: skip
    return TrainerConfig(
        tool="axolotl", source=fields.file.where, model=model, run=run, unplanned=draft.unplanned,
        batch_stated=True, quantised=four, compute_dtype=bnb.dtype("bnb_4bit_compute_dtype") or dtype,
        base_dtype=dtype, quant_storage=bnb.dtype("bnb_4bit_quant_storage") or "bfloat16", prepared=False,
        reentrant=fields.inner("gradient_checkpointing_kwargs").flag("use_reentrant"), input_grads=True,
        evaluates=_evaluates(fields), eval_batch_size=fields.whole("eval_batch_size", batch),
        pad_to_max=pad and not packed, trained_whole=fields.names("lora_modules_to_save"),
        device_map=fields.any("device_map") if isinstance(fields.any("device_map"), str) else None, sharded=sharded,
        assumed=tuple(draft.assumed), not_understood=fields.rest(COSTS_NOTHING),
    )  # fmt: skip


def _four_bits(fields: Fields, draft: Draft) -> bool | None:
    adapter = fields.text("adapter")
    if adapter not in ("lora", "qlora"):
        draft.refuse("training without an adapter is not described here" if adapter is None
                     else f"the adapter {adapter[:40]} is not described here")  # fmt: skip
    if fields.any("rl") is not None:
        draft.refuse(f"training by {str(fields.any('rl'))[:20]} is not described here")
    four = fields.flag("load_in_4bit")
    if fields.flag("load_in_8bit") or fields.flag("gptq"):
        draft.refuse("8-bit and GPTQ weights are not described here")
        return None
    draft.whole_base(four)
    return four


def _dtype(fields: Fields) -> str | None:
    """bf16 may be "auto", which asks the card; that is the default too."""
    bf16, fp16 = fields.any("bf16"), fields.any("fp16")
    fields.any("bfloat16")
    fields.any("float16")
    if bf16 is False and not fp16:
        return "float32"
    return "bfloat16" if bf16 is not False and not fp16 else "float16"


def _attention(fields: Fields) -> str | None:
    named = fields.text("attn_implementation")
    found = {
        "flex_attention": fields.flag("flex_attention"),
        "flash_attention_2": fields.flag("flash_attention"),
        "sdpa": fields.flag("sdp_attention"),
        "eager": fields.flag("eager_attention"),
        "xformers": fields.flag("xformers_attention"),
    }
    return named or next((name for name, asked in found.items() if asked), None)


def _lora(fields: Fields, draft: Draft) -> Lora:
    names = fields.names("lora_target_modules")
    if fields.flag("lora_target_linear"):
        names = ("all-linear",)
    elif not names:
        draft.refuse("the file names no target modules")
    if "lora_r" not in fields:
        draft.assumed.append("the file gives no lora_r: 16 is assumed")
    if fields.flag("peft_use_dora"):
        draft.refuse("DoRA is not described here")
    return Lora(
        r=fields.whole("lora_r", 16),
        alpha=fields.whole("lora_alpha", 32),
        targets=draft.targets(names) if names else ("all-linear",),
        dropout=fields.number("lora_dropout", 0.0, 0.99),
    )


def _evaluates(fields: Fields) -> bool:
    return fields.number("val_set_size", 0.0, 1e12) > 0 or bool(fields.any("test_datasets"))
