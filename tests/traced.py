"""Small models of every architecture described in closed form, and steps of them as the real libraries play them.

The cost of a trace goes by its operations, not by their sizes: the models are wide and have as few layers as show all
kinds of layer.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from vramplan.core import resident
from vramplan.core.recipes import RECIPES
from vramplan.core.replay import workspaces
from vramplan.core.timeline import play
from vramplan.core.types import GpuProfile, Levers, Lora, ModelSpec, RunSpec
from vramplan.core.unroll import Unrolled
from vramplan.sources.hf_config import parse_config
from vramplan.sources.profiles import load_gpu

STEP = ("forward", "backward", "optimizer")
LASTING = ("workspace.cublas", "workspace.libraries", "optimizer.state")  # made in a run's first step, and kept
CARDS = ("h200", "a100-40gb", "rtx-4090")

BASE = {"vocab_size": 512, "hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096, "use_cache": False}  # fmt: skip
DENSE = {**BASE, "intermediate_size": 2816, "num_key_value_heads": 4}
FALCON = {**BASE, "model_type": "falcon", "alibi": False, "bias": False, "parallel_attn": True, "multi_query": True,
          "new_decoder_architecture": False, "activation": "gelu", "hidden_dropout": 0.0, "attention_dropout": 0.0,
          "tie_word_embeddings": True}  # fmt: skip
GEMMA = {**DENSE, "head_dim": 64, "hidden_activation": "gelu_pytorch_tanh"}
MOE = {**DENSE, "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 256}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**DENSE, "model_type": "llama"},
    "mistral": {**DENSE, "model_type": "mistral", "sliding_window": 256},
    "qwen2": {**DENSE, "model_type": "qwen2"},
    "qwen3": {**DENSE, "model_type": "qwen3", "head_dim": 64},
    "gemma": {**GEMMA, "model_type": "gemma"},
    "gemma2": {**GEMMA, "model_type": "gemma2", "sliding_window": 256},
    "phi3": {**DENSE, "model_type": "phi3", "sliding_window": None},
    "smollm3": {**DENSE, "model_type": "smollm3", "num_hidden_layers": 4},
    "granite": {**DENSE, "model_type": "granite", "residual_multiplier": 0.2, "logits_scaling": 8.0},
    "starcoder2": {**DENSE, "model_type": "starcoder2", "sliding_window": None},
    "gpt_neox": {**BASE, "model_type": "gpt_neox", "intermediate_size": 4096},
    "falcon-7b": FALCON,
    "falcon-40b": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 4},
    "falcon-11b": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 4, "num_ln_in_parallel_attn": 1},
    "falcon-sequential": {**FALCON, "parallel_attn": False, "multi_query": False, "bias": True},
    "stablelm": {**DENSE, "model_type": "stablelm", "partial_rotary_factor": 0.25, "use_qkv_bias": True},
    "cohere": {**DENSE, "model_type": "cohere", "use_qk_norm": True},
    "cohere2": {**DENSE, "model_type": "cohere2", "sliding_window": 256, "num_hidden_layers": 4},
    "phi": {**BASE, "model_type": "phi", "intermediate_size": 4096, "partial_rotary_factor": 0.5, "resid_pdrop": 0.1,
            "embd_pdrop": 0.1},
    "olmo": {**DENSE, "model_type": "olmo", "clip_qkv": 8.0},
    "olmo2": {**DENSE, "model_type": "olmo2"},
    "olmo3": {**DENSE, "model_type": "olmo3", "sliding_window": 256, "num_hidden_layers": 4},
    "glm": {**DENSE, "model_type": "glm", "head_dim": 64, "attention_bias": True},
    "glm4": {**DENSE, "model_type": "glm4", "head_dim": 64, "attention_bias": True},
    "ministral": {**DENSE, "model_type": "ministral", "head_dim": 64, "sliding_window": 256},
    "exaone4": {**DENSE, "model_type": "exaone4", "sliding_window": 256, "num_hidden_layers": 4},
    "seed_oss": {**DENSE, "model_type": "seed_oss", "head_dim": 64},
    "mixtral": {**DENSE, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**MOE, "model_type": "qwen3_moe", "head_dim": 64, "norm_topk_prob": True},
    "olmoe": {**MOE, "model_type": "olmoe", "num_key_value_heads": 16},
}  # fmt: skip

TARGETS = {"gpt_neox": ("query_key_value",), "phi3": ("qkv_proj",)}
EXPERTS = ("mixtral", "qwen3_moe", "olmoe")


def spec_of(family: str) -> ModelSpec:
    return parse_config({**CONFIGS[family], "architectures": ["x"]}, name=family, source="traced")


def attention_targets(family: str) -> tuple[str, ...]:
    return TARGETS.get(family, ("query_key_value",) if family.startswith("falcon") else ("q_proj", "v_proj"))


def draw(rng: random.Random, family: str) -> tuple[RunSpec, GpuProfile]:
    """A run of this family with everything that changes the step left to chance."""
    driver = rng.choice(("trainer", "loop"))
    loss = rng.choice(("fused", "full"))
    wide = rng.random() < 0.6 and family not in EXPERTS  # PEFT wants no dropout where "all-linear" finds experts
    levers = replace(
        RECIPES[rng.choice(tuple(RECIPES))],
        upcast=rng.choice(("all", "norms", "none")),
        loss=loss,
        checkpointing=rng.choice(("none", "all", "all", "every-2")),
        checkpoint_offload=rng.random() < 0.25,
        optimizer=rng.choice(("adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "lion_32bit",
                              "adafactor", "sgd")),
        # FlashAttention's own package needs a card; of Falcon-7B's sdpa the tracer does not know all lifetimes
        attention=rng.choice(("sdpa", "sdpa", "eager")),
    )  # fmt: skip
    run = RunSpec(
        model=family,
        random_weights=True,
        micro_batch_size=rng.choice((1, 2, 3)),
        seq_len=rng.choice((128, 200, 512, 640)),
        accumulation=rng.choice((1, 1, 2)),
        lora=Lora(
            r=rng.choice((8, 16, 64)),
            targets=("all-linear",) if wide else attention_targets(family),
            dropout=rng.choice((0.0, 0.05)),
        ),
        double_quant=rng.random() < 0.7,
        driver=driver,
        padding=driver == "trainer" and loss == "full" and rng.random() < 0.4,
        levers=levers,
    )
    return run, load_gpu(rng.choice(CARDS))


# ------------------------------------------------------------------------------------------------------- peaks
def highest(unrolled: Unrolled, held: int) -> dict[str, int]:
    """Bytes of all tensors together at the highest point of each phase of a steady step, `held` before it."""
    now, out = held, {}
    for section, _, changes in unrolled.steps():
        if section.phase not in (*STEP, "zero_grad"):
            continue
        out[section.phase] = max(out.get(section.phase, 0), now)
        for event, _, _ in changes:
            row = unrolled.info[abs(event)]
            if row[0] not in LASTING:
                now += row[5] if event > 0 else -row[5]
                out[section.phase] = max(out[section.phase], now)
    return out


def played_peaks(spec: ModelSpec, run: RunSpec, gpu: GpuProfile) -> dict[str, int]:
    """In closed form: weights, adapter, optimizer's state, workspaces and the step."""
    unrolled = play(spec, run, gpu)
    held = resident.weights(spec, run.double_quant, run.levers.upcast).total_bytes
    held += resident.lora_bytes(spec, run) + resident.optimizer_bytes(spec, run)[0]
    return highest(unrolled, held + sum(workspaces(unrolled)))


def traced_peaks(unrolled: Unrolled) -> dict[str, int]:
    """The same of a trace, from what it loaded and made itself."""
    held = 0
    for section, _, changes in unrolled.steps():
        for event, _, _ in changes:
            row = unrolled.info[abs(event)]
            if section.phase not in (*STEP, "zero_grad", "end") or (row[0] in LASTING and event > 0):
                held += row[5] if event > 0 else -row[5]
    return highest(unrolled, held)


def births(unrolled: Unrolled) -> list[tuple[str, int]]:
    """(phase, bytes) of every tensor of the steady step, in the order in which they are born."""
    found = []
    for section, _, changes in unrolled.steps():
        for event, _, _ in changes:
            row = unrolled.info[abs(event)]
            if section.phase in STEP and event > 0 and row[0] not in LASTING and row[2] * row[3]:
                found.append((section.phase, row[5]))
    return found


def lean(family: str, **levers: Any) -> RunSpec:
    """The lean recipe on two sequences of 512 tokens."""
    chosen: Levers = replace(RECIPES["lean"], **levers)
    targets = attention_targets(family) if family in EXPERTS else ("all-linear",)
    lora = Lora(targets=targets)
    return RunSpec(model=family, random_weights=True, micro_batch_size=2, seq_len=512, lora=lora, levers=chosen)


def traced_model(model_type: str) -> ModelSpec:
    """The small model of this architecture."""
    return spec_of(next(family for family, config in CONFIGS.items() if config["model_type"] == model_type))
