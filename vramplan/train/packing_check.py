"""Do packed documents stay apart in this model? Tried before training."""

from __future__ import annotations

from typing import Any

import torch

from vramplan.errors import InputError
from vramplan.train.collate import Collator
from vramplan.train.fused_loss import decoder_of
from vramplan.train.varlen import arguments

TOKENS = 16


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
