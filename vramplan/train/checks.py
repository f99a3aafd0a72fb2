"""What is tried on a loaded model before training: that it does what we take it to do."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from vramplan.core.types import RunSpec
from vramplan.errors import InputError
from vramplan.train.collate import Collator
from vramplan.train.data import Splits
from vramplan.train.fused_loss import Head, decoder_of
from vramplan.train.trainer import QloraTrainer
from vramplan.train.varlen import arguments

TOKENS = 16  # length of the rows that are tried


def check_vocabulary(model: Any, tokenizer: Any, splits: Splits) -> None:
    """A token the embedding has no row for would end as an assertion inside a kernel. Looked for only if possible."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= rows:
        return
    if any(max(split.store.ids) >= rows for split in (splits.train, splits.eval) if split is not None):
        raise InputError(f"the tokenizer makes tokens of {len(tokenizer)}, the model knows only {rows}")


def check_layers(trainer: QloraTrainer, run: RunSpec, tokens: list[int]) -> None:
    """InputError if the layers or the loss do not do what the libraries' own do on a few tokens of the data."""
    if trainer.head is not None:
        check_fused_loss(trainer, trainer.head, tokens)
    if run.packing:
        check_packing(trainer, tokens)


def check_fused_loss(trainer: QloraTrainer, head: Head, tokens: list[int]) -> None:
    """Compare fused loss and layers with the model's own on a small padded batch; InputError if they differ.

    The head's formula is read from the config, and what a layer's pieces mean was found by trying them: an architecture
    that does something else shows here.
    """
    long, short = list(tokens)[:TOKENS], list(tokens)[: max(TOKENS // 2, 2)]
    rows = [{"input_ids": t, "labels": t, "attention_mask": [1] * len(t)} for t in (long, short)]
    collator = Collator(trainer.data_collator.pad_token_id, packed=trainer.data_collator.packed)
    inputs = trainer._prepare_inputs(collator(rows))
    trainer.model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        with trainer.fused.stock() if trainer.fused is not None else nullcontext():
            own = float(trainer.model(**inputs).loss)
        fused = float(trainer.fused_loss(inputs, None))
    if not abs(own - fused) <= 0.01 + 0.01 * abs(own):
        name = type(trainer.model.get_base_model()).__name__
        raise InputError(
            f"the fused loss does not reproduce {name}'s own ({fused:.4f} against {own:.4f})",
            "train with --loss full --kernels stock",
        )


def check_packing(trainer: Any, tokens: list[int]) -> None:
    """InputError if a document in a packed row sees the one before it.

    Architectures may keep the borders from their attention. A document is played after another and alone, and, for
    comparison, as if the two were one: what it becomes must be near the second, seen from the third.
    """
    first, second = (list(tokens) * 2)[:TOKENS], (list(tokens) * 2)[1 : TOKENS // 2 + 1]
    collator = Collator(trainer.data_collator.pad_token_id, packed=True)
    decoder = decoder_of(trainer.model.get_base_model())
    trainer.model.eval()

    def play(*documents: list[int]) -> Any:
        ids = [token for document in documents for token in document]
        row = {"input_ids": ids, "labels": ids, "lengths": [len(document) for document in documents]}
        inputs = trainer._prepare_inputs(collator([row]))
        with torch.no_grad(), trainer.accelerator.autocast():
            hidden = decoder(input_ids=inputs["input_ids"], use_cache=False, **arguments(inputs))[0]
        return hidden[0, len(ids) - len(second) : len(ids)].float()

    alone = play(second)
    packed, joined = (float((play(*rows) - alone).norm()) for rows in ((first, second), (first + second,)))
    if not packed <= 0.25 * joined:
        name = type(trainer.model.get_base_model()).__name__
        raise InputError(f"{name} lets documents in a packed row see each other", "leave out --packing")
