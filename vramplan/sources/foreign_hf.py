"""TrainingArguments of transformers, and what TRL's SFT script takes beside them: SFTConfig, ModelConfig.

Defaults are those of transformers 5.17 (`training_args.py`: micro-batch 8, evaluation 8, no checkpointing,
adamw_torch_fused; checkpoints are not reentrant unless asked for, `modeling_utils.py`) and of TRL 1.x (`sft_config.py`:
max_length 1024, checkpointing on; `model_config.py`: r=16, alpha 32, dropout 0.05, nf4, no nested quantisation). TRL
hands its `dtype` to bitsandbytes as the compute dtype. Versions differ where this is silent: TRL before 1.0 called
prepare_model_for_kbit_training and turned all but the norms back to bf16, newer ones do not call it, and make the
adapter bf16, which is not counted here; the loss in chunks became the default later.
"""

from __future__ import annotations

from vramplan.core.types import Levers, Lora, TrainerConfig
from vramplan.sources.foreign_fields import Draft, Fields

TRL_KEYS = ("max_length", "max_seq_length", "packing", "load_in_4bit", "load_in_8bit", "use_peft", "lora_r",
            "lora_target_modules", "dataset_text_field", "bnb_4bit_quant_type", "use_bnb_nested_quant", "loss_type",
            "assistant_only_loss", "completion_only_loss", "model_init_kwargs", "padding_free")  # fmt: skip
KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "num_train_epochs",
        "optim", "learning_rate", "max_steps", "per_device_eval_batch_size", "eval_strategy")  # fmt: skip
COSTS_NOTHING = (
    "output_dir", "overwrite_", "do_", "learning_rate", "num_train_epochs", "max_steps", "lr_", "warmup_", "weight_",
    "adam_", "max_grad_norm", "log", "save_", "hub_", "push_", "seed", "data_seed", "report_to", "run_name", "project",
    "trackio_", "dataset", "dataloader_", "remove_unused", "resume_", "ddp_", "disable_tqdm", "eval_steps",
    "eval_delay", "eval_on_start", "load_best", "metric_for", "greater_is", "restore_", "skip_memory",
    "full_determinism", "ignore_data", "include_", "label_", "length_column", "local_rank", "average_tokens",
    "train_sampling", "tf32",
    "torch_empty", "use_cache", "use_cpu", "shuffle", "eos_token", "pad_token", "chat_template", "truncation_mode",
    "model_revision", "lora_task_type", "use_rslora", "eval_use_gather", "eval_accumulation", "prediction_loss",
    "debug", "enable_jit", "accelerator_config", "optim_args", "packing_strategy", "assistant_only", "completion_only",
    "group_by_length", "trust_remote_code", "padding_free", "pad_to_multiple", "dataset_num_proc", "bf16_full",
    "fp16_full", "batch_eval", "eval_do_concat", "train_", "eval_packing",
)  # fmt: skip


def read_transformers(fields: Fields) -> TrainerConfig:
    """A TrainingArguments file: model, quantisation and adapter are in a script."""
    return _read(fields, "transformers")


def read_trl(fields: Fields) -> TrainerConfig:
    """The same with what TRL's SFT script adds."""
    return _read(fields, "trl")


def _read(fields: Fields, tool: str) -> TrainerConfig:
    trl = tool == "trl"
    model = fields.text("model_name_or_path")
    draft = Draft(model)
    four, eight = fields.flag("load_in_4bit"), fields.flag("load_in_8bit")
    base = fields.dtype("dtype", "torch_dtype") or fields.inner("model_init_kwargs").dtype("dtype", "torch_dtype")
    said = "load_in_4bit" in fields or "load_in_8bit" in fields
    quantised = four if said and not eight else None
    if not said:
        draft.assumed.append("quantisation is not in the file: NF4 by bitsandbytes is assumed")
    if eight:
        draft.refuse("8-bit weights are not described here")
    draft.whole_base(quantised)
    compute, storage = fields.dtype("bnb_4bit_compute_dtype"), fields.dtype("bnb_4bit_quant_storage")
    if trl and four and compute is None:
        compute = base or "float32"  # what bitsandbytes takes where nothing is said
    lora = _lora(fields, draft, trl)
    batch = fields.whole("per_device_train_batch_size", 8)
    kwargs = fields.inner("gradient_checkpointing_kwargs")
    checkpointing = fields.flag("gradient_checkpointing", trl)
    loss, loss_stated = _loss(fields, draft, trl)
    _elsewhere(fields, draft)
    sharded = bool(fields.any("fsdp")) or fields.any("deepspeed") is not None
    fields.any("fsdp_config")
    draft.several(sharded)
    strategy = fields.text("eval_strategy") or fields.text("evaluation_strategy") or "no"
    levers = Levers(
        upcast="none", loss=loss, checkpointing="all" if checkpointing else "none",
        optimizer=draft.optimizer(fields.text("optim") or "adamw_torch_fused"), kernels="stock", allocator="native",
        attention=draft.attention(_attention(fields)),
    )  # fmt: skip
    run = draft.run(
        levers=levers, lora=lora, batch=batch, seq_len=_length(fields, trl),
        accumulation=fields.whole("gradient_accumulation_steps", 1),
        double_quant=fields.flag("use_bnb_nested_quant", fields.flag("bnb_4bit_use_double_quant", quantised is None)),
    )  # fmt: skip
    return TrainerConfig(
        tool=tool, source=fields.file.where, model=model, run=run, unplanned=draft.unplanned,
        batch_stated="per_device_train_batch_size" in fields, loss_stated=loss_stated, quantised=quantised,
        compute_dtype=compute, base_dtype=base, quant_storage=storage, prepared=False if trl else None,
        reentrant=kwargs.flag("use_reentrant"), input_grads=True if trl else None,
        evaluates=strategy not in ("no", "False"), eval_batch_size=fields.whole("per_device_eval_batch_size", 8),
        pad_to_max=fields.text("padding") == "max_length" or fields.flag("pad_to_max_length"),
        trained_whole=fields.names("lora_modules_to_save") or fields.names("modules_to_save"),
        device_map=_device_map(fields), sharded=sharded, assumed=tuple(draft.assumed),
        not_understood=fields.rest(COSTS_NOTHING),
    )  # fmt: skip


def _lora(fields: Fields, draft: Draft, trl: bool) -> Lora:
    if trl and fields.any("use_peft") is False:
        draft.refuse("training without an adapter is not described here")
    targets = fields.names("lora_target_modules") or fields.names("target_modules")
    if not targets:
        whose = "PEFT chooses the target modules by the model" if trl else "the adapter is not in the file"
        draft.assumed.append(f"{whose}: all-linear is assumed")
    if fields.flag("use_dora"):
        draft.refuse("DoRA is not described here")
    return Lora(
        r=fields.whole("lora_r", 16),
        alpha=fields.whole("lora_alpha", 32),
        targets=draft.targets(targets) if targets else ("all-linear",),
        dropout=fields.number("lora_dropout", 0.05 if trl else 0.0, 0.99),
    )


def _loss(fields: Fields, draft: Draft, trl: bool) -> tuple[str, bool]:
    """(the loss, whether that is certain)."""
    kind = fields.text("loss_type")
    fields.any("liger_kernel_config")
    if fields.flag("use_liger_kernel") or fields.flag("use_liger"):
        draft.assumed.append("Liger's loss is counted as ours in chunks")
        return "fused", True
    if kind == "chunked_nll":
        draft.assumed.append("TRL's loss in chunks is counted as ours")
        return "fused", True
    return "full", kind is not None or not trl


def _elsewhere(fields: Fields, draft: Draft) -> None:
    """What changes the memory in ways that are not described."""
    if fields.flag("torch_compile"):
        draft.refuse("torch.compile is not described here")
    if fields.flag("activation_offloading"):
        draft.refuse("TRL's offloaded activations are not described here")
    if fields.flag("packing"):
        draft.assumed.append("packed rows are counted as rows without padding")
    for key in ("bf16", "fp16"):
        fields.flag(key)


def _attention(fields: Fields) -> str | None:
    if fields.any("use_flash_attention_2") is True:
        return "flash_attention_2"
    return fields.text("attn_implementation") or fields.inner("model_init_kwargs").text("attn_implementation")


def _length(fields: Fields, trl: bool) -> int | None:
    for key in ("max_length", "max_seq_length"):
        if key in fields:
            return fields.whole(key, 1024)
    return 1024 if trl else None


def _device_map(fields: Fields) -> str | None:
    value = fields.any("device_map") or fields.inner("model_init_kwargs").any("device_map")
    return value if isinstance(value, str) else None
