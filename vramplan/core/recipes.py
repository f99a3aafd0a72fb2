"""Named sets of levers."""

from __future__ import annotations

from .types import Levers

RECIPES: dict[str, Levers] = {
    # Ours, the default: nothing is upcast, layers are fused, the loss never makes whole logits, the allocator does not
    # fragment.
    "lean": Levers(),
    # What the tutorials run: prepare_model_for_kbit_training, HF Trainer, full logits, every layer checkpointed.
    "peft": Levers(
        upcast="all",
        loss="full",
        checkpointing="all",
        optimizer="adamw_torch_fused",
        allocator="native",
        kernels="stock",
    ),
}
