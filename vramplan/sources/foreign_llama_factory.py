"""LLaMA-Factory's YAML.

Defaults are those of its `hparams/` (cutoff_len 2048, rank 8, target all, no dropout, nf4 with double quantisation,
val_size 0) over those of transformers (micro-batch 8, evaluation 8). It does not use prepare_model_for_kbit_training:
checkpointing is on, reentrant, with the layers' inputs made to require gradients, and nothing is turned to float32 but
the norms on request (`model/model_utils/checkpointing.py`); compute and storage dtype are that of `bf16` or `fp16`,
and without either are chosen by the model and the card (`quantization.py`, `patcher.py`).
"""

from __future__ import annotations

from vramplan.core.types import Levers, Lora, TrainerConfig
from vramplan.sources.foreign_fields import Draft, Fields
from vramplan.sources.foreign_hf import COSTS_NOTHING as OF_TRANSFORMERS

KEYS = ("finetuning_type", "cutoff_len", "lora_target", "quantization_bit", "lora_rank", "additional_target",
        "flash_attn", "quantization_method")  # fmt: skip
COSTS_NOTHING = (*OF_TRANSFORMERS, "stage", "template", "max_samples", "overwrite_cache", "preprocessing_", "plot_loss",
                 "media_dir", "ray_", "use_swanlab", "swanlab", "val_size", "mask_history", "enable_thinking",
                 "adapter_name", "cache_dir", "tokenized_path", "mix_strategy", "interleave")  # fmt: skip
ATTENTIONS = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}


def read_llama_factory(fields: Fields) -> TrainerConfig:
    """The file as a run and the facts that are audited."""
    model = fields.text("model_name_or_path")
    draft = Draft(model)
    four = _four_bits(fields, draft)
    fields.flag("do_train")
    dtype = "bfloat16" if fields.flag("bf16") else "float16" if fields.flag("fp16") else None
    packed = fields.flag("packing") or fields.flag("neat_packing")
    if packed:
        draft.assumed.append("packed rows are counted as rows without padding")
    liger = fields.flag("enable_liger_kernel")
    if liger:
        draft.assumed.append("Liger's loss is counted as ours in chunks")
    sharded = bool(fields.any("fsdp")) or fields.any("deepspeed") is not None
    draft.several(sharded)
    attention = (fields.text("flash_attn") or "auto").lower()
    offload = fields.flag("use_unsloth_gc")
    checkpointing = not fields.flag("disable_gradient_checkpointing")
    levers = Levers(
        upcast="norms" if fields.flag("upcast_layernorm") else "none", loss="fused" if liger else "full",
        checkpointing="all" if checkpointing else "none", checkpoint_offload=offload and checkpointing,
        optimizer=draft.optimizer(fields.text("optim") or "adamw_torch_fused"), kernels="stock", allocator="native",
        attention=draft.attention(ATTENTIONS.get(attention, attention)),
    )  # fmt: skip
    run = draft.run(
        levers=levers, lora=_lora(fields, draft), batch=fields.whole("per_device_train_batch_size", 8),
        seq_len=fields.whole("cutoff_len", 2048), accumulation=fields.whole("gradient_accumulation_steps", 1),
        double_quant=fields.flag("double_quantization", True),
    )  # fmt: skip
    strategy = fields.text("eval_strategy") or fields.text("evaluation_strategy") or "no"
    held_out = fields.number("val_size", 0.0, 1e12) > 0 or fields.any("eval_dataset") is not None
    return TrainerConfig(
        tool="llama-factory", source=fields.file.where, model=model, run=run, unplanned=draft.unplanned,
        batch_stated="per_device_train_batch_size" in fields, quantised=four,
        compute_dtype=dtype, base_dtype=dtype, quant_storage=dtype, prepared=False,
        reentrant=fields.flag("use_reentrant_gc", True), input_grads=True,
        evaluates=held_out and strategy != "no", eval_batch_size=fields.whole("per_device_eval_batch_size", 8),
        trained_whole=fields.names("additional_target"), sharded=sharded,
        device_map=fields.text("quantization_device_map"), assumed=tuple(draft.assumed),
        not_understood=fields.rest(COSTS_NOTHING),
    )  # fmt: skip


def _four_bits(fields: Fields, draft: Draft) -> bool | None:
    kind = fields.text("finetuning_type") or "lora"
    if kind != "lora":
        draft.refuse(f"finetuning_type {kind[:20]} is not described here")
    stage = fields.text("stage") or "sft"
    if stage not in ("sft", "pt"):
        draft.refuse(f"stage {stage[:20]} is not described here")
    if fields.flag("use_unsloth"):
        draft.refuse("Unsloth's layers are not described here")
    bits = fields.any("quantization_bit")
    if bits is None:
        draft.whole_base(False)
        return False
    method = (fields.text("quantization_method") or "bnb").lower()
    if bits not in (4, "4") or method not in ("bnb", "bitsandbytes"):
        draft.refuse(f"weights of {str(bits)[:10]} bits by {method[:20]} are not described here")
        return None
    if (fields.text("quantization_type") or "nf4") not in ("nf4", "fp4"):
        draft.refuse("this quantization_type is not described here")
    return True


def _lora(fields: Fields, draft: Draft) -> Lora:
    names = fields.names("lora_target") or ("all",)
    if fields.flag("use_dora"):
        draft.refuse("DoRA is not described here")
    r = fields.whole("lora_rank", 8)
    return Lora(
        r=r,
        alpha=fields.whole("lora_alpha", 2 * r),
        targets=("all-linear",) if names == ("all",) else draft.targets(names),
        dropout=fields.number("lora_dropout", 0.0, 0.99),
    )
