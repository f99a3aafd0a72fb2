"""Named sets of levers, and how a command line says one."""

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


def checkpointing_text(levers: Levers) -> str:
    """ "all, offloaded": which layers are checkpointed, and whether that waits in host memory."""
    return levers.checkpointing + (", offloaded" if levers.checkpoint_offload else "")


def lever_flags(levers: Levers, recipe: Levers) -> list[str]:
    """What to add to a command that stands for `recipe`, to mean `levers`."""
    flags = {"upcast": "--upcast", "loss": "--loss", "checkpointing": "--checkpointing", "optimizer": "--optim",
             "attention": "--attn", "allocator": "--allocator", "kernels": "--kernels"}  # fmt: skip
    words = [word for name, flag in flags.items() if getattr(levers, name) != getattr(recipe, name)
             for word in (flag, str(getattr(levers, name)))]  # fmt: skip
    if levers.checkpoint_offload != recipe.checkpoint_offload:
        words.append("--checkpoint-offload" if levers.checkpoint_offload else "--no-checkpoint-offload")
    return words
