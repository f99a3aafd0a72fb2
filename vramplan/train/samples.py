"""Rows as the model sees them, for the eye: `sample_row` events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from vramplan.train.data import Splits
from vramplan.train.store import PackedExamples, TokenStore

MAX_TOKENS = 16_384  # of a document in an event; of a longer one the middle is left out

Segment = list[Any]  # [text, learned, special], or [tokens left out]


def sample_rows(splits: Splits, tokenizer: Any, count: int) -> Iterator[dict[str, Any]]:
    """The first `count` training rows, without a time. Of packed rows each is several documents.

    `segments` of a document are [text, learned, special token], in order; [n] stands for n tokens left out.
    """
    train = splits.train
    for index in range(min(count, len(train))):
        rows = train.documents(index)
        tokens = sum(map(train.store.length, rows))
        yield {
            "event": "sample_row",
            "number": index + 1,
            "of": len(train),
            "unit": splits.unit,
            "tokens": tokens,
            "learned_tokens": sum(map(train.store.learned_tokens, rows)),
            "padding": train.length(index) - tokens if isinstance(train, PackedExamples) else 0,
            "documents": [
                {
                    "source": train.store.sources[row],
                    "tokens": train.store.length(row),
                    "cut": train.store.cut[row],
                    "segments": segments(train.store, row, tokenizer),
                }
                for row in rows
            ],
        }


def segments(store: TokenStore, row: int, tokenizer: Any) -> list[Segment]:
    ids = store.example(row)["input_ids"]
    labels = [False, *(label >= 0 for label in store.example(row)["labels"][1:])]  # the first is never predicted
    special = set(tokenizer.all_special_ids)
    flagged = [(learned, token in special) for token, learned in zip(ids, labels, strict=True)]
    if len(ids) <= MAX_TOKENS:
        return _run(ids, flagged, tokenizer)
    half = MAX_TOKENS // 2
    gap: Segment = [len(ids) - 2 * half]
    return [*_run(ids[:half], flagged[:half], tokenizer), gap, *_run(ids[-half:], flagged[-half:], tokenizer)]


def _run(ids: Sequence[int], flagged: Sequence[tuple[bool, bool]], tokenizer: Any) -> list[Segment]:
    found: list[Segment] = []
    at = 0
    for (learned, special), group in groupby(flagged):
        size = len(list(group))
        found.append([_text(ids[max(at - 1, 0) : at], ids[at : at + size], tokenizer), learned, special])
        at += size
    return found


def _text(before: Sequence[int], ids: Sequence[int], tokenizer: Any) -> str:
    """Decoded after the token before: some tokenizers drop the space at the start of a text."""
    as_is = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    start, whole = (str(tokenizer.decode(list(part), **as_is)) for part in (before, [*before, *ids]))
    return whole[len(start) :] if whole.startswith(start) else str(tokenizer.decode(list(ids), **as_is))
